"""Regular expressions as automata over characters: the meaning of `re.fullmatch`, exactly.

The pattern is validated by `re` itself, and what a single character matches (`\\w`, `[^，、]`, `.`, under the
flags) is asked of `re` for every code point. Only what is between them is done here: sequence, choice, groups
and repetition. Greed makes no difference to a full match. What is not a regular language, or depends on the
order in which `re` tries, is refused with its place: look-around, back-references, conditions, atomic groups,
possessive repetition, word boundaries. Anchors are allowed where a full match makes them true.
"""

from __future__ import annotations

import functools
import operator
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

import numpy as np

from psyche_jax.errors import UsageError
from psyche_jax.rewards.automaton import (
    CODE_POINTS,
    CharacterAutomaton,
    TooLarge,
    explore,
    group_rows,
    minimize,
)

MAX_STATES = 4096  # over characters


class Ambiguous(Exception):  # noqa: N818
    """A text, the argument, that a pattern reads in two ways."""


Span = tuple[int, int]  # code points, the end not included


@dataclass(frozen=True)
class Characters:
    """One character of a set; `captured` if it is in a capturing group."""

    spans: tuple[Span, ...]
    captured: bool = False


@dataclass(frozen=True)
class Anchor:
    """`^`, `$`, `\\A` or `\\Z`."""

    text: str
    place: int


@dataclass(frozen=True)
class Series:
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    options: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    item: Node
    least: int
    most: int | None


Node = Characters | Anchor | Series | Choice | Repeat

_ESCAPE = re.compile(r"\\(?:0[0-7]{0,2}|[1-3][0-7]{2}|x..|u.{4}|U.{8}|N\{[^}]*\}|.)", re.DOTALL)
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_COMMENT = re.compile(r"\(\?#[^)]*\)")
_REPEAT = re.compile(r"[*+?]|\{(?!\})(?P<least>[0-9]*)(?P<range>,(?P<most>[0-9]*))?\}")
_GROUP = re.compile(r"\((?:\?P<[^>]*>|\?(?P<on>[a-zA-Z]*)(?:-(?P<off>[a-zA-Z]*))?(?P<end>[:)])|(?!\?))")
_REFUSED_GROUPS = {
    "(?=": "look-ahead",
    "(?!": "look-ahead",
    "(?<=": "look-behind",
    "(?<!": "look-behind",
    "(?P=": "a back-reference",
    "(?(": "a condition on a group",
    "(?>": "an atomic group",
}
_CHARACTER_FLAGS = re.ASCII | re.DOTALL | re.IGNORECASE
_DEEPEST = 100  # groups within groups: as deep as Python's stack surely allows
_ADVICE = "rules are automata and cannot do this; write the pattern without it"


def refuse(pattern: str, place: int, what: str, advice: str = _ADVICE) -> NoReturn:
    """Raises UsageError for what is at index `place` of the pattern."""
    found = pattern[place : place + 8]
    raise UsageError(f"pattern {pattern!r}: {what} at position {place} ({found!r}): {advice}")


