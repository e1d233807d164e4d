"""Minimizing and lifting, against walking byte by byte."""

from __future__ import annotations

import numpy as np
import pytest

from psyche_jax.rewards.automaton import (
    CLEAR,
    Automaton,
    TooLarge,
    explore,
    group_rows,
    minimize,
    to_tokens,
)


def random_automaton(seed: int, states: int, symbols: int) -> Automaton:
    rng = np.random.default_rng(seed)
    effects = np.array([0, 0, 0, 0, 1, 2, CLEAR, CLEAR | 4], np.int32)
    return Automaton(
        rng.integers(0, states, (states, symbols), dtype=np.int32),
        rng.choice(effects[: rng.choice([1, 8])], (states, symbols)),
        rng.random(states) < 0.3,
    )


def walk(automaton: Automaton, symbols: list[int]) -> tuple[int, int]:
    state = register = 0
    for symbol in symbols:
        effect = int(automaton.effect[state, symbol])
        register = (0 if effect & CLEAR else register) | (effect & ~CLEAR)
        state = int(automaton.next[state, symbol])
    return state, register


def test_group_rows() -> None:
    rows = np.random.default_rng(0).integers(-2, 2, (500, 4))
    first, group = group_rows(rows)
    np.testing.assert_array_equal(rows[first[group]], rows)
    assert len(first) == len({tuple(row) for row in rows.tolist()})


@pytest.mark.parametrize("seed", range(30))
def test_minimize_keeps_the_meaning_and_is_minimal(seed: int) -> None:
    automaton = random_automaton(seed, states=seed + 1, symbols=2)
    smallest = minimize(automaton)
    rng = np.random.default_rng(seed)
    for _ in range(50):
        symbols = rng.integers(0, 2, rng.integers(0, 12)).tolist()
        (state, register), (small, small_register) = walk(automaton, symbols), walk(smallest, symbols)
        assert (automaton.accept[state], register) == (smallest.accept[small], small_register)
    # Two states are told apart by some string: table filling, the textbook way.
    n = len(smallest.accept)
    apart = smallest.accept[:, None] != smallest.accept[None]
    apart |= (smallest.effect[:, None] != smallest.effect[None]).any(axis=-1)
    for _ in range(n):
        for symbol in range(2):
            target = smallest.next[:, symbol]
            apart |= apart[target[:, None], target[None]]
    assert (apart | np.eye(n, dtype=bool)).all()


@pytest.mark.parametrize("seed", range(20))
def test_a_token_does_what_its_bytes_do(seed: int) -> None:
    automaton = random_automaton(seed, states=6, symbols=256)
    rng = np.random.default_rng(seed)
    tokens: list[bytes | None] = [bytes(rng.integers(0, 256, rng.integers(0, 6)).tolist()) for _ in range(80)]
    tokens[5] = tokens[79] = None
    lifted = to_tokens(automaton, tokens, 1 << 20)
    assert lifted.next.dtype == np.int16
    assert (lifted.effect is None) == (not automaton.effect.any())
    dead = {int(s) for s in lifted.next[:, 0]}
    assert len(dead) == 1 and not lifted.accept[list(dead)].any()
    for _ in range(100):
        ids = rng.integers(0, 80, rng.integers(0, 8)).tolist()
        state = register = 0
        for i in ids:
            symbol = lifted.class_of[i]
            effect = 0
            if lifted.effect is not None and lifted.effects is not None:
                effect = int(lifted.effects[lifted.effect[state, symbol]])
            register = (0 if effect & CLEAR else register) | (effect & ~CLEAR)
            state = int(lifted.next[state, symbol])
        if any(tokens[i] is None for i in ids):
            assert {state} == dead
            continue
        expected, expected_register = walk(automaton, [b for i in ids for b in tokens[i] or b""])
        assert (lifted.accept[state], register) == (automaton.accept[expected], expected_register)


def test_limits() -> None:
    with pytest.raises(TooLarge, match="more than 10 states"):
        explore(0, lambda state: [(state + 1, 0)], lambda state: False, 10)
    automaton = random_automaton(0, states=200, symbols=256)
    tokens = [bytes([a, b]) for a in range(256) for b in range(100)]
    with pytest.raises(TooLarge, match="MiB"):
        to_tokens(automaton, tokens, 1 << 20)
