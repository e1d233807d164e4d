from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from support.adversary import Vocabulary

from psyche_jax.rewards import AnswerSetRule, ThinkFormatRule, score
from psyche_jax.rewards.automaton import TokenAutomaton
from psyche_jax.rewards.rules import compile_text_rule
from psyche_jax.rewards.score import compile_rules, load_or_compile

RULES = (AnswerSetRule(), ThinkFormatRule())


def same(left: TokenAutomaton, right: TokenAutomaton) -> bool:
    pairs = [(getattr(left, f.name), getattr(right, f.name)) for f in dataclasses.fields(TokenAutomaton)]
    return all((a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b)) for a, b in pairs)


def test_a_table_is_built_once(tiny: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = [load_or_compile(rule, tiny.token_bytes, tmp_path / "new") for rule in RULES]
    assert len(list((tmp_path / "new").iterdir())) == 2
    monkeypatch.setattr(score, "compile_text_rule", None)
    for rule, table in zip(RULES, built, strict=True):
        renamed = dataclasses.replace(rule, name="other", weight=3.0)
        assert same(load_or_compile(renamed, tiny.token_bytes, tmp_path / "new"), table)


def test_what_changes_the_table_changes_the_file(tiny: Vocabulary, tmp_path: Path) -> None:
    other = [*tiny.token_bytes[:-1], b"x"]
    for rule, vocabulary in [
        (AnswerSetRule(), tiny.token_bytes),
        (AnswerSetRule(lower_case=True), tiny.token_bytes),
        (AnswerSetRule(), other),
        (AnswerSetRule(), [b"B" if text == b"A" else text for text in tiny.token_bytes]),
        (AnswerSetRule(), tiny.token_bytes[:-1]),
    ]:
        table = load_or_compile(rule, vocabulary, tmp_path)
        assert same(table, compile_text_rule(rule, vocabulary))
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "other"])
def test_a_damaged_file_is_built_again(damage: str, tiny: Vocabulary, tmp_path: Path) -> None:
    rule = AnswerSetRule()
    table = load_or_compile(rule, tiny.token_bytes, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage == "other":
        np.savez(path, class_of=np.zeros(3))
    else:
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "noise": whole[:-400] + b"x" * 400}[damage])
    assert same(load_or_compile(rule, tiny.token_bytes, tmp_path), table)
    assert path.read_bytes()[:2] == b"PK"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_done_without(tiny: Vocabulary, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    table = load_or_compile(RULES[0], tiny.token_bytes, tmp_path / "file" / "cache")
    assert same(table, compile_text_rule(RULES[0], tiny.token_bytes))


def test_no_cache(tiny: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "_save", None)
    compile_rules(RULES, tiny.token_bytes, tiny.stops, cache_dir=None)
