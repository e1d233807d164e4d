"""Answers kept as they come, so that an evaluation that was killed asks only for the rest."""

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from psyche_jax.errors import UserError
from psyche_jax.files import bucket_errors, in_bucket, write_text
from psyche_jax.runs import read_lines

_SECONDS_BETWEEN_WRITES = 30.0  # of a file in a bucket
Key = tuple[str, int]  # the task's id and the number of the sample


@dataclass(frozen=True)
class Completion:
    """What a model said. `finished`: it ended by itself; `text` is without the stop token, which `tokens` counts.

    `tokens` is 0 where that is not known.
    """

    text: str
    tokens: int
    finished: bool


class Answers:
    """Answers by task and sample, appended to a file one line each. Without an `evaluation` they are in memory alone.

    Beside `evaluation.json` the file is `evaluation.HASH.answers.jsonl`, where the hash is of `identity`: all that
    the answers depend on. So an evaluation with other settings never takes over answers that are not its own.

    Objects in a bucket cannot be appended to: there the file is written whole, twice a minute and at the end.
    """

    def __init__(self, evaluation: Path | None, identity: Mapping[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
        self.path = evaluation and evaluation.with_name(f"{evaluation.stem}.{digest}.answers.jsonl")
        self.known: dict[Key, Completion] = {}
        self._file: Any = None
        self._lines: list[str] = []  # of a file in a bucket
        self._written, self._sent = 0, time.monotonic()

    def __enter__(self) -> "Answers":
        """Read what is there.

        Raises:
          UserError: the file was changed by hand.
        """
        if self.path is None:
            return self
        with bucket_errors(self.path):
            lines = read_lines(self.path)
        try:
            for line in lines:
                key = (line["id"], line["sample"])
                self.known[key] = Completion(line["text"], line["tokens"], line["finished"])
        except (KeyError, TypeError):
            raise UserError(f"{self.path}: holds something else than answers; remove it") from None
        texts = [json.dumps(line) + "\n" for line in lines]
        if in_bucket(self.path):
            self._lines, self._written = texts, len(texts)
        elif texts:  # a last line cut short by a crash would spoil the next one
            write_text(self.path, "".join(texts))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        self._send()

    def keep(self, key: Key, completion: Completion) -> None:
        """Take an answer, and write it down before anything else happens."""
        self.known[key] = completion
        if self.path is None:
            return
        line = {
            "id": key[0],
            "sample": key[1],
            "text": completion.text,
            "tokens": completion.tokens,
            "finished": completion.finished,
        }
        text = json.dumps(line) + "\n"
        if in_bucket(self.path):
            self._lines.append(text)
            if time.monotonic() - self._sent > _SECONDS_BETWEEN_WRITES:
                self._send()
            return
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            if self._file is not None:
                with contextlib.suppress(OSError):  # it tries to write again
                    self._file.close()
                self._file = None
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def _send(self) -> None:
        """Write what a bucket does not hold yet."""
        if self.path is not None and len(self._lines) > self._written:
            write_text(self.path, "".join(self._lines))
            self._written, self._sent = len(self._lines), time.monotonic()

    def discard(self) -> None:
        """Remove the file: its content stands in the evaluation now."""
        if self.path is not None:
            with bucket_errors(self.path):
                self.path.unlink(missing_ok=True)
