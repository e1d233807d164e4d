"""Several processes, each with some of the devices, running one program."""

import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from psyche_jax.config import DistributedSection
from psyche_jax.errors import UserError


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
        reason = str(error).splitlines()[0]
        raise UserError(
            f"distributed: the other hosts were not found within {section.timeout_seconds} s ({reason}); "
            "start the same command on every host of the slice (gcloud … --worker=all), "
            "or set distributed.initialize=never to use one host's devices alone"
        ) from None


def is_first() -> bool:
    """Whether this process is the one that writes logs, metrics and states."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Return when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def on_any(flag: bool) -> bool:
    """Whether the flag is set on any process; every process must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def from_first(tree: Any) -> Any:
    """Arrays of the same shapes on every process: those that the first one has."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def place(tree: Any, sharding: Sharding) -> Any:
    """Put arrays that every process holds alike onto the mesh; each process sends only what its devices keep."""
    return jax.tree.map(lambda leaf: jax.make_array_from_callback(leaf.shape, sharding, lambda part: leaf[part]), tree)
