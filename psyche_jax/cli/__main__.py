"""`python -m psyche_jax.cli`."""

import sys

from psyche_jax.cli import main

sys.exit(main())
