"""The rules on text as automata over tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from psyche_jax.errors import UsageError
from psyche_jax.rewards.automaton import (
    CLEAR,
    CODE_POINTS,
    CharacterAutomaton,
    TokenAutomaton,
    TooLarge,
    explore,
    intersect,
    minimize,
    to_bytes,
    to_tokens,
)
from psyche_jax.rewards.config import FULL_WIDTH, MAX_STATES, AnswerSetRule, PatternRule, ThinkFormatRule
from psyche_jax.rewards.reference import CLOSE, OPEN
from psyche_jax.rewards.regex import compile_pattern

TextRule = PatternRule | AnswerSetRule | ThinkFormatRule
MAX_TABLE_BYTES = 64 << 20


def compile_text_rule(rule: TextRule, token_bytes: Sequence[bytes | None], opened: str = "") -> TokenAutomaton:
    """The table of a rule, for responses that go on from the text `opened`.

    Raises UsageError if its automaton is too large, or nothing that the tokenizer can spell is worth anything.
    """
    advice = "simplify the rule"
    try:
        if isinstance(rule, PatternRule):
            advice = "simplify the pattern (counted repetition multiplies states)"
            try:
                characters = compile_pattern(rule.pattern, rule.re_flags, rule.max_states)
            except TooLarge:
                advice += " or raise `max_states`"
                raise
        elif isinstance(rule, ThinkFormatRule):
            characters = think_format()
        else:
            characters = answer_set(rule)
        table = to_tokens(to_bytes(characters, MAX_STATES), token_bytes, MAX_TABLE_BYTES, opened.encode())
    except TooLarge as error:
        raise UsageError(f"reward rule `{rule.name}`: its automaton has {error}: {advice}") from error
    if not _can_be_met(table):
        after, other = "", ""
        if opened:
            after, other = f" after {opened!r}, which the chat template has already written", " or chat template"
        raise UsageError(
            f"reward rule `{rule.name}`: every response would get 0, since the tokens of this tokenizer cannot spell "
            f"what it asks for{after}; change the rule, or take another tokenizer{other}"
        )
    return table


def _can_be_met(table: TokenAutomaton) -> bool:
    """Whether some tokens lead to a state that accepts, and, if letters matter, to a letter on the way."""
    reached = np.zeros(len(table.accept), bool)
    new = table.start.reshape(1)
    while len(new):
        reached[new] = True
        targets = np.unique(table.next[new])
        new = targets[~reached[targets]]
    reads = table.effect is None or bool(table.letters or (table.effect[reached] & (CLEAR - 1)).any())
    return bool(table.accept[reached].any()) and reads


def think_format() -> CharacterAutomaton:
    """White space, one thought with content, an answer with content; no tag a second time."""
    once_open, once_close = re.escape(OPEN), re.escape(CLOSE)
    result = compile_pattern(rf"\s*{once_open}.*\S.*{once_close}.*\S.*", re.DOTALL)
    for tag in (once_open, once_close):
        twice = compile_pattern(f".*{tag}.*{tag}.*", re.DOTALL)
        result = intersect(result, twice, not_right=True, max_states=MAX_STATES)
    return result


# Where on the line after a marker a response is: nowhere, among letters and separators, or after a closer.
_OFF, _LIST, _CLOSED = range(3)


def answer_set(rule: AnswerSetRule) -> CharacterAutomaton:
    """Reads the letters after the last marker into the register; every text is accepted.

    A state is (how much of a marker or of `answer_after` was just read, where on the answer's line we are).
    """
    spellings = {letter: 1 << (ord(letter) - ord("A")) for letter in rule.letters}
    if rule.lower_case:
        spellings |= {letter.lower(): bit for letter, bit in spellings.items()}
    spellings |= {chr(ord(letter) + FULL_WIDTH): bit for letter, bit in spellings.items()}
    watched = set(rule.markers) | ({rule.answer_after} if rule.answer_after is not None else set())
    parts = {text[:end] for text in watched for end in range(len(text) + 1)}
    alphabet = sorted(set("\r\n").union(*watched, spellings, rule.separators, rule.closers))

    def read(part: str) -> str:
        """The longest end of what was read that begins something watched."""
        return next(part[i:] for i in range(len(part) + 1) if part[i:] in parts)

    def step(state: tuple[str, int], symbol: int) -> tuple[tuple[str, int], int]:
        part, where = state
        if symbol == len(alphabet):  # any other character
            return ("", _OFF), CLEAR if where != _OFF else 0
        character = alphabet[symbol]
        part = read(part + character)
        if rule.answer_after is not None and part.endswith(rule.answer_after):
            return (part, _OFF), CLEAR
        if part.endswith(rule.markers):
            return (part, _LIST), CLEAR
        if where == _OFF or character in "\r\n":
            return (part, _OFF), 0
        if character in spellings and where == _LIST:
            return (part, _LIST), spellings[character]
        if character in rule.separators:
            return (part, where), 0
        if character in rule.closers:
            return (part, _CLOSED), 0
        return (part, _OFF), CLEAR

    def successors(state: tuple[str, int]) -> list[tuple[tuple[str, int], int]]:
        return [step(state, symbol) for symbol in range(len(alphabet) + 1)]

    table = explore(("", _OFF), successors, lambda state: True, MAX_STATES)
    class_of = np.full(CODE_POINTS, len(alphabet), np.int32)
    class_of[[ord(character) for character in alphabet]] = np.arange(len(alphabet))
    return CharacterAutomaton(class_of, minimize(table))
