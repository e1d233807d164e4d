"""Decoding: prefill, one token after the other with a KV cache, and how a token is drawn from its logits."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from psyche_jax.model.config import ModelConfig
from psyche_jax.model.log_probs import last_positions
from psyche_jax.model.qwen2 import Execution, KVCache, Parameters, bind, build
from psyche_jax.model.sharding import DECODE_RULES, join_rows, split_rows

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
        logits = keep_nucleus(logits, sampling.top_p)
    if sampling.min_p > 0:
        least = logits.max(axis=-1, keepdims=True) + jnp.log(jnp.float32(sampling.min_p))
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def keep_nucleus(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """-inf on all but each row's smallest set of likeliest tokens with probability `top_p` (arXiv 1904.09751).

    `logits` [rows, vocab]; `top_p` a number, or [rows, 1].
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    kept = keep_from(logits, lambda kept: jnp.where(kept, probabilities, 0).sum(axis=-1, keepdims=True) >= top_p)
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
    # Rounding must not reach the total itself, after which there is nothing.
    target = jnp.minimum(uniform * total, total * (1 - jnp.finfo(jnp.float32).epsneg))
    return jnp.sum(cumulative <= target, axis=-1)


# Decoding attends over the part of the cache that is filled, by steps: this much at first, then twice as much.
_FIRST_FILLED = 64


class Rollout(NamedTuple):
    """Responses, those of one prompt in consecutive rows.

    `tokens`: int32 [responses, max_new_tokens], padded after the first stop token;
    `mask`: bool, True up to and including the first stop token;
    `log_probs`: float32, of each token under the distribution it was drawn from (greedy: temperature 1), 0 off
    the mask.
    """

    tokens: jax.Array
    mask: jax.Array
    log_probs: jax.Array


def generate(
    config: ModelConfig,
    parameters: Parameters,
    prompt_tokens: jax.Array,
    prompt_mask: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    execution: Execution,
) -> Rollout:
    """Sample `generations_per_prompt` responses to each prompt, inside a jitted program.

    Args:
      config, parameters: the model.
      prompt_tokens: int32 [prompts, prompt_length], padded on either side.
      prompt_mask: bool [prompts, prompt_length], False on padding.
      key: random key; step t of wave w draws with `fold_in(fold_in(key, w), t)`.
      sampling: lengths and temperature.
      execution: its mesh and dtype are used; the table of rules is the one for decoding.
    """
    execution = replace(execution, sharding=replace(execution.sharding, rules=DECODE_RULES), remat="none")
    # One change of layout before the loop: weights in the dtype they compute in, whole but for the tensor axis. A
    # vocabulary that is not divided goes by columns to rows: at once, the compiler would copy all of it everywhere.
    parameters = jax.tree.map(lambda x: x.astype(execution.compute_dtype), parameters)
    for padded in (False, True):
        places = execution.sharding.of_parameters(build(config)[1], padded)
        parameters = jax.lax.with_sharding_constraint(parameters, places)
    if sampling.waves == 1:
        return _decode_wave(
            config, parameters, prompt_tokens, prompt_mask, jax.random.fold_in(key, 0), sampling, execution
        )
    split = partial(split_rows, parts=sampling.waves, sharding=execution.sharding)
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(sampling.waves))
    rollouts = jax.lax.map(
        lambda wave: _decode_wave(config, parameters, wave[0], wave[1], wave[2], sampling, execution),
        (split(prompt_tokens), split(prompt_mask), keys),
    )
    return join_rows(rollouts)


