"""Decontamination: exact twins, near ones and shared cases are found; nothing else is."""

import json
from pathlib import Path

import pytest

from psyche_jax.cli import main
from psyche_jax.data.dataset import load_records, write_dataset
from psyche_jax.data.decontamination import decontaminate
from psyche_jax.data.public import load_cpsyexam, load_pceb
from psyche_jax.data.records import Dialogue, Message, Question, question_to_rl, write_records
from psyche_jax.data.text import comparable

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
OPTIONS = {"A": "形象记忆", "B": "情绪记忆", "C": "逻辑记忆", "D": "运动记忆"}
CASE = "求助者，女性，三十岁，公司职员。近两个月因工作变动而失眠、烦躁，难以集中注意力，担心被辞退，主动前来求助。"
ASKED = Question("按照内容可以把记忆分为哪几类", OPTIONS, "ABCD", "multi")
ON_CASE = Question(
    f"{CASE}\n主要症状是", {"A": "焦虑", "B": "抑郁"}, "A", "single", meta={"case": CASE, "question": "主要症状是"}
)
OTHER = Question("弗洛伊德认为人格由哪几部分构成", {"A": "本我", "B": "自我", "C": "超我"}, "ABC", "multi")


def reasons(train):
    result = decontaminate(train, [ASKED, ON_CASE])
    return [leak.reason for leak in result.leaks], list(result.clean)


def test_each_kind_of_leak():
    swapped = dict(zip("ABCD", reversed(OPTIONS.values()), strict=True))
    exact = Question("12．按照内容，可以把记忆分为哪⼏类？", swapped, "ABCD", "multi")
    near = Question("按照内容可以把记忆分为几类", OPTIONS, "ABCD", "multi")
    case = Question(f"案例三：{CASE[:-7]}。咨询的目标不包括", {"A": "改善睡眠", "B": "升职"}, "B", "single")
    same_words = Question("主要症状是", {"A": "焦虑", "B": "抑郁"}, "A", "single")  # without its case it asks nothing
    assert reasons([exact, near, case, OTHER, same_words]) == (["exact", "near", "case"], [OTHER, same_words])


def test_records_of_other_kinds():
    talk = Dialogue((Message("user", f"{CASE}我该怎么办？"), Message("assistant", "先说说睡眠。")))
    found, clean = reasons([question_to_rl(ASKED), question_to_rl(OTHER), talk])
    assert found == ["exact", "case"]
    assert clean == [question_to_rl(OTHER)]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")
def test_cpsyexam_and_pceb():
    """Every exact leak, by a search of its own; every case that stands in a training stem."""
    train, evaluation = load_cpsyexam(SHARED / "cpsyexam_train.jsonl").good, load_pceb(SHARED / "pceb").good

    def key(question):
        options = sorted(comparable(text) for text in question.options.values())
        return comparable(question.stem), tuple(options)

    asked = {key(question) for question in evaluation if not question.meta}
    exact = {question.id for question in train if key(question) in asked}
    cases = {comparable(question.meta["case"]) for question in evaluation if question.meta}
    on_case = {q.id for q in train if any(case in comparable(q.stem) for case in cases)}
    result = decontaminate(train, evaluation)
    found = {reason: {leak.train_id for leak in result.leaks if leak.reason == reason} for reason in ("exact", "case")}
    assert found["exact"] == exact
    assert len(exact) > 50
    assert on_case <= found["case"]
    assert not {question.id for question in result.clean} & (exact | on_case)
    assert len(result.clean) + len(result.leaks) == len(train)


def test_the_command(tmp_path, capsys):
    write_dataset(str(tmp_path / "train"), [ASKED, OTHER])
    write_records(tmp_path / "eval.jsonl", [ASKED, ON_CASE])
    arguments = ["decontaminate", "--train", str(tmp_path / "train"), "--eval", str(tmp_path / "eval.jsonl")]
    assert main([*arguments, "--out", str(tmp_path / "clean")]) == 0
    captured = capsys.readouterr()
    assert "1 clean records; leaks: 1 exact" in captured.out
    assert ASKED.stem in captured.out
    assert load_records(Question, str(tmp_path / "clean")).good == (OTHER,)
    assert main([*arguments, "--out", str(tmp_path / "again"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["clean"], summary["leaks"], summary["evaluation_records"]) == (1, {"exact": 1}, 1)
    write_dataset(str(tmp_path / "leaky"), [ASKED])
    arguments[2] = str(tmp_path / "leaky")
    assert main([*arguments, "--out", str(tmp_path / "none")]) == 1
    assert "every record leaks" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert main([*arguments, "--out", "x", "--near", "2"]) == 2
    arguments[2] = str(tmp_path / "eval.jsonl")
    assert main([*arguments, "--out", "x"]) == 1
    assert "must be a data set" in capsys.readouterr().err
