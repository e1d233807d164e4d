"""Grouped-query attention over one or several sources of keys and values."""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

from psyche_jax.model.products import product

# Finite, so that a row without any allowed key (padding) gives a finite, unused result instead of NaN.
MASKED = -1e30


class Source(NamedTuple):
    """Keys and values to attend to.

    `key`, `value`: [rows, kv_heads, keys, head_dim]. `allowed`: bool [rows, queries or 1, keys], or with a row for
    each row of queries. A source may have fewer rows than there are queries: each of its rows then serves as many
    consecutive rows of queries (the shared prompt of a group of responses).
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
    query = by_key(query, sources[0].key.shape[1])
    scores = [masked_scores(query, source) for source in sources]
    largest = reduce(jnp.maximum, (score.max(axis=-1, keepdims=True) for score in scores))
    parts = [weigh(score, largest, source, query.dtype) for score, source in zip(scores, sources, strict=True)]
    return joined(parts, query.dtype)


class Weighed(NamedTuple):
    """One source's part of attention: what is added to the parts of others. Both are float32.

    `total`: [batch, kv_heads, queries that share a key, queries, 1], the sum of all weights; `output`: the same with
    head_dim last, the sum of values by weight.
    """

    total: jax.Array
    output: jax.Array


def weigh(scores: jax.Array, largest: jax.Array, source: Source, dtype: jnp.dtype) -> Weighed:
    """The values of `source` by the weights of `scores`, which are what `masked_scores` gives.

    `largest`, [..., 1]: the largest score of all sources, not of this one alone: so parts add up as they are. If each
    were relative to its own, bfloat16 would round weights otherwise than where there is one source.
    """
    weights = jnp.exp(scores - jax.lax.stop_gradient(largest))
    return Weighed(weights.sum(axis=-1, keepdims=True), _weighted(weights.astype(dtype), source))


def joined(parts: Sequence[Weighed], dtype: jnp.dtype) -> jax.Array:
    """Attention over the sources of all parts: [batch, queries, heads, head_dim]."""
    # Divided here, where the array is small, instead of in the weights.
    output = reduce(jnp.add, (part.output for part in parts)) / reduce(jnp.add, (part.total for part in parts))
    output = output.astype(dtype).transpose(0, 3, 1, 2, 4)
    batch, queries, kv_heads, shared, head_dim = output.shape
    return output.reshape(batch, queries, kv_heads * shared, head_dim)


def by_key(query: jax.Array, kv_heads: int) -> jax.Array:
    """[batch, kv_heads, queries that share a key, queries, head_dim], scaled.

    Scores and weights are the large arrays. They stay as the products leave them, [rows, kv_heads, queries that share a
    key, keys]; the queries are laid out for that, which is cheap.
    """
    batch, queries, heads, head_dim = query.shape
    query = query.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    return (query * jnp.asarray(head_dim**-0.5, query.dtype)).transpose(0, 2, 3, 1, 4)


def masked_scores(query: jax.Array, source: Source) -> jax.Array:
    """Float32 [batch, kv_heads, shared, queries, keys]; `query` as `by_key` lays it out."""
    batch, kv_heads, shared, queries, head_dim = query.shape
    rows, keys = source.key.shape[0], source.key.shape[2]
    by_row = _join_groups(query, rows).reshape(rows, kv_heads, -1, head_dim)
    score = product("bkmh,bkth->bkmt", by_row, source.key, jnp.float32)
    score = _split_groups(score, (batch, kv_heads, shared, queries, keys))
    allowed = source.allowed
    if batch // allowed.shape[0] > 1:
        allowed = jnp.repeat(allowed, batch // allowed.shape[0], axis=0)
    return jnp.where(allowed[:, None, None], score, MASKED)


def _weighted(weights: jax.Array, source: Source) -> jax.Array:
    """Float32 [batch, kv_heads, shared, queries, head_dim]: the sum of values by weight."""
    batch, kv_heads, shared, queries, keys = weights.shape
    rows, head_dim = source.key.shape[0], source.key.shape[3]
    by_row = _join_groups(weights, rows).reshape(rows, kv_heads, -1, keys)
    output = product("bkmt,bkth->bkmh", by_row, source.value, jnp.float32)
    return _split_groups(output, (batch, kv_heads, shared, queries, head_dim))


def _join_groups(array: jax.Array, rows: int) -> jax.Array:
    """[batch, kv_heads, ...] to [rows, kv_heads, batch / rows, ...]: a source's row with all that it serves."""
    if array.shape[0] == rows:
        return array
    return array.reshape(rows, -1, *array.shape[1:]).swapaxes(1, 2)


def _split_groups(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[rows, kv_heads, everything that shares a row, last] to `shape`, whose first axis is the batch."""
    rows, batch = array.shape[0], shape[0]
    if batch == rows:
        return array.reshape(shape)
    return array.reshape(rows, shape[1], batch // rows, *shape[2:]).swapaxes(1, 2).reshape(shape)


def by_head(array: jax.Array) -> jax.Array:
    """[batch, sequence, heads, head_dim] to [batch, heads, sequence, head_dim], and back."""
    return array.swapaxes(1, 2)


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
