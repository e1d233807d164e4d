"""What the forms of `answer_set` read, take back and leave; and that one text has one reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
import pytest
from support.adversary import Vocabulary
from support.forms import NOTHING, RIGHT, WRONG, letters, table

from psyche_jax.errors import UserError
from psyche_jax.rewards import AnswerSetRule, RuleConfig, extract_letters, rules
from psyche_jax.rewards.config import FORMS
from psyche_jax.rewards.regex import Ambiguous, compile_pattern
from psyche_jax.rewards.rules import compile_text_rule

ADAPTER: pydantic.TypeAdapter[RuleConfig] = pydantic.TypeAdapter(RuleConfig)
NATURAL = AnswerSetRule(reading="natural")
EXAMPLES = {  # as in docs/rewards.md
    "markers": [("答案是B", "B"), ("应选AC", "AC"), ("故选：B", "B"), ("The answer is B.", "B"), ("答案：B项", "B")],
    "markdown": [("**答案：AC**", "AC"), ("答案：**A**、**C**", "AC"), ("**答案**：B", "B"), ("答案：`B`", "B")],
    "brackets": [("答案：（B）", "B"), ("答案：“B”", "B"), ("答案：(A)(C)", "AC"), ("答案：[A, C]", "AC")],
    "texts": [("答案：B. 共情", "B"), ("答案：A、共情", "A"), ("答案：A.共情 C.尊重", "AC"), ("答案：B（共情）", "B")],
    "lines": [("答案：\nB", "B"), ("答案：\nA\nC\n\n因为", "AC"), ("答案：\r\n- A、C", "AC")],
    "boxed": [("$\\boxed{B}$", "B"), ("\\boxed{\\text{AC}}", "AC"), ("答案：$\\boxed{B}$。", "B")],
    "alone": [("B", "B"), ("<think>嗯</think>\nA、C\n", "AC")],
    "reasons": [("答案：B，因为A错", "B"), ("答案：B。本题考查共情", "B"), ("答案：B，理由：可能", "B")],
}


def test_the_default_is_strict() -> None:
    assert AnswerSetRule() == AnswerSetRule(reading="strict", forms=None)
    for text, _ in RIGHT + WRONG:
        assert extract_letters(text) == extract_letters(text, AnswerSetRule(forms=()))


@pytest.mark.parametrize("form", FORMS)
def test_each_form_alone_reads_its_examples_and_strict_does_not(form: str) -> None:
    for text, given in EXAMPLES[form]:
        assert letters(text, AnswerSetRule(forms=(form,))) == given, text
        assert letters(text, NATURAL) == given, text
    unread = [text for text, given in EXAMPLES[form] if letters(text, AnswerSetRule()) != given]
    assert len(unread) >= len(EXAMPLES[form]) - 1


def test_natural_reads_nearly_all_right_answers() -> None:
    assert len(RIGHT) == 88
    assert sum(letters(text, NATURAL) == given for text, given in RIGHT) >= 80


@pytest.mark.parametrize("rule", [NATURAL, *(AnswerSetRule(forms=(form,)) for form in FORMS)])
def test_no_form_reads_what_is_no_answer(rule: AnswerSetRule) -> None:
    assert len(WRONG) >= 40
    assert [text for text, taken in WRONG if letters(text, rule) == taken] == []


def test_natural_reads_nothing_where_there_is_no_one_answer() -> None:
    assert len(NOTHING) > 100
    assert [text for text in NOTHING if letters(text, NATURAL)] == []


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("错误答案：B", ""),
        ("答案：B\n不对，应该是C", ""),
        ("答案：B\n不对，答案：C", "C"),  # the last statement counts, if it is one
        ("答案：B\n更正：应选C", "C"),
        ("答案：B\n\n解析：A. 不符合。选项C错误", "B"),
        ("答案：B\nA项错误。", "B"),
        ("答案：\nA. 共情\nC. 尊重", "AC"),
        ("答案：\nA. 共情\nC", ""),
        ("答案：B. 不安全型依恋", "B"),
        ("答案：B. A型人格", "B"),
        ("答案：B. 生气或愤怒", "B"),
        ("答案：A. 共情或C", ""),
        ("答案：A. 共情 C", ""),
        ("答案：A（CD）", ""),
        ("答案：A. BC", ""),
        ("答案：B\n答案：", ""),
        ("答案：B\n答案：我不知道", ""),
        ("答案：B</think>", ""),
        ("<think>答案：B</think>C", "C"),
        ("B选项正确", "B"),
        ("选项B正确。", "B"),
        ("A、C两项正确", "AC"),
        ("因此，B选项正确。", "B"),
        ("B是正确答案", "B"),
        ("Option B is correct.", "B"),
        ("答案：B\n有人认为答案是C", "B"),
        ("答案：B\n故A错误，C正确", "B"),
        ("我认为答案是B", "B"),
        ("不选A，选C", "C"),
        ("\\boxed{A}、\\boxed{C}", "AC"),
        ("$\\boxed{A}$ and $\\boxed{C}$", "AC"),
        ("答案：$\\text{B}$", "B"),
        ("答案：\n1. A. 共情\n2. C. 尊重", "AC"),
        ("答案：\n1) A\n2) C", "AC"),
        ("The correct answers are A and C.", "AC"),
        ("正确的有A、C", "AC"),
    ],
)
def test_natural(text: str, given: str) -> None:
    assert letters(text, NATURAL) == given


def test_a_thought_that_does_not_end_holds_no_answer() -> None:
    """By the natural reading; the strict one looks for `</think>` alone."""
    assert letters("<think>答案：B", NATURAL) == ""
    assert letters("<think>想</think>\n<think>答案：B", NATURAL) == ""
    assert letters("<think>答案：A</think>答案：B", NATURAL) == "B"
    assert letters("<think>答案：B", AnswerSetRule()) == "B"


def test_lower_case_and_own_markers() -> None:
    assert letters("the answer is b", AnswerSetRule(reading="natural", lower_case=True)) == "B"
    assert letters("Key= B. x", AnswerSetRule(forms=("texts",), markers=("Key=",))) == "B"
    assert letters("答案：H", NATURAL) == "", "A to G, unless `letters` says more"
    assert letters("答案：H", AnswerSetRule(reading="natural", letters="ABCDEFGH")) == "H"


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"reading": "naturel"}, "did you mean 'natural'"),
        ({"forms": ["boxd"]}, "did you mean 'boxed'"),
        ({"forms": ["everything"]}, "known: markers, markdown"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(mapping: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        ADAPTER.validate_python({"rule": "answer_set", **mapping})


def test_what_could_be_read_in_two_ways_is_no_automaton(tiny: Vocabulary) -> None:
    bits = {"A": 1, "B": 2}
    compile_pattern("(?:([AB])c|[AB]d)", letters=bits)  # the next character tells
    for pattern in ("(?:([AB])[AB]|[AB]([AB]))", "(?:([AB])|[AB])c*", "(?:([AB])|[AB]c)"):
        with pytest.raises(Ambiguous):
            compile_pattern(pattern, letters=bits)
    rule = AnswerSetRule(reading="natural", separators="、，共")
    with pytest.raises(UserError, match="can be read in two ways; leave some of them out"):
        compile_text_rule(rule, tiny.token_bytes)


def test_too_large_a_table_says_what_to_take_less_of(tiny: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MAX_TABLE_BYTES", 1 << 10)
    with pytest.raises(
        UserError, match=r"`answer_set`: its automaton has .*take fewer `letters`, `markers` or `forms`"
    ):
        compile_text_rule(AnswerSetRule(), tiny.token_bytes)


def test_the_table_of_the_docs_is_current() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert table() in docs, "PYTHONPATH=tests python -m support.forms prints it"
