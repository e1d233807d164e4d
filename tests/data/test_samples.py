"""The sample data is what the README and the demo say it is."""

import json
from importlib.resources import files
from pathlib import Path

import pytest

from psyche_jax.data.dataset import load_records
from psyche_jax.data.records import Dialogue, Question, question_text, question_to_rl, question_to_sft
from psyche_jax.synth.duplicates import fold

SAMPLES = Path(str(files("psyche_jax.data") / "samples"))


def objects(name: str) -> list[dict]:
    return [json.loads(line) for line in (SAMPLES / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def questions() -> tuple[Question, ...]:
    records = load_records(Question, SAMPLES / "questions.jsonl")
    assert records.set_aside == ()
    return records.good


@pytest.fixture(scope="module")
def dialogues() -> tuple[Dialogue, ...]:
    records = load_records(Dialogue, SAMPLES / "dialogues.jsonl")
    assert records.set_aside == ()
    return records.good


def test_counts(questions, dialogues):
    assert len(questions) >= 120
    assert sum(question.kind == "multi" for question in questions) >= 40
    assert sum(question.kind == "single" for question in questions) >= 40
    assert len(dialogues) >= 40
    assert len(objects("passages.jsonl")) >= 30


def test_questions_are_whole(questions):
    for question in questions:
        assert len(question.options) >= 4
        assert question.rationale is not None and len(question.rationale) >= 20, question.stem
        assert question.source and question.meta["subject"]
        assert question.stem == question.stem.strip()
        if question.kind == "multi":
            assert 2 <= len(question.answer) <= len(question.options), question.stem
        options = [fold(option) for option in question.options.values()]
        assert len(set(options)) == len(options), question.stem
        # An option that holds its own letter would be asked as "A. A. …".
        assert not any(option[:2] in {f"{x}." for x in "ABCDEFG"} for option in question.options.values())
        assert not {"\u2028", "\u2029", "\x85", "\u200b", "\ufeff", "�"} & set(question_text(question))


def test_no_letter_is_always_right(questions):
    """A guesser who always says the same scores no better than chance by much."""
    singles = [question.answer for question in questions if question.kind == "single"]
    for letter in "ABCD":
        assert 0.1 < singles.count(letter) / len(singles) < 0.45


def test_dialogues_are_single_turns(dialogues):
    for dialogue in dialogues:
        assert [turn.role for turn in dialogue.turns] == ["user", "assistant"]
        assert all(len(turn.content) >= 15 for turn in dialogue.turns)
        assert dialogue.source


def test_passages():
    for passage in objects("passages.jsonl"):
        assert set(passage) == {"text", "source", "licence", "meta"}
        assert len(passage["text"]) >= 100
        assert passage["licence"] == "Apache-2.0"
        assert passage["meta"]["title"] and passage["meta"]["subject"]


def test_nothing_stands_twice(questions, dialogues):
    for texts in (
        [fold(question.stem) for question in questions],
        [fold(question.rationale or "") for question in questions],
        [fold(dialogue.turns[0].content) for dialogue in dialogues],
        [fold(dialogue.turns[1].content) for dialogue in dialogues],
        [fold(passage["text"]) for passage in objects("passages.jsonl")],
        [fold(passage["meta"]["title"]) for passage in objects("passages.jsonl")],
    ):
        assert len(texts) > 30
        assert len(set(texts)) == len(texts)


def test_ids(questions, dialogues):
    """Unique, and hashes of what is asked: the first of each file stay what they are."""
    for records in (questions, dialogues):
        assert len({record.id for record in records}) == len(records)
    assert Question("何为心理？", {"A": "甲", "B": "乙"}, "A", "single").id == "95713b83bbb80639"
    assert len({question_to_rl(question).id for question in questions}) == len(questions)
    assert len({question_to_sft(question).id for question in questions}) == len(questions)
