"""Grouped-query attention over one or several sources of keys and values."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that a row without any allowed key (padding) gives a finite, unused result instead of NaN.
_MASKED = -1e30


class Source(NamedTuple):
    """Keys and values to attend to.

    `key`, `value`: [rows, keys, kv_heads, head_dim]. `allowed`: bool [rows, queries or 1, keys].
    A source may have fewer rows than there are queries: each of its rows then serves as many consecutive rows of
    queries (the shared prompt of a group of responses).
    """

    key: jax.Array
    value: jax.Array
    allowed: jax.Array


def attention(query: jax.Array, sources: Sequence[Source]) -> jax.Array:
    """Softmax attention of `query` over all sources together.

    Args:
      query: [batch, queries, heads, head_dim].
      sources: what is attended to; `heads` must be a multiple of their `kv_heads`.

    Returns:
      [batch, queries, heads, head_dim] in the dtype of `query`. Scores and softmax are float32.
    """
    batch, queries, heads, head_dim = query.shape
    scale = head_dim**-0.5
    scores = []
    for source in sources:
        rows, keys, kv_heads, _ = source.key.shape
        grouped = query.reshape(rows, batch // rows, queries, kv_heads, heads // kv_heads, head_dim)
        score = jnp.einsum("bgqkrh,btkh->bkgrqt", grouped, source.key, preferred_element_type=jnp.float32)
        # `allowed` has a row per source row or a row per query row.
        allowed = source.allowed.reshape(rows, -1, *source.allowed.shape[1:])[:, None, :, None]
        score = jnp.where(allowed, score * scale, _MASKED)
        # [batch, kv_heads, heads per kv head, queries, keys]
        score = score.transpose(0, 2, 1, 3, 4, 5).reshape(batch, kv_heads, heads // kv_heads, queries, keys)
        scores.append(score)
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(query.dtype)
    outputs = []
    start = 0
    for source in sources:
        rows, keys, kv_heads, _ = source.key.shape
        weight = weights[..., start : start + keys]
        start += keys
        weight = weight.reshape(rows, batch // rows, kv_heads, heads // kv_heads, queries, keys)
        output = jnp.einsum("bgkrqt,btkh->bgqkrh", weight, source.value, preferred_element_type=jnp.float32)
        outputs.append(output.reshape(batch, queries, heads, head_dim))
    return sum(outputs[1:], outputs[0]).astype(query.dtype)


def causal_mask(segments: jax.Array) -> jax.Array:
    """Which keys each query may see: earlier ones and itself, of its own segment.

    Args:
      segments: int32 [batch, sequence]; 0 marks padding, packed examples are numbered from 1.

    Returns:
      bool [batch, sequence, sequence] (query, key).
    """
    length = segments.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    same = segments[:, :, None] == segments[:, None, :]
    return causal & same & (segments > 0)[:, None, :]
