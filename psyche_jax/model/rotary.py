"""Rotary position embedding (RoPE, arXiv 2104.09864), also stretched to longer texts."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from psyche_jax.model.config import ModelConfig, RopeScaling
from psyche_jax.model.products import product


def rotary_tables(positions: jax.Array, config: ModelConfig, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [batch, sequence, 1, head_dim / 2] for `positions` [batch, sequence]."""
    frequencies = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    magnitude = 1.0
    if config.rope_scaling is not None:
        kept = _kept(config.rope_scaling, config.rope_theta, config.head_dim)
        frequencies *= (kept + (1 - kept) / config.rope_scaling.factor).astype(np.float32)
        magnitude = _magnitude(config.rope_scaling)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return (magnitude * jnp.cos(angles)).astype(dtype), (magnitude * jnp.sin(angles)).astype(dtype)


def _kept(scaling: RopeScaling, base: float, head_dim: int) -> np.ndarray:
    """Which share of each frequency stays as it is, float64 [head_dim / 2]; the rest is divided by the factor.

    All of one that makes many turns within the original length, nothing of one that makes few. In between the share is
    linear: for Llama 3 in the number of turns (as Meta published it), for YaRN in the frequency's index
    (arXiv 2309.00071, section 3.2).
    """
    few, many = scaling.turns
    index, length = np.arange(head_dim // 2), scaling.original_max_position_embeddings
    if scaling.rope_type == "llama3":
        turns = length / (2 * math.pi) * base ** (-2 * index / head_dim)
        return np.clip((turns - few) / (many - few), 0, 1)

    def index_of(turns: float) -> float:
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = index_of(many), index_of(few)
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    # The bounds, and how far apart they are at least, are those of transformers.
    first, last = max(first, 0), min(last, head_dim - 1)
    return 1 - np.clip((index - first) / (last - first or 0.001), 0, 1)


def _magnitude(scaling: RopeScaling) -> float:
    """What cosine and sine are multiplied by, so that attention stays as sharp (YaRN, section 3.4)."""
    if scaling.rope_type != "yarn":
        return 1.0
    return 0.1 * math.log(scaling.factor) + 1 if scaling.attention_factor is None else scaling.attention_factor


def rotate(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding of `x` [batch, sequence, heads, head_dim], halves paired as in Hugging Face's Qwen2."""
    return jax.lax.platform_dependent(x, *rotary, tpu=_rotate_whole, default=_rotate_halves)


def _rotate_halves(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def _rotate_whole(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    # A TPU keeps vectors whole in its lanes: cut in two, they fill half of them or are laid across heads and turned
    # back, a tenth of the training of 7B with adapters. A product with a permutation exchanges the halves, exactly.
    half = x.shape[-1] // 2
    exchanged = product("...d,de->...e", x, jnp.roll(jnp.eye(2 * half, dtype=x.dtype), half, axis=0))
    return x * jnp.concatenate([cosine, cosine], axis=-1) + exchanged * jnp.concatenate([-sine, sine], axis=-1)
