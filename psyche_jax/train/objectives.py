"""What GRPO optimizes, as pure functions of log-probs, rewards and masks. No model, no mesh."""

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

Aggregation: TypeAlias = Literal["grpo", "dapo", "dr_grpo", "bnpo"]
Scale: TypeAlias = Literal["group", "batch", "none"]

_STD_EPSILON = 1e-4


def group_advantages(rewards: jax.Array, scale: Scale) -> jax.Array:
    """(reward - mean of its group) / (std + 1e-4), std with one degree of freedom less (DeepSeekMath, eq. 10; TRL).

    Args:
      rewards: float [prompts, generations].
      scale: the std of the `group`, of the whole `batch` (arXiv 2508.08221), or `none` (Dr. GRPO, arXiv 2503.20783).

    Returns:
      The same shape; exactly 0 in groups whose rewards are all equal.
    """
    centered = rewards - rewards.mean(axis=1, keepdims=True)
    centered = jnp.where(zero_std_groups(rewards)[:, None], 0.0, centered)
    if scale == "none":
        return centered
    std = rewards.std(axis=1, ddof=1, keepdims=True) if scale == "group" else rewards.std(ddof=1)
    return centered / (std + _STD_EPSILON)


def zero_std_groups(rewards: jax.Array) -> jax.Array:
    """Which groups teach nothing, all their rewards being equal: bool [prompts]."""
    return rewards.max(axis=1) == rewards.min(axis=1)


def token_weights(mask: jax.Array, aggregation: Aggregation, micro_batches: int = 1) -> jax.Array:
    """What each token counts, so that the loss is the sum of weight × token loss, however a batch is split.

    `grpo`: mean over sequences of the mean over tokens; `dapo`: mean over all tokens of the batch; `dr_grpo`: sum
    over sequences × length limit; `bnpo`: mean over the tokens of each micro-batch, so the split does matter there.

    Args:
      mask: bool [responses, length] of the whole batch that one update sees.
      aggregation: the name.
      micro_batches: into how many equal parts (consecutive rows) the batch will be split.

    Returns:
      float32 [responses, length]; float64 with x64 on.
    """
    weights = mask.astype(jnp.result_type(float))
    responses, length = mask.shape
    if aggregation == "grpo":
        return weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0) / responses
    if aggregation == "dapo":
        return weights / jnp.maximum(weights.sum(), 1.0)
    if aggregation == "dr_grpo":
        return weights / (responses * length)
    parts = weights.reshape(micro_batches, -1, length)
    return (parts / jnp.maximum(parts.sum(axis=(1, 2), keepdims=True), 1.0) / micro_batches).reshape(mask.shape)


class TokenLoss(NamedTuple):
    """Per token, float [responses, length]: `loss`; `kl` to the reference (k3); which ratios the clip has cut."""

    loss: jax.Array
    kl: jax.Array
    clipped_low: jax.Array
    clipped_high: jax.Array


def clipped_policy_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    reference_log_probs: jax.Array,
    advantages: jax.Array,
    clip_low: float,
    clip_high: float,
    kl_coefficient: float,
) -> TokenLoss:
    """-min(r·A, clip(r, 1 - clip_low, 1 + clip_high)·A) + β·k3, r the ratio to the old policy (DeepSeekMath, eq. 3).

    k3 = exp(d) - d - 1 with d = reference - policy (eq. 4; Schulman, "Approximating KL divergence").

    Args:
      log_probs, old_log_probs, reference_log_probs: float [responses, length].
      advantages: float [responses].
      clip_low, clip_high: how far below and above 1 the ratio counts.
      kl_coefficient: β.
    """
    ratio = jnp.exp(log_probs - old_log_probs)
    advantages = advantages[:, None]
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = -jnp.minimum(ratio * advantages, clipped * advantages)
    distance = reference_log_probs - log_probs
    kl = jnp.exp(distance) - distance - 1
    return TokenLoss(
        loss + kl_coefficient * kl if kl_coefficient else loss,
        kl,
        (ratio < 1 - clip_low) & (advantages < 0),
        (ratio > 1 + clip_high) & (advantages > 0),
    )
