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
    largest = reduce(jnp.maximum, (highest(score, len(query)) for score in scores))
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
    rows, kv_heads, _, queries, keys = scores.shape
    weights = jnp.exp(scores - _by_source(jax.lax.stop_gradient(largest), rows))
    by_row = weights.astype(dtype).reshape(rows, kv_heads, -1, keys)
    output = product("bkmt,bkth->bkmh", by_row, source.value, jnp.float32)
    output = output.reshape(rows, kv_heads, -1, queries, output.shape[-1])
    total = weights.sum(axis=-1, keepdims=True)
    return Weighed(_by_query(total, len(largest)), _by_query(output, len(largest)))


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
    """Float32 [rows, kv_heads, queries that share a key of the row, queries, keys]; `query` as `by_key` lays it out.

    Where a row of the source serves several of queries, theirs stay side by side, as the product leaves them: so many
    scores are not turned, only what is read out of them.
    """
    _, kv_heads, shared, queries, head_dim = query.shape
    rows, keys = source.key.shape[0], source.key.shape[2]
    by_row = _by_source(query, rows).reshape(rows, kv_heads, -1, head_dim)
    score = product("bkmh,bkth->bkmt", by_row, source.key, jnp.float32)
    allowed = source.allowed.reshape(rows, -1, *source.allowed.shape[1:])
    if allowed.shape[1] > 1:
        allowed = jnp.repeat(allowed, shared, axis=1)
    return jnp.where(allowed[:, None], score.reshape(rows, kv_heads, -1, queries, keys), MASKED)


def highest(scores: jax.Array, batch: int) -> jax.Array:
    """The largest of each query's `masked_scores`: [batch, kv_heads, queries that share a key, queries, 1]."""
    return _by_query(scores.max(axis=-1, keepdims=True), batch)


def _by_source(array: jax.Array, rows: int) -> jax.Array:
    """[batch, kv_heads, shared, queries, last] to [rows, kv_heads, batch / rows * shared, queries, last]."""
    batch, kv_heads, shared, queries, last = array.shape
    if batch == rows:
        return array
    grouped = array.reshape(rows, batch // rows, kv_heads, shared, queries, last).swapaxes(1, 2)
    return grouped.reshape(rows, kv_heads, -1, queries, last)


def _by_query(array: jax.Array, batch: int) -> jax.Array:
    """Back from `_by_source`."""
    rows, kv_heads, _, queries, last = array.shape
    if batch == rows:
        return array
    grouped = array.reshape(rows, kv_heads, batch // rows, -1, queries, last).swapaxes(1, 2)
    return grouped.reshape(batch, kv_heads, -1, queries, last)


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
