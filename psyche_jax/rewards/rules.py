"""The rules on text as automata over tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from psyche_jax.errors import UsageError
from psyche_jax.rewards.automaton import (
    CLEAR,
    CODE_POINTS,
    CharacterAutomaton,
    TokenAutomaton,
    TooLarge,
    difference,
    explore,
    group_rows,
    minimize,
    to_bytes,
    to_tokens,
    with_dead_state,
)
from psyche_jax.rewards.config import MAX_STATES, AnswerSetRule, PatternRule, ThinkFormatRule
from psyche_jax.rewards.reference import CLOSE, OPEN, grammar, known_forms, spellings
from psyche_jax.rewards.regex import Ambiguous, compile_pattern

TextRule = PatternRule | AnswerSetRule | ThinkFormatRule
MAX_TABLE_BYTES = 160 << 20


def compile_text_rule(rule: TextRule, token_bytes: Sequence[bytes | None], opened: str = "") -> TokenAutomaton:
    """The table of a rule, for responses that continue the text `opened`.

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
            advice = "take fewer `letters`, `markers` or `forms`"
            characters = answer_in_forms(rule) if known_forms(rule) else answer_set(rule)
        table = to_tokens(to_bytes(characters, MAX_STATES), token_bytes, MAX_TABLE_BYTES, opened.encode())
    except TooLarge as error:
        raise UsageError(f"reward rule `{rule.name}`: its automaton has {error}: {advice}") from error
    except Ambiguous as error:
        raise UsageError(
            f"reward rule `{rule.name}`: with these markers, separators, closers and forms {str(error)!r} can be read "
            "in two ways; leave some of them out"
        ) from error
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
    reads = (
        table.effect is None
        or table.effects is None
        or bool(table.letters or (table.effects[table.effect[reached]] & (CLEAR - 1)).any())
    )
    return bool(table.accept[reached].any()) and reads


def think_format() -> CharacterAutomaton:
    """White space, one thought with content, an answer with content; no tag a second time."""
    once_open, once_close = re.escape(OPEN), re.escape(CLOSE)
    result = compile_pattern(rf"\s*{once_open}.*\S.*{once_close}.*\S.*", re.DOTALL)
    for tag in (once_open, once_close):
        twice = compile_pattern(f".*{tag}.*{tag}.*", re.DOTALL)
        result = difference(result, twice, MAX_STATES)
    return result


# Where on the line after a marker a response is: nowhere, among letters and separators, or after a closer.
_OFF, _LIST, _CLOSED = range(3)


def answer_set(rule: AnswerSetRule) -> CharacterAutomaton:
    """Reads the letters after the last marker into the register; every text is accepted.

    A state is (how much of a marker or of `answer_after` was just read, where on the answer's line we are).
    """
    bits = spellings(rule)
    watched = set(rule.markers) | ({rule.answer_after} if rule.answer_after is not None else set())
    parts = {text[:end] for text in watched for end in range(len(text) + 1)}
    alphabet = sorted(set("\r\n").union(*watched, bits, rule.separators, rule.closers))

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
        if character in bits and where == _LIST:
            return (part, _LIST), bits[character]
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


@dataclass(frozen=True)
class _Reader:
    """Where a reader in forms is: the states of the automata that it runs side by side.

    `thought`: how much of `answer_after` was just read. `opens`, `leads`, `goes_on`, `denied`: what has been read since
    then; after `<think>`, nothing counts. `statement`: which one we are in, or None; `answer`, `withdrawn`: what has
    been read since its first letter.
    """

    thought: int = 0
    opens: int = 0
    leads: tuple[int, ...] = ()
    goes_on: int = 0
    denied: int = 0
    statement: int | None = None
    answer: int = 0
    withdrawn: int = 0


