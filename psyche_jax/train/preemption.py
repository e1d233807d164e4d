"""Being told to stop: SIGTERM or SIGINT, here or on another host, noticed between steps and within evaluations.

Python runs a signal's handler when it next runs Python, which a compilation of minutes does not. So Ctrl-C is answered
by a thread, to which the interpreter's own handler passes each signal at once (`signal.set_wakeup_fd`).
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from psyche_jax.train import hosts

QUIT_CODE = 130  # as of a command that Ctrl-C ended
_LAST_WORDS_SECONDS = 5.0  # how long a state in a bucket that does not answer may hold up a second Ctrl-C


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
def listening(last_words: Callable[[], None] = lambda: None) -> Iterator[Stop]:
    """Within the block SIGTERM and SIGINT do nothing but tell the Stop that this yields.

    The first SIGINT is answered at once; the second ends the process after `last_words`, whatever it is doing.
    """
    stop = Stop()
    read, write = os.pipe()
    os.set_blocking(write, False)
    answering = threading.Thread(target=_answer, args=(read, last_words), name="Ctrl-C", daemon=True)
    answering.start()
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    previous = {number: signal.signal(number, stop.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.close(write)  # which ends the thread
        answering.join()
        os.close(read)


def _answer(signals: int, last_words: Callable[[], None]) -> None:
    """Read numbers of signals until there can be no more."""
    asked = False
    while number := os.read(signals, 1):
        if number[0] != signal.SIGINT:
            continue
        if asked:
            saying = threading.Thread(target=last_words, daemon=True)
            saying.start()
            saying.join(_LAST_WORDS_SECONDS)
            os._exit(QUIT_CODE)
        asked = True
        print("stopping after this step, saving; Ctrl-C again to quit now", file=sys.stderr, flush=True)
