"""The start of JAX, for the verbs that compute."""

import logging
import os
import platform
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from psyche_jax.config import DistributedSection

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "psyche_jax" / "xla"
_TUNABLES = "GLIBC_TUNABLES"
# Huge pages; and what is freed is kept for the next step, but for blocks of a gibibyte, which would leave large holes:
# in one arena, since any other would map and unmap what is larger than itself.
_MALLOC = {"hugetlb": 1, "mmap_threshold": 2**30, "trim_threshold": 2**30, "arena_max": 1}
_GLIBC = [2, 35]  # the first that knows the first two
COMPUTING = {"sft", "grpo", "bench", "demo", "eval", "chat", "serve"}  # the verbs that call `start_jax`


def quiet_orbax() -> None:
    """For the verbs that read or write checkpoints: no tracebacks in the log of what Orbax then raises."""
    import absl.logging

    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # those of all that came after the first


def start_jax(distributed: "DistributedSection | None" = None) -> None:
    """Do what must come before the first computation: open the compilation cache, wait for the other hosts."""
    quiet_orbax()
    flags = os.environ.get("XLA_FLAGS", "")
    virtual = "xla_force_host_platform_device_count" in flags
    if virtual:
        # XLA's threads, else one a virtual device: collectives that wait for each other could hold all of them.
        os.environ.setdefault("NPROC", "64")
    if _computes_on_cpu() and (virtual or (distributed is not None and distributed.num_processes is not None)):
        # Else each device begins independent collectives in an order of its own, and meets the wrong ones of others.
        os.environ["XLA_FLAGS"] = f"--xla_cpu_enable_concurrency_optimized_scheduler=false {flags}"
    import jax

    from psyche_jax.model.sharding import set_tpu_flags
    from psyche_jax.train import hosts

    set_tpu_flags()

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(_CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if distributed is not None:
        hosts.initialize(distributed)
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        # A program from the cache may enter its collectives in another order on each virtual device, and hang.
        jax.config.update("jax_enable_compilation_cache", False)


def set_malloc() -> None:
    """Where JAX will compute on the CPU: begin this process anew with settings for malloc.

    XLA's CPU backend takes the memory of a program's temporaries anew for each call. Page faults for it, and the
    kernel's zeroing of it, are a good part of the time of a small model's step (docs/measurements/benchmarks.md). glibc
    reads its settings only once, at the start of a process; those that are there already stay.
    """
    name, version = platform.libc_ver()
    known = name == "glibc" and [int(part) for part in version.split(".") if part.isdecimal()] >= _GLIBC
    if known and _computes_on_cpu() and _TUNABLES not in os.environ:
        settings = ":".join(f"glibc.malloc.{setting}={value}" for setting, value in _MALLOC.items())
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, _TUNABLES: settings})


def _computes_on_cpu() -> bool:
    """Whether JAX will find nothing but the CPU, as far as can be told without starting it."""
    chosen = os.environ.get("JAX_PLATFORMS")
    if chosen:
        return chosen == "cpu"
    return find_spec("libtpu") is None and not entry_points(group="jax_plugins")
