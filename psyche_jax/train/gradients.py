"""Gradients of a batch in micro-batches. Losses are sums with weights that know the whole batch, so parts add up."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from psyche_jax.model.qwen2 import Parameters
from psyche_jax.model.sharding import Sharding, join_rows, split_rows

LossFunction: TypeAlias = Callable[[Parameters, Any], tuple[jax.Array, Any]]


def accumulate_gradients(
    loss: LossFunction, parameters: Parameters, batch: Any, micro_batches: int, sharding: Sharding
) -> tuple[jax.Array, Any, Parameters]:
    """Sum of the losses and gradients of consecutive micro-batches.

    Args:
      loss: `(parameters, part of batch) -> (loss, per-row extras)`.
      parameters: what is differentiated.
      batch: a pytree of arrays [rows, ...].
      micro_batches: divides `rows`.
      sharding: the mesh.

    Returns:
      The loss, the extras of all rows, the gradient.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if micro_batches == 1:
        (value, extras), gradients = gradient(parameters, batch)
        return value, extras, gradients

    def add(carry: tuple[jax.Array, Parameters], part: Any) -> tuple[tuple[jax.Array, Parameters], Any]:
        (value, extras), gradients = gradient(parameters, part)
        return (carry[0] + value, jax.tree.map(jnp.add, carry[1], gradients)), extras

    start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, parameters))
    (value, gradients), extras = jax.lax.scan(add, start, split_rows(batch, micro_batches, sharding))
    return value, join_rows(extras), gradients
