"""The start of JAX, for the verbs that compute."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from psyche_jax.config import DistributedSection

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "psyche_jax" / "xla"


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
