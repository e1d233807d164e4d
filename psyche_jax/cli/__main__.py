"""The process of the command `psyche`, also as `python -m psyche_jax.cli`."""

import sys

from psyche_jax.cli import main, start


def run() -> int:
    """What the installed command calls."""
    if {*sys.argv[1:2]} & start.COMPUTING:
        start.use_huge_pages()
    return main()


if __name__ == "__main__":
    sys.exit(run())
