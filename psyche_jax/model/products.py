"""Matrix products: their precision on every backend, and products with weights whose gradient is fast on a CPU."""

from functools import partial

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
