"""Several processes, each with some of the devices, running one program."""

import os
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from psyche_jax.config import DistributedSection
from psyche_jax.errors import UserError, first_reason


def initialize(section: DistributedSection) -> None:
    """Find the other processes, as `section` says. Must come before anything else touches a device.

    Raises:
      UserError: the others did not come in time, or there is nothing to tell who they are.
    """
    several = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1 or section.num_processes is not None
    if section.initialize == "never" or (section.initialize == "auto" and not several):
        return
    if section.coordinator_port is not None:
        os.environ["JAX_COORDINATOR_PORT"] = str(section.coordinator_port)
    try:
        jax.distributed.initialize(
            coordinator_address=section.coordinator,
            num_processes=section.num_processes,
            process_id=section.process_id,
            initialization_timeout=section.timeout_seconds,
        )
    except (RuntimeError, ValueError) as error:
        reason = first_reason(error)
        raise UserError(
            f"distributed: the other hosts were not found within {section.timeout_seconds} s ({reason}); "
            "start the same command on every host of the slice (gcloud … --worker=all), "
            "or set distributed.initialize=never to use one host's devices alone"
        ) from None


def is_first() -> bool:
    """Whether this process is the one that writes logs, metrics and states."""
    return jax.process_index() == 0


def say(line: str) -> None:
    """Print a line on stderr, once for all processes."""
    if is_first():
        print(line, file=sys.stderr, flush=True)


def wait_for_all(name: str) -> None:
    """Return when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def on_any(flag: bool) -> bool:
    """Whether the flag is set on any process; every process must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def preempted(step: int) -> bool:
    """Whether JAX's preemption service, which knows of SIGTERM on any process, names `step` as the one to stop after.

    Every process must ask after every step.
    """
    if jax.process_count() == 1:
        return False
    try:
        return multihost_utils.reached_preemption_sync_point(step)
    except RuntimeError:  # it is turned off (jax_enable_preemption_service)
        return False


def from_first(tree: Any) -> Any:
    """Arrays of the same shapes on every process: those that the first one has."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def own_rows(sharding: Sharding, rows: int) -> slice:
    """Which of the `rows` of a batch this process's devices keep: the least range that holds them all."""
    indices = sharding.addressable_devices_indices_map((rows, 1)).values()
    parts = [index[0].indices(rows) for index in indices if index is not None]
    return slice(min(part[0] for part in parts), max(part[1] for part in parts))


def place(tree: Any, sharding: Sharding, first: int = 0, rows: int | None = None) -> Any:
    """Put arrays onto the mesh; each process sends only what its devices keep.

    Args:
      tree: arrays that every process holds alike; or each its own rows of them, as `own_rows` gives them.
      sharding: how they are placed.
      first: the first row that this process holds.
      rows: how many rows there are in all; None: as many as this process holds.
    """

    def placed(leaf: np.ndarray) -> jax.Array:
        shape = (leaf.shape[0] if rows is None else rows, *leaf.shape[1:])

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(shape[0])
            return leaf[(slice(start - first, stop - first), *index[1:])]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(placed, tree)