class _Parser:
    """A recursive descent over a pattern that `re` has accepted."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0
        self.depth = 0
        self.captures = 0

    def choice(self, flags: int) -> Node:
        options = [self.sequence(flags)]
        while self.pattern.startswith("|", self.at):
            self.at += 1
            options.append(self.sequence(flags))
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def sequence(self, flags: int) -> Node:
        items: list[Node] = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            if comment := _COMMENT.match(self.pattern, self.at):
                self.at = comment.end()
            elif items and (repeat := _REPEAT.match(self.pattern, self.at)):
                items[-1] = self.repeat(items[-1], repeat)
            else:
                items.append(self.item(flags))
        return items[0] if len(items) == 1 else Series(tuple(items))

    def repeat(self, item: Node, found: re.Match[str]) -> Node:
        self.at = found.end()
        if self.pattern.startswith("+", self.at):
            refuse(self.pattern, found.start(), "possessive repetition")
        if self.pattern.startswith("?", self.at):  # lazy
            self.at += 1
        if found[0] in "*+?":
            return Repeat(item, int(found[0] == "+"), 1 if found[0] == "?" else None)
        least, most = found["least"], found["most"] if found["range"] else found["least"]
        return Repeat(item, int(least or 0), int(most) if most else None)

    def item(self, flags: int) -> Node:
        place, pattern = self.at, self.pattern
        if pattern[place] == "(":
            return self.group(flags)
        if pattern[place] in "^$":
            self.at += 1
            return Anchor(pattern[place], place)
        if pattern[place] == "\\":
            escape = _ESCAPE.match(pattern, place)
            assert escape is not None  # `re` has accepted it
            self.at = escape.end()
            if escape[0] in (r"\b", r"\B"):
                refuse(pattern, place, "a word boundary")
            if escape[0] in (r"\A", r"\Z"):
                return Anchor(escape[0], place)
            if len(escape[0]) == 2 and escape[0][1] in "123456789":
                refuse(pattern, place, "a back-reference")
        elif pattern[place] == "[":
            found = _CLASS.match(pattern, place)
            assert found is not None
            self.at = found.end()
        else:
            self.at += 1
        return Characters(spans_of(pattern[place : self.at], flags & _CHARACTER_FLAGS), self.captures > 0)

    def group(self, flags: int) -> Node:
        place = self.at
        for start, what in _REFUSED_GROUPS.items():
            if self.pattern.startswith(start, place):
                refuse(self.pattern, place, what)
        found = _GROUP.match(self.pattern, place)
        assert found is not None
        self.at = found.end()
        on, off = (_flags(found["on"] or ""), _flags(found["off"] or ""))
        if on & re.VERBOSE:
            refuse(self.pattern, place, "the flag VERBOSE", "write the pattern without spaces and comments")
        if found["end"] == ")":  # flags of the whole pattern, which `re` has reported
            return Series(())
        if on & (re.ASCII | re.UNICODE):
            flags &= ~(re.ASCII | re.UNICODE)
        self.depth += 1
        if self.depth > _DEEPEST:
            refuse(self.pattern, place, f"a group within {_DEEPEST} others", "write it with fewer brackets")
        self.captures += found[0] == "("
        node = self.choice((flags | on) & ~off)
        self.captures -= found[0] == "("
        self.depth -= 1
        self.at += 1  # the closing bracket
        return node if isinstance(node, Series | Choice) else Series((node,))


def _flags(letters: str) -> int:
    return functools.reduce(operator.or_, (re.RegexFlag[letter.upper()] for letter in letters), re.NOFLAG)


@functools.cache
def _all_characters() -> str:
    return np.arange(CODE_POINTS, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")


@functools.lru_cache(maxsize=1024)
def spans_of(source: str, flags: int) -> tuple[Span, ...]:
    """The code points that a pattern of exactly one character matches, as `re` says."""
    if len(source) == 1 and source != "." and not flags & re.IGNORECASE:
        return ((ord(source), ord(source) + 1),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # `[[`: said once, by the pattern
        runs = re.compile(f"(?:{source})+", flags)
    return tuple(run.span() for run in runs.finditer(_all_characters()))


def parse(pattern: str, flags: int = 0) -> Node:
    """The tree of a pattern. Raises UsageError where `re` rejects it or an automaton cannot do it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            all_flags = re.compile(pattern, flags).flags
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        raise UsageError(f"pattern {pattern!r} is not a regular expression: {error}; correct it") from error
    if flags & re.VERBOSE:
        raise UsageError(f"pattern {pattern!r}: the flag VERBOSE is not supported; write it without spaces")
    tree = _Parser(pattern).choice(all_flags)
    _check_anchors(pattern, tree, first=True, last=True)
    return tree


def _check_anchors(pattern: str, node: Node, *, first: bool, last: bool) -> None:
    """Refuses an anchor that is not true in every full match. `first`: nothing comes before the node."""
    if isinstance(node, Anchor):
        if not (first if node.text in (r"\A", "^") else last):
            side = "start" if node.text in (r"\A", "^") else "end"
            advice = f"a full match needs none at the {side} of the pattern and none is allowed elsewhere"
            refuse(pattern, node.place, "an anchor", advice)
    elif isinstance(node, Choice):
        for option in node.options:
            _check_anchors(pattern, option, first=first, last=last)
    elif isinstance(node, Repeat):
        once = node.most is not None and node.most <= 1
        _check_anchors(pattern, node.item, first=first and once, last=last and once)
    elif isinstance(node, Series):
        solid = [i for i, item in enumerate(node.items) if not isinstance(item, Anchor)]
        for i, item in enumerate(node.items):
            before, after = bool(solid) and solid[0] < i, bool(solid) and solid[-1] > i
            _check_anchors(pattern, item, first=first and not before, last=last and not after)


_Reading: TypeAlias = tuple[tuple[int, int], ...]  # bits that were read, positions (as bits) reached with them


