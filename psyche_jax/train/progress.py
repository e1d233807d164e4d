"""What a run says on its way: a bar on a terminal, elsewhere a line now and then."""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping

from tqdm import tqdm

from psyche_jax.train import hosts

_SECONDS_BETWEEN_LINES = 30.0
_STEPS_OF_PACE = 20  # the last ones: what is left goes by their mean, with all that is done between them


class Progress:
    """How far a run is. Nothing here waits for a device: it goes by metrics that are on the host already.

    Args:
      name: what is trained.
      first, total: how many steps are done, and how many there are.
      headline: the metrics that are shown.
      clock: seconds, never set.
    """

    def __init__(
        self, name: str, first: int, total: int, headline: tuple[str, ...], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name, self._total, self._headline, self._clock = name, total, headline, clock
        self._bar = (
            tqdm(total=total, initial=first, desc=name, unit="step")
            if sys.stderr.isatty() and hosts.is_first()
            else None
        )
        self._every = max(1, total // 10)
        self._begun = self._said = clock()
        self._ends: deque[float] = deque(maxlen=_STEPS_OF_PACE + 1)
        self.shown: dict[str, str] = {}  # the last value of each metric of the headline

    def update(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Show a finished step."""
        now = self._clock()
        self._ends.append(now)
        values = {name: metrics.get(name) for name in self._headline}
        shown = {name: f"{value:.4g}" for name, value in values.items() if value is not None}
        self.shown |= shown
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()
        elif (
            step % self._every == 0
            or step == self._total
            or len(self._ends) == 1
            or now - self._said >= _SECONDS_BETWEEN_LINES
        ):
            self._said = now
            text = ", ".join(f"{name} {value}" for name, value in shown.items())
            hosts.say(
                f"{self._name}: step {step}/{self._total} at {time.strftime('%H:%M:%S')}{self._pace(step)}: {text}"
            )

    def close(self) -> None:
        """Leave the finished bar on the screen."""
        if self._bar is not None:
            self._bar.close()

    @property
    def took(self) -> str:
        """How long it has been since the first of these steps began."""
        return tqdm.format_interval(self._clock() - self._begun)

    def _pace(self, step: int) -> str:
        """Of the first step nothing is said: it may hold a compilation."""
        if len(self._ends) < 2:
            return ""
        seconds = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return f", {seconds:.2f} s a step, {tqdm.format_interval(seconds * (self._total - step))} left"