def answer_in_forms(rule: AnswerSetRule) -> CharacterAutomaton:
    """Reads the letters of the last statement into the register; accepts where it is one that may be read."""
    # One small automaton for each part of the grammar; below they run side by side.
    known, bits = grammar(rule), spellings(rule)
    leads = [compile_pattern(before, re.DOTALL, MAX_STATES) for before, _ in known.statements]
    distinct = list(dict.fromkeys(answer for _, answer in known.statements))
    answers = [compile_pattern(answer, re.DOTALL, MAX_STATES, bits) for answer in distinct]
    goes_on, withdrawn, denied = (
        compile_pattern(part, re.DOTALL, MAX_STATES) for part in (known.goes_on, known.withdrawn, known.denied)
    )
    thought = compile_pattern(".*" + re.escape(rule.answer_after), re.DOTALL) if rule.answer_after else None
    opens = compile_pattern(f".*{OPEN}.*", re.DOTALL) if rule.answer_after == CLOSE else None
    # All parts over the same classes of characters, as plain lists, which the loop reads faster than arrays.
    parts = [*leads, *answers, goes_on, withdrawn, denied, *filter(None, (thought, opens))]
    member, class_of = group_rows(np.stack([part.class_of for part in parts], axis=1))
    letter_classes, nothing = {int(class_of[ord(letter)]) for letter in bits}, int(class_of[0])
    tables = {id(part): part.table.next[:, part.class_of[member]].tolist() for part in parts}
    effects = [part.table.effect[:, part.class_of[member]].tolist() for part in answers]
    # What can never come back: a statement taken back for good, an answer that can no longer match.
    taken_back = withdrawn.table.accept
    for_good = taken_back & (withdrawn.table.next == np.arange(len(taken_back))[:, None]).all(axis=1)
    dead = [with_dead_state(part.table)[1] for part in answers]
    kind = [distinct.index(answer) for _, answer in known.statements]
    begin = _Reader(leads=(0,) * len(leads))

    def step(reader: _Reader, symbol: int) -> tuple[_Reader, int]:
        def moved(part: CharacterAutomaton, state: int, symbol: int = symbol) -> int:
            return tables[id(part)][state][symbol]

        # A thought that ends, or begins, forgets all that was read before it.
        passed = moved(thought, reader.thought) if thought else 0
        if thought and thought.table.accept[passed]:
            return replace(begin, thought=passed), 0
        opened = moved(opens, reader.opens) if opens else 0
        if opens and opens.table.accept[opened]:
            return replace(begin, thought=passed, opens=opened), 0
        # A letter behind a lead begins a new statement, unless it is denied or goes on from the last one.
        heard = nothing if denied.table.accept[reader.denied] else symbol
        statement, answer, taken, effect = reader.statement, reader.answer, reader.withdrawn, 0
        begun = [kind[i] for i, lead in enumerate(leads) if lead.table.accept[reader.leads[i]]]
        if heard in letter_classes and begun and not goes_on.table.accept[reader.goes_on]:
            statement, answer, taken, effect = begun[0], 0, 0, CLEAR
        # The open statement reads on; where it can no longer match, it is over.
        if statement is not None:
            effect |= effects[statement][answer][symbol]
            answer, taken = moved(answers[statement], answer), moved(withdrawn, taken)
            if answer == dead[statement] or for_good[taken]:
                statement = None
        if statement is None:
            answer = taken = effect = 0  # what the register holds does not matter then
        # The other parts read on in any case.
        seen = tuple(moved(lead, state, heard) for lead, state in zip(leads, reader.leads, strict=True))
        further = moved(goes_on, reader.goes_on, heard)
        no = moved(denied, reader.denied)
        return _Reader(passed, opened, seen, further, no, statement, answer, taken), effect

    def accepts(reader: _Reader) -> bool:
        if reader.statement is None or taken_back[reader.withdrawn]:
            return False
        return bool(answers[reader.statement].table.accept[reader.answer])

    symbols = range(len(member))
    table = explore(begin, lambda reader: [step(reader, s) for s in symbols], accepts, MAX_STATES)
    return CharacterAutomaton(class_of.astype(np.int32), minimize(table))