class _Positions:
    """A nondeterministic automaton: position i goes on a character of `sets[i]` to `follows[i]`, or, if that
    has no set, to all of `jumps[i]` on nothing."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.sets: list[tuple[Span, ...] | None] = []
        self.captured: list[bool] = []
        self.follows: list[list[int]] = []

    def add(self, characters: tuple[Span, ...] | None, follows: list[int], captured: bool = False) -> int:
        if len(self.sets) >= self.limit:
            raise TooLarge(f"more than {self.limit} positions")
        self.sets.append(characters)
        self.captured.append(captured)
        self.follows.append(follows)
        return len(self.sets) - 1

    def build(self, node: Node, goal: int) -> int:
        """The position from which exactly what `node` matches leads to `goal`."""
        if isinstance(node, Characters):
            return self.add(node.spans, [goal], node.captured)
        if isinstance(node, Series):
            for item in reversed(node.items):
                goal = self.build(item, goal)
            return goal
        if isinstance(node, Choice):
            return self.add(None, [self.build(option, goal) for option in node.options])
        if isinstance(node, Repeat):
            start = goal
            if node.most is None:
                start = self.add(None, [goal])
                self.follows[start].append(self.build(node.item, start))
            else:
                for _ in range(node.most - node.least):
                    start = self.add(None, [goal, self.build(node.item, start)])
            for _ in range(node.least):
                start = self.build(node.item, start)
            return start
        return goal  # an anchor, which is true

    def closure(self, position: int) -> int:
        """The positions with a set, and the goal, reached on nothing; as bits."""
        found, todo, seen = 0, [position], {position}
        while todo:
            at = todo.pop()
            if self.sets[at] is not None or at == 0:
                found |= 1 << at
                continue
            for target in self.follows[at]:
                if target not in seen:
                    seen.add(target)
                    todo.append(target)
        return found


def _character_classes(sets: Sequence[tuple[Span, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """Characters in the same sets are one class: (int32 [CODE_POINTS] class, bool [sets, classes] member)."""
    cuts = np.unique(np.array([0, CODE_POINTS] + [cut for spans in sets for span in spans for cut in span]))
    member = np.zeros((len(cuts) - 1, len(sets)), np.int32)
    for i, spans in enumerate(sets):
        for low, high in spans:
            member[np.searchsorted(cuts, low) : np.searchsorted(cuts, high), i] = 1
    first, group = group_rows(member)
    return np.repeat(group, np.diff(cuts)).astype(np.int32), member[first].T.astype(bool)


def compile_pattern(
    pattern: str, flags: int = 0, max_states: int = MAX_STATES, letters: Mapping[str, int] | None = None
) -> CharacterAutomaton:
    """The smallest automaton that accepts what `re.fullmatch(pattern, text, flags)` matches.

    It reads `letters` too: each that is matched in a capturing group (not a named one) has its bit or-ed into the
    register. A state is sets of positions, by the bits that were read on the way there and not on every way here: those
    are given out as soon as it is certain.

    Raises UsageError for patterns that are refused, TooLarge beyond `max_states`, Ambiguous if some text can be read in
    two ways, or its letters are certain only at its end.
    """
    letters = letters or {}
    positions = _Positions(4 * max_states)
    goal = positions.add(None, [])
    start = positions.build(parse(pattern, flags), goal)
    # Characters that no position tells apart are one symbol; each letter is a symbol of its own.
    own = [((ord(letter), ord(letter) + 1),) for letter in letters]
    sets = sorted({spans for spans in positions.sets if spans is not None}.union(own))
    class_of, member = _character_classes(sets)
    symbols_of = {spans: np.flatnonzero(row).tolist() for spans, row in zip(sets, member, strict=True)}
    bit_of = [0] * member.shape[1]
    for letter, bit in letters.items():
        bit_of[class_of[ord(letter)]] = bit
    came_from: dict[_Reading, tuple[_Reading, int]] = {}  # so that an ambiguity can be shown as a text

    @functools.cache
    def move(position: int) -> tuple[list[int], int]:
        """Its symbols, and the positions to which they lead."""
        spans = positions.sets[position]
        assert spans is not None  # else it would be in no closure
        return symbols_of[spans], positions.closure(positions.follows[position][0])

    def successors(state: _Reading) -> list[tuple[_Reading, int]]:
        reached: list[dict[int, int]] = [{} for _ in bit_of]  # by symbol: bits that were read → positions
        for read, here in state:
            for position in _bits(here & ~1):
                symbols, there = move(position)
                for symbol in symbols:
                    bits = read | bit_of[symbol] if positions.captured[position] else read
                    reached[symbol][bits] = reached[symbol].get(bits, 0) | there
        # Bits that all ways share are certain: they go into the register now, and out of the state.
        found = []
        for symbol, ways in enumerate(reached):
            certain = functools.reduce(operator.and_, ways) if ways else 0
            target = tuple(sorted((read & ~certain, there) for read, there in ways.items()))
            came_from.setdefault(target, (state, symbol))
            if sum(ways.values()) != functools.reduce(operator.or_, ways.values(), 0):  # one position, read in two ways
                raise Ambiguous(text_to(target))
            found.append((target, certain))
        return found

    def accepts(state: _Reading) -> bool:
        read = [bits for bits, here in state if here & 1]
        if any(read):
            raise Ambiguous(text_to(state))
        return bool(read)

    def text_to(state: _Reading) -> str:
        text = ""
        while state != begin:
            state, symbol = came_from[state]
            text = chr(int(np.argmax(class_of == symbol))) + text
        return text

    begin: _Reading = ((0, positions.closure(start)),)
    return CharacterAutomaton(class_of, minimize(explore(begin, successors, accepts, max_states)))


def _bits(number: int) -> list[int]:
    found = []
    while number:
        low = number & -number
        found.append(low.bit_length() - 1)
        number ^= low
    return found
