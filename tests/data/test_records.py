"""Records: written and read back the same; bad ones named by file and line and set aside."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psyche_jax.data.dataset import load_records
from psyche_jax.data.records import (
    Dialogue,
    Message,
    Question,
    RlPrompt,
    SftExample,
    answer_mask,
    question_to_rl,
    question_to_sft,
    write_records,
)
from psyche_jax.errors import NotTextError, RowError, UserError
from psyche_jax.storage.files import read_jsonl

QUESTION = {"stem": "问", "options": {"A": "甲", "B": "乙", "C": "丙"}, "answer": "AC", "kind": "multi"}
TURNS = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]

# Everything that JSON may hold, line ends of all kinds among it.
texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('\u2028\u2029\x85\x0b\x1c\r\n"\\{'))
full_texts = texts.filter(lambda text: text.strip() != "")
metas = st.dictionaries(texts, st.none() | st.booleans() | st.integers(-(2**60), 2**60) | texts | st.lists(texts))


@st.composite
def questions(draw: st.DrawFn) -> Question:
    options = draw(st.lists(full_texts, min_size=2, max_size=26))
    letters = [chr(ord("A") + index) for index in range(len(options))]
    kind = draw(st.sampled_from(["single", "multi"]))
    answer = draw(st.sets(st.sampled_from(letters), min_size=1, max_size=1 if kind == "single" else None))
    return Question(
        draw(full_texts),
        dict(zip(letters, options, strict=True)),
        "".join(sorted(answer)),
        kind,
        draw(st.none() | texts),
        draw(texts),
        draw(metas),
        draw(st.just("") | full_texts),
    )


@st.composite
def conversations(draw: st.DrawFn, last: str) -> tuple[Message, ...]:
    pairs = draw(st.integers(0 if last == "user" else 1, 3))
    roles = ["user", "assistant"] * pairs + ["user"] * (last == "user")
    roles = draw(st.sampled_from([[], ["system"]])) + roles
    return tuple(Message(role, draw(full_texts)) for role in roles)


records = st.one_of(
    st.lists(questions(), min_size=1, max_size=4),
    st.lists(st.builds(Dialogue, conversations("assistant"), texts, metas), min_size=1, max_size=4),
    st.lists(st.builds(SftExample, conversations("assistant"), texts, metas), min_size=1, max_size=4),
    st.lists(
        st.builds(RlPrompt, conversations("user"), st.just("BD"), st.just("multi"), texts, metas),
        min_size=1,
        max_size=4,
    ),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records)
def test_round_trip(tmp_path, written):
    path = tmp_path / "records.jsonl"
    write_records(path, written)
    read = load_records(type(written[0]), path)
    assert read.set_aside == ()
    assert read.good == tuple(written)
    assert [record.id for record in read.good] == [record.id for record in written]


@given(questions())
def test_ids_depend_on_what_is_asked_alone(question):
    again = dataclasses.replace(question, id="")
    changed = dataclasses.replace(question, id="", rationale="别的", source="别处", meta={"x": 1})
    assert again.id == changed.id
    assert len(again.id) == 16
    assert dataclasses.replace(question, id="", stem=question.stem + "？").id != again.id
    assert dataclasses.replace(question, id="", options={**question.options, "A": "另一个选项"}).id != again.id or (
        question.options["A"] == "另一个选项"
    )


def lines_of(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


BAD_QUESTIONS = {
    "not JSON": ("{", "not JSON"),
    "empty object": ({}, "stem"),
    "a list": ([1], "must be a JSON object"),
    "a number": ("5", "must be a JSON object"),
    "null": ("null", "must be a JSON object"),
    "too deep": ("[" * 100_000, "not JSON"),
    "a number too long": ('{"stem": ' + "9" * 5000 + "}", "not JSON"),
    "half a surrogate pair": (json.dumps({**QUESTION, "rationale": "\ud800", "id": "x"}), "surrogates not allowed"),
    "an unknown key": ({**QUESTION, "anwser": "A"}, "anwser"),
    "an unknown key of two lines": ({**QUESTION, "a\nb": "A"}, "a b"),
    "no answer": ({k: v for k, v in QUESTION.items() if k != "answer"}, "answer"),
    "an empty answer": ({**QUESTION, "answer": ""}, "the answer is empty"),
    "a letter outside": ({**QUESTION, "answer": "AD"}, "'D', which is not among the options ABC"),
    "a lower-case letter": ({**QUESTION, "answer": "a"}, "'a', which is not among"),
    "a full-width letter": ({**QUESTION, "answer": "Ａ"}, "not among"),
    "letters out of order": ({**QUESTION, "answer": "CA"}, "in order"),
    "a letter twice": ({**QUESTION, "answer": "AA"}, "once"),
    "separated letters": ({**QUESTION, "answer": "A,C"}, "','"),
    "two answers to a single": ({**QUESTION, "kind": "single"}, "names 2"),
    "another kind": ({**QUESTION, "kind": "essay"}, "kind"),
    "no kind": ({k: v for k, v in QUESTION.items() if k != "kind"}, "kind"),
    "an empty stem": ({**QUESTION, "stem": " \n"}, "the stem is empty"),
    "a stem that is a number": ({**QUESTION, "stem": 5}, "stem"),
    "one option": ({**QUESTION, "options": {"A": "甲"}, "answer": "A"}, "options"),
    "no option": ({**QUESTION, "options": {}, "answer": "A"}, "options"),
    "a list of options": ({**QUESTION, "options": ["甲", "乙"]}, "options"),
    "a gap": ({**QUESTION, "options": {"A": "甲", "C": "乙"}}, "without a gap, not A, C"),
    "another order": ({**QUESTION, "options": {"B": "甲", "A": "乙"}, "answer": "A"}, "B, A"),
    "two letters in one": ({**QUESTION, "options": {"AB": "甲", "C": "乙"}}, "not AB, C"),
    "a nameless option": ({**QUESTION, "options": {"": "甲", "A": "乙", "B": "丙"}, "answer": "A"}, "without a gap"),
    "lower-case options": ({**QUESTION, "options": {"a": "甲", "b": "乙"}, "answer": "a"}, "options"),
    "an empty option": ({**QUESTION, "options": {"A": "甲", "B": " "}, "answer": "A"}, "option B is empty"),
    "27 options": ({**QUESTION, "options": {chr(65 + i): "x" for i in range(27)}, "answer": "A"}, "options"),
}


@pytest.mark.parametrize(("line", "expected"), BAD_QUESTIONS.values(), ids=BAD_QUESTIONS)
def test_bad_questions_are_named_and_set_aside(line, expected, tmp_path):
    path = lines_of(tmp_path / "q.jsonl", QUESTION, "", line, QUESTION)
    read = load_records(Question, path)
    assert len(read.good) == 2
    (fault,) = read.set_aside
    assert fault.startswith(f"{path}:3: ")
    assert expected in fault
    assert len(fault.splitlines()) == 1
    with pytest.raises(UserError) as caught:
        load_records(Question, lines_of(path, line))
    assert f"{path}:1: " in str(caught.value)
    assert "no usable record of Question" in str(caught.value)


BAD_TURNS = {
    "none": [],
    "only a system turn": [{"role": "system", "content": "x"}],
    "assistant first": TURNS[::-1],
    "user twice": [TURNS[0], TURNS[0], TURNS[1]],
    "system in the middle": [TURNS[0], {"role": "system", "content": "x"}, TURNS[1]],
    "an empty message": [TURNS[0], {"role": "assistant", "content": "  "}],
    "another role": [TURNS[0], {"role": "bot", "content": "x"}],
    "no content": [TURNS[0], {"role": "assistant"}],
    "content in parts": [TURNS[0], {"role": "assistant", "content": [{"type": "text", "text": "x"}]}],
    "an unknown key": [TURNS[0], {**TURNS[1], "name": "x"}],
    "a string": "问",
}


@pytest.mark.parametrize("turns", BAD_TURNS.values(), ids=BAD_TURNS)
def test_bad_turns(turns, tmp_path):
    for kind, key, good in (
        (SftExample, "messages", {"messages": TURNS}),
        (Dialogue, "turns", {"turns": TURNS}),
        (RlPrompt, "messages", {"messages": TURNS[:1], "answer": "A", "kind": "single"}),
    ):
        path = lines_of(tmp_path / "t.jsonl", {**good, key: turns}, good)
        read = load_records(kind, path)
        assert len(read.good) == 1
        assert read.set_aside[0].startswith(f"{path}:1: ")


def test_the_last_turn(tmp_path):
    path = lines_of(tmp_path / "t.jsonl", {"messages": TURNS[:1]}, {"messages": TURNS})
    assert "the last turn must be the assistant's" in load_records(SftExample, path).set_aside[0]
    key = {"answer": "A", "kind": "single"}
    path = lines_of(tmp_path / "t.jsonl", {"messages": TURNS[:1], **key}, {"messages": TURNS, **key})
    assert "the last turn must be the user's" in load_records(RlPrompt, path).set_aside[0]


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_empty(text, tmp_path):
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"q\.jsonl: holds no usable record of Question$"):
        load_records(Question, tmp_path / "q.jsonl")


def test_missing_folder_and_other_encodings(tmp_path):
    with pytest.raises(UserError, match=r"absent.jsonl: the data cannot be read \(No such file"):
        load_records(Question, tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match=r"is not a data set \(nothing is there\)"):
        load_records(Question, tmp_path)
    path = tmp_path / "gbk.jsonl"
    path.write_bytes(json.dumps(QUESTION, ensure_ascii=False).encode("gbk"))
    with pytest.raises(UserError, match=r"gbk\.jsonl: is not UTF-8 text"):
        load_records(Question, path)


def test_lines_of_json(tmp_path):
    """Each value with its place; what is none is named in its place, the last line cut short by a crash too."""
    path = tmp_path / "a.jsonl"
    deep, long, gbk = b"[" * 100_000, b"9" * 5000, "问".encode("gbk")
    lines = [b'\xef\xbb\xbf{"a": 1}\r', b"", b'"a\xe2\x80\xa8b"', deep, long, b'"' + gbk + b'"', b"3", b'{"cut": "\xe9']
    path.write_bytes(b"\n".join(lines))
    found = dict(read_jsonl(path))
    assert [found.pop(f"{path}:{line}") for line in (1, 3, 7)] == [{"a": 1}, "a\u2028b", 3]
    assert {where.rpartition(":")[2]: type(fault) for where, fault in found.items()} == {
        "4": RowError,
        "5": RowError,
        "6": NotTextError,
        "8": NotTextError,
    }
    assert [value for _, value in read_jsonl(path, "latin-1", "name") if isinstance(value, str)] != []
    with pytest.raises(UserError, match=r"name: the data cannot be read \(No such file"):
        list(read_jsonl(tmp_path / "none", name="name"))


def test_writing_is_one_step(tmp_path):
    path = tmp_path / "q.jsonl"
    question = Question(**QUESTION)
    write_records(path, [question])

    def broken():
        yield question
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_records(path, broken())
    assert load_records(Question, path).good == (question,)
    assert [file.name for file in tmp_path.iterdir()] == ["q.jsonl"]


def test_what_training_reads():
    question = Question(**QUESTION, rationale="因为", source="书", meta={"n": 1})
    text = "多项选择题：问\nA. 甲\nB. 乙\nC. 丙"
    example = question_to_sft(question)
    assert example.messages == (Message("user", text), Message("assistant", "<think>因为</think>\n答案：AC"))
    prompt = question_to_rl(question)
    assert (prompt.messages, prompt.answer, prompt.kind) == ((Message("user", text),), "AC", "multi")
    assert (example.source, example.meta) == (prompt.source, prompt.meta) == ("书", {"n": 1})
    single = dataclasses.replace(question, answer="B", kind="single", rationale=None)
    assert question_to_rl(single).messages[0].content.startswith("单项选择题：问\n")
    with pytest.raises(UserError, match=f"{question.id}: has no rationale"):
        question_to_sft(single)


@given(st.sets(st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ")))
def test_answer_mask(letters):
    mask = answer_mask("".join(sorted(letters)))
    assert {chr(65 + bit) for bit in range(32) if mask >> bit & 1} == letters


def test_every_bad_line_is_named(tmp_path):
    path = lines_of(tmp_path / "q.jsonl", "x", QUESTION, {}, QUESTION, [])
    assert [fault.split(": ")[0] for fault in load_records(Question, path).set_aside] == [
        f"{path}:{number}" for number in (1, 3, 5)
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_files_of_windows(encoding, end, tmp_path):
    text = json.dumps(QUESTION, ensure_ascii=False) + end
    (tmp_path / "q.jsonl").write_bytes((text + text).encode(encoding))
    read = load_records(Question, tmp_path / "q.jsonl")
    assert (len(read.good), read.set_aside) == (2, ())
