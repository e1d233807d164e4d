"""The store of calls: every request before it is sent, every reply before it is used, keyed by content (SQLite)."""

import asyncio
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from psyche_jax.errors import UserError
from psyche_jax.llm.reply import Reply, printable

_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
  key TEXT PRIMARY KEY,
  llm TEXT NOT NULL,
  model TEXT NOT NULL,
  prompt TEXT NOT NULL,
  request TEXT NOT NULL,
  repeated INTEGER NOT NULL DEFAULT 0,
  text TEXT,
  finish TEXT,
  prompt_tokens INTEGER,
  completion_tokens INTEGER,
  asked REAL NOT NULL,
  received REAL
) WITHOUT ROWID
"""
_OF_THE_PLACE = tuple(f"SQLITE_{name}" for name in ("FULL", "IOERR", "READONLY", "CANTOPEN", "PERM", "BUSY", "NOLFS"))


@dataclass(frozen=True)
class Call:
    """What is asked of an LLM. `parameters`: those of sampling; `sample` tells apart several of the same request."""

    llm: str
    model: str
    prompt: str  # name and version of the prompt file
    messages: tuple[Mapping[str, str], ...]
    parameters: tuple[tuple[str, Any], ...]
    sample: int = 0

    @cached_property
    def request(self) -> str:
        """The content as JSON, always written in the same way."""
        value = [self.llm, self.model, self.messages, self.parameters, self.sample]
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    @cached_property
    def key(self) -> str:
        """SHA-256 of the content; also the idempotency key."""
        return hashlib.sha256(self.request.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Usage:
    """Calls and tokens of one LLM with one prompt.

    `repeated`: calls that were in flight when a run was killed, or whose reply was forgotten.
    """

    llm: str
    model: str
    prompt: str
    calls: int
    repeated: int
    prompt_tokens: int
    completion_tokens: int


@contextmanager
def database_errors(path: Path, what: str) -> Iterator[None]:
    """Within the block, what is wrong with the SQLite file `path`, or with a record in it, is one line.

    Raises:
      UserError: it is no store of `what`, or damaged, or (on a full disk, say) cannot be used now.
    """
    try:
        yield
    except (sqlite3.Error, ValueError, TypeError) as error:
        if getattr(error, "sqlite_errorname", "").startswith(_OF_THE_PLACE):
            raise UserError(f"{path}: cannot be used ({error})") from None
        fault = f"{path}: is not a store of {what}, or damaged ({printable(str(error))})"
        raise UserError(f"{fault}; put a copy in its place, or move it away") from None


@contextmanager
def writing(database: sqlite3.Connection, path: Path) -> Iterator[None]:
    """A transaction that holds the lock from its beginning, so that what it reads is still so when it writes.

    Raises:
      UserError: it cannot be written; nothing of it is.
    """
    try:
        with database:  # which commits, or takes back what was written before a fault
            database.execute("BEGIN IMMEDIATE")
            yield
    except (sqlite3.Error, OverflowError, ValueError) as error:  # a full disk, half of a surrogate pair
        raise UserError(f"{path}: cannot be written ({error})") from None


class CallStore:
    """Requests and replies are there before a method returns, and survive a killed process.

    (WAL without a sync at each commit: a crash of the machine may lose the last ones, never the file. No thread: it
    would fight for the interpreter with what it serves. And not lines of JSON, as `evaluate/answers.py` writes: of
    100,000 replies each is found by its key, without all of them in memory.)
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with database_errors(path, "calls"):
            self._database = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute(_SCHEMA)
            self.usage()  # reads it, so that a damaged one is found at once
        self._waiting: list[tuple[str, tuple[Any, ...]]] = []
        self._writing: asyncio.Task[None] | None = None

    def find(self, key: str) -> Reply | None:
        """The stored reply to the call `key`."""
        sql = "SELECT text, finish, prompt_tokens, completion_tokens FROM calls WHERE key = ? AND received IS NOT NULL"
        with database_errors(self._path, "calls"):
            row = self._database.execute(sql, (key,)).fetchone()
        if row is None:
            return None
        text, finish, asked, said = row
        return Reply(text, finish=finish, prompt_tokens=asked, completion_tokens=said, stored=True)

    async def opened(self, call: Call) -> None:
        """Write the request; one that is there without a reply was in flight when a run ended, and is counted."""
        await self._written(
            "INSERT INTO calls (key, llm, model, prompt, request, asked) VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (key) DO UPDATE SET repeated = repeated + 1",
            *(call.key, call.llm, call.model, call.prompt, call.request, time.time()),
        )

    async def answered(self, key: str, reply: Reply) -> None:
        """Write the reply; its tokens are added to those of one that was forgotten."""
        await self._written(
            "UPDATE calls SET text = ?, finish = ?, prompt_tokens = COALESCE(prompt_tokens, 0) + ?, "
            "completion_tokens = COALESCE(completion_tokens, 0) + ?, received = ? WHERE key = ?",
            *(reply.text, reply.finish, reply.prompt_tokens, reply.completion_tokens, time.time(), key),
        )

    def forget(self, key: str) -> None:
        """The call will be asked again; what it cost stays counted."""
        self._write([("UPDATE calls SET received = NULL WHERE key = ?", (key,))])

    def usage(self) -> list[Usage]:
        """Calls that had a reply and their tokens, by LLM and prompt."""
        rows = self._database.execute(
            "SELECT llm, model, prompt, count(*), sum(repeated), sum(prompt_tokens), sum(completion_tokens) "
            "FROM calls WHERE prompt_tokens IS NOT NULL GROUP BY llm, model, prompt ORDER BY prompt, llm, model"
        )
        return [Usage(*row) for row in rows]

    def close(self) -> None:
        """Write what waits, and close the file."""
        if self._waiting:  # the event loop was ended before their turn
            self._write(self._waiting)
        self._database.close()

    async def _written(self, sql: str, *values: Any) -> None:
        """Wait until it is written; all of one turn of the event loop are one transaction, which is cheaper by half."""
        self._waiting.append((sql, values))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_waiting())
        await asyncio.shield(self._writing)

    async def _write_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._write(waiting)

    def _write(self, statements: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
        with writing(self._database, self._path):
            for sql, values in statements:
                self._database.execute(sql, values)
