"""What a rule may say in a config: one frozen dataclass a rule, told apart by the field `rule`.

What a rule means is in `psyche_jax.rewards.reference`.
"""

from __future__ import annotations

import difflib
import functools
import math
import operator
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from psyche_jax.errors import UsageError
from psyche_jax.rewards.regex import parse

LETTERS = string.ascii_uppercase
FULL_WIDTH = 0xFEE0  # from "A" to "Ａ"
MAX_NGRAM = 16
MAX_STATES = 2**15 - 1  # states are int16 in the tables

FORMS = ("markers", "markdown", "brackets", "texts", "lines", "boxed", "alone", "reasons")
"""Ways to write an answer that a rule may know; docs/rewards.md has an example of each."""
READINGS = {"strict": (), "natural": FORMS}

PatternFlag = Literal["ASCII", "DOTALL", "IGNORECASE", "MULTILINE"]


@dataclass(frozen=True, kw_only=True)
class _Rule:
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    rule: str
    """Which rule this is."""
    name: str = ""
    """The name under which its value is reported; by default the rule's."""
    weight: float = 1.0
    """Multiplies its value in the total."""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.rule)
        self._require(abs(self.weight) <= 1e6, "weight", "must be a number from -1e6 to 1e6")

    def _require(self, met: bool, field: str, problem: str) -> None:
        if not met:
            raise UsageError(f"reward rule `{self.name}`: `{field}` {problem}; got {getattr(self, field)!r}")

    def _to_tuple(self, field: str) -> None:
        object.__setattr__(self, field, tuple(getattr(self, field)))


