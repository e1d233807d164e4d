"""Gradients of a batch in micro-batches. Losses are sums with weights that know the whole batch, so parts add up."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from psyche_jax.model.qwen2 import Parameters
from psyche_jax.model.sharding import Sharding, join_rows, split_rows

LossFunction: TypeAlias = Callable[[Parameters, Any], tuple[jax.Array, Any]]


def accumulate_gradients(
    loss: LossFunction,
    parameters: Parameters,
    batch: Any,
    micro_batches: int,
    sharding: Sharding,
    places: Any = None,
) -> tuple[jax.Array, Any, Parameters]:
    """Sum of the losses and gradients of consecutive micro-batches.

    Args:
      loss: `(parameters, part of batch) -> (loss, per-row extras)`.
      parameters: what is differentiated.
      batch: a pytree of arrays [rows, ...].
      micro_batches: divides `rows`.
      sharding: the mesh.
      places: shardings of the parameters, where their gradients lie too (None: wherever the compiler likes).

    Returns:
      The loss, the extras of all rows, the gradient.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if micro_batches == 1:
        (value, extras), gradients = gradient(parameters, batch)
        return value, extras, gradients

    # The backward pass adds each layer's gradient to these where they lie: a second gradient never stands beside.
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    sums = jax.tree.map(jax.new_ref, zeros if places is None else jax.lax.with_sharding_constraint(zeros, places))

    def add(total: jax.Array, part: Any) -> tuple[jax.Array, Any]:
        pull_back: Any  # jax.VJP, which jax.vjp's type does not say
        value, pull_back, extras = jax.vjp(lambda parameters: loss(parameters, part), parameters, has_aux=True)
        pull_back.with_refs(sums)(jnp.ones_like(value))
        return total + value, extras

    value, extras = jax.lax.scan(add, jnp.float32(0), split_rows(batch, micro_batches, sharding))
    return value, join_rows(extras), jax.tree.map(jax.freeze, sums)
