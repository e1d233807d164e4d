"""Compiled tables on disk, so that a second run does not build them again.

A table's file is named by the hash of all that it depends on: the rule, the vocabulary, the code that builds
it and Python's Unicode tables. A file that cannot be read is built again; a folder that cannot be written to
is done without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import sys
import tempfile
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from psyche_jax.rewards.automaton import TokenAutomaton
from psyche_jax.rewards.rules import TextRule, compile_text_rule

DEFAULT_CACHE_DIR = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "psyche_jax"
_BUILDERS = ("automaton.py", "config.py", "forms.py", "reference.py", "regex.py", "rules.py", "store.py")
_FIELDS = [field.name for field in dataclasses.fields(TokenAutomaton)]
_NOT_IN_TABLES = {"name", "weight", "credit", "require_stop"}


def load_or_compile(
    rule: TextRule, token_bytes: Sequence[bytes | None], cache_dir: str | Path | None, opened: str = ""
) -> TokenAutomaton:
    """The rule's table, from the cache if it is there. Raises UsageError as `compile_text_rule` does."""
    if cache_dir is None:
        return compile_text_rule(rule, token_bytes, opened)
    path = Path(cache_dir).expanduser() / f"reward-{_key(rule, token_bytes, opened)}.npz"
    table = _load(path, len(token_bytes))
    if table is None:
        table = compile_text_rule(rule, token_bytes, opened)
        with contextlib.suppress(OSError):
            _save(path, table)
    return table


@lru_cache(maxsize=1)
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


def _load(path: Path, tokens: int) -> TokenAutomaton | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Any] = {name: file[name] if name in file.files else None for name in _FIELDS}
        table = TokenAutomaton(**arrays)
        states, classes = table.next.shape
        whole = table.class_of.shape == (tokens,) and table.accept.shape == (states,)
        whole &= table.effect is None or table.effect.shape == (states, classes)
        if table.effect is not None and table.effects is not None:
            whole &= bool((table.effect < len(table.effects)).all())
        else:
            whole &= table.effect is None and table.effects is None
        whole &= bool((table.next >= 0).all() and (table.next < states).all())
        whole &= table.start.shape == table.letters.shape == () and 0 <= int(table.start) < states
        whole &= bool((table.class_of >= 0).all() and (table.class_of < classes).all())
    except Exception:  # whatever a damaged file makes numpy and zipfile raise
        return None
    return table if whole else None


def _save(path: Path, table: TokenAutomaton) -> None:
    """Writes beside and renames, so that a reader sees all of the file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".reward-", suffix=".npz")
    try:
        with os.fdopen(handle, "wb") as file:
            arrays = {field: getattr(table, field) for field in _FIELDS if getattr(table, field) is not None}
            np.savez(file, **arrays)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
