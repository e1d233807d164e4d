"""How often a run is checkpointed: by steps, and by the work that a preemption may cost."""

import time
from collections.abc import Callable

import numpy as np

from psyche_jax import hosts
from psyche_jax.config import CheckpointSection


class Pace:
    """Says after which steps a checkpoint is due. Measures by a clock that nobody sets."""

    def __init__(self, section: CheckpointSection, clock: Callable[[], float] = time.monotonic) -> None:
        self._section = section
        self._clock = clock
        self._saved = self._before = clock()

    def due(self, step: int, writing: bool) -> bool:
        """Whether to save after `step`; every process must ask after every step, and gets what the first one finds.

        That is after every `every_steps`, and where another step as long as the last one would make more than
        `every_seconds` of work since the last checkpoint, unless that is still being written (`writing`).
        """
        now = self._clock()
        length, self._before = now - self._before, now
        limit = self._section.every_seconds
        if limit is None:
            return step % self._section.every_steps == 0
        late = not writing and now - self._saved + length > limit
        return bool(hosts.from_first(np.asarray(late))) or step % self._section.every_steps == 0

    def saved(self) -> None:
        """A checkpoint of the last step that was asked for is on its way."""
        self._saved = self._before
