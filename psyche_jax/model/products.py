"""Products with weights, whose gradients are computed in the order that suits the machine."""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def weighted(x: jax.Array, weights: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """`x` [..., in] times `weights` [out, in], summed and returned in `dtype` (None: that of `x`): [..., out]."""
    return jnp.einsum("...i,oi->...o", x, weights, preferred_element_type=dtype)


def _forward(
    x: jax.Array, weights: jax.Array, dtype: jnp.dtype | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return weighted(x, weights, dtype), (x, weights)


def _backward(
    dtype: jnp.dtype | None, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
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
    turned = jnp.einsum("...i,...o->io", x, gradient, preferred_element_type=of_weights.dtype)
    return jax.lax.optimization_barrier(turned).T


weighted.defvjp(_forward, _backward)
