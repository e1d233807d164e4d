"""Rules as tables over token ids, kept on disk, and scores of responses from them in the graph."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import sys
import tempfile
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from psyche_jax.errors import UsageError
from psyche_jax.rewards.automaton import CLEAR, TokenAutomaton
from psyche_jax.rewards.config import (
    AnswerSetRule,
    LengthRule,
    PatternRule,
    RepetitionRule,
    RuleConfig,
    ThinkFormatRule,
    check_rules,
)
from psyche_jax.rewards.rules import TextRule, compile_text_rule

DEFAULT_CACHE_DIR = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "psyche_jax"
_BUILDERS = ("automaton.py", "config.py", "reference.py", "regex.py", "rules.py", "score.py")
_NOT_IN_TABLES = {"name", "weight", "credit", "require_stop"}


def load_or_compile(
    rule: TextRule, token_bytes: Sequence[bytes | None], cache_dir: str | Path | None, opened: str = ""
) -> TokenAutomaton:
    """The rule's table, from the cache if it is there. Raises UsageError as `compile_text_rule` does."""
    if cache_dir is None:
        return compile_text_rule(rule, token_bytes, opened)
    path = Path(cache_dir).expanduser() / f"reward-{_key(rule, token_bytes, opened)}.npz"
    if (table := _load(path)) is None:
        table = compile_text_rule(rule, token_bytes, opened)
        with contextlib.suppress(OSError):
            _save(path, table)
    return table


@cache
def _code_digest() -> bytes:
    folder = resources.files("psyche_jax.rewards")
    code = b"\0".join(folder.joinpath(name).read_bytes() for name in _BUILDERS)
    versions = f"{sys.version_info[:3]} {unicodedata.unidata_version}".encode()
    return hashlib.sha256(code + versions).digest()


def _key(rule: TextRule, token_bytes: Sequence[bytes | None], opened: str) -> str:
    meaning = {k: v for k, v in dataclasses.asdict(rule).items() if k not in _NOT_IN_TABLES}
    digest = hashlib.sha256(_code_digest())
    digest.update(repr((sorted(meaning.items()), opened)).encode("utf-8", "surrogatepass"))
    digest.update(np.array([-1 if b is None else len(b) for b in token_bytes], np.int32).tobytes())
    digest.update(b"".join(b for b in token_bytes if b is not None))
    return digest.hexdigest()[:32]


def _load(path: Path) -> TokenAutomaton | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            whole = file.zip.testzip() is None  # by checksums
            return TokenAutomaton(**{"effect": None, "effects": None, **file}) if whole else None
    except Exception:  # whatever a damaged file makes numpy and zipfile raise
        return None


def _save(path: Path, table: TokenAutomaton) -> None:
    """Writes beside and renames, so that a reader sees all of the file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".reward-", suffix=".npz")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **{name: array for name, array in vars(table).items() if array is not None})
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class CompiledRules:
    """What `score` needs. A pytree: the tables are leaves (arguments of a jitted function, not constants in
    it), the rest is static and hashable."""

    tables: dict[str, TokenAutomaton]
    """The automata of the rules on text, by the rule's name."""
    rules: tuple[RuleConfig, ...]
    stop_token_ids: tuple[int, ...]


jax.tree_util.register_dataclass(
    TokenAutomaton, ["class_of", "next", "effect", "effects", "accept", "start", "letters"], []
)
jax.tree_util.register_dataclass(CompiledRules, ["tables"], ["rules", "stop_token_ids"])


def compile_rules(
    rules: Sequence[RuleConfig],
    token_bytes: Sequence[bytes | None],
    stop_token_ids: Sequence[int],
    *,
    opened: str = "",
    cache_dir: str | Path | None = DEFAULT_CACHE_DIR,
) -> CompiledRules:
    """Builds the tables of the rules for a vocabulary, or takes them from `cache_dir` (None: no cache).

    `opened` is what the prompt has already written of the response (`data.chat.opened_text`): to rules on text, the
    text begins with it.

    Raises UsageError if two rules have one name, no stop token is given or one is not in the vocabulary, or a
    pattern is refused or too large.
    """
    check_rules(rules)
    stops = tuple(sorted({int(i) for i in stop_token_ids}))
    if not stops or stops[0] < 0 or stops[-1] >= len(token_bytes):
        raise UsageError(
            f"stop_token_ids must hold ids from 0 to {len(token_bytes) - 1}, at least one; got {list(stops)}"
        )
    tables = {
        rule.name: jax.tree.map(jnp.asarray, load_or_compile(rule, token_bytes, cache_dir, opened))
        for rule in rules
        if isinstance(rule, PatternRule | AnswerSetRule | ThinkFormatRule)
    }
    return CompiledRules(tables, tuple(rules), stops)


