"""Answers kept as they come, so that an evaluation that was killed asks only for the rest."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from psyche_jax.errors import UserError
from psyche_jax.files import write_text
from psyche_jax.runs import read_lines

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
    """

    def __init__(self, evaluation: Path | None, identity: Mapping[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
        self.path = evaluation and evaluation.with_name(f"{evaluation.stem}.{digest}.answers.jsonl")
        self.known: dict[Key, Completion] = {}
        self._file: Any = None

    def __enter__(self) -> "Answers":
        """Read what is there.

        Raises:
          UserError: the file was changed by hand.
        """
        if self.path is None:
            return self
        lines = read_lines(self.path)
        try:
            for line in lines:
                key = (line["id"], line["sample"])
                self.known[key] = Completion(line["text"], line["tokens"], line["finished"])
        except (KeyError, TypeError):
            raise UserError(f"{self.path}: holds something else than answers; remove it") from None
        if lines:  # a last line cut short by a crash would spoil the next one
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

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
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            if self._file is not None:
                with contextlib.suppress(OSError):  # it tries to write again
                    self._file.close()
                self._file = None
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def discard(self) -> None:
        """Remove the file: its content stands in the evaluation now."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
