"""The thread that decodes for all: who waits, who has a slot, and what each is told.

Between two chunks what was said is handed out, rows that nobody waits for are given up, and others join; and a few
prompts are scored, if there are any.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from psyche_jax.serve.engine import Batch, Chunk, Engine, PromptScores, RowSettings, likeliest

_LOG = logging.getLogger("psyche_jax.serve")
_SCORED = 8192  # tokens, with padding, of prompts that are scored at once; one prompt may have more


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


@dataclass(eq=False)
class ScoreJob:
    """A prompt that is to be scored. The batcher's thread calls `deliver` with its scores, or with None: it failed."""

    prompt: Sequence[int]
    alternatives: int
    deliver: Callable[[PromptScores | None], None]
    given_up: bool = False


class _Running:
    """A batch, whose rows its slots have, and who is about to join."""

    def __init__(self) -> None:
        self.batch = Batch()
        self.rows: dict[int, tuple[Job, int]] = {}
        self.joining: list[Job] = []

    @property
    def jobs(self) -> set[Job]:
        """All that fail with it."""
        return {*(job for job, _ in self.rows.values()), *self.joining}

    def let_go(self) -> None:
        """Free the slots of rows that have ended, or that nobody waits for."""
        for slot, (job, row) in self.rows.items():
            if row in job.given_up:
                self.batch.left[slot] = 0
        self.rows = {slot: own for slot, own in self.rows.items() if self.batch.left[slot] > 0}


class Batcher:
    """Feeds an engine. `rows`: how many responses are decoded at once; `waiting`: how many jobs may wait.

    There is one batch that all join, but where a job would make its cache much larger than they need: that job begins
    another, and batches take turns.
    """

    def __init__(self, engine: Engine, rows: int, waiting: int) -> None:
        self._engine = engine
        self._rows = rows
        self._most_waiting = waiting
        self._waiting: deque[Job] = deque()
        self._to_score: deque[ScoreJob] = deque()
        self._running: list[_Running] = []
        self._closing = False
        self._abandoned = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, *jobs: Job | ScoreJob) -> None:
        """Queue the jobs of a request.

        Raises:
          BusyError, ClosingError: it is refused.
        """
        with self._changed:
            if self._closing:
                raise ClosingError
            if len(self._waiting) + len(self._to_score) >= self._most_waiting:
                raise BusyError
            self._waiting += (job for job in jobs if isinstance(job, Job))
            self._to_score += (job for job in jobs if isinstance(job, ScoreJob))
            self._changed.notify()

    def close(self, seconds: float) -> None:
        """Refuse new jobs, fail those that wait, let running ones finish for so long, then break them off."""
        with self._changed:
            self._closing = True
            refused: list[Job | ScoreJob] = [*self._waiting, *self._to_score]
            self._waiting.clear()
            self._to_score.clear()
            self._changed.notify()
        for job in refused:
            job.deliver(None)
        self._thread.join(seconds)
        self._abandoned.set()
        self._thread.join()  # a step that has begun cannot be broken off, and must not outlive the interpreter

    def _run(self) -> None:
        while not self._abandoned.is_set():
            with self._changed:
                for running in self._running:
                    running.let_go()
                self._running = [running for running in self._running if running.rows]
                while not (self._waiting or self._to_score or self._running or self._closing):
                    self._changed.wait()
                if self._closing and not self._running:
                    return
                self._take()
                scored = self._take_scored()
            self._score(scored)
            for running in list(self._running):
                if self._abandoned.is_set():
                    break
                self._join(running)
                self._advance(running)
        for running in self._running:
            for job in running.jobs:
                job.deliver(None)

    def _take(self) -> None:
        """Find a batch for jobs from the front of the queue, as many as may run beside what is running."""
        room = self._rows - sum(len(running.rows) for running in self._running)
        while self._waiting and len(self._waiting[0].settings) <= room:
            job = self._waiting.popleft()
            if len(job.given_up) == len(job.settings):
                continue
            room -= len(job.settings)
            fitting = (one for one in self._running if self._engine.takes(one.batch, *_rows([*one.joining, job])))
            running = next(fitting, None)
            if running is None:
                running = _Running()
                self._running.append(running)
            running.joining.append(job)

    def _take_scored(self) -> list[ScoreJob]:
        """Those from the front of the queue that are scored next, together."""
        taken: list[ScoreJob] = []
        longest = 0
        while self._to_score and len(taken) < self._rows:
            longest = max(longest, len(self._to_score[0].prompt))
            if taken and (len(taken) + 1) * longest > _SCORED:
                break
            job = self._to_score.popleft()
            taken += [] if job.given_up else [job]
        return taken

    def _score(self, jobs: Sequence[ScoreJob]) -> None:
        if not jobs:
            return
        try:
            scores = self._engine.score([job.prompt for job in jobs], max(job.alternatives for job in jobs))
        except Exception:
            self._fail(jobs)
        else:
            for job, own in zip(jobs, scores, strict=True):
                job.deliver(own)

    def _join(self, running: _Running) -> None:
        """Begin the jobs that were found a place in this batch."""
        jobs, running.joining = running.joining, []
        if not jobs:
            return
        try:
            slots = self._engine.join(running.batch, *_rows(jobs))
        except Exception:
            if not running.rows and len(jobs) == 1:
                self._fail(jobs)
                return
            for job in jobs:  # there may be memory for each by itself; and one that cannot be begun fails alone
                own = _Running()
                own.joining = [job]
                self._running.append(own)
                self._join(own)
        else:
            owners = [(job, row) for job in jobs for row in range(len(job.settings))]
            running.rows |= dict(zip(slots, owners, strict=True))

    def _advance(self, running: _Running) -> None:
        """A chunk for this batch; what goes wrong fails its jobs only."""
        if not running.rows:
            return
        batch = running.batch
        try:
            chunk = self._engine.advance(batch, any(job.alternatives for job in running.jobs))
            for slot, (job, row) in running.rows.items():
                job.deliver(self._piece(chunk, slot, row, job.alternatives, batch.left[slot] == 0))
        except Exception:
            self._fail(running.jobs)
            running.rows = {}

    def _fail(self, jobs: Collection[Job | ScoreJob]) -> None:
        _LOG.exception("a batch failed")
        for job in jobs:
            job.deliver(None)

    def _piece(self, chunk: Chunk, index: int, row: int, alternatives: int, finished: bool) -> Piece:
        said = chunk.mask[index]
        tokens: list[int] = chunk.tokens[index][said].tolist()
        stopped = bool(tokens) and tokens[-1] in self._engine.config.stop_token_ids
        count = len(tokens) - stopped
        best = likeliest(chunk.best[index][said], chunk.best_log_probs[index][said], alternatives)
        finish: Literal["stop", "length"] | None = "stop" if stopped else "length" if finished else None
        return Piece(row, tokens[:count], chunk.log_probs[index][said].tolist()[:count], best[:count], finish)


def _rows(jobs: Sequence[Job]) -> tuple[list[Sequence[int]], list[RowSettings]]:
    """The prompt and the settings of each row of these jobs."""
    return [job.prompt for job in jobs for _ in job.settings], [row for job in jobs for row in job.settings]