def score(compiled: CompiledRules, tokens: Array, gold_mask: Array | None = None) -> tuple[Array, dict[str, Array]]:
    """The rewards of responses `tokens` int32 [N, T]; can be jitted, and traced inside any program.

    A response ends at its first stop token, which counts as one of its tokens but is not text; what comes after it does
    not matter. `gold_mask` int32 [N] holds the gold letters of an `answer_set` rule (bit 0 is A).

    Returns (total float32 [N], {rule's name: its unweighted value float32 [N]}). Raises UsageError if an `answer_set`
    rule has no `gold_mask`.
    """
    steps = tokens.shape[1]
    stops = jnp.isin(tokens, jnp.asarray(compiled.stop_token_ids, tokens.dtype))
    text_length = jnp.min(jnp.where(stops, jnp.arange(steps), steps), axis=1, initial=steps)
    stopped = text_length < steps
    read = _read(compiled.tables, tokens, text_length)
    total, by_rule = jnp.zeros(len(tokens)), {}
    for rule in compiled.rules:
        if isinstance(rule, LengthRule):
            value = _length(rule, text_length + stopped)
        elif isinstance(rule, RepetitionRule):
            value = _repetition(rule, tokens, text_length)
        else:
            state, letters = read[rule.name]
            good = compiled.tables[rule.name].accept[state]
            if isinstance(rule, ThinkFormatRule) or rule.require_stop:
                good &= stopped
            value = good.astype(jnp.float32)
            if isinstance(rule, AnswerSetRule):
                if gold_mask is None:
                    raise UsageError(f"reward rule `{rule.name}` needs the gold letters: pass `gold_mask`")
                value *= _credit(rule, letters, gold_mask)
        by_rule[rule.name] = value
        total += rule.weight * value
    return total, by_rule


_Read: TypeAlias = dict[str, tuple[Array, Array]]
"""By rule on text: the state of its automaton, and the letters that it has read; int32 [N]."""


def _read(tables: dict[str, TokenAutomaton], tokens: Array, text_length: Array) -> _Read:
    """Where each automaton is at the end of each response's text."""

    def step(read: _Read, at: tuple[Array, Array]) -> tuple[_Read, None]:
        index, token = at
        is_text, read = index < text_length, dict(read)
        for name, table in tables.items():
            state, letters = read[name]
            known = (token >= 0) & (token < len(table.class_of))
            symbol = jnp.where(known, table.class_of[token], 0).astype(jnp.int32)
            if table.effect is not None and table.effects is not None:
                effect = table.effects[table.effect[state, symbol]]
                kept = jnp.where(effect & CLEAR, 0, letters)
                letters = jnp.where(is_text, kept | (effect & (CLEAR - 1)), letters)
            read[name] = jnp.where(is_text, table.next[state, symbol], state), letters
        return read, None

    begin = {
        name: (jnp.full(len(tokens), table.start), jnp.full(len(tokens), table.letters))
        for name, table in tables.items()
    }
    return jax.lax.scan(step, begin, (jnp.arange(tokens.shape[1]), tokens.T))[0]


def _length(rule: LengthRule, length: Array) -> Array:
    free = rule.max_length - rule.buffer
    falling = (free - length).astype(jnp.float32) / max(rule.buffer, 1)
    return jnp.where(length <= free, 0.0, jnp.where(length > rule.max_length, -1.0, falling))


def _credit(rule: AnswerSetRule, letters: Array, gold_mask: Array) -> Array:
    right = (letters != 0) & (letters & ~gold_mask == 0)
    if rule.credit == "strict":
        return (right & (letters == gold_mask)).astype(jnp.float32)
    count = jax.lax.population_count
    share = count(letters).astype(jnp.float32) / jnp.maximum(count(gold_mask), 1).astype(jnp.float32)
    return jnp.where(right, share, 0.0)


def _repetition(rule: RepetitionRule, tokens: Array, text_length: Array) -> Array:
    """Sorts the n-grams of each response: equal ones are then neighbours. O(T log T) time, O(nT) memory."""
    starts = tokens.shape[1] - rule.ngram + 1
    if starts < 1:
        return jnp.zeros(tokens.shape[0], jnp.float32)
    total = jnp.maximum(text_length - rule.ngram + 1, 0)
    valid = jnp.arange(starts) < total[:, None]
    columns = [tokens[:, i : i + starts] for i in range(rule.ngram)]
    blank = jnp.iinfo(jnp.int32).max  # n-grams beyond the response come last
    ordered = jax.lax.sort([jnp.where(valid, c, blank) for c in columns], num_keys=rule.ngram)
    same = jnp.stack([c[:, 1:] == c[:, :-1] for c in ordered]).all(axis=0)
    repeated = jnp.sum(same & valid[:, 1:], axis=1)
    return repeated.astype(jnp.float32) / jnp.maximum(total, 1).astype(jnp.float32)
