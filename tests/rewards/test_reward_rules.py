"""What the rules mean (the reference), and what a config may say."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest

from psyche_jax.errors import UserError
from psyche_jax.rewards import (
    AnswerSetRule,
    LengthRule,
    PatternRule,
    RepetitionRule,
    RuleConfig,
    ThinkFormatRule,
    extract_letters,
    reference,
)
from psyche_jax.rewards.score import compile_rules

ADAPTER: pydantic.TypeAdapter[RuleConfig] = pydantic.TypeAdapter(RuleConfig)


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("答案：ABC", "ABC"),
        ("答案：ABC。", "ABC"),
        ("答案：A、C", "AC"),
        ("答案:A,C", "AC"),
        ("答案： A 和 C ", "AC"),
        ("**答案：Ｂ**", "B"),
        ("答案：CBA、A", "ABC"),
        ("答案：A\n因为…", "A"),
        ("答案：A。\r\n因为B", "A"),
        ("所以答案：A，正确答案：B", "B"),
        ("<think>答案：A</think>答案：B", "B"),
        ("答案：BANANA", "ABN"),
        ("答案：）", None),
        ("", None),
        ("A", None),
        ("答案：", None),
        ("答案：B\n答案：", None),
        ("答案：B 答案：", None),
        ("答案：A</think>", None),
        ("<think>答案：A</think>我不知道", None),
        ("答案：选A", None),
        ("答案：A 因为…", None),
        ("答案：A或B", None),
        ("答案：A-D", None),
        ("答案：A.B", None),
        ("答案：A）、B）", None),
        ("答案：A. 抑郁症", None),
        ("答案：Depression", None),
        ("答案：\nA", None),
        ("答案：a", None),
        ("答案：A\u2028", None),
    ],
)
def test_extract_letters(text: str, letters: str | None) -> None:
    assert extract_letters(text) == (None if letters is None else frozenset(letters))


def test_extract_letters_as_configured() -> None:
    lower = AnswerSetRule(lower_case=True, letters="ABCD", separators="/", closers="", markers=("Answer:",))
    assert extract_letters("Answer:a/ｂ/C", lower) == frozenset("ABC")
    assert extract_letters("Answer:a/E", lower) is None
    assert extract_letters("Answer:a。", lower) is None
    assert extract_letters("答案：A", lower) is None
    assert extract_letters("答案：A</think>", AnswerSetRule(answer_after=None, closers="</think>")) == {"A"}


def test_credit() -> None:
    strict, elastic = AnswerSetRule(), AnswerSetRule(credit="elastic")
    for text, gold, is_strict, is_elastic in [
        ("答案：AC", 0b101, 1.0, 1.0),
        ("答案：A", 0b101, 0.0, 0.5),
        ("答案：AB", 0b101, 0.0, 0.0),
        ("答案：", 0b101, 0.0, 0.0),
        ("答案：", 0, 0.0, 0.0),
        ("答案：Z", 1 << 25, 1.0, 1.0),
    ]:
        assert reference.answer_set(text, gold, strict) == is_strict
        assert reference.answer_set(text, gold, elastic) == is_elastic


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("<think>a</think>b", True),
        (" \n\u3000<think>\n想\n</think>\n\n答案：A", True),
        ("<think><</think>b", True),
        ("<think></</think>b", True),
        ("<think>\u200b</think>b", True),
        ("<think></think>b", False),
        ("<think>\u3000\n</think>b", False),
        ("<think>a</think>", False),
        ("<think>a</think>\n", False),
        ("x<think>a</think>b", False),
        ("<think>a</think>b</think>", False),
        ("<think>a<think>b</think>c", False),
        ("<think>a</think>b<think>", False),
        ("<think>a</think>b<think>c</think>d", False),
        ("</think>a<think>b", False),
        ("<think>a", False),
        ("a", False),
        ("", False),
    ],
)
def test_think_format(text: str, good: bool) -> None:
    assert reference.think_format(text) == good


def test_length() -> None:
    rule = LengthRule(max_length=100, buffer=20)
    values = [reference.length(n, rule) for n in (0, 79, 80, 85, 90, 99, 100, 101, 1000)]
    assert values == [0.0, 0.0, 0.0, -0.25, -0.5, -0.95, -1.0, -1.0, -1.0]
    assert [reference.length(n, LengthRule(max_length=3)) for n in (3, 4)] == [0.0, -1.0]


def test_repetition() -> None:
    rule = RepetitionRule(ngram=2)
    assert reference.repetition([1, 2, 1, 2, 1], rule) == 0.5
    assert reference.repetition([1, 2, 3], rule) == 0.0
    assert reference.repetition([1], rule) == 0.0


def test_a_response_ends_at_its_first_stop_token() -> None:
    vocabulary = [b"<think>a</think>b", None, b"stop", "答".encode()[:1]]
    rule = ThinkFormatRule()
    for ids, value in [([0, 2], 1), ([0, 2, 1, 0], 1), ([0], 0), ([2, 0], 0), ([0, 1, 2], 0), ([0, 3, 2], 0)]:
        assert reference.score_response(rule, ids, vocabulary, [2], 0) == value
    assert reference.score_response(LengthRule(max_length=1), [0, 2, 0], vocabulary, [2], 0) == -1.0
    assert reference.score_response(RepetitionRule(ngram=1), [0, 0, 2, 2], vocabulary, [2], 0) == 0.5


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"rule": "think_format"}, ThinkFormatRule()),
        (
            {"rule": "pattern", "pattern": "a.", "flags": ["DOTALL"], "name": "p", "weight": 2},
            PatternRule(pattern="a.", flags=("DOTALL",), name="p", weight=2.0),
        ),
        (
            {"rule": "answer_set", "markers": ["X:"], "credit": "elastic"},
            AnswerSetRule(markers=("X:",), credit="elastic"),
        ),
        ({"rule": "length", "max_length": 9, "buffer": 2}, LengthRule(max_length=9, buffer=2)),
        ({"rule": "repetition"}, RepetitionRule(ngram=4, weight=-1.0)),
    ],
)
def test_from_a_mapping(mapping: dict[str, Any], expected: RuleConfig) -> None:
    rule = ADAPTER.validate_python(mapping)
    assert rule == expected
    assert hash(rule) == hash(expected)
    assert rule.name == mapping.get("name", mapping["rule"])


@pytest.mark.parametrize(
    "mapping",
    [
        {"rule": "nothing"},
        {"rule": "length"},
        {"rule": "think_format", "wieght": 2},
        {"rule": "pattern", "pattern": "a(?=b)"},
        {"rule": "pattern", "pattern": "a", "flags": ["VERBOSE"]},
        {"rule": "pattern", "pattern": "a", "max_states": 1 << 20},
        {"rule": "answer_set", "markers": []},
        {"rule": "answer_set", "markers": ["x</think>"]},
        {"rule": "answer_set", "letters": "AbC"},
        {"rule": "answer_set", "letters": "AA"},
        {"rule": "answer_set", "separators": "、B"},
        {"rule": "answer_set", "separators": "\n"},
        {"rule": "answer_set", "closers": "、"},
        {"rule": "answer_set", "closers": "ａ", "lower_case": True},
        {"rule": "answer_set", "credit": "partial"},
        {"rule": "answer_set", "answer_after": ""},
        {"rule": "length", "max_length": 0},
        {"rule": "length", "max_length": 10, "buffer": 11},
        {"rule": "repetition", "ngram": 0},
        {"rule": "repetition", "weight": float("nan")},
    ],
)
def test_a_wrong_mapping_is_refused(mapping: dict[str, Any]) -> None:
    with pytest.raises((UserError, pydantic.ValidationError)):
        ADAPTER.validate_python(mapping)


def test_names_must_differ() -> None:
    with pytest.raises(UserError, match="two reward rules are called `think_format`"):
        compile_rules([ThinkFormatRule(), ThinkFormatRule(weight=2.0)], [b"a", None], [1], cache_dir=None)


def test_too_large_a_pattern_says_which_rule() -> None:
    rule = PatternRule(pattern=".*a.{10}", max_states=300, name="big")
    with pytest.raises(UserError, match=r"reward rule `big`: its automaton has more than .* or raise `max_states`"):
        compile_rules([rule], [b"a", None], [1], cache_dir=None)
    rule = PatternRule(pattern=r"\w{1,300}", name="wide")  # raising would not help: it is UTF-8 that makes it large
    with pytest.raises(UserError, match=r"reward rule `wide`: its automaton has .* multiplies states\)$"):
        compile_rules([rule], [b"a", None], [1], cache_dir=None)


@pytest.mark.parametrize(
    ("rule", "missing"),
    [
        (AnswerSetRule(), "案"),
        (AnswerSetRule(letters="AB"), "AB"),
        (ThinkFormatRule(), "/"),
        (PatternRule(pattern="[^a]*é", require_stop=True), "é"),
    ],
)
def test_what_the_tokenizer_cannot_spell_is_refused(rule: Any, missing: str) -> None:
    """A tokenizer that lacks the bytes of a marker: no response could ever earn the reward."""
    lacks = set(missing.encode()) | {byte for letter in missing for byte in chr(ord(letter) + 0xFEE0).encode()}
    tokens = [bytes([byte]) for byte in range(256)]
    compile_rules([rule], [*tokens, None], [256], cache_dir=None)
    with pytest.raises(UserError, match=f"reward rule `{rule.name}`: every response would get 0"):
        compile_rules([rule], [None if t[0] in lacks else t for t in tokens] + [None], [256], cache_dir=None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>想</think>\n答案：B", ("想", "答案：B")),
        ("想</think>答案：B", ("想", "答案：B")),
        ("<think>\n想</think>一</think>二", ("想</think>一", "二")),
        (" <think>想", ("想", "")),
        ("好。<think>想", ("好。<think>想", "")),
        ("<think></think>答", ("", "答")),
        (" 答 ", (None, "答")),
        ("", (None, "")),
    ],
)
def test_thought_and_answer(text: str, expected: tuple[str | None, str]) -> None:
    assert reference.split_thought(text) == expected
