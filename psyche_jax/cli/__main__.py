"""The process of the command `psyche`, also as `python -m psyche_jax.cli`."""

import os
import signal
import sys
import threading
from typing import Any

from psyche_jax.cli import main, start

_LINGER_SECONDS = 30.0


def run() -> int:
    """What the installed command calls."""
    sys.unraisablehook = _hear_interrupts
    if {*sys.argv[1:2]} & start.COMPUTING:
        start.set_malloc()
    code = main()
    if code:  # what failed may have left threads that wait much longer (Orbax's, of a save: ten minutes)
        end = threading.Timer(_LINGER_SECONDS, os._exit, [code])
        end.daemon = True
        end.start()
    return code


def _hear_interrupts(unraisable: Any) -> None:
    """Ctrl-C may come while JAX tidies up within the garbage collector, where an exception is lost: once more, then."""
    if unraisable.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(unraisable)
        return
    # Not now: this too runs where exceptions are lost.
    again = threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    again.daemon = True
    again.start()


if __name__ == "__main__":
    sys.exit(run())
