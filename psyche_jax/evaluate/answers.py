"""Answers kept as they come, so that a killed evaluation asks only for the rest."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from psyche_jax.errors import UserError
from psyche_jax.storage.files import GrowingFile, bucket_errors, in_bucket
from psyche_jax.train.run_files import read_lines

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
        self.known: dict[Key, Completion] = {}
        self._file: GrowingFile | None = None
        if evaluation is not None:
            self._file = GrowingFile(evaluation.with_name(f"{evaluation.stem}.{digest}.answers.jsonl"))

    def __enter__(self) -> "Answers":
        """Read what is there.

        Raises:
          UserError: the file was changed by hand.
        """
        if self._file is None:
            return self
        with bucket_errors(self._file.path):
            lines = read_lines(self._file.path)
        try:
            for line in lines:
                key = (line["id"], line["sample"])
                self.known[key] = Completion(line["text"], line["tokens"], line["finished"])
        except (KeyError, TypeError):
            raise UserError(f"{self._file.path}: does not hold answers; remove it") from None
        if lines:  # a last line cut short by a crash would spoil the next one
            self._file.replace([json.dumps(line) + "\n" for line in lines])
        return self

    def __exit__(self, *_: object) -> None:
        """Write what is not written yet."""
        if self._file is not None:
            self._file.flush()

    def keep(self, key: Key, completion: Completion) -> None:
        """Take an answer, and write it down before anything else happens."""
        self.known[key] = completion
        if self._file is None:
            return
        if not in_bucket(self._file.path):
            self._file.path.parent.mkdir(parents=True, exist_ok=True)
        self._file.append(json.dumps({"id": key[0], "sample": key[1], **asdict(completion)}) + "\n")
        self._file.flush(every=_SECONDS_BETWEEN_WRITES)

    def discard(self) -> None:
        """Remove the file: the evaluation holds its content now."""
        if self._file is not None:
            with bucket_errors(self._file.path):
                self._file.path.unlink(missing_ok=True)
