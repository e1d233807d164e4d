"""Being told to stop: SIGTERM or SIGINT, here or on another host, noticed between steps and within evaluations."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from psyche_jax import hosts


class StoppedError(Exception):
    """Raised within an evaluation when the run is to stop."""


class Stop:
    """Whether the run was told to stop. Every process must ask, at the same points."""

    def __init__(self) -> None:
        self._received: list[str] = []

    def requested(self, step: int | None = None) -> bool:
        """Whether any process was told to stop.

        `step` is the one just done, None within a step: signals that came before this class listened are known to
        JAX's preemption service, which answers by step.
        """
        return hosts.on_any(bool(self._received) or (step is not None and hosts.preempted(step)))

    def check(self) -> None:
        """For the middle of an evaluation.

        Raises:
          StoppedError: any process was told to stop.
        """
        if self.requested():
            raise StoppedError

    def __str__(self) -> str:
        return self._received[0] if self._received else "another host"

    def receive(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler."""
        self._received.append(signal.Signals(number).name)


@contextlib.contextmanager
def listening() -> Iterator[Stop]:
    """Within the block SIGTERM and SIGINT do nothing but tell the Stop that this yields."""
    stop = Stop()
    previous = {number: signal.signal(number, stop.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
