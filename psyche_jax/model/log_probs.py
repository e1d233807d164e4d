"""Log-probabilities of given tokens, of responses behind shared prompts too, never holding whole logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from psyche_jax.model.kernels import SharedPrompt
from psyche_jax.model.products import weighted
from psyche_jax.model.qwen2 import Execution, Qwen2, cast_weights


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

    # Log-prob and entropy from the same logits, which are gone afterwards.
    def chunk(hidden: jax.Array, targets: jax.Array) -> TokenScores:
        hidden = sharding.constrain(hidden, rows, None, None)
        weights = _copied(head, copy)
        logits = weighted(hidden, weights, jnp.float32)
        logits = sharding.constrain(logits, rows, None, vocab) / temperature
        log_normalizer = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        expected = jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1)
        return TokenScores(chosen - log_normalizer, log_normalizer - expected)

    if chunks == 1:
        return chunk(hidden, targets)
    stacked = jax.lax.map(
        lambda pair: jax.checkpoint(chunk)(*pair),
        (
            hidden.reshape(batch, chunks, size, -1).swapaxes(0, 1),
            targets.reshape(batch, chunks, size).swapaxes(0, 1),
        ),
    )
    return TokenScores(*(x.swapaxes(0, 1).reshape(batch, chunks * size)[:, :length] for x in stacked))


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
