"""Groups of responses to prompts, as training reads them: with each prompt once, or once for every response."""

import jax
import jax.numpy as jnp

from psyche_jax.model.kernels import SharedPrompt
from psyche_jax.model.qwen2 import Execution, Qwen2


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
