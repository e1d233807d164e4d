"""Sampling responses with a key-value cache. A prompt is read once and shared by all of its responses."""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from psyche_jax.model.config import ModelConfig
from psyche_jax.model.qwen2 import Execution, KVCache, Parameters, bind, build
from psyche_jax.model.sharding import DECODE_RULES, join_rows, split_rows


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Temperature 0 is greedy; 1 draws from the model's full distribution."""

    max_new_tokens: int
    temperature: float = 1.0
    generations_per_prompt: int = 1
    waves: int = 1  # the prompts are decoded in that many parts, one after the other, to hold less cache


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
    shardings = execution.sharding.of_parameters(build(config)[1])
    # One change of layout before the loop: weights in the dtype they compute in, whole but for the tensor axis.
    parameters = jax.tree.map(
        lambda x, sharding: jax.lax.with_sharding_constraint(x.astype(execution.compute_dtype), sharding),
        parameters,
        shardings,
    )
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
    prompts, prompt_length = prompt_tokens.shape
    responses = prompts * sampling.generations_per_prompt
    lengths = prompt_mask.sum(axis=1)
    positions = jnp.maximum(jnp.cumsum(prompt_mask, axis=1) - 1, 0)
    hidden, (prompt_key, prompt_value) = model.prefill(
        prompt_tokens, prompt_mask.astype(jnp.int32), positions, execution
    )
    last = prompt_length - 1 - jnp.argmax(prompt_mask[:, ::-1], axis=1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    layers, _, _, kv_heads, head_dim = prompt_key.shape
    own = jnp.zeros((layers, responses, sampling.max_new_tokens, kv_heads, head_dim), prompt_key.dtype)
    cache_axes = (None, "batch", None, "kv_heads", None)
    own = execution.sharding.constrain(own, *cache_axes)
    cache = KVCache(prompt_key, prompt_value, prompt_mask, own, own)
    response_positions = jnp.repeat(lengths, sampling.generations_per_prompt)
    stop = jnp.asarray(config.stop_token_ids, jnp.int32)
    padding = config.pad_token_id or 0

    def draw(logits: jax.Array, step: jax.Array, finished: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Token, its log-prob and whether the response is over, each [responses]."""
        logits = execution.sharding.constrain(logits, "batch", "vocab")
        if sampling.temperature > 0:
            logits = logits / sampling.temperature
            token = jax.random.categorical(jax.random.fold_in(key, step), logits)
        else:
            token = jnp.argmax(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        log_prob = chosen - jax.nn.logsumexp(logits, axis=-1)
        token = jnp.where(finished, padding, token).astype(jnp.int32)
        return token, jnp.where(finished, 0.0, log_prob), finished | jnp.isin(token, stop)

    shape = (responses, sampling.max_new_tokens)
    logits = jnp.repeat(model.logits(hidden), sampling.generations_per_prompt, axis=0)
    token, log_prob, finished = draw(logits, jnp.int32(0), jnp.zeros(responses, bool))
    rollout = Rollout(
        jnp.full(shape, padding, jnp.int32).at[:, 0].set(token),
        jnp.zeros(shape, bool).at[:, 0].set(True),
        jnp.zeros(shape, jnp.float32).at[:, 0].set(log_prob),
    )

    def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array, KVCache, Rollout]) -> jax.Array:
        step, _, finished, _, _ = carry
        return (step < sampling.max_new_tokens) & ~jnp.all(finished)

    def advance(
        carry: tuple[jax.Array, jax.Array, jax.Array, KVCache, Rollout],
    ) -> tuple[jax.Array, jax.Array, jax.Array, KVCache, Rollout]:
        step, token, finished, cache, rollout = carry
        hidden, cache = model.decode(token, response_positions + step - 1, step - 1, cache, execution)
        token, log_prob, now_finished = draw(model.logits(hidden), step, finished)
        rollout = Rollout(
            rollout.tokens.at[:, step].set(token),
            rollout.mask.at[:, step].set(~finished),
            rollout.log_probs.at[:, step].set(log_prob),
        )
        return step + 1, token, now_finished, cache, rollout

    carry = (jnp.int32(1), token, finished, cache, rollout)
    with jax.named_scope("decoding_loop"):  # the name by which `psyche plan` finds it in the compiled program
        return jax.lax.while_loop(unfinished, advance, carry)[-1]
