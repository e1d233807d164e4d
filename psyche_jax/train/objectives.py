"""What GRPO and its kin optimize, as pure functions of log-probs, rewards and masks. No model, no mesh."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from psyche_jax.config import ObjectiveName, ObjectiveSection, Scale

_STD_EPSILON = 1e-4


def total_rewards(values: Mapping[str, Any], weights: Mapping[str, float]) -> tuple[jax.Array, jax.Array]:
    """Weighted sums of rewards, some of which may be absent.

    A reward that is absent for a whole group does not apply to its prompt: the group's totals go without it. One that
    is absent for some responses of a group makes these no longer comparable with the others: they do not count.

    Args:
      values: float [prompts, generations] by name, of JAX or numpy; NaN where absent.
      weights: factors by name.

    Returns:
      Totals, float [prompts, generations], and which of them count (bool).
    """
    total = jnp.zeros(next(iter(values.values())).shape, jnp.result_type(float))
    counted, any_applies = jnp.ones(total.shape, bool), jnp.zeros((len(total), 1), bool)
    for name, value in values.items():
        present = ~jnp.isnan(value)
        applies = present.any(axis=1, keepdims=True)
        counted, any_applies = counted & (present | ~applies), any_applies | applies
        total = total + weights[name] * jnp.where(present, value, 0.0)
    return total, counted & any_applies


def group_advantages(rewards: jax.Array, scale: Scale, counted: jax.Array | None = None) -> jax.Array:
    """(reward - mean of its group) / (std + 1e-4), std with one degree of freedom less (DeepSeekMath, eq. 10; TRL).

    Args:
      rewards: float [prompts, generations].
      scale: the std of the `group`, of the whole `batch` (arXiv 2508.08221), or `none` (Dr. GRPO, arXiv 2503.20783).
      counted: bool, the same shape: responses that belong to their group; None: all do.

    Returns:
      The same shape; exactly 0 in groups whose rewards are all equal, and for responses that do not count.
    """
    counted = jnp.ones(rewards.shape, bool) if counted is None else counted
    rewards = jnp.where(counted, rewards, 0.0)
    centered = rewards - rewards.sum(axis=1, keepdims=True) / _size(counted, axis=1)
    centered = jnp.where(counted & ~zero_std_groups(rewards, counted)[:, None], centered, 0.0)
    if scale == "none":
        return centered
    return centered / (masked_std(rewards, counted, axis=1 if scale == "group" else None) + _STD_EPSILON)


def masked_std(rewards: jax.Array, counted: jax.Array, axis: int | None) -> jax.Array:
    """The std, with one degree of freedom less, of what is counted along `axis` (kept as 1) or over all; 0 of one."""
    mean = jnp.sum(rewards, axis, where=counted, keepdims=True) / _size(counted, axis)
    squares = jnp.sum((rewards - mean) ** 2, axis, where=counted, keepdims=True)
    return jnp.sqrt(squares / jnp.maximum(counted.sum(axis, keepdims=True) - 1, 1))


def zero_std_groups(rewards: jax.Array, counted: jax.Array | None = None) -> jax.Array:
    """Which groups teach nothing, all rewards that count in them being equal: bool [prompts]."""
    counted = jnp.ones(rewards.shape, bool) if counted is None else counted
    most = jnp.max(rewards, axis=1, where=counted, initial=-jnp.inf)
    return most <= jnp.min(rewards, axis=1, where=counted, initial=jnp.inf)


def reward_metrics(
    values: dict[str, jax.Array], rewards: jax.Array, counted: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """By the names that users of TRL know, of the responses that count; arrays are [prompts, generations].

    Args:
      values: those of each reward, NaN where absent.
      rewards: the totals.
      counted: which responses count.

    Returns:
      The metrics, and by name which of them are of nothing: no response counts, or none has that reward.
    """
    metrics: dict[str, jax.Array] = {}
    absent: dict[str, jax.Array] = {}
    for name, value in values.items():
        present = ~jnp.isnan(value) & counted
        mean = jnp.sum(value, where=present) / jnp.maximum(present.sum(), 1)
        std = masked_std(value, present, axis=None)[0, 0]
        metrics |= {f"rewards/{name}/mean": mean, f"rewards/{name}/std": std}
        absent |= dict.fromkeys((f"rewards/{name}/mean", f"rewards/{name}/std"), ~present.any())
    groups = counted.any(axis=1)
    zero = zero_std_groups(rewards, counted) & groups
    totals = {
        "reward": jnp.sum(rewards, where=counted) / jnp.maximum(counted.sum(), 1),
        "reward_std": jnp.sum(masked_std(rewards, counted, axis=1)[:, 0], where=groups) / jnp.maximum(groups.sum(), 1),
        "frac_reward_zero_std": zero.sum() / jnp.maximum(groups.sum(), 1),
    }
    return metrics | totals, absent | dict.fromkeys(totals, ~groups.any())


def token_weights(mask: jax.Array, objective: ObjectiveName, micro_batches: int = 1) -> jax.Array:
    """What each token counts, so that the loss is the sum of weight × token loss, however a batch is split.

    `grpo`, `gspo`: mean over sequences of the mean over tokens (a sequence that is masked wholly counts as 0);
    `dapo`, `cispo`: mean over all tokens of the batch; `dr_grpo`: sum over sequences × length limit; `bnpo`: mean
    over the tokens of each micro-batch, so the split does matter there.

    Args:
      mask: bool [responses, length] of the whole batch that one update sees.
      objective: the name.
      micro_batches: into how many equal parts (consecutive rows) the batch will be split.

    Returns:
      float32 [responses, length]; float64 with x64 on.
    """
    weights = mask.astype(jnp.result_type(float))
    responses, length = mask.shape
    match objective:
        case "grpo" | "gspo":
            return weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0) / responses
        case "dapo" | "cispo":
            return weights / jnp.maximum(weights.sum(), 1.0)
        case "dr_grpo":
            return weights / (responses * length)
        case "bnpo":
            parts = weights.reshape(micro_batches, -1, length)
            tokens = jnp.maximum(parts.sum(axis=(1, 2), keepdims=True), 1.0)
            return (parts / tokens / micro_batches).reshape(mask.shape)


def high_entropy_tokens(entropy: jax.Array, mask: jax.Array, share: float) -> jax.Array:
    """The tokens whose entropy is among the highest `share` of the batch (arXiv 2506.01939).

    Args:
      entropy: float [responses, length].
      mask: bool, the same shape: the batch's tokens.
      share: from 0 to 1; the limit is the quantile 1 - share, interpolated linearly.

    Returns:
      bool, the same shape.
    """
    limit = jnp.nanquantile(jnp.where(mask, entropy, jnp.nan), 1 - share)
    return mask & (entropy >= limit)


def sampler_correction(trainer: jax.Array, sampler: jax.Array, cap: float) -> jax.Array:
    """Truncated importance weights min(π_trainer / π_sampler, cap) of the policy that sampled, by token.

    Sampling and training compute the same policy in other ways and precisions; this makes up for it (Yao et al.
    2025, "Your efficient RL framework secretly brings you off-policy RL training").

    Args:
      trainer, sampler: log-probs of that one policy, float [responses, length].
      cap: the largest weight.
    """
    return jnp.exp(jnp.minimum(trainer - sampler, math.log(cap)))


class TokenLoss(NamedTuple):
    """Per token, float [responses, length]: `loss`; `kl` to the reference (k3); which ratios were cut.

    `clipped_low`, `clipped_high`: where the clip takes the gradient (`cispo`: where it cuts the weight);
    `clipped_delta`: where the two-sided clip takes it.
    """

    loss: jax.Array
    kl: jax.Array
    clipped_low: jax.Array
    clipped_high: jax.Array
    clipped_delta: jax.Array


class PolicyTokens(NamedTuple):
    """What the loss of an update is made of, float [responses, length] unless said otherwise.

    `log_probs`, `entropy`: of the policy, which the gradient goes through; `old_log_probs`, `reference_log_probs`: of
    the policy that sampled, and of the reference; `advantages`: float [responses]; `mask`: bool, the tokens that
    count; `learned`: bool, those that the policy's term counts for (None: all), see `high_entropy_tokens`;
    `correction`: factors of the policy's term (None: 1), see `sampler_correction`.
    """

    log_probs: jax.Array
    old_log_probs: jax.Array
    reference_log_probs: jax.Array
    entropy: jax.Array
    advantages: jax.Array
    mask: jax.Array
    learned: jax.Array | None = None
    correction: jax.Array | None = None


def policy_loss(tokens: PolicyTokens, objective: ObjectiveSection) -> TokenLoss:
    """Loss of each token, to be summed with `token_weights`.

    With r the ratio of the policy to the old one and A the advantage,

      grpo, dapo, dr_grpo, bnpo   -min(min(r, δ)·A, clip(r, 1 - clip_low, 1 + clip_high)·A)
      gspo                        the same, r being the sequence's: exp(mean over its tokens of log r)
      cispo                       -stop_gradient(clip(r, 1 - clip_low, 1 + clip_high))·A·log π

    then times `learned` and `correction`, + kl_coefficient × KL (`kl_terms`), - entropy_coefficient × entropy.

    Sources: DeepSeekMath (arXiv 2402.03300) eq. 3; DAPO (2503.14476) eq. 8; GSPO (2507.18071) eq. 5 to 7;
    MiniMax-M1 (2506.13585) eq. 4 and 5; δ: INTELLECT-2 (2505.07291).
    """
    log_probs, advantages, mask = tokens.log_probs, tokens.advantages[:, None], tokens.mask

    # The ratio, by token or, in GSPO, one for the whole sequence.
    token_log_ratio = log_ratio = log_probs - tokens.old_log_probs
    if objective.name == "gspo":
        log_ratio = jnp.sum(log_ratio, axis=1, where=mask, keepdims=True) / _size(mask, axis=1)
    ratio = jnp.broadcast_to(jnp.exp(log_ratio), log_probs.shape)

    # The clip: beyond it a token has no gradient, so that no update goes far from the policy that sampled.
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    clipped = jnp.clip(ratio, low, high)
    clipped_low, clipped_high = ratio < low, ratio > high
    clipped_delta = jnp.zeros(ratio.shape, bool)
    if objective.name == "cispo":
        loss = -jax.lax.stop_gradient(clipped) * advantages * log_probs
    else:
        unclipped = ratio
        if objective.clip_delta is not None:
            unclipped = jnp.minimum(ratio, objective.clip_delta)
            clipped_delta = (ratio > objective.clip_delta) & (advantages < 0)
        loss = -jnp.minimum(unclipped * advantages, clipped * advantages)
        clipped_low, clipped_high = clipped_low & (advantages < 0), clipped_high & (advantages > 0)
    if tokens.learned is not None:
        loss = loss * tokens.learned
    if tokens.correction is not None:
        loss = loss * tokens.correction

    # The terms that hold for all tokens, whether the policy's term counts there or not.
    kl = kl_terms(log_probs, tokens.reference_log_probs)
    if objective.kl_coefficient:
        penalty = kl[objective.kl_estimator]
        if objective.kl_unbiased:
            penalty = penalty * jnp.exp(token_log_ratio)
        loss = loss + objective.kl_coefficient * penalty
    if objective.entropy_coefficient:
        loss = loss - objective.entropy_coefficient * tokens.entropy
    return TokenLoss(loss, kl["k3"], clipped_low, clipped_high, clipped_delta)


def kl_terms(log_probs: jax.Array, reference_log_probs: jax.Array) -> dict[str, jax.Array]:
    """Schulman's estimators of KL(policy, reference) by token ("Approximating KL divergence"), d = reference - policy.

    k1 = -d, k2 = d² / 2, k3 = exp(d) - d - 1. As a term of the loss, on policy, k1 has a gradient of mean 0, k2 the
    KL's, k3 that of KL(reference, policy); k1 and k3 times the ratio have the KL's (arXiv 2512.02556, eq. 7).
    """
    distance = reference_log_probs - log_probs
    return {"k1": -distance, "k2": distance**2 / 2, "k3": jnp.exp(distance) - distance - 1}


def _size(counted: jax.Array, axis: int | None) -> jax.Array:
    """How many are counted, at least 1."""
    return jnp.maximum(counted.sum(axis=axis, keepdims=True), 1)
