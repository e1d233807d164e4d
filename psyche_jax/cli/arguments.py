"""What the verbs share: options, checks of them, and the start of JAX."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from psyche_jax.errors import UsageError

if TYPE_CHECKING:
    from psyche_jax.config import DistributedSection

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "psyche_jax" / "xla"


class AddVerb(Protocol):
    """Makes the parser of one verb, which calls `run`."""

    def __call__(
        self, name: str, run: Callable[[argparse.Namespace], None], text: str, example: str
    ) -> argparse.ArgumentParser: ...


def add_set(verb: argparse.ArgumentParser) -> None:
    """`--set`, as every verb with a config has it."""
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change one key of the config, for example optimizer.learning_rate=1e-6; may be repeated",
    )


def check_at_least(name: str, value: int | None, least: int) -> None:
    """Refuse a number below `least`; None is one that was not given."""
    if value is not None and value < least:
        raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


def check_seed(seed: int) -> None:
    """Refuse a seed that is no 32-bit number."""
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed must be from 0 to 4294967295, not {seed}")


def start_jax(distributed: "DistributedSection | None" = None) -> None:
    """What must come before the first computation: the persistent compilation cache, the other hosts."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # XLA's threads, else one a virtual device: collectives that wait for each other could hold all of them.
        os.environ.setdefault("NPROC", "64")
    import jax

    from psyche_jax import hosts

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(_CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if distributed is not None:
        hosts.initialize(distributed)
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        # A program from the cache may enter its collectives in another order on each virtual device, and hang.
        jax.config.update("jax_enable_compilation_cache", False)
