"""Drawing a token from logits: temperature, top-k, top-p and min-p, without sorting the vocabulary."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

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
    waves: int = 1  # the prompts are decoded in that many parts, one after the other, to hold less cache
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0


def draw(logits: jax.Array, key: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """A token for each row, and its log-prob under the distribution it was drawn from.

    Args:
      logits: float32 [rows, vocab].
      key: random key.
      sampling: greedy draws report the log-prob at temperature 1.

    Returns:
      int32 [rows], float32 [rows].
    """
    if sampling.temperature == 0:
        token = jnp.argmax(logits, axis=-1)
    else:
        logits = filter_logits(logits / sampling.temperature, sampling)
    largest = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    if sampling.temperature > 0:
        token = _pick(weights, key)
    chosen = jnp.take_along_axis(logits - largest, token[:, None], axis=-1)[:, 0]
    return token.astype(jnp.int32), chosen - jnp.log(weights.sum(axis=-1))


def whole_blocks(logits: jax.Array, parts: int) -> jax.Array:
    """`logits` [rows, vocab], with tokens of no probability behind, so that each of `parts` devices has whole blocks.

    Else the compiler gathers the weights of all tokens for every draw.
    """
    spare = -logits.shape[-1] % (_BLOCK * parts) if parts > 1 else 0
    return jnp.pad(logits, ((0, 0), (0, spare)), constant_values=-jnp.inf)


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """`logits` [rows, vocab], -inf where the filters of `sampling` leave a token out."""
    vocabulary = logits.shape[-1]
    if sampling.top_k is not None and sampling.top_k < vocabulary:
        enough = jnp.float32(sampling.top_k)
        logits = keep_from(logits, lambda kept: kept.sum(axis=-1, keepdims=True, dtype=jnp.float32) >= enough)
    if sampling.top_p < 1:
        probabilities = jax.nn.softmax(logits, axis=-1)

        def enough_mass(kept: jax.Array) -> jax.Array:
            return jnp.where(kept, probabilities, 0).sum(axis=-1, keepdims=True) >= sampling.top_p

        logits = keep_from(logits, enough_mass)
    if sampling.min_p > 0:
        least = logits.max(axis=-1, keepdims=True) + jnp.log(jnp.float32(sampling.min_p))
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


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


def _pick(weights: jax.Array, key: jax.Array) -> jax.Array:
    """Index into each row of `weights` [rows, vocab] with that probability, by inverting the cumulative sum.

    Two uniform numbers a row instead of one a token: the first picks a block, the second the token in it, so that
    rare tokens keep their share, and a vocabulary that is split over devices is only summed, never gathered.
    """
    rows, vocabulary = weights.shape
    blocks = -(-vocabulary // _BLOCK)
    by_block = jnp.pad(weights, ((0, 0), (0, blocks * _BLOCK - vocabulary))).reshape(rows, blocks, _BLOCK)
    uniform = jax.random.uniform(key, (2, rows, 1))
    block = _invert(by_block.sum(axis=-1), uniform[0])
    chosen = jnp.arange(blocks) == block[:, None]
    within = jnp.where(chosen[:, :, None], by_block, 0).sum(axis=1)
    return block * _BLOCK + _invert(within, uniform[1])


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first index at which the cumulative sum of `weights` [rows, n] exceeds `uniform` [rows, 1] of the total."""
    cumulative = jnp.cumsum(weights, axis=-1)
    total = cumulative[:, -1:]
    # Rounding must not reach the total itself, behind which nothing stands.
    target = jnp.minimum(uniform * total, total * (1 - jnp.finfo(jnp.float32).epsneg))
    return jnp.sum(cumulative <= target, axis=-1)