@dataclass(frozen=True, kw_only=True)
class PatternRule(_Rule):
    """1 where `re.fullmatch(pattern, text, flags)` matches, else 0."""

    rule: Literal["pattern"] = "pattern"
    pattern: str
    """A regular expression of Python's `re`, as far as an automaton can match it (docs/rewards.md)."""
    flags: tuple[PatternFlag, ...] = ()
    """Flags of `re`."""
    require_stop: bool = False
    """Whether a truncated response (one without a stop token) gets 0."""
    max_states: int = 4096
    """The most states that the automaton over characters may have."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._to_tuple("flags")
        known = {"ASCII", "DOTALL", "IGNORECASE", "MULTILINE"}
        self._require(set(self.flags) <= known, "flags", f"may hold {', '.join(sorted(known))}")
        self._require(2 <= self.max_states <= MAX_STATES, "max_states", f"must be from 2 to {MAX_STATES}")
        try:
            parse(self.pattern, self.re_flags)
        except UsageError as error:
            raise UsageError(f"reward rule `{self.name}`: {error}") from error

    @property
    def re_flags(self) -> int:
        """The flags as `re` takes them."""
        return functools.reduce(operator.or_, (re.RegexFlag[name] for name in self.flags), re.NOFLAG)


@dataclass(frozen=True, kw_only=True)
class AnswerSetRule(_Rule):
    """Credit for the option letters after the last marker; see `reference.extract_letters`."""

    rule: Literal["answer_set"] = "answer_set"
    reading: str = "strict"
    """Which forms of answers are read: `strict` none, `natural` all."""
    forms: tuple[str, ...] | None = None
    """The forms of answers to read, instead of those of `reading`."""
    markers: tuple[str, ...] = ("答案：", "答案:")
    """The letters follow the last of these."""
    answer_after: str | None = "</think>"
    """Markers before the last of these are reasoning and do not count. None: all count."""
    letters: str | None = None
    """The option letters; None: A to Z, or A to G if forms are read. A line with any other letter is not read."""
    lower_case: bool = False
    """Whether `a` counts as `A`."""
    separators: str = "、,，;；和与及 \t\u3000"
    """Characters that may occur anywhere in the line."""
    closers: str = "。．.!！)）]】」』\"'”’*"  # noqa: RUF100
    """Characters that may come after the letters."""
    credit: Literal["strict", "elastic"] = "strict"
    """strict: 1 for exactly the right letters; elastic: the share of right letters if none is wrong."""
    require_stop: bool = False
    """Whether a truncated response (one without a stop token) gets 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._to_tuple("markers")
        self._check_named("reading", [self.reading], READINGS)
        if self.forms is not None:
            self._to_tuple("forms")
            self._check_named("forms", self.forms, FORMS)
        self._require(bool(self.markers) and all(self.markers), "markers", "needs at least one, and none may be empty")
        if self.answer_after is not None:
            self._require(bool(self.answer_after), "answer_after", "must not be empty (use null for none)")
            clash = [m for m in self.markers if self.answer_after in m or m in self.answer_after]
            self._require(not clash, "answer_after", f"must not contain a marker or be part of one ({clash})")
        letters = LETTERS if self.letters is None else self.letters
        options = set(letters)
        self._require(
            bool(options) and options <= set(LETTERS) and len(options) == len(letters),
            "letters",
            "must be distinct letters from A to Z",
        )
        self._require(self.credit in ("strict", "elastic"), "credit", "must be `strict` or `elastic`")
        taken = options | {chr(ord(c) + FULL_WIDTH) for c in options}
        taken |= {c.lower() for c in taken} if self.lower_case else set()
        taken |= {"\r", "\n"}
        self._require(not taken & set(self.separators), "separators", "must hold no letter and no line end")
        taken |= set(self.separators)
        self._require(not taken & set(self.closers), "closers", "must hold no letter, no separator and no line end")

    def _check_named(self, field: str, names: Iterable[str], known: Iterable[str]) -> None:
        for name in names:
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            self._require(name in known, field, f"has no {name!r}; {hint}known: {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class ThinkFormatRule(_Rule):
    """1 where the response is one `<think>` thought `</think>`, an answer and a stop token, else 0."""

    rule: Literal["think_format"] = "think_format"


@dataclass(frozen=True, kw_only=True)
class LengthRule(_Rule):
    """DAPO's soft overlong penalty: 0 up to `max_length - buffer` tokens, then falling to -1."""

    rule: Literal["length"] = "length"
    max_length: int
    """Tokens at which the penalty is -1."""
    buffer: int = 0
    """The penalty falls to -1 over this many tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.max_length >= 1, "max_length", "must be at least 1")
        self._require(0 <= self.buffer <= self.max_length, "buffer", "must be from 0 to max_length")


@dataclass(frozen=True, kw_only=True)
class RepetitionRule(_Rule):
    """The share of token n-grams that occurred before (0 to 1): give it a negative weight."""

    rule: Literal["repetition"] = "repetition"
    ngram: int = 4
    """Length of an n-gram, in tokens."""
    weight: float = -1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(1 <= self.ngram <= MAX_NGRAM, "ngram", f"must be from 1 to {MAX_NGRAM}")


@dataclass(frozen=True, kw_only=True)
class FunctionReward(_Rule):
    """A Python function that scores responses, on the host; see `rewards/functions.py`."""

    rule: Literal["function"] = "function"
    function: str
    """`module:function`, importable or in the current folder."""
    timeout_seconds: float = 60.0
    """How long one call, with all responses of a step, may take."""
    on_error: Literal["stop", "absent"] = "stop"
    """If it fails: end the run, or continue as if it had returned None for every response."""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.function.rpartition(":")[2])
        super().__post_init__()
        module, _, function = self.function.partition(":")
        named = all(part.isidentifier() for part in (*module.split("."), *function.split(".")))
        self._require(named, "function", "must have the form module:function")
        self._require(0 < self.timeout_seconds < math.inf, "timeout_seconds", "must be positive")


RuleConfig = PatternRule | AnswerSetRule | ThinkFormatRule | LengthRule | RepetitionRule
"""Rules on token ids, computed in the graph."""
RewardConfig = Annotated[RuleConfig | FunctionReward, Field(discriminator="rule")]
"""What the list of rewards in a config may hold."""


def check_rules(rules: Sequence[RuleConfig | FunctionReward]) -> None:
    """Raises UsageError where two rules share a name."""
    names = [rule.name for rule in rules]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two reward rules are called `{name}`: give one of them another `name`")
