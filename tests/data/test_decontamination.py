"""Decontamination: exact twins, near ones and shared cases are found; nothing else is."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from psyche_jax.cli import main
from psyche_jax.data.dataset import load_any_records, load_records, write_dataset
from psyche_jax.data.decontamination import decontaminate
from psyche_jax.data.public import load_cpsyexam, load_pceb
from psyche_jax.data.records import Dialogue, Message, Question, RlPrompt, question_to_rl, write_records
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


def test_each_question_is_compared_with_each_record():
    """Two cases that differ in a number, two questions that differ in a word: one training row leaks both of each."""
    other_case = CASE.replace("三十岁", "四十岁")
    again = Question(
        f"{other_case}\n咨询的目标是",
        {"A": "睡好", "B": "升职"},
        "A",
        "single",
        meta={"case": other_case, "question": "咨询的目标是"},
    )
    nearly = Question("按照内容可以把记忆分为几类", OPTIONS, "ABCD", "multi")
    talk = Dialogue((Message("user", CASE), Message("assistant", "先说说睡眠。")))
    result = decontaminate([talk, ASKED, OTHER], [ASKED, nearly, ON_CASE, again])
    assert result.leaked == {ON_CASE.id: "case", again.id: "case", ASKED.id: "exact", nearly.id: "near"}
    assert [leak.reason for leak in result.leaks] == ["case", "exact"], "a training record is counted once"
    assert result.clean == (OTHER,)
    assert result.summary()["evaluation_records"] == 4


TALK = "心理咨询师：您说他应该先问您，这是为什么呢？求助者：因为我是他的领导，凡事都应该由我来决定。"
TECHNIQUES = {"A": "面质技术", "B": "具体化技术", "C": "内容反应", "D": "自我开放"}


@pytest.mark.parametrize("talk_in", ["case", "question", "neither"])
def test_a_question_on_a_case_is_also_compared_without_its_introduction(talk_in):
    """The training row has question, options and conversation; the benchmark has that with the case or the question."""
    question = "心理咨询师在这段谈话中使用的技术是"
    in_case, in_question = (TALK if talk_in == where else "" for where in ("case", "question"))
    case, asked = f"{CASE * 3}{in_case}", f"{in_question}{question}"
    meta = {"case": case, "question": asked}
    evaluated = Question(f"{case}\n{asked}", TECHNIQUES, "B", "single", meta=meta)
    swapped = dict(zip("ABCD", reversed(TECHNIQUES.values()), strict=True))
    row = Question(f"案例二：{'' if talk_in == 'neither' else TALK}{question}（　）。", swapped, "C", "single")
    for record in (row, question_to_rl(row)):
        assert decontaminate([record], [evaluated]).leaked.keys() == {evaluated.id}
    assert not decontaminate([OTHER, ASKED, Dialogue((Message("user", TALK[:12]), Message("assistant", "嗯。")))],
                             [evaluated]).leaked  # fmt: skip


def test_options_of_a_conversation_are_found_however_they_are_written():
    options = [f"{letter}{mark}{text}" for letter, text in OPTIONS.items() for mark in "．"]
    for text in (" ".join(options), "\n".join(options), "".join(f"（{o[0]}）{o[2:]}" for o in options)):
        talk = Dialogue((Message("user", f"请教一题。{ASKED.stem}：{text}"), Message("assistant", "ABCD")))
        assert decontaminate([talk], [ASKED]).leaked == {ASKED.id: "near"}, text


def test_records_of_other_kinds():
    talk = Dialogue((Message("user", f"{CASE}我该怎么办？"), Message("assistant", "先说说睡眠。")))
    found, clean = reasons([question_to_rl(ASKED), question_to_rl(OTHER), talk])
    assert found == ["exact", "case"]
    assert clean == [question_to_rl(OTHER)]


def test_a_damaged_first_line_does_not_hide_what_the_others_are(tmp_path):
    talk = Dialogue((Message("user", f"{CASE}我该怎么办？"), Message("assistant", "先说说睡眠。")))
    write_records(tmp_path / "a.jsonl", [talk])
    (tmp_path / "b.jsonl").write_text('{"turns": [\n' + (tmp_path / "a.jsonl").read_text())
    loaded = load_any_records(str(tmp_path / "b.jsonl"))
    assert loaded.good == (talk,) and len(loaded.set_aside) == 1


def test_conversations_are_looked_for_too():
    """By what the user says; a greeting, or an instruction that stands in all of them, says nothing."""

    def talk(*said: str) -> Dialogue:
        turns = [Message(role, text) for one in said for role, text in (("user", one), ("assistant", "嗯。"))]
        return Dialogue(tuple(turns))

    told = "我最近总是睡不好觉，晚上会醒来好几次，白天上班的时候一点精神也没有，怎么办？"
    evaluation = [talk(told), talk("你好。")]
    near, longer, greeting, other = (
        talk(f"老师您好，{told[:-4]}，请帮帮我"),
        talk(told, "谢谢"),
        talk("你好"),
        talk("您好呀"),
    )
    result = decontaminate([talk(told), near, longer, greeting, other], evaluation)
    assert [leak.reason for leak in result.leaks] == ["exact", "near", "near", "exact"]
    assert result.clean == (other,)
    asked = "请认真阅读下面的题目，一步一步地想清楚，最后在答案后面写出正确选项的字母，不要写别的任何内容。"
    topics = [f"{chr(0x4E00 + 97 * n) * 9}{chr(0x5E00 + 31 * n) * 8}是什么？" for n in range(12)]
    prompts = [RlPrompt((Message("user", topic + asked),), "A", "single") for topic in topics]
    assert not decontaminate(prompts[:6], prompts[6:]).leaks
    assert len(decontaminate([*prompts[:6], prompts[6]], prompts[6:]).leaks) == 1


@pytest.mark.slow
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

    # Every question on a case half of which stands in a training stem, not one question for each stem.
    def runs(text):
        return {text[start : start + 5] for start in range(len(text) - 4)}

    stems = [runs(comparable(question.stem)) for question in train if len(question.stem) > 100]
    standing = {case for case in cases if any(len(runs(case) & stem) >= len(runs(case)) / 2 for stem in stems)}
    on_standing = {q.id for q in evaluation if q.meta and comparable(q.meta["case"]) in standing}
    assert len(on_standing) > 300
    assert on_standing <= {id_ for id_, reason in result.leaked.items() if reason == "case"}
    # No twin of a question on a case stays: the same options, and its stem in that of the training row.
    asked_on_cases = {(comparable(q.meta["question"]), key(q)[1]) for q in evaluation if q.meta}
    by_options = defaultdict(list)
    for stem, options in asked_on_cases:
        by_options[options].append(stem)
    left = [q for q in result.clean for stem in by_options[key(q)[1]] if len(stem) > 10 and stem in comparable(q.stem)]
    assert not left


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


def test_training_data_in_jsonl(tmp_path, capsys):
    write_records(tmp_path / "train.jsonl", [question_to_rl(ASKED), question_to_rl(OTHER)])
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"messages": []}\n')
    write_records(tmp_path / "eval.jsonl", [ASKED])
    arguments = ["--train", str(tmp_path / "train.jsonl"), "--eval", str(tmp_path / "eval.jsonl")]
    assert main(["decontaminate", *arguments, "--out", str(tmp_path / "clean")]) == 0
    assert f"skipped: {tmp_path / 'train.jsonl'}:3: " in capsys.readouterr().err
    assert load_records(RlPrompt, str(tmp_path / "clean")).good == (question_to_rl(OTHER),)
