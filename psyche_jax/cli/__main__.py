"""The process of the command `psyche`, also as `python -m psyche_jax.cli`."""

import os
import sys
import threading

from psyche_jax.cli import main, start

_LINGER_SECONDS = 30.0


def run() -> int:
    """What the installed command calls."""
    if {*sys.argv[1:2]} & start.COMPUTING:
        start.use_huge_pages()
    code = main()
    if code:  # what failed may have left threads that wait much longer (Orbax's, of a save: ten minutes)
        end = threading.Timer(_LINGER_SECONDS, os._exit, [code])
        end.daemon = True
        end.start()
    return code


if __name__ == "__main__":
    sys.exit(run())
