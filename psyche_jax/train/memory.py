"""Whether programs fit into the devices' memory: asked of the largest before the first step, said in one line."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from psyche_jax.errors import UserError

_GIB = 2**30


@contextlib.contextmanager
def out_of_memory(settings: str) -> Iterator[None]:
    """Within the block, what XLA raises where memory does not suffice is one line.

    Args:
      settings: what to set otherwise.

    Raises:
      UserError: memory did not suffice.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
            raise
        raise UserError(f"out of memory; {settings} ({message.splitlines()[0][:200]})") from None


def check_memory(program: jax.stages.Compiled, settings: str) -> None:
    """Compare what a program will ask for when it runs with what its devices have left.

    A TPU's compiler refuses by itself what is too large; a GPU's leaves it to the allocator, in the step that first
    meets the shape. Where devices do not say how much memory they have (CPUs), nothing can be compared.

    Args:
      program: compiled; its arguments lie on the devices already.
      settings: what to set otherwise.

    Raises:
      UserError: it does not fit.
    """
    memory: Any = program.memory_analysis()
    if memory is None:
        return
    wanted = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    for device in jax.local_devices():
        known = device.memory_stats() or {}
        if "bytes_limit" not in known:
            return
        free = known["bytes_limit"] - known.get("bytes_in_use", 0)
        if wanted > free:
            raise UserError(
                f"out of memory: the largest step needs {wanted / _GIB:.2f} GiB beside what lies on {device}, which "
                f"has {free / _GIB:.2f} GiB left; {settings}"
            )
