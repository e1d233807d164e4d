"""Deterministic automata over characters, bytes and tokens, as numpy tables, and the ways between them.

An automaton starts in state 0. Its input is a symbol: a class of characters, a byte, or a class of tokens.
Besides the next state, a (state, symbol) has an effect on an int32 register of letters: the register is
cleared if the bit CLEAR is set, and then the other bits are or-ed in. Automata that only accept or reject
have effect 0 everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

CODE_POINTS = 0x110000
CLEAR = 1 << 30

Ints = NDArray[np.int32]
Wide = NDArray[np.int64]
State = TypeVar("State", bound=Hashable)


class TooLarge(Exception):  # noqa: N818
    """An automaton outgrew its limit; the message says which. Callers name the rule."""


@dataclass(frozen=True)
class Automaton:
    """`next` and `effect` int32 [states, symbols], `accept` bool [states]; the start is state 0."""

    next: Ints
    effect: Ints
    accept: NDArray[np.bool_]


@dataclass(frozen=True)
class CharacterAutomaton:
    """An automaton over classes of characters: `class_of` int32 [CODE_POINTS] gives each character's."""

    class_of: Ints
    table: Automaton


@dataclass(frozen=True)
class TokenAutomaton:
    """An automaton over token ids, which is what is scanned in the graph.

    `class_of` [tokens] maps a token to its class; `next` [states, classes]; `effect` [states, classes] says which of
    `effects` int32 [n] a transition has, both None if none has any; `accept` bool [states]. `dead` is a state that
    nothing leaves or accepts. Class 0 leads there from everywhere, and is that of tokens without bytes. `start` and
    `letters` are int32 scalars: the state and the register before the first token.
    """

    class_of: NDArray[np.integer]
    next: NDArray[np.integer]
    effect: NDArray[np.integer] | None
    effects: Ints | None
    accept: NDArray[np.bool_]
    start: Ints
    letters: Ints

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.class_of, self.next, self.effect, self.effects) if a is not None)


def group_rows(rows: NDArray[np.integer]) -> tuple[Wide, Wide]:
    """Groups equal rows of [n, m]: (the index of one row a group, the group [n] of each row)."""
    if not len(rows):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    weights = np.random.default_rng(rows.shape[1]).integers(1, 2**63, rows.shape[1], dtype=np.uint64) | 1
    mixed = rows.astype(np.uint64)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    _, first, group = np.unique((mixed * weights).sum(axis=1), return_index=True, return_inverse=True)
    if not np.array_equal(rows[first[group]], rows):  # two different rows with one hash
        _, first, group = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return first, group.reshape(-1)


def explore(
    start: State,
    successors: Callable[[State], list[tuple[State, int]]],
    accepts: Callable[[State], bool],
    max_states: int,
) -> Automaton:
    """The automaton of all states reached from `start`; `successors` gives (state, effect) for each symbol.

    Raises TooLarge beyond `max_states`.
    """
    ids: dict[State, int] = {start: 0}
    order = [start]
    next_rows: list[list[int]] = []
    effect_rows: list[list[int]] = []
    for state in order:  # grows while it is walked
        next_row, effect_row = [], []
        for target, effect in successors(state):
            if target not in ids:
                if len(ids) >= max_states:
                    raise TooLarge(f"more than {max_states} states")
                ids[target] = len(ids)
                order.append(target)
            next_row.append(ids[target])
            effect_row.append(effect)
        next_rows.append(next_row)
        effect_rows.append(effect_row)
    accept = np.array([accepts(state) for state in order], bool)
    return Automaton(np.array(next_rows, np.int32), np.array(effect_rows, np.int32), accept)


def minimize(automaton: Automaton) -> Automaton:
    """The smallest automaton with the same acceptance and effects (Moore's partition refinement)."""
    _, block = group_rows(np.concatenate([automaton.accept[:, None], automaton.effect], axis=1))
    blocks = int(block.max()) + 1
    while True:
        rows = np.concatenate([block[:, None], block[automaton.next]], axis=1)
        member, block = group_rows(rows)
        if len(member) == blocks:
            break
        blocks = len(member)
    rank = np.empty(blocks, np.int64)  # in order of first members, so that the start stays 0
    order = np.argsort(member)
    rank[order] = np.arange(blocks)
    member, block = member[order], rank[block]
    next_state = block[automaton.next[member]].astype(np.int32)
    return Automaton(next_state, automaton.effect[member], automaton.accept[member])


