"""One thread that decodes for all: requests that wait are begun together, and batches take turns chunk by chunk."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from psyche_jax.serve.engine import Batch, Chunk, Engine, RowSettings

_LOG = logging.getLogger("psyche_jax.serve")


class BusyError(Exception):
    """As many requests wait as may."""


class ClosingError(Exception):
    """The server is shutting down."""


@dataclass(frozen=True)
class Piece:
    """What one row of a job said in one chunk: `best[i]` are (token, log-prob) pairs, empty if not asked for.

    `finish`: "stop" after a stop token, which is not among the tokens; "length" after the last token allowed; else
    None.
    """

    row: int
    tokens: list[int]
    log_probs: list[float]
    best: list[list[tuple[int, float]]]
    finish: Literal["stop", "length"] | None


@dataclass(eq=False)
class Job:
    """A prompt and what is wanted of it. The batcher's thread calls `deliver` with Pieces, or with None: it failed."""

    prompt: Sequence[int]
    settings: Sequence[RowSettings]
    alternatives: int
    deliver: Callable[[Piece | None], None]
    given_up: set[int] = field(default_factory=set)

    def give_up(self, row: int | None = None) -> None:
        """Nobody waits for the rest of a row, or of all rows."""
        self.given_up.update(range(len(self.settings)) if row is None else [row])


class _Running:
    """A batch and whose rows it has."""

    def __init__(self, batch: Batch, jobs: Sequence[Job]) -> None:
        self.batch = batch
        self.jobs = jobs
        self.rows = [(job, row) for job in jobs for row in range(len(job.settings))]


class Batcher:
    """Feeds an engine. `rows`: how many may lie in memory; `waiting`: how many jobs may wait."""

    def __init__(self, engine: Engine, rows: int, waiting: int) -> None:
        self._engine = engine
        self._rows = rows
        self._most_waiting = waiting
        self._waiting: deque[Job] = deque()
        self._running: list[_Running] = []
        self._closing = False
        self._abandoned = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
          BusyError, ClosingError: it is refused.
        """
        with self._changed:
            if self._closing:
                raise ClosingError
            if len(self._waiting) >= self._most_waiting:
                raise BusyError
            self._waiting.append(job)
            self._changed.notify()

    def close(self, seconds: float) -> None:
        """Refuse new jobs, fail those that wait, let running ones finish for so long, then break them off."""
        with self._changed:
            self._closing = True
            refused = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for job in refused:
            job.deliver(None)
        self._thread.join(seconds)
        self._abandoned.set()
        self._thread.join()  # a step that has begun cannot be broken off, and must not outlive the interpreter

    def _run(self) -> None:
        while not self._abandoned.is_set():
            with self._changed:
                while not (self._waiting or self._running or self._closing):
                    self._changed.wait()
                if self._closing and not self._running:
                    return
                jobs = self._take()
            if jobs:
                self._guarded(jobs, partial(self._begin, jobs))
            for running in list(self._running):
                if self._abandoned.is_set():
                    break
                if not self._guarded(running.jobs, partial(self._advance, running)):
                    self._running.remove(running)
        for running in self._running:
            for job in running.jobs:
                job.deliver(None)

    def _take(self) -> list[Job]:
        """Jobs from the front of the queue for which there is room beside what is running."""
        room = self._rows - sum(running.batch.rows for running in self._running)
        jobs: list[Job] = []
        while self._waiting and (len(self._waiting[0].settings) <= room):
            job = self._waiting.popleft()
            if len(job.given_up) < len(job.settings):
                room -= len(job.settings)
                jobs.append(job)
        return jobs

    def _guarded(self, jobs: Sequence[Job], work: Callable[[], bool]) -> bool:
        """Whether `work` leaves something to do; what goes wrong fails these jobs only."""
        try:
            return work()
        except Exception:
            _LOG.exception("a batch failed")
            for job in jobs:
                job.deliver(None)
            return False

    def _begin(self, jobs: Sequence[Job]) -> bool:
        prompts = [job.prompt for job in jobs for _ in job.settings]
        settings = [row for job in jobs for row in job.settings]
        alternatives = any(job.alternatives for job in jobs)
        self._running.append(_Running(self._engine.begin(prompts, settings, alternatives), jobs))
        return True

    def _advance(self, running: _Running) -> bool:
        live = []
        for index, (job, row) in enumerate(running.rows):
            if row in job.given_up:
                running.batch.give_up(index)
            elif running.batch.left[index] > 0:
                live.append(index)
        if not running.batch.done:
            chunk = self._engine.advance(running.batch)
            for index in live:
                job, row = running.rows[index]
                job.deliver(self._piece(chunk, index, row, job.alternatives, running.batch.left[index] <= 0))
        return not running.batch.done

    def _piece(self, chunk: Chunk, index: int, row: int, alternatives: int, finished: bool) -> Piece:
        said = chunk.mask[index]
        tokens: list[int] = chunk.tokens[index][said].tolist()
        stopped = bool(tokens) and tokens[-1] in self._engine.config.stop_token_ids
        count = len(tokens) - stopped
        best = [
            list(zip(tokens_.tolist(), log_probs.tolist(), strict=True))[:alternatives]
            for tokens_, log_probs in zip(chunk.best[index][said], chunk.best_log_probs[index][said], strict=True)
        ]
        return Piece(
            row,
            tokens[:count],
            chunk.log_probs[index][said].tolist()[:count],
            best[:count],
            "stop" if stopped else "length" if finished else None,
        )
