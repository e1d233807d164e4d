"""Loaders of public data: the shared files against their README's figures, and every fault in a case of its own."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from support.tables import CPSYEXAM, write

from psyche_jax.cli import main
from psyche_jax.data.dataset import load_records
from psyche_jax.data.imports import Notes
from psyche_jax.data.public import load_cpsyexam, load_pceb, load_smile, pceb_essays
from psyche_jax.data.records import Question
from psyche_jax.data.text import clean_text, comparable

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")


@shared
def test_cpsyexam():
    loaded = load_cpsyexam(SHARED / "cpsyexam_train.jsonl")
    assert len(loaded.good) + len(loaded.set_aside) == 9855
    expected = {
        "answer holds more than letters": 100,
        "multiple-answer question with one letter": 136,
        "key points to no option": 10,
        "its case is missing": 104 - 2,  # two that refer to a case tell it themselves
        "duplicate": 735 + 1,  # one more: a number stands before its stem
    }
    assert {fault: loaded.faults[fault] for fault in expected} == expected
    assert len({question.id for question in loaded.good}) == len(loaded.good)


@shared
def test_pceb():
    loaded = load_pceb(SHARED / "pceb")
    assert loaded.faults["duplicate"] == 26
    good = loaded.good
    assert len(good) + len(loaded.set_aside) == 1119
    cases = [question for question in good if question.meta]
    assert Counter(question.kind for question in cases) == {"single": 245, "multi": 214}
    assert len({question.meta["case"] for question in cases}) == 47
    assert len(loaded.set_aside) <= 1  # elsewhere it is clean; questions on different cases may read the same
    notes = Notes()
    essays = list(pceb_essays(SHARED / "pceb", notes))
    assert len(essays) == 44
    assert not any(re.search(r"（\s*\d+\s*分\s*）", essay.reference) for essay in essays)
    assert notes.faults["reference embeds marks"] >= 43


@shared
def test_smile():
    loaded = load_smile(SHARED / "smile_600.jsonl")
    assert len(loaded.good) + len(loaded.set_aside) == 600
    assert len(loaded.good) >= 590


def question(**changes):
    return {**CPSYEXAM, **changes}


def load(tmp_path, *rows):
    return load_cpsyexam(write(tmp_path / "rows.jsonl", rows))


FATAL = {
    "empty answer": {"answer": " "},
    "answer holds more than letters": {"answer": "D、运动记忆"},
    "key points to no option": {"answer": "AE"},
    "options are missing": {"options": {"A": "甲", "B": ""}, "answer": "A"},
    "options are merged": {"options": {"A": "甲", "B": "酶", "C": "DNA.D.丁", "D": ""}, "answer": "A"},
    "its case is missing": {"question": "根据案例，该求助者的主要症状是"},
}


@pytest.mark.parametrize(("fault", "changes"), FATAL.items(), ids=FATAL)
def test_what_is_set_aside(fault, changes, tmp_path):
    loaded = load(tmp_path, question(), question(**{"question": "另一题", **changes}))
    assert len(loaded.good) == 1
    assert loaded.set_aside == (f"{tmp_path / 'rows.jsonl'}:2: {fault}",)
    assert loaded.faults[fault] == 1


def test_what_is_mended(tmp_path):
    """Blanks within answers, radicals of both blocks, prefixes, an empty last option, a kind against the key."""
    rows = [
        question(question="3．⻅⻔⼼\u00a0理 学", answer="A,\u00a0C\n"),
        question(question="甲", answer="BA", question_type="single"),
        question(question="乙", answer="C"),
    ]
    loaded = load(tmp_path, *rows)
    assert loaded.set_aside == ()
    first, second, third = loaded.good
    assert (first.stem, first.answer, first.kind) == ("3．见门心理学", "AC", "multi")
    assert list(first.options) == ["A", "B", "C", "D"]
    assert (second.answer, second.kind) == ("AB", "multi")
    assert (third.answer, third.kind) == ("C", "multi")
    assert loaded.faults == {
        "separators in the answer": 1,
        "kind contradicts the key": 1,
        "multiple-answer question with one letter": 1,
    }


UNUSUAL = {
    "options out of order": {"options": {"A": "甲", "C": "丙", "B": "乙", "D": "丁"}, "answer": "CA"},
    "full-width letters": {"options": {"Ａ": "甲", "Ｃ": "丙", "Ｂ": "乙"}, "answer": "ＡＣ"},
    "six options": {"options": dict(zip("ABCDEF", "赵钱孙李周王", strict=True)), "answer": "AF"},
    "initials of names": {
        "options": {"A": "F．王某", "B": "B．F．斯金纳", "C": "C．罗杰斯", "D": "E．弗洛姆"},
        "answer": "A",
    },
    "an initial behind a name": {
        "options": {"A": "斯金纳", "B": "罗杰斯", "C": "霍尔", "D": "弗洛姆（E．Fromm）"},
        "answer": "D",
    },
    "a case told in a few words": {"question": "求助者，女性，20岁，失眠两周，怕与人说话。该求助者最可能的问题是"},
    "a case of a child": {"question": "某儿童特别害怕猫，老师让她先看图片，再远远观看。这个案例中的方法是"},
    "a case of a teacher": {"question": "李老师因工作压力大而失眠一个月，由丈夫陪同前来。对该求助者应首先"},
    "a case with a heading": {"question": "案例：小王，男，20岁，失眠两周。该求助者最可能的问题是"},
    "a case with a name": {"question": "求助者小李，因失恋而情绪低落三周，主动求助。对该求助者应首先"},
}


@pytest.mark.parametrize("changes", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_questions_are_kept(changes, tmp_path):
    loaded = load(tmp_path, question(**changes))
    assert loaded.set_aside == ()
    (kept,) = loaded.good
    assert list(kept.options) == sorted(kept.options)
    given = changes.get("options", {})
    assert [given.get(letter, given.get(chr(ord(letter) + 0xFEE0))) for letter in kept.options if given] == (
        [*kept.options.values()] if given else []
    )


def test_what_an_import_says_of_dialogues(tmp_path, capsys):
    """Turns that hold the other side's words, first turns that are shared: counted and shown, and all are kept."""

    def talk(*contents):
        return [
            {"role": ("client", "counselor")[place % 2], "content": content} for place, content in enumerate(contents)
        ]

    rows = [
        talk("你好，我想咨询", "请说。"),
        talk("你好，我想咨询", "您好。来访者：我睡不好。咨询师：多久了？"),
        talk("你好，我想咨询", "欢迎。", "咨询师：您说。", "嗯，您说。"),
        talk("我最近总是和室友吵架，很难过", "我最近总是和室友吵架，很难过"),
        talk("我的咨询师很好", "那就好。来访者都这样说。"),
        talk("早", "早。"),
        talk("早", "早上好。"),
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    command = ["data", "import", str(tmp_path / "a.json"), str(tmp_path / "out"), "--format", "smile"]
    assert main([*command, "--report", str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr().out
    assert "7 records of Dialogue" in out and "skipped 0 rows" in out
    assert "warning: 3 turns in 3 dialogues contain the other speaker's words" in out
    assert (
        "warning: 5 dialogues share their first turn with another, in 2 groups; the most common, 3 times: 你好，我想"
        in out
    )
    assert len(json.loads((tmp_path / "r.json").read_text())["remarks"]) == 2
    chats = [{"m": [{"role": "user", "content": "早"}, {"role": "assistant", "content": f"早{n}"}]} for n in range(2)]
    write(tmp_path / "b.jsonl", chats)
    (tmp_path / "c.yaml").write_text("record: SftExample\ncolumns: {messages: m}\n")
    command = ["data", "import", str(tmp_path / "b.jsonl"), str(tmp_path / "sft"), "--config", str(tmp_path / "c.yaml")]
    assert main(command) == 0
    assert "warning: 2 dialogues share their first turn with another, in 1 groups" in capsys.readouterr().out


def test_duplicates(tmp_path):
    """Also with options in another order; if their keys conflict, none is kept."""
    swapped = {"A": "情绪记忆", "B": "形象记忆", "C": "逻辑记忆", "D": "运动记忆"}
    loaded = load(
        tmp_path, question(answer="AC"), question(question="1. 记忆的种类包括：", options=swapped, answer="BC")
    )
    assert len(loaded.good) == 1
    assert loaded.set_aside[0].endswith("rows.jsonl:2: duplicate of " + f"{tmp_path / 'rows.jsonl'}:1")
    loaded = load(tmp_path, question(answer="AC"), question(options=swapped, answer="AC"))
    assert loaded.good == ()
    assert loaded.faults["duplicates with conflicting keys"] == 1
    assert len(loaded.set_aside) == 2


def test_cases_and_prefixes_of_pceb(tmp_path):
    folder = tmp_path / "cases" / "mix" / "third"
    folder.mkdir(parents=True)
    options = {"A": "焦\u2003虑", "B": "抑郁"}
    pairs = [
        {"question": "单选：1．主要症状是（ ）。", "options": options, "answer": "A", "analysis": "选A"},
        {"question": "多选：2．诊断依据是", "options": options, "answer": "AB\u00a0", "analysis": ""},
        {"question": "单选：3．还有", "options": options, "answer": "AB", "analysis": ""},
    ]
    case = {"general_info": "求助者，女", "case_introduction": "失眠一个月。", "questions_and_answers": pairs}
    (folder / "a.json").write_text(json.dumps([case, {**case, "case_introduction": "另一案。"}]), encoding="utf-8")
    loaded = load_pceb(tmp_path)
    assert [(q.kind, q.answer) for q in loaded.good] == [("single", "A"), ("multi", "AB"), ("multi", "AB")] * 2
    assert loaded.good[0].stem == "求助者，女失眠一个月。\n主要症状是（）。"
    assert loaded.good[0].options == {"A": "焦虑", "B": "抑郁"}
    assert loaded.good[0].meta["question"] == "主要症状是（）。"
    assert "选A" not in loaded.good[0].stem
    assert loaded.faults["kind contradicts the key"] == 2


def test_dialogues(tmp_path):
    def turns(*pairs):
        return {"id": "x", "turns": [{"role": role, "content": content} for role, content in pairs]}

    rows = [
        turns(
            ("counselor", "您好"),
            ("client", "我\u00a0睡不着"),
            ("client", "很久了"),
            ("counselor", "多久？"),
            ("client", "月"),
        ),
        turns(("client", "在吗")),
        turns(("client", "在吗"), ("doctor", "在")),
        {"id": "y"},
    ]
    loaded = load_smile(write(tmp_path / "smile.jsonl", rows))
    (dialogue,) = loaded.good
    assert [(t.role, t.content) for t in dialogue.turns] == [("user", "我睡不着\n很久了"), ("assistant", "多久？")]
    assert len(loaded.set_aside) == 3
    assert loaded.faults["no dialogue"] == 3


def test_text():
    assert clean_text(" ⼀\u00a0⻓\u3000“abc  def”， x\ny ") == "一长“abc def”，x y"
    assert comparable("单选：12．Ａ ⻢（　　）。") == comparable("a马") == "a马"
    assert comparable("多项选择题：甲") == comparable("1、甲？") == "甲"


def test_the_command(tmp_path, capsys):
    write(tmp_path / "a.jsonl", [question(), question(question="乙", answer="")])
    arguments = ["data", "import", str(tmp_path / "a.jsonl"), str(tmp_path / "out")]
    assert main([*arguments, "--format", "cpsyexam"]) == 0
    captured = capsys.readouterr()
    assert "skipped 1 row;" in captured.out
    assert "1 empty answer" in captured.out
    assert "a.jsonl:2: empty answer" in captured.err
    assert len(load_records(Question, str(tmp_path / "out")).good) == 1
    assert load_pceb(tmp_path / "out").faults == {"not of this format": 1}  # a manifest is JSON, too


def test_a_line_that_is_no_object_is_named_in_json_words(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('["stem"]\n')
    assert main(["data", "import", str(tmp_path / "a.jsonl"), str(tmp_path / "out"), "--format", "cpsyexam"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("not of this format (must be a JSON object)")
