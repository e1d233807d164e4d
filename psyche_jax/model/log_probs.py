"""Log-probabilities of given tokens, of responses behind shared prompts too, never holding whole logits."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from psyche_jax.model.kernels import SharedPrompt
from psyche_jax.model.linear import cast_weights
from psyche_jax.model.products import weighted
from psyche_jax.model.qwen2 import Execution, Qwen2

Scores = TypeVar("Scores")


def response_hidden(
    model: Qwen2,
    prompt_tokens: jax.Array,
    prompt_mask: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    execution: Execution,
    share_prompt: bool,
) -> jax.Array:
    """The final hidden states that predict each token of the responses.

    Args:
      model: the policy.
      prompt_tokens: int32 [prompts, prompt_length], padded on either side; prompt_mask: bool, False on padding.
      tokens: int32 [responses, length], those of one prompt in consecutive rows; mask: bool, True up to the end.
      execution: how to compute.
      share_prompt: read each prompt once and let all its responses attend to it. The same numbers for less work; the
        prompts, not the responses, are then what is spread over the mesh's batch axes.

    Returns:
      [responses, length, width]; position t predicts `tokens[:, t]`.
    """
    prompts, prompt_length = prompt_tokens.shape
    responses, length = tokens.shape
    group = responses // prompts
    ends = last_positions(prompt_mask)
    prompt_positions = jnp.maximum(jnp.cumsum(prompt_mask, axis=1) - 1, 0)
    starts = prompt_mask.sum(axis=1)
    if share_prompt:
        of_response = starts[:, None] + jnp.tile(jnp.arange(length), group)
        hidden = model(
            jnp.concatenate([prompt_tokens, tokens.reshape(prompts, -1)], axis=1),
            jnp.concatenate([prompt_mask, mask.reshape(prompts, -1)], axis=1).astype(jnp.int32),
            jnp.concatenate([prompt_positions, of_response], axis=1),
            execution,
            SharedPrompt(prompt_length, group, length),
        )
        of_prompt, hidden = jnp.split(hidden, [prompt_length], axis=1)
        first = jnp.take_along_axis(of_prompt, ends[:, None, None], axis=1)
        first, hidden = jnp.repeat(first, group, axis=0), hidden.reshape(responses, length, -1)
    else:
        repeated = jnp.repeat(prompt_tokens, group, axis=0), jnp.repeat(prompt_mask, group, axis=0)
        positions = jnp.repeat(prompt_positions, group, axis=0), jnp.repeat(starts, group)[:, None] + jnp.arange(length)
        hidden = model(
            jnp.concatenate([repeated[0], tokens], axis=1),
            jnp.concatenate([repeated[1], mask], axis=1).astype(jnp.int32),
            jnp.concatenate(positions, axis=1),
            execution,
        )
        of_prompt, hidden = jnp.split(hidden, [prompt_length], axis=1)
        first = jnp.take_along_axis(of_prompt, jnp.repeat(ends, group)[:, None, None], axis=1)
    hidden = jnp.concatenate([first, hidden[:, :-1]], axis=1)
    return execution.sharding.constrain(hidden, "batch", "sequence", "activation_embed")


def last_positions(mask: jax.Array) -> jax.Array:
    """Where each row of a bool mask [rows, length] is True for the last time: int32 [rows]."""
    return mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)


class TokenScores(NamedTuple):
    """`log_probs` and `entropy` (nats) of each position, float32 [batch, sequence]."""

    log_probs: jax.Array
    entropy: jax.Array


def token_scores(
    model: Qwen2,
    hidden: jax.Array,
    targets: jax.Array,
    execution: Execution,
    temperature: float = 1.0,
    chunk_tokens: int = 2048,
) -> TokenScores:
    """Log-softmax of logits / temperature at `targets`, in float32, by chunks along the sequence.

    Args:
      model: gives the head.
      hidden: [batch, sequence, width]; position t predicts `targets[:, t]`.
      targets: int32 [batch, sequence].
      temperature: the one that the tokens were sampled at.
      chunk_tokens: how many positions' logits exist at once, over all rows; backward recomputes those of
        several chunks.
    """

    # Log-prob and entropy from the same logits, which are gone afterwards.
    def score(logits: jax.Array, targets: jax.Array) -> TokenScores:
        log_normalizer = jax.nn.logsumexp(logits, axis=-1)
        chosen = jax.lax.platform_dependent(logits, targets, tpu=_sum_targets, default=_read_targets)
        expected = jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1)
        return TokenScores(chosen - log_normalizer, log_normalizer - expected)

    return _by_chunks(model, hidden, targets, execution, score, temperature, chunk_tokens)


def _read_targets(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _sum_targets(logits: jax.Array, targets: jax.Array) -> jax.Array:
    # Its gradient is fused with the softmax's; a TPU writes that of an indexed read into a copy of the logits.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.sum(jnp.where(is_target, logits, 0), axis=-1)


class LikeliestScores(NamedTuple):
    """`log_probs` float32 [batch, sequence]; `best`, `best_log_probs` [batch, sequence, count]: likeliest tokens."""

    log_probs: jax.Array
    best: jax.Array
    best_log_probs: jax.Array


def likeliest_scores(
    model: Qwen2, hidden: jax.Array, targets: jax.Array, execution: Execution, count: int, chunk_tokens: int = 512
) -> LikeliestScores:
    """As `token_scores`, with the `count` likeliest tokens of each position in place of the entropy."""

    def score(logits: jax.Array, targets: jax.Array) -> LikeliestScores:
        log_normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)
        best_logits, best = jax.lax.top_k(logits, count)
        return LikeliestScores((chosen - log_normalizer)[..., 0], best, best_logits - log_normalizer)

    return _by_chunks(model, hidden, targets, execution, score, 1.0, chunk_tokens)


def _by_chunks(
    model: Qwen2,
    hidden: jax.Array,
    targets: jax.Array,
    execution: Execution,
    score: Callable[[jax.Array, jax.Array], Scores],
    temperature: float,
    chunk_tokens: int,
) -> Scores:
    """`score(logits / temperature, targets)` of all positions, in float32, by chunks along the sequence.

    Its arrays begin with [batch, sequence].
    """
    # Logits of all positions at once would be the largest array of the program: chunks of equal size instead.
    batch, length = targets.shape
    size = min(length, max(1, chunk_tokens // batch))
    chunks = -(-length // size)
    padding = chunks * size - length
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))
    # The vocabulary is spread over all devices where it can be; rows then stay whole.
    sharding = execution.sharding
    spread = sharding.divides(model.config.vocab_size, "loss_vocab")
    vocab, rows = ("loss_vocab", "loss_batch") if spread else ("vocab", "batch")
    head = model.output_embedding
    if model.head is None or not spread:
        # Not laid out for the loss yet: once, so that its gradient adds up over chunks and goes back once.
        head, hidden = _bound(head, hidden)
        if not sharding.divides(model.config.vocab_size, "vocab"):  # by columns to rows, as in decoding
            head = sharding.constrain(head, None, "vocab")
        head = sharding.constrain(head, vocab, None)
    # Bound to the hidden states, so that no loop over micro-batches keeps a copy of the head between their losses.
    copy, hidden = _bound(jax.lax.stop_gradient(head), hidden)
    copy = cast_weights(copy, hidden.dtype)

    def chunk(hidden: jax.Array, targets: jax.Array) -> Scores:
        hidden = sharding.constrain(hidden, rows, None, None)
        weights = _copied(head, copy)
        logits = weighted(hidden, weights, jnp.float32)
        return score(sharding.constrain(logits, rows, None, vocab) / temperature, targets)

    if chunks == 1:
        return chunk(hidden, targets)
    stacked = jax.lax.map(
        lambda pair: jax.checkpoint(chunk)(*pair),
        (
            hidden.reshape(batch, chunks, size, -1).swapaxes(0, 1),
            targets.reshape(batch, chunks, size).swapaxes(0, 1),
        ),
    )

    def joined(x: Any) -> Any:
        return x.swapaxes(0, 1).reshape(batch, chunks * size, *x.shape[3:])[:, :length]

    scores: Scores = jax.tree.map(joined, stacked)
    return scores


@jax.custom_vjp
def _bound(head: jax.Array, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as they are, neither computed before the other; so too their gradients.

    The barrier's own backward pass (JAX 0.11.2 to 0.12.0) confuses the two where one of them is added to a Ref.
    """
    return jax.lax.optimization_barrier((head, hidden))


_bound.defvjp(lambda *arrays: (_bound(*arrays), None), lambda _, gradients: jax.lax.optimization_barrier(gradients))


@jax.custom_vjp
def _copied(weights: jax.Array, copy: jax.Array) -> jax.Array:
    """`copy`, which is `weights` in another dtype; its gradient goes to `weights`, and adds up in their dtype."""
    return copy


_copied.defvjp(lambda weights, copy: (copy, weights), lambda weights, gradient: (gradient.astype(weights.dtype), None))
