"""Linear maps of all layers, with their adapters: how they are stored, and how they are multiplied."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from psyche_jax.config import AdapterSection
from psyche_jax.model.products import product, weighted, weighted_int8

Parameters: TypeAlias = dict[str, Any]


class Linear(nnx.Module):
    """Affine maps of all layers; `kernel` [layers, out, in], `bias` [layers, out] or absent.

    A kernel in int8 (`model/int8.py`) counts `kernel_scale` times, float32 [layers, out].
    With an adapter: also `lora_a` [layers, rank, in] and `lora_b` [layers, out, rank], float32; when `bind` has put
    them in, the latter is [layers, rank, out].
    """

    def __init__(
        self,
        key: jax.Array,
        shape: tuple[int, int, int],
        axes: tuple[str, str],
        bias: bool,
        dtype: jnp.dtype,
        int8: bool,
    ) -> None:
        layers, features, _ = shape
        self.shape, self.axes = shape, axes
        self.adapter_scale = 0.0  # there is none
        if int8:
            kernel = jax.random.randint(key, shape, -127, 128, jnp.int8)
            scale = jnp.full((layers, features), 0.02 * 3**0.5 / 127)  # of standard deviation 0.02 too
        else:
            kernel, scale = 0.02 * jax.random.normal(key, shape, dtype), None
        self.kernel = nnx.Param(kernel, logical_axes=("layers", *axes))
        self.kernel_scale = None if scale is None else nnx.Param(scale, logical_axes=("layers", axes[0]))
        self.bias = nnx.Param(jnp.zeros((layers, features), dtype), logical_axes=("layers", axes[0])) if bias else None

    def add_adapter(self, key: jax.Array, adapter: AdapterSection) -> None:
        """Have it add alpha / rank · B(A x), which is 0 as long as B is. A begins as in `peft`: uniform, ± 1/√in."""
        layers, features, inputs = self.shape
        shape, limit = (layers, adapter.rank, inputs), inputs**-0.5
        start = jax.random.uniform(key, shape, jnp.float32, -limit, limit)
        zeros = jnp.zeros((layers, features, adapter.rank), jnp.float32)
        self.lora_a = nnx.Param(start, logical_axes=("layers", None, self.axes[1]))
        self.lora_b = nnx.Param(zeros, logical_axes=("layers", self.axes[0], None))
        self.adapter_scale = adapter.scale

    def __call__(self, x: jax.Array, low: jax.Array | None) -> jax.Array:
        """[rows, in] to [rows, out], within a scan that has taken the leading axis away.

        `low` [rows, rank]: with an adapter, alpha / rank · A x.
        """
        if self.kernel_scale is None:
            y = weighted(x, cast_weights(self.kernel[...], x.dtype))
        else:
            y = weighted_int8(x, self.kernel[...], self.kernel_scale[...])
        if low is not None:
            y = y + product("...r,ro->...o", low, cast_weights(self.lora_b[...], x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def apply(x: jax.Array, *maps: Linear) -> tuple[jax.Array, ...]:
    """What each map makes of the same `x`: of [..., in] arrays [..., out]."""
    # Over flat rows: with several axes of them the CPU compiler transposes activations for the weights' gradient.
    rows = x.reshape(-1, x.shape[-1])
    lows: list[jax.Array | None] = [None] * len(maps)
    if adapted := [number for number, one in enumerate(maps) if one.adapter_scale]:
        # As one product, since a TPU takes as long for the few rows of one A as for those of all. They are of one rank,
        # and scaled alike.
        low = weighted(rows, jnp.concatenate([cast_weights(maps[number].lora_a[...], x.dtype) for number in adapted]))
        low = low * maps[adapted[0]].adapter_scale
        for number, part in zip(adapted, jnp.split(low, len(adapted), axis=-1), strict=True):
            lows[number] = part
    mapped = (one(rows, low) for one, low in zip(maps, lows, strict=True))
    return tuple(y.reshape(*x.shape[:-1], -1) for y in mapped)


def cast_weights(weights: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`weights.astype(dtype)`, done in place: within a loop over layers, one layer at a time.

    A cast alone the TPU compiler moves out of a loop (its bfloat16 propagation sees that the loop reads nothing
    else), so that a second copy of the weights of all layers is held through the program. The rounding to bfloat16's
    bits before the cast changes no value, and is an operation that the compiler does not move.
    """
    if weights.dtype == jnp.float32 and dtype == jnp.bfloat16:
        weights = jax.lax.reduce_precision(weights, exponent_bits=8, mantissa_bits=7)
    return weights.astype(dtype)


def turned(parameters: Parameters) -> Parameters:
    """`parameters` with each `lora_b` [layers, out, rank] as `lora_b_turned` [layers, rank, out].

    So it is multiplied: a TPU fills up the last axis to 128, and its compiler would hold copies of a B with a rank of
    32 that are four times as large. What is turned stays so.
    """
    return _with_b("lora_b", "lora_b_turned", parameters)


def turned_back(parameters: Parameters) -> Parameters:
    """What `turned` was given."""
    return _with_b("lora_b_turned", "lora_b", parameters)


def as_multiplied(parameters: Parameters) -> Parameters:
    """`parameters` turned, by the names of the module that multiplies them."""
    return _with_b("lora_b_turned", "lora_b", turned(parameters), lambda b: b)


def _with_b(
    old: str, new: str, tree: Parameters, change: Callable[[jax.Array], jax.Array] = lambda b: b.swapaxes(1, 2)
) -> Parameters:
    result: Parameters = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            result[name] = _with_b(old, new, value, change)
        else:
            result[new if name == old else name] = change(value) if name == old else value
    return result
