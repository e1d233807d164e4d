"""The graph against the reference, on responses meant to break it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.adversary import FORM_RULES, RULES, TOKENS, Vocabulary, batches, compare

from psyche_jax.rewards.score import advance, compile_rules, finish, initial_state, score

# At least so many of 10,000 must get something, or the comparison says little.
ACCEPTED = {"think_format": 2000, "answer_set": 300, "elastic": 300, "tangled": 60, "exam": 30}


@pytest.mark.parametrize(("name", "seed"), [("tiny", 1), ("qwen", 2)])
def test_graph_agrees_with_reference(name: str, seed: int, request: pytest.FixtureRequest) -> None:
    vocab: Vocabulary = request.getfixturevalue(name)
    outcome = compare(vocab, 10_000, seed)
    assert outcome.checked == 10_000
    assert outcome.mismatches == []
    for rule in RULES:
        assert outcome.nonzero[rule.name] >= ACCEPTED.get(rule.name, 1000), rule.name
        assert outcome.nonzero[rule.name] < 9500, rule.name


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in (("tiny", 20_000, 6), ("qwen", 6_000, 5))]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count", "seed"), [("tiny", 2000, 9), *SLOW])
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


def test_token_by_token_is_the_same_as_at_once(tiny: Vocabulary) -> None:
    (batch,) = batches(tiny, 500, 500, seed=3)
    compiled = compile_rules(RULES, tiny.token_bytes, tiny.stops, cache_dir=None)
    tokens, gold = jnp.asarray(batch.tokens), jnp.asarray(batch.gold)
    lengths = jnp.asarray(np.random.default_rng(0).integers(0, TOKENS + 1, len(tokens)), jnp.int32)
    state = initial_state(compiled, len(tokens))
    step = jax.jit(advance)
    for i in range(TOKENS):
        state = step(compiled, state, tokens[:, i], i < lengths)
    total, by_rule = finish(compiled, state, gold, tokens)
    expected_total, expected = jax.jit(score)(compiled, tokens, gold, lengths)
    np.testing.assert_allclose(total, expected_total, atol=1e-6)
    assert by_rule.keys() == expected.keys() == {rule.name for rule in RULES}
    for name, values in expected.items():
        np.testing.assert_allclose(by_rule[name], values, rtol=1e-6, err_msg=name)