def _decode_wave(
    config: ModelConfig,
    parameters: Parameters,
    prompt_tokens: jax.Array,
    prompt_mask: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    execution: Execution,
) -> Rollout:
    """Prefill, then decode until every response of these prompts has ended."""
    model = bind(config, parameters)
    responses = len(prompt_tokens) * sampling.generations_per_prompt
    lengths = prompt_mask.sum(axis=1)
    positions = jnp.maximum(jnp.cumsum(prompt_mask, axis=1) - 1, 0)
    hidden, (prompt_key, prompt_value) = model.prefill(
        prompt_tokens, prompt_mask.astype(jnp.int32), positions, execution
    )
    hidden = jnp.take_along_axis(hidden, last_positions(prompt_mask)[:, None, None], axis=1)[:, 0]
    layers, _, kv_heads, _, head_dim = prompt_key.shape
    own = jnp.zeros((layers, responses, kv_heads, sampling.max_new_tokens, head_dim), prompt_key.dtype)
    cache_axes = (None, "batch", "kv_heads", None, None)
    own = execution.sharding.constrain(own, *cache_axes)
    cache = KVCache(prompt_key, prompt_value, prompt_mask, own, own)
    response_positions = jnp.repeat(lengths, sampling.generations_per_prompt)
    stop = jnp.asarray(config.stop_token_ids, jnp.int32)
    padding = config.pad_token_id or 0
    tensor = execution.sharding.mesh.shape["tensor"]

    def choose(logits: jax.Array, step: jax.Array, finished: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Token, its log-prob and whether the response is over, each [responses]."""
        logits = execution.sharding.constrain(whole_blocks(logits, tensor), "batch", "vocab")
        token, log_prob = draw(logits, jax.random.fold_in(key, step), sampling)
        token = jnp.where(finished, padding, token)
        return token, jnp.where(finished, 0.0, log_prob), finished | jnp.isin(token, stop)

    shape = (responses, sampling.max_new_tokens)
    logits = jnp.repeat(model.logits(hidden), sampling.generations_per_prompt, axis=0)
    token, log_prob, finished = choose(logits, jnp.int32(0), jnp.zeros(responses, bool))
    rollout = Rollout(
        jnp.full(shape, padding, jnp.int32).at[:, 0].set(token),
        jnp.zeros(shape, bool).at[:, 0].set(True),
        jnp.zeros(shape, jnp.float32).at[:, 0].set(log_prob),
    )

    def decode(start: int, end: int, filled: int, carry: _Carry) -> _Carry:
        """Tokens `start` to `end` of all responses, unless all end before; `filled` is at least `end` - 1."""

        def unfinished(state: tuple[jax.Array, _Carry]) -> jax.Array:
            turn, carry = state
            return (turn < end - start) & ~jnp.all(carry.finished)

        def advance(state: tuple[jax.Array, _Carry]) -> tuple[jax.Array, _Carry]:
            turn, (token, finished, cache, rollout) = state
            step = start + turn
            hidden, cache = model.decode(token, response_positions + step - 1, step - 1, cache, execution, filled)
            token, log_prob, now_finished = choose(model.logits(hidden), step, finished)
            rollout = Rollout(
                rollout.tokens.at[:, step].set(token),
                rollout.mask.at[:, step].set(~finished),
                rollout.log_probs.at[:, step].set(log_prob),
            )
            return turn + 1, _Carry(token, now_finished, cache, rollout)

        with jax.named_scope("decoding_loop"):  # the name by which `psyche plan` finds it in the compiled program
            return jax.lax.while_loop(unfinished, advance, (jnp.int32(0), carry))[1]

    carry = _Carry(token, finished, cache, rollout)
    start = 1
    for filled in _filled_lengths(sampling.max_new_tokens - 1):
        carry = decode(start, filled + 1, filled, carry)
        start = filled + 1
    return carry.rollout


class _Carry(NamedTuple):
    """What one decoding step hands to the next: the last tokens, who has ended, the cache, all tokens so far."""

    token: jax.Array
    finished: jax.Array
    cache: KVCache
    rollout: Rollout


def _filled_lengths(longest: int) -> list[int]:
    """64, 128, 256, … and `longest`: a loop each. None at all where nothing is decoded."""
    lengths = []
    filled = _FIRST_FILLED
    while filled < longest:
        lengths.append(filled)
        filled *= 2
    return [*lengths, longest] if longest else []
