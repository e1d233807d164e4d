"""Group-relative policy optimization: answer each prompt several times, and learn from what was better than the rest.

Read `Iteration.__call__`, then `sample` and `learn`, which it calls: that is the algorithm, from top to bottom.

    sample   P prompts ─► G responses each (`model/decode.py`) ─► rewards by rule (`rewards/score.py`)
    learn    rewards ─► advantages within each group ─► log-probs of the reference and of the old policy
             ─► updates: forward, `policy_loss` (`train/objectives.py`), backward, AdamW (`train/state.py`)

All of it is one XLA program without a visit to the host; metrics and samples come out at its end. (`psyche plan` knows
its phases by their `named_scope`s.) Where a reward is a Python function it is two programs, `sample` and `learn`, with
the function between them. What feeds it, and what becomes of its metrics and samples, is in `train/grpo_run.py`.

Compared with the paper (DeepSeekMath, arXiv 2402.03300, section 4): the reference policy never changes, there is no
reward model, and with one update a step (the default) the ratio to the old policy is 1 and the clip does nothing. What
later papers changed is chosen in the config's `objective` and `dynamic_sampling`; docs/grpo.md lists it.

Shapes: P prompts of a step, G generations per prompt, R = P × G responses (in an update, those of its minibatch; those
to one prompt are consecutive rows), T = max_new_tokens. An array named `rewards_PG` is [P, G].
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from psyche_jax.config import GrpoConfig
from psyche_jax.model.adapters import joined, without_adapter
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.decode import Rollout, generate, generate_counted
from psyche_jax.model.linear import Parameters
from psyche_jax.model.log_probs import TokenScores, response_hidden, token_scores
from psyche_jax.model.qwen2 import Execution, bind
from psyche_jax.model.sampling import Sampling
from psyche_jax.model.sharding import join_rows, split_rows
from psyche_jax.rewards.score import CompiledRules, score
from psyche_jax.train.objectives import (
    PolicyTokens,
    TokenLoss,
    group_advantages,
    high_entropy_tokens,
    policy_loss,
    reward_metrics,
    sampler_correction,
    token_weights,
    total_rewards,
    zero_std_groups,
)
from psyche_jax.train.state import TrainState, accumulate_gradients, apply_gradients, updates_counted

# Metrics that are undefined in a step without a token to learn from.
_TOKEN_METRICS = {
    "loss",
    "grad_norm",
    "kl",
    "entropy",
    *(f"clip_ratio/{what}_mean" for what in ("low", "high", "region", "delta")),
    *(f"sampling/logp_difference/{what}" for what in ("mean", "max")),
    *(f"sampling/importance_sampling_ratio/{what}" for what in ("mean", "min", "max")),
}


class Sampled(NamedTuple):
    """What the policy of a step answered, scored by the rules; responses to one prompt are consecutive.

    `prompts`: those of the candidates that were answered, [prompts_per_step, ...]; `rollout`: [responses,
    max_new_tokens]; `rewards`: float32 [prompts_per_step, generations] by rule; `chosen`: bool [prompts_per_step],
    the prompts that are learned from (all, without dynamic sampling); `statistics`: metrics of decoding and of dynamic
    sampling.
    """

    prompts: dict[str, jax.Array]
    rollout: Rollout
    rewards: dict[str, jax.Array]
    chosen: jax.Array
    statistics: dict[str, jax.Array]


class Experience(NamedTuple):
    """What a rollout gives the updates; rows are prompts, or responses, those of one prompt consecutive.

    `prompt_tokens`: int32, `prompt_mask`: bool [prompts, prompt_length]; `tokens`: int32 [responses, max_new_tokens];
    `mask`: bool [responses, max_new_tokens], the tokens that are learned from: the response up to and with its first
    stop token, or none of them;
    `sampler_log_probs`: float32 [responses, max_new_tokens]; `advantages`: float32 [responses];
    `reference_log_probs`, `old_log_probs`: as `sampler_log_probs`, or None: without a KL term, and with one update
    a step, they are not needed. Where the old policy is the one that is updated, `old_log_probs` are NaN.
    """

    prompt_tokens: jax.Array
    prompt_mask: jax.Array
    tokens: jax.Array
    mask: jax.Array
    sampler_log_probs: jax.Array
    advantages: jax.Array
    reference_log_probs: jax.Array | None
    old_log_probs: jax.Array | None


class Update(NamedTuple):
    """What one optimizer update reports. `finite`: its loss and gradient were; `empty`: there was no token to learn
    from. Parameters change only if it was `finite` and not `empty`. `loss`, `grad_norm`; the rest is by token."""

    finite: jax.Array
    empty: jax.Array
    loss: jax.Array
    grad_norm: jax.Array
    scores: TokenScores
    terms: TokenLoss
    correction: jax.Array | None


@dataclass(frozen=True)
class Iteration:
    """One GRPO iteration, for a given model and config; `Iteration(...).program()` is the jitted program."""

    config: GrpoConfig
    model: ModelConfig
    execution: Execution
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    shardings: TrainState

    def program(self) -> Any:
        """`(state, reference, rules, candidates, key) -> (state, outputs)`, jitted.

        The old state's memory is given to the new one; metrics and samples are replicated.
        """
        return self._jitted(self.__call__, (self.shardings, self.execution.sharding.named()), donate=0)

    def programs(self) -> tuple[Any, Any]:
        """`sample` and `learn`, jitted: the same in two parts, for Python rewards, which run between them."""
        everywhere = self.execution.sharding.named()
        return self._jitted(self.sample, everywhere), self._jitted(self.learn, (self.shardings, everywhere), donate=0)

    def _jitted(self, function: Callable[..., Any], out_shardings: Any, donate: int | None = None) -> Any:
        options = self.execution.sharding.compiler_options
        return jax.jit(function, donate_argnums=donate, out_shardings=out_shardings, compiler_options=options)

    def __call__(
        self,
        state: TrainState,
        reference: Parameters | None,
        rules: CompiledRules,
        candidates: dict[str, jax.Array],
        key: jax.Array,
    ) -> tuple[TrainState, dict[str, Any]]:
        """Sample, score, learn.

        Args:
          state: policy, optimizer, step.
          reference: parameters of the reference policy, None if the KL coefficient is 0. Where adapters are trained it
            is their base, which is never None: the policy is the reference with the adapters of `state`.
          rules: compiled rewards.
          candidates: `tokens` int32, `mask` bool [candidates_per_step, length], `answers` int32 (bit masks); any
            other entries by prompt are passed through to `Sampled.prompts`.
          key: random key of this step.
        """
        policy = self.policy(reference, state.parameters)
        return self.learn(state, reference, self.sample(policy, rules, candidates, key), {})

    def policy(self, reference: Parameters | None, trained: Parameters) -> Parameters:
        """All parameters of the policy of which `trained` are those that the state holds."""
        return trained if self.model.adapter is None else joined(reference, trained)

    def sample(
        self, parameters: Parameters, rules: CompiledRules, candidates: dict[str, jax.Array], key: jax.Array
    ) -> Sampled:
        """Responses to `prompts_per_step` of the candidates, with the values of the rules; `parameters`: the policy's.

        With dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) the candidates are answered in parts, in order,
        until enough prompts have responses that are not all equally right, or the candidates are used up.
        """
        config = self.config
        if config.dynamic_sampling.candidate_prompts is None:
            return self._respond(parameters, rules, candidates, key)

        # One part after the other, each as large as a step, until the chosen prompts fill a step.
        size, parts = config.prompts_per_step, config.candidates_per_step // config.prompts_per_step
        by_part = split_rows(candidates, parts, self.execution.sharding)

        def part(number: jax.Array) -> Sampled:
            prompts = jax.tree.map(lambda leaf: leaf[number], by_part)
            return self._respond(parameters, rules, prompts, jax.random.fold_in(key, number))

        def unfilled(carry: tuple[jax.Array, Sampled]) -> jax.Array:
            number, kept = carry
            return (number < parts) & (kept.chosen.sum() < size)

        def one_more(carry: tuple[jax.Array, Sampled]) -> tuple[jax.Array, Sampled]:
            number, kept = carry
            return number + 1, self._merge(kept, part(number))

        first = jnp.int32(1), part(jnp.int32(0))
        with jax.named_scope("more_candidates"):
            number, kept = jax.lax.while_loop(unfilled, one_more, first)
        sampled = number * size
        return kept._replace(
            statistics={
                "decoding_steps": kept.statistics["decoding_steps"],
                "dynamic_sampling/sampled_prompts": sampled,
                "dynamic_sampling/unused_prompts": config.candidates_per_step - sampled,
                "dynamic_sampling/kept_prompts": kept.chosen.sum(),
                "dynamic_sampling/accuracy": kept.statistics["accuracy"] / number,
            }
        )

    @jax.named_scope("updates")
    def learn(
        self,
        state: TrainState,
        reference: Parameters | None,
        sampled: Sampled,
        function_values: dict[str, jax.Array],
    ) -> tuple[TrainState, dict[str, Any]]:
        """Rewards to advantages, and the updates.

        Args:
          state, reference: as for the whole iteration.
          sampled: what `sample` gave for `state`.
          function_values: float32 [prompts_per_step, generations] by name, NaN where a function has no value.
        """
        config, rollout = self.config, sampled.rollout

        # One number a response: the weighted sum of its rewards. A reward may be absent (NaN): from a whole group it
        # drops out of the sum; a response that alone lacks it cannot be compared with its group and does not count.
        values_PG = {**sampled.rewards, **function_values}
        weights = {reward.name: reward.weight for reward in config.rewards}
        rewards_PG, counted_PG = total_rewards(values_PG, weights)
        counted_PG &= sampled.chosen[:, None]

        # How much better than its group each response is. The group's mean is the baseline: no value model.
        advantages_PG = group_advantages(rewards_PG, config.objective.scale, counted_PG)

        # Which tokens are learned from: each response up to and with its stop token.
        is_stop_RT = jnp.isin(rollout.tokens, jnp.asarray(self.model.stop_token_ids))
        finished_R = jnp.any(rollout.mask & is_stop_RT, axis=1)
        learned_RT = rollout.mask & counted_PG.reshape(-1, 1)
        if config.objective.mask_truncated:  # a response that was cut off is not to be judged (DAPO, section 3.4)
            learned_RT &= finished_R[:, None]
        experience = Experience(
            prompt_tokens=sampled.prompts["tokens"],
            prompt_mask=sampled.prompts["mask"],
            tokens=rollout.tokens,
            mask=learned_RT,
            sampler_log_probs=rollout.log_probs,
            advantages=advantages_PG.reshape(-1),
            reference_log_probs=None,
            old_log_probs=None,
        )

        # Log-probs that stay as they are while the policy is updated: the reference's for the KL term, and the old
        # policy's for the ratio. In a step's first update the old policy is the current one, and costs no pass.
        # Of adapters the reference is the base alone: the same arrays, without the adapters' products.
        policy = self.policy(reference, state.parameters)
        if reference is not None and config.objective.kl_coefficient:
            of_reference = self._fixed_log_probs(without_adapter(self.model), reference, experience)
            experience = experience._replace(reference_log_probs=of_reference)
        if config.on_policy_prompts < config.prompts_per_step:
            experience = experience._replace(old_log_probs=self._old_log_probs(policy, experience))

        # The updates, `passes_per_step` times through the minibatches of this step.
        state, history = self._updates(reference, state, experience)
        state = TrainState(state.step + 1, state.parameters, state.optimizer_state)

        # What is reported. `absent` says by name which metrics are undefined in this step; they are logged as null.
        metrics = self._metrics(state, experience, rollout, finished_R, history)
        about_rewards, absent = reward_metrics(values_PG, rewards_PG, counted_PG)
        metrics |= about_rewards | sampled.statistics
        absent |= dict.fromkeys(_TOKEN_METRICS & metrics.keys(), ~learned_RT.any())
        samples = {
            "prompts": sampled.prompts["tokens"],
            "prompt_mask": sampled.prompts["mask"],
            "tokens": rollout.tokens,
            "mask": rollout.mask,
            "rewards": rewards_PG.reshape(-1),
            "rewards_by_rule": {name: value.reshape(-1) for name, value in values_PG.items()},
            "advantages": advantages_PG.reshape(-1),
        }
        return state, {"metrics": metrics, "absent": absent, "samples": samples}

    def evaluate(
        self, parameters: Parameters, rules: CompiledRules, prompts: dict[str, jax.Array]
    ) -> tuple[Rollout, dict[str, jax.Array]]:
        """One greedy response to each prompt, and the values of the rules, float32 [prompts]."""
        sampling = Sampling(self.config.max_new_tokens, 0.0, 1, self.config.slots)
        key = jax.random.key(0)  # unused: decoding is greedy
        rollout = generate(self.model, parameters, prompts["tokens"], prompts["mask"], key, sampling, self.execution)
        return rollout, score(rules, rollout.tokens, prompts["answers"])[1]

    def _respond(
        self,
        parameters: Parameters,
        rules: CompiledRules,
        prompts: dict[str, jax.Array],
        key: jax.Array,
    ) -> Sampled:
        """Responses to given prompts; those whose responses are equally right are not chosen under dynamic sampling."""
        config = self.config
        sampling = Sampling(config.max_new_tokens, config.temperature, config.generations_per_prompt, config.slots)
        with jax.named_scope("prefill"):  # but for the loop over steps, which has a scope of its own
            rollout, steps = generate_counted(
                self.model, parameters, prompts["tokens"], prompts["mask"], key, sampling, self.execution
            )
        answers = jnp.repeat(prompts["answers"], config.generations_per_prompt)
        with jax.named_scope("rewards"):
            _, by_rule = score(rules, rollout.tokens, answers)
        rewards = {name: value.reshape(-1, config.generations_per_prompt) for name, value in by_rule.items()}
        chosen, statistics = jnp.ones(config.prompts_per_step, bool), {"decoding_steps": steps}
        if config.dynamic_sampling.candidate_prompts is not None:
            accuracy = rewards[config.dynamic_sampling.rule]
            chosen, statistics = ~zero_std_groups(accuracy), {**statistics, "accuracy": accuracy.mean()}
        return Sampled(prompts, rollout, rewards, chosen, statistics)

    def _merge(self, kept: Sampled, new: Sampled) -> Sampled:
        """The first P prompts of both, the chosen ones first, else in order. Counts and sums of both are added."""
        size = len(kept.chosen)
        order = jnp.argsort(~jnp.concatenate([kept.chosen, new.chosen]), stable=True)[:size]

        def pick(old: jax.Array, new: jax.Array) -> jax.Array:
            by_prompt = [leaf.reshape(size, -1, *leaf.shape[1:]) for leaf in (old, new)]
            return jnp.concatenate(by_prompt)[order].reshape(old.shape)

        statistics = jax.tree.map(jnp.add, kept.statistics, new.statistics)
        picked = jax.tree.map(pick, kept._replace(statistics={}), new._replace(statistics={}))
        return picked._replace(statistics=statistics)

    @jax.named_scope("log_probs")
    def _fixed_log_probs(self, model: ModelConfig, parameters: Parameters, experience: Experience) -> jax.Array:
        """Log-probs of the responses under some policy, by micro-batches, without gradient."""
        micro_batches = len(experience.prompt_tokens) // self.config.prompts_per_micro_batch
        parts = split_rows(experience, micro_batches, self.execution.sharding)
        return join_rows(jax.lax.map(lambda part: self._scores(model, parameters, part).log_probs, parts))

    def _old_log_probs(self, policy: Parameters, experience: Experience) -> jax.Array:
        """Of all responses, NaN where the update that learns from them finds them by itself."""
        first, prompts = self.config.on_policy_prompts, self.config.prompts_per_step
        others = jax.tree.map(lambda leaf: leaf[first * len(leaf) // prompts :], experience)
        if self.config.objective.old_log_probs == "sampler":
            log_probs = jnp.where(others.mask, others.sampler_log_probs, 0.0)  # as `_scores` has them
        else:
            log_probs = self._fixed_log_probs(self.model, policy, others)
        missing = len(experience.tokens) - len(log_probs)
        return jnp.pad(log_probs, ((missing, 0), (0, 0)), constant_values=jnp.nan)

    def _scores(self, config: ModelConfig, parameters: Parameters, experience: Experience) -> TokenScores:
        """Log-probs (0 off the mask) and entropies of the responses' tokens, [responses, max_new_tokens]."""
        model = bind(config, parameters)
        # Only if each device's share of a micro-batch is whole prompts.
        share_prompt = self.config.share_prompt and self.execution.sharding.divides(
            len(experience.prompt_tokens), "batch"
        )
        hidden = response_hidden(
            model,
            experience.prompt_tokens,
            experience.prompt_mask,
            experience.tokens,
            experience.mask,
            self.execution,
            share_prompt,
        )
        scores = token_scores(model, hidden, experience.tokens, self.execution, self.config.temperature)
        # What comes after a stop token has no weight, but its ratio could overflow, and inf · 0 is NaN.
        return scores._replace(log_probs=jnp.where(experience.mask, scores.log_probs, 0.0))

    def _updates(
        self, reference: Parameters | None, state: TrainState, experience: Experience
    ) -> tuple[TrainState, Update]:
        """All updates of a step: `passes_per_step` times through its minibatches. Returns the `Update`s stacked."""
        config, one_update = self.config, partial(self._update, reference)
        if config.updates_per_step == 1:
            state, update = one_update(state, experience)
            return state, jax.tree.map(lambda leaf: leaf[None], update)
        minibatches = config.updates_per_step // config.passes_per_step
        parts = split_rows(experience, minibatches, self.execution.sharding)

        def one_pass(state: TrainState, _: None) -> tuple[TrainState, Update]:
            return jax.lax.scan(one_update, state, parts)

        state, history = jax.lax.scan(one_pass, state, length=config.passes_per_step)
        return state, join_rows(history)

    def _update(
        self, reference: Parameters | None, state: TrainState, experience: Experience
    ) -> tuple[TrainState, Update]:
        """One optimizer update on a minibatch, its gradient summed over micro-batches."""
        config, objective = self.config, self.config.objective
        micro_batches = config.prompts_per_update // config.prompts_per_micro_batch

        # Weights by token make the loss a sum, so that it does not matter into which micro-batches it is split.
        weights_RT = token_weights(experience.mask, objective.name, micro_batches)

        # Which tokens have the highest entropy is known for the whole minibatch only: one more forward pass.
        high_entropy_RT = None
        if objective.top_entropy < 1:
            parts = split_rows(experience, micro_batches, self.execution.sharding)
            policy = self.policy(reference, state.parameters)
            with jax.named_scope("log_probs"):
                entropy_RT = join_rows(jax.lax.map(lambda part: self._scores(self.model, policy, part).entropy, parts))
            high_entropy_RT = high_entropy_tokens(entropy_RT, experience.mask, objective.top_entropy)

        def loss(
            parameters: Parameters, part: tuple[Experience, jax.Array, jax.Array | None]
        ) -> tuple[jax.Array, tuple[TokenScores, TokenLoss, jax.Array | None]]:
            experience, weights_RT, high_entropy_RT = part
            scores = self._scores(self.model, self.policy(reference, parameters), experience)
            # On policy the old policy is this one, without its gradient: ratio 1, and the gradient is A·∇log π.
            current_RT = jax.lax.stop_gradient(scores.log_probs)
            old_RT = _known(experience.old_log_probs, current_RT)
            reference_RT = current_RT if experience.reference_log_probs is None else experience.reference_log_probs
            correction_RT = None
            if objective.sampler_cap is not None:
                correction_RT = sampler_correction(old_RT, experience.sampler_log_probs, objective.sampler_cap)
            tokens = PolicyTokens(
                log_probs=scores.log_probs,
                old_log_probs=old_RT,
                reference_log_probs=reference_RT,
                entropy=scores.entropy,
                advantages=experience.advantages,
                mask=experience.mask,
                learned=high_entropy_RT,
                correction=correction_RT,
            )
            terms = policy_loss(tokens, objective)
            return jnp.sum(terms.loss * weights_RT), (scores, terms, correction_RT)

        value, extras, gradients = accumulate_gradients(
            loss,
            state.parameters,
            (experience, weights_RT, high_entropy_RT),
            micro_batches,
            self.execution.sharding,
            self.shardings.parameters,
        )
        empty = ~experience.mask.any()  # AdamW's moments and weight decay would move the parameters even so
        state, norm, finite = apply_gradients(self.optimizer, state, value, gradients, ~empty)
        return state, Update(finite, empty, value, norm, *extras)

    def _metrics(
        self, state: TrainState, experience: Experience, rollout: Rollout, finished: jax.Array, history: Update
    ) -> dict[str, jax.Array]:
        """Means over tokens that are learned from, and over updates with any, by the names that users of TRL know."""
        config, mask = self.config, experience.mask
        tokens = jnp.maximum(mask.sum(), 1)

        # Of all updates: [updates, responses of a minibatch, length] to [passes, responses, length].
        scores, terms, correction = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *mask.shape), (history.scores, history.terms, history.correction)
        )

        def mean(values: jax.Array) -> jax.Array:
            return jnp.sum(values * mask) / tokens / config.passes_per_step

        def mean_update(values: jax.Array) -> jax.Array:
            return jnp.sum(values, where=~history.empty) / jnp.maximum(jnp.sum(~history.empty), 1)

        # How far sampler and trainer are apart, where the trainer's log-probs of the policy that sampled are known.
        trainer, compared = _known(experience.old_log_probs, scores.log_probs[0]), mask
        if config.objective.old_log_probs == "sampler":  # in the first update alone
            first = jnp.arange(len(mask)) < config.prompts_per_update * config.generations_per_prompt
            trainer, compared = scores.log_probs[0], mask & first[:, None]
        difference = jnp.abs(trainer - experience.sampler_log_probs) * compared
        lengths = rollout.mask.sum(axis=1)
        metrics = {
            "loss": mean_update(history.loss),
            "grad_norm": mean_update(history.grad_norm),
            "skipped_updates": jnp.sum(~history.finite),
            "learning_rate": self.schedule(jnp.maximum(updates_counted(state.optimizer_state) - 1, 0)),
            "kl": mean(terms.kl),
            "entropy": mean(scores.entropy),
            "clip_ratio/low_mean": mean(terms.clipped_low),
            "clip_ratio/high_mean": mean(terms.clipped_high),
            "clip_ratio/region_mean": mean(terms.clipped_low | terms.clipped_high),
            "completions/mean_length": lengths.mean(),
            "completions/min_length": lengths.min(),
            "completions/max_length": lengths.max(),
            "completions/clipped_ratio": 1 - finished.mean(),
            "num_tokens": self.config.generations_per_prompt * experience.prompt_mask.sum() + lengths.sum(),
            "sampling/logp_difference/mean": difference.sum() / compared.sum(),  # not a number where there is none
            "sampling/logp_difference/max": jnp.where(compared.any(), difference.max(), jnp.nan),
        }
        if config.functions or config.objective.mask_truncated or config.dynamic_sampling.candidate_prompts is not None:
            metrics["empty_updates"] = jnp.sum(history.empty)  # otherwise there is always something to learn from
        if config.objective.clip_delta is not None:
            metrics["clip_ratio/delta_mean"] = mean(terms.clipped_delta)
        if correction is not None:
            metrics["sampling/importance_sampling_ratio/mean"] = mean(correction)
            metrics["sampling/importance_sampling_ratio/min"] = jnp.min(jnp.where(mask, correction, jnp.inf))
            metrics["sampling/importance_sampling_ratio/max"] = jnp.max(jnp.where(mask, correction, 0.0))
        return metrics


def _known(old_log_probs: jax.Array | None, on_policy: jax.Array) -> jax.Array:
    """The old policy's log-probs; where the old policy is the current one, those `on_policy`."""
    return on_policy if old_log_probs is None else jnp.where(jnp.isnan(old_log_probs), on_policy, old_log_probs)
