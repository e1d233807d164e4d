"""How a token is drawn from its logits: the filters, and random numbers that depend on nothing but what is drawn."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p

_TINY = jnp.finfo(jnp.float32).tiny  # what is smaller may be 0 in float32
_BLOCK = 128  # a draw finds a block of so many tokens first, then the token in it


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Temperature 0 is greedy; the defaults are the model's full distribution.

    The filters work one after the other, as in transformers: `top_k` keeps the k likeliest tokens; `top_p` the
    smallest set of likeliest tokens that has that much probability among what is left; `min_p` those at least that
    likely relative to the likeliest. Ties with the last one kept are kept.
    """

    max_new_tokens: int
    temperature: float = 1.0
    generations_per_prompt: int = 1
    slots: int | None = None  # so many responses are decoded at once, to hold less cache; None: all
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0


def uniform(key: jax.Array, response: jax.Array, position: jax.Array) -> jax.Array:
    """Two numbers from 0 to below 1 for each token, float32 [2, rows]: a function of key, response and position alone.

    The cipher behind `jax.random` (Threefry) is applied to the pair of both, for all rows at once.

    Args:
      key: random key; or the numbers themselves, float32 [2, responses, positions], by which responses can be made to
        end at given places (`bench`).
      response, position: int32 [rows], the number of a response among all, and which of its tokens is drawn.
    """
    if key.dtype == jnp.float32:
        return key[:, response, position]
    words = jax.random.key_data(key).ravel()
    bits = threefry2x32_p.bind(words[0], words[1], response.astype(jnp.uint32), position.astype(jnp.uint32))
    return jnp.stack([(part >> 8).astype(jnp.float32) * jnp.float32(2**-24) for part in bits])


def draw(logits: jax.Array, numbers: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """A token for each row, and its log-prob under the distribution it was drawn from.

    Args:
      logits: float32 [rows, vocab].
      numbers: what `uniform` gives for these rows.
      sampling: greedy draws report the log-prob at temperature 1.

    Returns:
      int32 [rows], float32 [rows].
    """
    relative = tempered(logits, sampling.temperature or 1.0)
    if sampling.temperature > 0:
        relative = filter_logits(relative, sampling)  # which keeps the largest, 0
    blocks = whole_blocks(relative, 1).reshape(len(logits), -1, _BLOCK)
    weights = jnp.exp(blocks).sum(axis=-1)
    log_total = jnp.log(weights.sum(axis=-1))
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), -log_total

    # By inverting the cumulative sum, with two uniform numbers a row instead of one a token: the first picks a block,
    # the second the token in it, so that rare tokens keep their share, and a vocabulary that is split over devices is
    # only summed, never gathered. Of weights by token only those of one block are ever in memory.
    block = _invert(weights, numbers[0])
    is_chosen = jnp.arange(blocks.shape[1]) == block[:, None]
    within = jnp.where(is_chosen[:, :, None], blocks, 0).sum(axis=1)
    place = _invert(jnp.exp(within), numbers[1])
    log_weight = jnp.take_along_axis(within, place[:, None], axis=-1)[:, 0]
    return (block * _BLOCK + place).astype(jnp.int32), log_weight - log_total


def tempered(logits: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """`logits` [rows, vocab] at a temperature above 0, a number or [rows, 1], however small; the largest is 0.

    Relative to the largest, that one stays finite where the others overflow.
    """
    return (logits - logits.max(axis=-1, keepdims=True)) / jnp.maximum(temperature, _TINY)


def whole_blocks(logits: jax.Array, parts: int) -> jax.Array:
    """`logits` [rows, vocab], with tokens of no probability behind, so that each of `parts` devices has whole blocks.

    Else the compiler gathers the weights of all tokens for every draw.
    """
    return jnp.pad(logits, ((0, 0), (0, -logits.shape[-1] % (_BLOCK * parts))), constant_values=-jnp.inf)


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """`logits` [rows, vocab], -inf where the filters of `sampling` leave a token out."""
    vocabulary = logits.shape[-1]
    if sampling.top_k is not None and sampling.top_k < vocabulary:
        enough = jnp.float32(sampling.top_k)
        logits = keep_from(logits, lambda kept: kept.sum(axis=-1, keepdims=True, dtype=jnp.float32) >= enough)
    if sampling.top_p < 1:
        logits = keep_nucleus(logits, sampling.top_p)
    if sampling.min_p > 0:
        least = logits.max(axis=-1, keepdims=True) + jnp.log(jnp.float32(sampling.min_p))
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def keep_nucleus(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """-inf on all but each row's smallest set of likeliest tokens with probability `top_p` (arXiv 1904.09751).

    `logits` [rows, vocab]; `top_p` a number, or [rows, 1].
    """
    probabilities, least = jax.nn.softmax(logits, axis=-1), jnp.maximum(top_p, _TINY)
    kept = keep_from(logits, lambda kept: jnp.where(kept, probabilities, 0).sum(axis=-1, keepdims=True) >= least)
    return jnp.where(jnp.asarray(top_p) < 1, kept, logits)  # all of them, whatever their sum is rounded to


def keep_from(logits: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Keep the logits from the highest threshold on at which those kept are `enough`.

    Bisection over the bits of float32, which are ordered as the numbers are: 32 passes, whatever the vocabulary,
    and exact. `enough(kept)`: bool [rows, 1] of a bool mask [rows, vocab].
    """
    bits = jax.lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.int32)
    # Negative numbers are ordered the other way round.
    order = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
    threshold = jnp.full((*logits.shape[:-1], 1), jnp.iinfo(jnp.int32).min, jnp.int32)

    def narrow(step: jax.Array, threshold: jax.Array) -> jax.Array:
        # From the smallest number, add powers of two as long as enough is kept; the first one crosses zero.
        higher = threshold + jnp.left_shift(jnp.int32(1), 31 - step)
        return jnp.where(enough(order >= higher), higher, threshold)

    threshold = jax.lax.fori_loop(0, 32, narrow, threshold)
    return jnp.where(order >= threshold, logits, -jnp.inf)


def _invert(weights: jax.Array, share: jax.Array) -> jax.Array:
    """The first index at which the cumulative sum of `weights` [rows, n] exceeds `share` [rows] of the total."""
    cumulative = jnp.cumsum(weights, axis=-1)
    total = cumulative[:, -1:]
    # Rounding must not reach the total itself, after which there is nothing.
    target = jnp.minimum(share[:, None] * total, total * (1 - jnp.finfo(jnp.float32).epsneg))
    return jnp.sum(cumulative <= target, axis=-1)
