"""The graph: how responses end, what is an argument, and what the values are."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.adversary import RULES, Vocabulary

from psyche_jax.errors import UserError
from psyche_jax.rewards import AnswerSetRule, LengthRule, PatternRule, RepetitionRule, ThinkFormatRule, reference
from psyche_jax.rewards.score import CompiledRules, compile_rules, score

# 0 is a stop token, 1 another; 2 has no bytes.
BYTES = [b"<|im_end|>", b"<|endoftext|>", None, b"<think>", b"a", b"</think>", "答案：".encode(), b"A", b"B", b"\n"]
STOP, STOP2, NONE, OPEN, A_LOW, CLOSE, MARK, A, B, LINE = range(10)
GOOD = [OPEN, A_LOW, CLOSE, MARK, A, B]


def compiled_rules(*rules: object) -> CompiledRules:
    return compile_rules(rules, BYTES, [STOP, STOP2], cache_dir=None)  # type: ignore[arg-type]


def values(rule: object, rows: list[list[int]], gold: int = 0b11) -> list[float]:
    width = max(len(row) for row in rows)
    tokens = jnp.asarray([row + [STOP] * (width - len(row)) for row in rows], jnp.int32)
    _, by_rule = score(compiled_rules(rule), tokens, jnp.full(len(rows), gold, jnp.int32))
    (found,) = by_rule.values()
    assert found.dtype == jnp.float32
    return found.tolist()


def test_either_stop_token_ends_a_response_and_nothing_after_it_matters() -> None:
    rows = [[*GOOD, STOP, NONE, CLOSE, OPEN], [*GOOD, STOP2, MARK, B, -7], [*GOOD, A, A, A, A], [STOP, *GOOD]]
    assert values(ThinkFormatRule(), rows) == [1, 1, 0, 0]
    assert values(AnswerSetRule(), rows) == [1, 1, 1, 0]
    assert values(AnswerSetRule(require_stop=True), rows) == [1, 1, 0, 0]
    assert values(PatternRule(pattern=".+"), rows) == [1, 1, 1, 0]
    assert values(PatternRule(pattern=".+", require_stop=True), rows) == [1, 1, 0, 0]
    assert values(LengthRule(max_length=9, buffer=5), rows) == pytest.approx([-0.6, -0.6, -1, 0])
    assert values(RepetitionRule(ngram=1), rows) == pytest.approx([0, 0, 0.4, 0])


def test_ids_without_bytes_fail_rules_on_text() -> None:
    rows = [[*GOOD, odd, STOP] for odd in (NONE, -1, 10, 2**31 - 1, -(2**31))]
    for rule in (ThinkFormatRule(), AnswerSetRule(), PatternRule(pattern="(?s).*")):
        assert values(rule, rows) == [0] * 5
    assert values(LengthRule(max_length=7), rows) == [-1] * 5


def test_an_answer_in_the_thought_is_none() -> None:
    rows = [[OPEN, MARK, A, LINE, CLOSE, A_LOW, STOP], [OPEN, MARK, B, LINE, CLOSE, MARK, A, STOP], [MARK, A, LINE, B]]
    assert values(AnswerSetRule(), rows, gold=0b1) == [0, 1, 1]
    assert values(AnswerSetRule(answer_after=None), rows, gold=0b1) == [1, 1, 1]


def test_total_is_weighted_and_values_are_not() -> None:
    rules = [ThinkFormatRule(weight=0.5), AnswerSetRule(weight=2.0), RepetitionRule(ngram=1, name="rep")]
    tokens = jnp.asarray([[OPEN, A_LOW, CLOSE, MARK, A, A, STOP]], jnp.int32)
    total, by_rule = jax.jit(score)(compiled_rules(*rules), tokens, jnp.asarray([1], jnp.int32))
    assert {name: value.tolist() for name, value in by_rule.items()} == {
        "think_format": [1.0],
        "answer_set": [1.0],
        "rep": [pytest.approx(1 / 6)],
    }
    assert total.dtype == jnp.float32
    assert total.tolist() == [pytest.approx(0.5 + 2.0 - 1 / 6)]


def test_repetition_of_responses_shorter_than_an_ngram() -> None:
    assert values(RepetitionRule(ngram=5), [[A, A, A]]) == [0]
    assert values(RepetitionRule(ngram=3), [[A, A, A, A, STOP], [A, A, STOP, A, A]]) == [0.5, 0]


def test_empty_buffers() -> None:
    compiled = compiled_rules(PatternRule(pattern="a?"), ThinkFormatRule(), RepetitionRule())
    _, by_rule = score(compiled, jnp.zeros((2, 0), jnp.int32))
    assert by_rule["pattern"].tolist() == [1, 1]
    assert by_rule["think_format"].tolist() == [0, 0]


def test_what_a_rule_needs_is_asked_for() -> None:
    tokens = jnp.asarray([GOOD], jnp.int32)
    with pytest.raises(UserError, match="gold_mask"):
        score(compiled_rules(AnswerSetRule()), tokens)
    assert score(compiled_rules(ThinkFormatRule()), tokens)[0].tolist() == [0]


@pytest.mark.parametrize("stops", [[], [10], [-1]])
def test_stop_tokens_must_be_in_the_vocabulary(stops: list[int]) -> None:
    with pytest.raises(UserError, match="stop_token_ids"):
        compile_rules([ThinkFormatRule()], BYTES, stops, cache_dir=None)


def test_tables_are_arguments_and_other_tables_need_no_new_trace(tiny: Vocabulary) -> None:
    compiled = compile_rules(RULES, tiny.token_bytes, tiny.stops, cache_dir=None)
    leaves, structure = jax.tree.flatten(compiled)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    hash(structure)
    tokens, gold = jnp.zeros((2, 5), jnp.int32), jnp.zeros(2, jnp.int32)
    jaxpr = jax.make_jaxpr(score)(compiled, tokens, gold)
    assert sum(np.size(c) for c in jaxpr.consts) < 100
    traces = []

    def counted(*arguments: object) -> object:
        traces.append(1)
        return score(*arguments)  # type: ignore[arg-type]

    run = jax.jit(counted)
    again = compile_rules(RULES, tiny.token_bytes, tiny.stops, cache_dir=None)
    run(compiled, tokens, gold)
    run(again, tokens, gold)
    assert len(traces) == 1


def test_the_example_of_the_docs_runs(tiny: Vocabulary) -> None:
    docs = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", docs, re.DOTALL)
    assert example is not None
    answer = tiny.tokenizer.encode("<think>嗯</think>答案：A").ids + [151645]
    names = {"tokenizer": tiny.tokenizer, "tokens": jnp.asarray([answer]), "gold_mask": jnp.asarray([1])}
    exec(example[1], names)
    assert float(names["total"][0]) == pytest.approx(1.2)


def opened_values(opened: str, rule: object, row: list[int], gold: int = 0b1) -> float:
    compiled = compile_rules([rule], BYTES, [STOP, STOP2], opened=opened, cache_dir=None)  # type: ignore[list-item]
    value = score(compiled, jnp.asarray([row], jnp.int32), jnp.asarray([gold], jnp.int32))[1]
    (found,) = value.values()
    assert float(found[0]) == reference.score_response(rule, row, BYTES, [STOP, STOP2], gold, opened)  # type: ignore[arg-type]
    return float(found[0])


def test_the_text_begins_with_what_the_template_has_opened() -> None:
    """As QwQ's does, whose prompt ends in `<think>` and a newline."""
    thought = [A_LOW, CLOSE, MARK, A, STOP]
    assert opened_values("", ThinkFormatRule(), thought) == 0
    assert opened_values("<think>\n", ThinkFormatRule(), thought) == 1
    assert opened_values("<think>\n", ThinkFormatRule(), [OPEN, *thought]) == 0, "a second tag"
    assert opened_values("<think>\n", PatternRule(pattern="<think>\na</think>.*"), thought) == 1
    assert opened_values("<think>\n", AnswerSetRule(), thought) == 1
    assert opened_values("答案：A", AnswerSetRule(), [B, STOP], 0b11) == 1
    assert opened_values("答案：A", AnswerSetRule(), [STOP]) == 1
    assert opened_values("答案：A", AnswerSetRule(), [MARK, B, STOP], 0b10) == 1
    assert opened_values("<think>\n", LengthRule(max_length=5, buffer=2), thought) == -1, "generated tokens alone"
    assert opened_values("aaaa", RepetitionRule(ngram=1), [A_LOW, STOP]) == 0


def test_what_the_template_has_opened_is_no_reason_for_another_trace() -> None:
    plain, opened = (
        jax.tree.structure(compile_rules([AnswerSetRule()], BYTES, [STOP], opened=text, cache_dir=None))
        for text in ("", "<think>\n答案：A")
    )
    assert plain == opened


def test_a_rule_that_cannot_be_met_after_what_is_opened_is_refused() -> None:
    """A template that thinks nothing, as Qwen3's without thinking: `think_format` would be 0 for ever."""
    with pytest.raises(UserError, match=r"`think_format`: every response would get 0.*already written.*chat template"):
        compile_rules([ThinkFormatRule()], BYTES, [STOP], opened="<think>\n\n</think>\n\n", cache_dir=None)