def with_dead_state(automaton: Automaton) -> tuple[Automaton, int]:
    """The automaton with a state that nothing leaves or accepts (it may have one), and which that is."""
    states = np.arange(len(automaton.accept))
    stays = (automaton.next == states[:, None]).all(axis=1) & (automaton.effect == 0).all(axis=1)
    dead = np.flatnonzero(stays & ~automaton.accept)
    if len(dead):
        return automaton, int(dead[0])
    symbols = automaton.next.shape[1]
    extended = Automaton(
        np.concatenate([automaton.next, np.full((1, symbols), len(states), np.int32)]),
        np.concatenate([automaton.effect, np.zeros((1, symbols), np.int32)]),
        np.append(automaton.accept, False),
    )
    return extended, len(states)


def difference(left: CharacterAutomaton, right: CharacterAutomaton, max_states: int) -> CharacterAutomaton:
    """Accepts what `left` accepts and `right` does not. Effects are dropped."""
    member, class_of = group_rows(np.stack([left.class_of, right.class_of], axis=1))
    left_next = left.table.next[:, left.class_of[member]].tolist()
    right_next = right.table.next[:, right.class_of[member]].tolist()
    table = explore(
        (0, 0),
        lambda state: [(pair, 0) for pair in zip(left_next[state[0]], right_next[state[1]], strict=True)],
        lambda state: bool(left.table.accept[state[0]] and not right.table.accept[state[1]]),
        max_states,
    )
    return CharacterAutomaton(class_of.astype(np.int32), minimize(table))


def to_bytes(automaton: CharacterAutomaton, max_states: int) -> Automaton:
    """The same automaton over the bytes of UTF-8: [states, 256]. Bytes that are not valid UTF-8 lead to a
    dead state, and an end within a character is not accepted. Effects happen at a character's last byte.

    Raises TooLarge beyond `max_states`.
    """
    table, dead = with_dead_state(automaton.table)
    states = len(table.accept)
    # A transition as one number: the state in the low half, the effect in the high half. The extra symbol at
    # the end (index -1) is for bytes that are part of no character.
    packed = (table.effect.astype(np.int64) << 32) | table.next
    packed = np.concatenate([packed, np.full((states, 1), dead, np.int64)], axis=1)

    class_of = automaton.class_of.copy()
    class_of[0xD800:0xE000] = -1  # surrogates are not text
    # Blocks of 64 characters share all bytes but the last, blocks of 64 blocks all but the last two.
    first, last_byte = group_rows(class_of.reshape(-1, 64))
    last_rows = class_of.reshape(-1, 64)[first]
    third_of_4 = last_byte.reshape(-1, 64)  # [272, 64]
    last_of_3 = third_of_4[:16].copy()
    last_of_3[0, :32] = -1  # overlong
    first, second_of_4 = group_rows(third_of_4)
    third_rows = third_of_4[first]
    second_rows = np.full((5, 64), -1, np.int64)
    second_rows.flat[16 : len(second_of_4)] = second_of_4[16:]  # before: overlong; after: beyond U+10FFFF

    # States within a character: one for each different row of transitions on the bytes that may come next, whichever
    # character they belong to.
    continuations: dict[bytes, int] = {}  # a row of 64 packed transitions → its state
    rows: list[Wide] = []

    def intern(wanted: Wide) -> Wide:
        """The states [n + 1] whose transitions on bytes 0x80..0xBF are rows [n, 64]; the last is `dead`."""
        found = np.full(len(wanted) + 1, dead, np.int64)
        for i in np.flatnonzero((wanted != dead).any(axis=1)):
            key = wanted[i].tobytes()
            if key not in continuations:
                if states + len(continuations) >= max_states:
                    raise TooLarge(f"more than {max_states} states over bytes")
                continuations[key] = states + len(continuations)
                rows.append(wanted[i])
            found[i] = continuations[key]
        return found

    # Built backwards from the last byte: what one byte before the end leads to, then two, then three.
    full = np.full((states, 256), dead, np.int64)
    ascii_classes = class_of[:128]
    for state in range(states):
        if state == dead:
            continue
        after = packed[state]
        one_left = intern(after[last_rows])
        full[state, :0x80] = after[ascii_classes]
        full[state, 0xC2:0xE0] = one_left[last_byte[2:32]]
        full[state, 0xE0:0xF0] = intern(one_left[last_of_3])[:-1]
        two_left = intern(one_left[third_rows])
        full[state, 0xF0:0xF5] = intern(two_left[second_rows])[:-1]
    # States within a character behind the old ones; a text that ends in one of them is not accepted.
    amid = np.full((len(rows), 256), dead, np.int64)
    if rows:
        amid[:, 0x80:0xC0] = np.stack(rows)
    full = np.concatenate([full, amid])
    accept = np.concatenate([table.accept, np.zeros(len(rows), bool)])
    return Automaton((full & 0xFFFFFFFF).astype(np.int32), (full >> 32).astype(np.int32), accept)


