"""GRPO, one XLA program an iteration: prompts in; rollout, rewards, advantages, updates; new state and metrics out.

Source: DeepSeekMath (arXiv 2402.03300), section 4.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from psyche_jax import hosts
from psyche_jax.config import GrpoConfig, config_to_dict
from psyche_jax.data.chat import prompt_tokens
from psyche_jax.data.dataset import load_records
from psyche_jax.data.records import RlPrompt, answer_mask
from psyche_jax.data.streams import Batch, batches, pad_prompts
from psyche_jax.errors import UserError
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.decoding import Rollout, Sampling, generate
from psyche_jax.model.log_probs import TokenScores, token_scores
from psyche_jax.model.qwen2 import Execution, Parameters, bind
from psyche_jax.model.sharding import join_rows, split_rows
from psyche_jax.rewards import CompiledRules, compile_rules, score, token_bytes_from_tokenizer
from psyche_jax.runs import Run, open_run
from psyche_jax.train.checkpoints import checkpoint_metadata
from psyche_jax.train.gradients import accumulate_gradients
from psyche_jax.train.loop import Program, run_training
from psyche_jax.train.objectives import (
    TokenLoss,
    group_advantages,
    high_entropy_tokens,
    policy_loss,
    sampler_correction,
    token_weights,
    zero_std_groups,
)
from psyche_jax.train.setup import abstract_state, check_rows, keep_tokenizer, prepare, report_set_aside
from psyche_jax.train.state import TrainState, initial_state, make_optimizer, make_schedule


class Experience(NamedTuple):
    """What a rollout gives the updates; rows are responses, those of one prompt consecutive.

    `tokens`, `segments`, `positions`: int32 [responses, prompt_length + max_new_tokens], prompt and response;
    `mask`: bool [responses, max_new_tokens], what is learned from: the response up to its first stop token, or
    nothing of it;
    `sampler_log_probs`: float32 [responses, max_new_tokens]; `advantages`: float32 [responses];
    `reference_log_probs`, `old_log_probs`: as `sampler_log_probs`, or None: without a KL term, and with one update
    a step, they are not needed (the old policy then is the current one).
    """

    tokens: jax.Array
    segments: jax.Array
    positions: jax.Array
    mask: jax.Array
    sampler_log_probs: jax.Array
    advantages: jax.Array
    reference_log_probs: jax.Array | None
    old_log_probs: jax.Array | None


class Update(NamedTuple):
    """What one optimizer update reports: `loss`, `grad_norm` and, by token, `scores`, `terms` and `correction`."""

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
        """`(state, reference, rules, prompts, key) -> (state, outputs)`, jitted.

        The old state's memory is given to the new one; metrics and samples lie whole on every device.
        """
        everywhere = self.execution.sharding.named()
        return jax.jit(self.__call__, donate_argnums=0, out_shardings=(self.shardings, everywhere))

    def __call__(
        self,
        state: TrainState,
        reference: Parameters | None,
        rules: CompiledRules,
        prompts: dict[str, jax.Array],
        key: jax.Array,
    ) -> tuple[TrainState, dict[str, Any]]:
        """Sample, score, learn.

        Args:
          state: policy, optimizer, step.
          reference: parameters of the reference policy, None if the KL coefficient is 0.
          rules: compiled rewards.
          prompts: `tokens` int32, `mask` bool [prompts, length], `answers` int32 [prompts] (bit masks).
          key: random key of this step.
        """
        config = self.config
        sampling = Sampling(
            config.max_new_tokens, config.temperature, config.generations_per_prompt, config.rollout_waves
        )
        rollout = generate(
            self.model, state.parameters, prompts["tokens"], prompts["mask"], key, sampling, self.execution
        )
        answers = jnp.repeat(prompts["answers"], config.generations_per_prompt)
        rewards, rewards_by_rule = score(rules, rollout.tokens, answers)
        grouped = rewards.reshape(-1, config.generations_per_prompt)
        advantages = group_advantages(grouped, config.objective.scale).reshape(-1)
        finished = jnp.any(rollout.mask & jnp.isin(rollout.tokens, jnp.asarray(self.model.stop_token_ids)), axis=1)
        learned = rollout.mask & finished[:, None] if config.objective.mask_truncated else rollout.mask
        experience = self._experience(state.parameters, reference, prompts, rollout, learned, advantages)
        state, history = self._updates(state, experience)
        state = TrainState(state.step + 1, state.parameters, state.optimizer_state)
        metrics = self._metrics(state, experience, rollout, finished, history)
        for name, values in rewards_by_rule.items():
            metrics |= {f"rewards/{name}/mean": values.mean(), f"rewards/{name}/std": values.std()}
        metrics |= {
            "reward": rewards.mean(),
            "reward_std": grouped.std(axis=1, ddof=1).mean(),
            "frac_reward_zero_std": zero_std_groups(grouped).mean(),
        }
        samples = {
            "prompts": prompts["tokens"],
            "prompt_mask": prompts["mask"],
            "tokens": rollout.tokens,
            "mask": rollout.mask,
            "rewards": rewards,
            "rewards_by_rule": rewards_by_rule,
            "advantages": advantages,
        }
        return state, {"metrics": metrics, "samples": samples}

    def _experience(
        self,
        parameters: Parameters,
        reference: Parameters | None,
        prompts: dict[str, jax.Array],
        rollout: Rollout,
        learned: jax.Array,
        advantages: jax.Array,
    ) -> Experience:
        """Prompts and responses side by side, with the log-probs that stay fixed during the updates."""
        config = self.config
        prompt_tokens = jnp.repeat(prompts["tokens"], config.generations_per_prompt, axis=0)
        prompt_mask = jnp.repeat(prompts["mask"], config.generations_per_prompt, axis=0)
        segments = jnp.concatenate([prompt_mask, rollout.mask], axis=1).astype(jnp.int32)
        experience = Experience(
            tokens=jnp.concatenate([prompt_tokens, rollout.tokens], axis=1),
            segments=segments,
            positions=jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0),
            mask=learned,
            sampler_log_probs=rollout.log_probs,
            advantages=advantages,
            reference_log_probs=None,
            old_log_probs=None,
        )
        several_updates = config.updates_per_step > 1
        return experience._replace(
            reference_log_probs=None if reference is None else self._fixed_log_probs(reference, experience),
            old_log_probs=self._fixed_log_probs(parameters, experience) if several_updates else None,
        )

    def _fixed_log_probs(self, parameters: Parameters, experience: Experience) -> jax.Array:
        """Log-probs of the responses under some policy, by micro-batches, without gradient."""
        micro_batch = self.config.micro_batch_prompts or self.config.minibatch_prompts or self.config.prompts_per_step
        parts = split_rows(experience, self.config.prompts_per_step // micro_batch, self.execution.sharding)
        return join_rows(jax.lax.map(lambda part: self._scores(parameters, part).log_probs, parts))

    def _scores(self, parameters: Parameters, experience: Experience) -> TokenScores:
        """Log-probs (0 off the mask) and entropies of the responses' tokens, [responses, max_new_tokens]."""
        model = bind(self.model, parameters)
        hidden = model(experience.tokens, experience.segments, experience.positions, self.execution)
        length = experience.mask.shape[1]
        responses = experience.tokens[:, -length:]
        scores = token_scores(model, hidden[:, -length - 1 : -1], responses, self.execution, self.config.temperature)
        # What stands after a stop token has no weight, but its ratio could overflow, and inf · 0 is NaN.
        return scores._replace(log_probs=jnp.where(experience.mask, scores.log_probs, 0.0))

    def _updates(self, state: TrainState, experience: Experience) -> tuple[TrainState, Update]:
        """All updates of a step: `passes_per_step` times through its minibatches. Of the `Update`s, [updates, ...]."""
        config = self.config
        if config.updates_per_step == 1:
            state, update = self._update(state, experience)
            return state, jax.tree.map(lambda leaf: leaf[None], update)
        minibatches = config.updates_per_step // config.passes_per_step
        parts = split_rows(experience, minibatches, self.execution.sharding)

        def one_pass(state: TrainState, _: None) -> tuple[TrainState, Update]:
            return jax.lax.scan(self._update, state, parts)

        state, history = jax.lax.scan(one_pass, state, length=config.passes_per_step)
        return state, join_rows(history)

    def _update(self, state: TrainState, experience: Experience) -> tuple[TrainState, Update]:
        """One optimizer update on a minibatch, its gradient summed over micro-batches."""
        config, objective = self.config, self.config.objective
        minibatch = config.minibatch_prompts or config.prompts_per_step
        micro_batches = minibatch // (config.micro_batch_prompts or minibatch)
        weights = token_weights(experience.mask, objective.name, micro_batches)
        learned = None
        if objective.top_entropy < 1:
            parts = split_rows(experience, micro_batches, self.execution.sharding)
            entropy = join_rows(jax.lax.map(lambda part: self._scores(state.parameters, part).entropy, parts))
            learned = high_entropy_tokens(entropy, experience.mask, objective.top_entropy)

        def loss(
            parameters: Parameters, part: tuple[Experience, jax.Array, jax.Array | None]
        ) -> tuple[jax.Array, tuple[TokenScores, TokenLoss, jax.Array | None]]:
            experience, weights, learned = part
            scores = self._scores(parameters, experience)
            current = jax.lax.stop_gradient(scores.log_probs)
            old = current if experience.old_log_probs is None else experience.old_log_probs
            reference = current if experience.reference_log_probs is None else experience.reference_log_probs
            correction = None
            if objective.sampler_cap is not None:
                correction = sampler_correction(old, experience.sampler_log_probs, objective.sampler_cap)
            terms = policy_loss(
                scores.log_probs,
                old,
                reference,
                scores.entropy,
                experience.advantages,
                experience.mask,
                objective,
                learned,
                correction,
            )
            return jnp.sum(terms.loss * weights), (scores, terms, correction)

        value, extras, gradients = accumulate_gradients(
            loss,
            state.parameters,
            (experience, weights, learned),
            micro_batches,
            self.execution.sharding,
            self.shardings.parameters,
        )
        changes, optimizer_state = self.optimizer.update(gradients, state.optimizer_state, state.parameters)
        parameters = optax.apply_updates(state.parameters, changes)
        return TrainState(state.step, parameters, optimizer_state), Update(value, optax.global_norm(gradients), *extras)

    def _metrics(
        self, state: TrainState, experience: Experience, rollout: Rollout, finished: jax.Array, history: Update
    ) -> dict[str, jax.Array]:
        """Means over the tokens that are learned from and over updates, by the names that users of TRL know."""
        config, mask = self.config, experience.mask
        tokens = jnp.maximum(mask.sum(), 1)

        # Of all updates: [updates, responses of a minibatch, length] to [passes, responses, length].
        scores, terms, correction = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *mask.shape), (history.scores, history.terms, history.correction)
        )

        def mean(values: jax.Array) -> jax.Array:
            return jnp.sum(values * mask) / tokens / config.passes_per_step

        trainer = scores.log_probs[0] if experience.old_log_probs is None else experience.old_log_probs
        difference = jnp.abs(trainer - experience.sampler_log_probs) * mask
        lengths = rollout.mask.sum(axis=1)
        metrics = {
            "loss": history.loss.mean(),
            "grad_norm": history.grad_norm.mean(),
            "learning_rate": self.schedule(state.step * config.updates_per_step - 1),
            "kl": mean(terms.kl),
            "entropy": mean(scores.entropy),
            "clip_ratio/low_mean": mean(terms.clipped_low),
            "clip_ratio/high_mean": mean(terms.clipped_high),
            "clip_ratio/region_mean": mean(terms.clipped_low | terms.clipped_high),
            "completions/mean_length": lengths.mean(),
            "completions/min_length": lengths.min(),
            "completions/max_length": lengths.max(),
            "completions/clipped_ratio": 1 - finished.mean(),
            "num_tokens": experience.segments.sum(),
            "sampling/logp_difference/mean": difference.sum() / tokens,
            "sampling/logp_difference/max": difference.max(),
        }
        if config.objective.clip_delta is not None:
            metrics["clip_ratio/delta_mean"] = mean(terms.clipped_delta)
        if correction is not None:
            metrics["sampling/importance_sampling_ratio/mean"] = mean(correction)
            metrics["sampling/importance_sampling_ratio/min"] = jnp.min(jnp.where(mask, correction, jnp.inf))
            metrics["sampling/importance_sampling_ratio/max"] = jnp.max(jnp.where(mask, correction, 0.0))
        return metrics


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt with its record."""

    tokens: list[int]
    record: RlPrompt


def train_grpo(config: GrpoConfig, profile_steps: int = 0) -> None:
    """Run GRPO as `config` says, or go on with it; see `psyche grpo --help`.

    Raises:
      UserError: the model, the data, a rule or the run folder cannot be used.
    """
    setup = prepare(
        config.model,
        config.mesh,
        config.data.max_prompt_length + config.max_new_tokens,
        "data.max_prompt_length + max_new_tokens",
    )
    execution = setup.execution
    model = setup.model.config
    minibatch = config.minibatch_prompts or config.prompts_per_step
    micro_batch = config.micro_batch_prompts or minibatch
    check_rows(config.prompts_per_step // config.rollout_waves, "prompts_per_step / rollout_waves", execution.sharding)
    check_rows(
        micro_batch * config.generations_per_prompt,
        "micro_batch_prompts × generations_per_prompt",
        execution.sharding,
    )
    if not model.stop_token_ids:
        raise UserError(f"{config.model.path}: names no stop token (eos_token_id); a response could never end")
    rules = compile_rules(
        config.rewards, token_bytes_from_tokenizer(setup.tokenizer, model.vocab_size), model.stop_token_ids
    )
    prompts, faults = _tokenized(setup.tokenizer, config)
    total_steps = math.ceil(config.epochs * len(prompts) / config.prompts_per_step)
    schedule = make_schedule(config.optimizer, total_steps, config.updates_per_step)
    optimizer = make_optimizer(config.optimizer, schedule)
    abstract, shardings = abstract_state(setup, optimizer)
    iteration = Iteration(config, model, execution, optimizer, schedule, shardings).program()
    reference = setup.read_parameters(config.reference_dtype) if config.objective.kl_coefficient else None
    key = jax.random.key(config.run.seed)
    collate = partial(_collate, largest=config.data.max_prompt_length)
    place = execution.sharding.named("batch")

    def device_batches(first: int) -> Iterator[dict[str, jax.Array]]:
        stream = batches(prompts, config.prompts_per_step, config.run.seed, collate, range(first, total_steps))
        return (hosts.place(batch, place) for batch in stream)

    def train_step(state: TrainState, batch: dict[str, jax.Array], index: int) -> tuple[TrainState, dict[str, Any]]:
        return iteration(state, reference, rules, batch, jax.random.fold_in(key, index))

    def log_samples(run: Run, _: TrainState, index: int, outputs: dict[str, Any]) -> dict[str, float]:
        if index == 1 or index == total_steps or index % config.logging.samples_every_steps == 0:
            for sample in decoded_samples(setup.tokenizer, outputs["samples"], config.generations_per_prompt):
                run.log_sample(index, sample)
        return {}

    with open_run(Path(config.run.dir), "grpo", config_to_dict(config), config.logging) as run:
        keep_tokenizer(run, setup)
        report_set_aside(run, faults)
        program = Program(
            "grpo", total_steps, device_batches, train_step, log_samples, ("reward", "kl", "completions/mean_length")
        )
        run_training(
            program,
            run,
            lambda: initial_state(optimizer, setup.read_parameters(), shardings),
            abstract,
            checkpoint_metadata(model, config.prompt, seed=config.run.seed, reference=config.model.path),
            config.checkpoints,
            profile_steps,
        )


def decoded_samples(
    tokenizer: Any, samples: dict[str, Any], generations: int, prompts: int = 2
) -> Iterator[dict[str, Any]]:
    """Text, rewards and advantages of all responses to the first few prompts of a step."""
    rows = jax.device_get(samples)
    for row in range(min(prompts * generations, len(rows["tokens"]))):
        prompt = row // generations
        yield {
            "prompt": tokenizer.decode(rows["prompts"][prompt][rows["prompt_mask"][prompt]]),
            "completion": tokenizer.decode(rows["tokens"][row][rows["mask"][row]]),
            "tokens": int(rows["mask"][row].sum()),
            "reward": float(rows["rewards"][row]),
            "rewards": {name: float(values[row]) for name, values in rows["rewards_by_rule"].items()},
            "advantage": float(rows["advantages"][row]),
        }


def _tokenized(tokenizer: Any, config: GrpoConfig) -> tuple[list[Prompt], list[str]]:
    path, largest = config.data.train, config.data.max_prompt_length
    records = load_records(RlPrompt, path)
    prompts, faults = [], list(records.set_aside)
    for record in records.good:
        tokens = prompt_tokens(tokenizer, record.messages, config.prompt)
        if len(tokens) > largest:
            faults.append(f"{path}: record {record.id}: {len(tokens)} tokens, over data.max_prompt_length {largest}")
        else:
            prompts.append(Prompt(tokens, record))
    if not prompts:
        raise UserError(f"{path}: no prompt has at most data.max_prompt_length {largest} tokens")
    return prompts, faults


def _collate(prompts: list[Prompt], largest: int) -> Batch:
    answers = np.asarray([answer_mask(prompt.record.answer) for prompt in prompts], np.int32)
    return {**pad_prompts([prompt.tokens for prompt in prompts], largest), "answers": answers}
