"""The graph against the reference, on responses meant to break it."""

from __future__ import annotations

import pytest
from support.adversary import FORM_RULES, RULES, Vocabulary, compare

# At least such a share must get something, or the comparison says little.
ACCEPTED = {"think_format": 0.2, "answer_set": 0.03, "elastic": 0.03, "tangled": 0.006, "exam": 0.003}


@pytest.mark.parametrize(("name", "count", "seed"), [("tiny", 10_000, 1), ("qwen", 4_000, 2)])
def test_graph_agrees_with_reference(name: str, count: int, seed: int, request: pytest.FixtureRequest) -> None:
    vocab: Vocabulary = request.getfixturevalue(name)
    outcome = compare(vocab, count, seed)
    assert outcome.checked == count
    assert outcome.mismatches == []
    for rule in RULES:
        assert ACCEPTED.get(rule.name, 0.1) <= outcome.nonzero[rule.name] / count < 0.95, rule.name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count", "seed"), [("tiny", 2000, 9), ("qwen", 2000, 5)])
def test_graph_agrees_with_reference_on_forms(name: str, count: int, seed: int, request: pytest.FixtureRequest) -> None:
    """The natural reading, each form alone, lower-case letters, markers of one's own."""
    outcome = compare(request.getfixturevalue(name), count, seed, rules=FORM_RULES)
    assert outcome.checked == count
    assert outcome.mismatches == []
    assert outcome.nonzero["natural"] >= count * 0.03
    for rule in FORM_RULES:
        assert outcome.nonzero[rule.name] >= 1, rule.name


@pytest.mark.parametrize("opened", ["<think>\u3000", "<think>想</thi", "<think>想</think>答案：A、"])
def test_graph_agrees_with_reference_on_what_the_prompt_has_opened(opened: str, tiny: Vocabulary) -> None:
    outcome = compare(tiny, 4000, seed=4, opened=opened)
    assert outcome.mismatches == []
    for rule in ("think_format", "answer_set", "elastic"):
        assert outcome.nonzero[rule] >= 100, rule