def to_tokens(
    automaton: Automaton, token_bytes: Sequence[bytes | None], max_bytes: int, opened: bytes = b""
) -> TokenAutomaton:
    """Lifts an automaton over bytes to tokens, with tokens that act alike on all states in one class. Its start is
    where `opened` leads, with the letters read on the way.

    What a token does is a function of states. The functions of all prefixes of all tokens are found byte by
    byte; equal ones are kept once, so the work goes with how many differ, not with the vocabulary.

    Raises TooLarge if the tables need more than `max_bytes`.
    """
    # Bytes that act alike on all states are one class, so that fewer functions have to be composed.
    automaton, dead = with_dead_state(automaton)
    states = len(automaton.accept)
    first, byte_class = group_rows(np.concatenate([automaton.next, automaton.effect]).T)
    byte_next, byte_effect = automaton.next[:, first].T, automaton.effect[:, first].T  # [byte classes, states]
    has_effects = bool(automaton.effect.any())

    # Function 0 is what tokens without bytes do, function 1 what empty tokens do.
    targets = [np.full(states, dead, np.int32), np.arange(states, dtype=np.int32)]
    effects = [np.zeros(states, np.int32), np.zeros(states, np.int32)]
    known = {_key(t, e, has_effects): i for i, (t, e) in enumerate(zip(targets, effects, strict=True))}

    # All tokens at once, a byte position at a time, the longest tokens first so that those still running are a prefix.
    # Of each pair (function of the prefix, class of the next byte) the composition is made once.
    with_bytes = np.array([i for i, b in enumerate(token_bytes) if b is not None], np.int64)
    texts = [b for b in token_bytes if b is not None]
    lengths = np.array([len(b) for b in texts], np.int64)
    starts = np.cumsum(lengths) - lengths
    symbols = byte_class[np.frombuffer(b"".join(texts), np.uint8)]
    by_length = np.argsort(-lengths, kind="stable")
    function = np.ones(len(texts), np.int64)
    for position in range(int(lengths.max(initial=0))):
        active = by_length[: np.searchsorted(-lengths[by_length], -position)]
        keys = function[active] * len(byte_next) + symbols[starts[active] + position]
        pairs, which = np.unique(keys, return_inverse=True)
        extended = np.empty(len(pairs), np.int64)
        for i, (prefix, symbol) in enumerate(zip(*divmod(pairs, len(byte_next)), strict=True)):
            target = byte_next[symbol][targets[prefix]]
            effect = effects[0]
            if has_effects:
                before, then = effects[prefix], byte_effect[symbol][targets[prefix]]
                effect = np.where(then & CLEAR, then, before | then)
            key = _key(target, effect, has_effects)
            if key not in known:
                known[key] = len(targets)
                targets.append(target)
                effects.append(effect)
                if len(targets) * states * 4 > 4 * max_bytes:
                    raise TooLarge(f"more than {max_bytes >> 20} MiB of tables")
            extended[i] = known[key]
        function[active] = extended[which]

    # Only the functions of whole tokens are kept: each is a class of tokens.
    used, class_of_known = np.unique(np.append(function, 0), return_inverse=True)  # function 0 stays class 0
    class_of = np.zeros(len(token_bytes), np.int64)
    class_of[with_bytes] = class_of_known[:-1]
    kind_of, kinds = None, None
    if has_effects:
        by_function = np.stack([effects[i] for i in used], axis=1)
        kinds = np.sort(np.unique_values(by_function))  # by hashing: tens of millions of numbers, some hundred kinds
        kind_of = np.searchsorted(kinds, by_function).astype(np.min_scalar_type(len(kinds)))
    # Where the template has already opened a thought, responses do not start in the first state.
    start, letters = 0, 0
    for byte in opened:
        change = int(automaton.effect[start, byte])
        letters = ((0 if change & CLEAR else letters) | change) & (CLEAR - 1)
        start = int(automaton.next[start, byte])
    table = TokenAutomaton(
        class_of=class_of.astype(np.int16 if len(used) <= 2**15 else np.int32),
        next=np.stack([targets[i] for i in used], axis=1).astype(np.int16 if states <= 2**15 else np.int32),
        effect=kind_of,
        effects=kinds,
        accept=automaton.accept,
        start=np.asarray(start, np.int32),
        letters=np.asarray(letters, np.int32),
    )
    if table.nbytes > max_bytes:
        raise TooLarge(f"{table.nbytes / 2**20:.0f} MiB of tables, more than {max_bytes >> 20}")
    return table


def _key(target: Ints, effect: Ints, has_effects: bool) -> bytes:
    return target.tobytes() + effect.tobytes() if has_effects else target.tobytes()
