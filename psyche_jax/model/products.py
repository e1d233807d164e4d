"""Matrix products: their precision on every backend, their gradients on a CPU, what a TPU keeps out of them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Float32 is multiplied as float32 on every backend. By default a TPU rounds the factors to bfloat16, a GPU to TF32.
FLOAT32_PRECISION = jax.lax.Precision.HIGHEST


def product(form: str, first: jax.Array, second: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """`einsum` of two factors of one dtype, summed and returned in `dtype` (None: theirs), as precise as they are.

    Of 16-bit factors every product is exact in float32, whatever the precision is called.
    """
    precision = FLOAT32_PRECISION if first.dtype == jnp.float32 else None
    return jnp.einsum(form, first, second, precision=precision, preferred_element_type=dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def weighted(x: jax.Array, weights: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """`x` [..., in] times `weights` [out, in], summed and returned in `dtype` (None: that of `x`): [..., out]."""
    return product("...i,oi->...o", x, weights, dtype)


def _forward(
    x: jax.Array, weights: jax.Array, dtype: DTypeLike | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return weighted(x, weights, dtype), (x, weights)


def _backward(
    dtype: DTypeLike | None, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weights = kept
    of_x, of_weights = jax.vjp(partial(weighted.fun, dtype=dtype), x, weights)[1](gradient)
    features, width = weights.shape
    if features > width:
        of_weights = jax.lax.platform_dependent(x, gradient, of_weights, cpu=_narrow_first, default=lambda *a: a[2])
    return of_x, of_weights


def _narrow_first(x: jax.Array, gradient: jax.Array, of_weights: jax.Array) -> jax.Array:
    # A CPU transposes the first factor of a product over rows in memory. So the narrow one comes first, and what is
    # turned at last is as small as the weights; without the barrier the compiler would swap the factors again.
    turned = product("...i,...o->io", x, gradient, of_weights.dtype)
    return jax.lax.optimization_barrier(turned).T


weighted.defvjp(_forward, _backward)


@jax.custom_vjp
def weighted_int8(x: jax.Array, weights: jax.Array, scale: jax.Array) -> jax.Array:
    """`x` [..., in] times `weights` int8 [out, in] times `scale` float32 [out]: [..., out], in the dtype of `x`.

    The weights are multiplied in the dtype of `x`, which holds every one of them exactly; sums are scaled in float32
    and rounded once. Only `x` has a gradient.
    """
    return (product("...i,oi->...o", x, weights.astype(x.dtype), jnp.float32) * scale).astype(x.dtype)


def _backward_int8(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None, None]:
    weights, scale = kept
    scaled = (gradient * scale).astype(gradient.dtype)
    return product("...o,oi->...i", scaled, weights.astype(gradient.dtype)), None, None


weighted_int8.defvjp(lambda x, weights, scale: (weighted_int8(x, weights, scale), (weights, scale)), _backward_int8)


@jax.custom_vjp
def materialized(x: jax.Array) -> jax.Array:
    """`x`, on a TPU computed once and written to memory, and so its gradient.

    Otherwise the TPU compiler computes it within each product that reads it, again for every tile, or keeps a product's
    result in float32 for what is added to it: in training of 7B that costs up to a sixth of the time.
    """
    return _written(x)


materialized.defvjp(lambda x: (materialized(x), None), lambda _, gradient: (_written(gradient),))


@jax.custom_vjp
def gradients_materialized(*x: jax.Array) -> tuple[jax.Array, ...]:
    """What is given, whose gradients are `materialized`. It may itself be fused with what reads it."""
    return x


gradients_materialized.defvjp(lambda *x: (x, None), lambda _, gradients: _written(gradients))


def _written(x: Any) -> Any:  # on a CPU the program is the same with barriers; on a GPU they were not measured
    return jax.lax.platform_dependent(x, tpu=jax.lax.optimization_barrier, default=lambda x: x)
