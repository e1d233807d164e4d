"""GRPO iterations against a plain implementation on whole logits, plain-Python rewards."""

import copy
import dataclasses
import functools
import math
import re
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.iterations import FAST, RATE, SEVERAL, Bench, Outcome, bench, compare, outcome
from support.training_fixtures import RULES, execution, grpo_config, largest_difference
from test_objectives import plain_advantages

from psyche_jax.config import DynamicSamplingSection, ObjectiveSection, PromptSection
from psyche_jax.data.chat import opened_text, prompt_tokens
from psyche_jax.data.records import Message, RlPrompt
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.decode import Rollout
from psyche_jax.model.qwen2 import bind
from psyche_jax.rewards import AnswerSetRule, FunctionReward, LengthRule, PatternRule, ThinkFormatRule
from psyche_jax.rewards.functions import LoadedFunction
from psyche_jax.rewards.reference import score_response
from psyche_jax.train import grpo_run
from psyche_jax.train.grpo import Sampled
from psyche_jax.train.grpo_run import decoded_samples


def whole_scores(
    model: ModelConfig, config: Any, samples: dict[str, Any]
) -> tuple[Any, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """A function of parameters that gives log-probs and entropies of right-padded sequences from whole logits, the
    padded tokens, and where in [row, place] each response's tokens are."""
    generations = config.generations_per_prompt
    rows, places = [], []
    for row, (tokens, mask) in enumerate(zip(samples["tokens"], samples["mask"], strict=True)):
        prompt = samples["prompts"][row // generations][samples["prompt_mask"][row // generations]]
        rows.append(np.concatenate([prompt, tokens[mask]]))
        places.append((np.full(mask.sum(), row), np.arange(len(prompt), len(rows[-1]))))
    padded = np.zeros((len(rows), max(map(len, rows))), np.int32)
    segments = np.zeros_like(padded)
    for row, tokens in enumerate(rows):
        padded[row, : len(tokens)] = tokens
        segments[row, : len(tokens)] = 1
    positions = np.broadcast_to(np.arange(padded.shape[1]), padded.shape)

    def scores(parameters: Any) -> tuple[jax.Array, jax.Array]:
        module = bind(model, parameters)
        logits = module.logits(module(padded, segments, positions, execution(1))) / config.temperature
        whole = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(whole[:, :-1], padded[:, 1:, None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(whole) * whole, axis=-1)[:, :-1]
        return jnp.pad(chosen, ((0, 0), (1, 0))), jnp.pad(entropy, ((0, 0), (1, 0)))

    return scores, padded, places


class Plain(NamedTuple):
    """What the plain implementation gives for one step."""

    parameters: Any
    losses: list[float]
    norms: list[float]
    metrics: dict[str, float]


def plain_step(model: ModelConfig, outcome: Outcome, step: int) -> Plain:
    """GRPO's updates of one step by hand from its samples: whole logits, no micro-batches, loops where it can."""
    config, samples = outcome.config, outcome.samples[step]
    scores, padded, places = whole_scores(model, config, samples)
    mask = np.zeros(padded.shape, bool)
    for place in places:
        mask[place] = True
    start = outcome.parameters[step]
    (old, _), (reference, _) = (
        jax.device_get(jax.jit(scores, compiler_options=FAST)(p)) for p in (start, outcome.reference)
    )
    rewards = samples["rewards"].astype(np.float64).reshape(-1, config.generations_per_prompt)
    advantages = plain_advantages(rewards, config.objective.scale).reshape(-1, 1)
    size = config.prompts_per_update * config.generations_per_prompt

    @functools.partial(jax.jit, compiler_options=FAST)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(parameters: Any, rows: Any) -> tuple[jax.Array, Any]:
        log_probs, entropy = scores(parameters)
        ratio = jnp.where(mask, jnp.exp(log_probs - old), 1.0)
        clipped = jnp.clip(ratio, 1 - config.objective.clip_low, 1 + config.objective.clip_high)
        distance = jnp.where(mask, reference - log_probs, 0.0)
        kl = jnp.exp(distance) - distance - 1
        token = -jnp.minimum(ratio * advantages, clipped * advantages) + config.objective.kl_coefficient * kl
        here = rows[:, None] & mask
        if config.objective.name == "dapo":
            value = jnp.sum(token * here) / jnp.sum(here)
        else:
            value = jnp.sum(jnp.sum(token * here, axis=1) / mask.sum(axis=1)) / jnp.sum(rows)
        low = (ratio < 1 - config.objective.clip_low) & (advantages < 0)
        high = (ratio > 1 + config.objective.clip_high) & (advantages > 0)
        return value, jax.tree.map(
            lambda x: jnp.sum(x * here), {"kl": kl, "entropy": entropy, "low": low, "high": high}
        )

    parameters, losses, norms, sums = start, [], [], []
    for first in [*range(0, len(padded), size)] * config.passes_per_step:
        rows = (np.arange(len(padded)) >= first) & (np.arange(len(padded)) < first + size)
        (value, extras), gradients = loss(parameters, rows)
        losses.append(float(value))
        norms.append(float(optax.global_norm(gradients)))
        sums.append(jax.device_get(extras))
        parameters = jax.tree.map(lambda p, g: p - RATE * g, parameters, gradients)
    tokens = mask.sum() * config.passes_per_step
    total = {name: sum(float(part[name]) for part in sums) / tokens for name in sums[0]}
    return Plain(jax.device_get(parameters), losses, norms, total)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("several", "passes"), [(False, 1), (True, 1), (True, 2)], ids=["one update", "two updates", "twice two updates"]
)
def test_a_step_is_that_of_the_plain_implementation(several, passes, tiny_root, tiny_config, figure):
    """The second step: there the policy has left the reference, so that the KL term has a gradient."""
    if passes == 1:
        ours = outcome(tiny_root, several=several)
    else:
        ours = Bench(tiny_root, **SEVERAL, passes_per_step=passes).run(2)
    metrics = ours.metrics[1]
    assert metrics["frac_reward_zero_std"] < 1, "the step must have something to learn"
    plain = plain_step(tiny_config, ours, 1)
    figure("GRPO loss against whole logits", abs(metrics["loss"] - np.mean(plain.losses)), 1e-5)
    figure("GRPO gradient norm against whole logits", abs(metrics["grad_norm"] / np.mean(plain.norms) - 1), 1e-4)
    moved = jax.tree.map(np.subtract, ours.parameters[2], ours.parameters[1])
    expected = jax.tree.map(np.subtract, plain.parameters, ours.parameters[1])
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    difference = max(map(lambda a, b: np.abs(a - b).max(), jax.tree.leaves(moved), jax.tree.leaves(expected)))
    figure("GRPO update against whole logits", difference / scale, 1e-4)
    for name, value in {
        "kl": plain.metrics["kl"],
        "entropy": plain.metrics["entropy"],
        "clip_ratio/low_mean": plain.metrics["low"],
        "clip_ratio/high_mean": plain.metrics["high"],
        "clip_ratio/region_mean": plain.metrics["low"] + plain.metrics["high"],
    }.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert metrics["kl"] > 1e-4
    assert (metrics["clip_ratio/region_mean"] > 0) == several, "clips can only cut after the first update"


@pytest.mark.parametrize("several", [False, True], ids=["one update", "two updates"])
def test_rewards_are_those_of_the_plain_reference(several, tiny_root):
    """Of the tokens up to the first stop token, as text; and their sums, means and advantages."""
    this, ours = bench(tiny_root, several=several), outcome(tiny_root, several=several)
    generations = this.config.generations_per_prompt
    for metrics, samples in zip(ours.metrics, ours.samples, strict=True):
        total = np.zeros(len(samples["tokens"]))
        gold = np.repeat(np.asarray(this.batch["answers"]), generations)
        for rule in this.config.rewards:
            expected = [
                score_response(rule, row.tolist(), this.bytes, this.model.stop_token_ids, int(key))
                for row, key in zip(samples["tokens"], gold, strict=True)
            ]
            np.testing.assert_allclose(samples["rewards_by_rule"][rule.name], expected, atol=1e-6)
            assert metrics[f"rewards/{rule.name}/mean"] == pytest.approx(np.mean(expected), abs=1e-6)
            assert metrics[f"rewards/{rule.name}/std"] == pytest.approx(np.std(expected, ddof=1), abs=1e-6)
            assert np.std(expected) > 0, f"{rule.name} should tell these responses apart"
            total += rule.weight * np.asarray(expected)
        np.testing.assert_allclose(samples["rewards"], total, atol=1e-6)
        groups = total.reshape(-1, generations)
        assert metrics["reward"] == pytest.approx(total.mean(), abs=1e-6)
        assert metrics["reward_std"] == pytest.approx(groups.std(axis=1, ddof=1).mean(), abs=1e-6)
        equal = samples["rewards"].reshape(-1, generations)
        equal = equal.min(axis=1) == equal.max(axis=1)
        assert metrics["frac_reward_zero_std"] == pytest.approx(equal.mean())
        expected = plain_advantages(equal_where(groups, equal), this.config.objective.scale).reshape(-1)
        np.testing.assert_allclose(samples["advantages"], expected, atol=1e-4)


def equal_where(groups: np.ndarray, equal: np.ndarray) -> np.ndarray:
    """`groups`, exactly equal where they are equal but for rounding."""
    return np.where(equal[:, None], groups[:, :1], groups)


@pytest.mark.parametrize("several", [False, True], ids=["one update", "two updates"])
def test_metrics_of_the_completions(several, tiny_root, tiny_config):
    ours = outcome(tiny_root, several=several)
    for metrics, samples in zip(ours.metrics, ours.samples, strict=True):
        stops = np.isin(samples["tokens"], tiny_config.stop_token_ids)
        first = np.where(stops.any(axis=1), stops.argmax(axis=1) + 1, stops.shape[1])
        assert (samples["mask"] == (np.arange(stops.shape[1]) < first[:, None])).all()
        prompts = samples["prompt_mask"].sum() * ours.config.generations_per_prompt
        expected = {
            "completions/mean_length": first.mean(),
            "completions/min_length": first.min(),
            "completions/max_length": first.max(),
            "completions/clipped_ratio": 1 - stops.any(axis=1).mean(),
            "num_tokens": prompts + first.sum(),
            "learning_rate": RATE,
        }
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-5), name
        assert 0 < metrics["completions/clipped_ratio"] < 1
        assert len(set(first)) > 2


def test_metrics_have_the_names_that_users_of_trl_know(tiny_root):
    names = {
        *("loss", "grad_norm", "learning_rate", "reward", "reward_std", "frac_reward_zero_std", "kl", "entropy"),
        *(f"clip_ratio/{part}_mean" for part in ("low", "high", "region")),
        *(f"completions/{part}_length" for part in ("mean", "min", "max")),
        *("completions/clipped_ratio", "num_tokens", "skipped_updates", "decoding_steps"),
        *(f"sampling/logp_difference/{part}" for part in ("mean", "max")),
        *(f"rewards/{rule}/{part}" for rule in ("ascii", "length", "repetition") for part in ("mean", "std")),
    }
    assert set(outcome(tiny_root).metrics[0]) == names


@pytest.mark.parametrize("several", [False, True], ids=["temperature 1", "temperature 0.7"])
def test_sampler_and_trainer_agree(several, tiny_root, figure):
    for metrics in outcome(tiny_root, several=several).metrics:
        figure("GRPO sampler against trainer, max", metrics["sampling/logp_difference/max"], 2e-5)
        assert 0 <= metrics["sampling/logp_difference/mean"] <= metrics["sampling/logp_difference/max"]


@pytest.mark.slow
def test_the_samplers_log_probs_may_be_the_old_ones(tiny_root, figure):
    """With them a step gives the same numbers. Ratios are to them after the first update."""
    objective = dataclasses.replace(SEVERAL["objective"], old_log_probs="sampler")
    this = Bench(tiny_root, **{**SEVERAL, "objective": objective})
    compare(this.run(2), outcome(tiny_root, several=True), figure, "the sampler's log-probs")
    learn, state = jax.jit(this.iteration.learn, compiler_options=FAST), this.state(this.read())
    sampled = jax.jit(this.iteration.sample, compiler_options=FAST)(
        state.parameters, this.rules, this.batch, jax.random.key(8)
    )
    first = np.arange(len(sampled.rollout.tokens))[:, None] < 4 * this.config.generations_per_prompt
    metrics = {}
    for name, rows in (("as they are", False), ("of the first", first), ("of the others", ~first)):
        log_probs = sampled.rollout.log_probs - 0.05 * sampled.rollout.mask * rows
        rollout = sampled.rollout._replace(log_probs=log_probs)
        metrics[name] = jax.device_get(
            learn(state, this.reference, sampled._replace(rollout=rollout), {})[1]["metrics"]
        )
    before, of_first, of_others = metrics.values()
    assert of_first["sampling/logp_difference/mean"] == pytest.approx(0.05, rel=1e-3)
    assert of_first["loss"] == before["loss"] and of_first["clip_ratio/high_mean"] == before["clip_ratio/high_mean"]
    assert of_others["sampling/logp_difference/mean"] == before["sampling/logp_difference/mean"] < 2e-5
    # Ratios that are 5 % larger: more tokens above its limit, fewer below.
    assert of_others["clip_ratio/high_mean"] > before["clip_ratio/high_mean"]
    assert of_others["clip_ratio/low_mean"] < before["clip_ratio/low_mean"]


def test_the_reference_stays_where_it_was(tiny_root, figure):
    ours = outcome(tiny_root)
    figure("GRPO KL of the first step", abs(ours.metrics[0]["kl"]), 1e-9)
    assert ours.metrics[1]["kl"] > 1e-4
    assert largest_difference(ours.reference, ours.parameters[0]) == 0
    assert largest_difference(ours.parameters[1], ours.parameters[0]) > 0


@pytest.mark.slow
def test_truncated_responses_teach_nothing(tiny_root):
    """On policy the loss is minus the mean advantage, by token: of the responses that stop."""
    this = Bench(tiny_root, objective=ObjectiveSection("dapo", kl_coefficient=0.0, mask_truncated=True))
    metrics, samples = (values[0] for values in this.run(1)[1:3])
    stops = np.isin(samples["tokens"], this.model.stop_token_ids).any(axis=1)
    assert 0 < stops.mean() < 1
    tokens = samples["mask"].sum(axis=1) * stops
    assert metrics["loss"] == pytest.approx(-(samples["advantages"] * tokens).sum() / tokens.sum(), abs=1e-6)
    assert metrics["completions/clipped_ratio"] == pytest.approx(1 - stops.mean())
    assert metrics["completions/mean_length"] == pytest.approx(samples["mask"].sum(axis=1).mean())


@pytest.mark.slow
@pytest.mark.parametrize(("candidates", "tokens"), [(16, 2), (8, 2)], ids=["a slate", "a filter"])
def test_dynamic_sampling(candidates, tokens, tiny_root):
    """Trained on are the first prompts of the slate whose responses are not equally right, by the rule alone."""
    section = DynamicSamplingSection(candidates, "ascii")
    objective = ObjectiveSection("dapo", kl_coefficient=0.05)
    rules = (PatternRule(pattern="[ -~]*", name="ascii"), LengthRule(max_length=2, buffer=1, weight=0.5))
    this = Bench(tiny_root, dynamic_sampling=section, objective=objective, max_new_tokens=tokens, rewards=rules)
    result = this.run(1)
    metrics, samples = result.metrics[0], result.samples[0]
    sampled, kept = metrics["dynamic_sampling/sampled_prompts"], metrics["dynamic_sampling/kept_prompts"]
    assert sampled in range(8, candidates + 1, 8)
    assert metrics["dynamic_sampling/unused_prompts"] == candidates - sampled
    assert kept == 8 or sampled == candidates, "it goes on until it has enough, or all are used up"
    accuracy = samples["rewards_by_rule"]["ascii"].reshape(8, -1)
    chosen = accuracy.min(axis=1) < accuracy.max(axis=1)
    assert chosen.sum() == kept > 0
    assert chosen[: int(kept)].all() or sampled == 8, "of several parts the chosen ones stand first"
    advantages = samples["advantages"].reshape(8, -1)
    assert (advantages[~chosen] == 0).all()
    lengths = samples["mask"].sum(axis=1).reshape(8, -1)[chosen]
    assert metrics["loss"] == pytest.approx(-(advantages[chosen] * lengths).sum() / lengths.sum(), abs=1e-6)
    assert metrics["reward"] == pytest.approx(samples["rewards"].reshape(8, -1)[chosen].mean(), abs=1e-6)
    assert metrics["frac_reward_zero_std"] == 0
    prompts = [row[mask].tobytes() for row, mask in zip(samples["prompts"], samples["prompt_mask"], strict=True)]
    assert len(set(prompts)) == 8
    assert all(math.isfinite(value) for value in metrics.values())


def test_evaluation_is_greedy_and_counts_every_prompt_once(tiny_root):
    """Rewards of the plain reference on greedy responses, also where the last batch is not full, and with functions."""
    this = bench(tiny_root)
    config = dataclasses.replace(this.config, rewards=(*RULES, FunctionReward(function="a:judge", weight=2.0)))
    iteration = dataclasses.replace(this.iteration, config=config)
    _prompts, _ = grpo_run.tokenized_prompts(this.tokenizer, config, str(tiny_root / "rl.jsonl"))
    prompts = _prompts[:11]
    program = jax.jit(iteration.evaluate, compiler_options=FAST)
    seen, failing = [], None

    def judge(numbers, tokens, mask):
        seen.extend(zip(numbers, tokens, mask, strict=True))
        values = [[np.nan if number == 3 else float(number)] for number in numbers]
        return {"judge": np.asarray(values, np.float32)}, {"rewards/judge/failed": float(failing in numbers)}

    state = this.state(this.read())
    arguments = (program, config, this.execution.sharding, this.rules, prompts, judge, state, lambda: None)
    metrics = grpo_run.held_out_reward(*arguments)
    assert [number for number, _, _ in seen] == list(range(11))
    scores = {
        rule.name: [
            score_response(rule, tokens.tolist(), this.bytes, this.model.stop_token_ids, 0) for _, tokens, _ in seen
        ]
        for rule in RULES
    }
    for name, values in scores.items():
        assert metrics[f"evaluation_rewards/{name}/mean"] == pytest.approx(np.mean(values), abs=1e-6)
    numbers = [number for number in range(11) if number != 3]
    assert metrics["evaluation_rewards/judge/mean"] == pytest.approx(np.mean(numbers))
    total = sum(rule.weight * np.asarray(scores[rule.name]) for rule in RULES)
    assert metrics["evaluation_reward"] == pytest.approx((total.sum() + 2 * sum(numbers)) / 11, rel=1e-5)
    assert metrics["evaluation_completions/mean_length"] == pytest.approx(np.mean([mask.sum() for _, _, mask in seen]))
    assert grpo_run.held_out_reward(*arguments) == metrics
    failing = 2
    assert grpo_run.held_out_reward(*arguments) == {**metrics, "evaluation_reward": None}, "no total without a part"


TO_HOST = re.compile(r"callback|\b(infeed|outfeed|send|recv|send-done|recv-done)\(|MoveToHost|host_compute", re.I)


def test_the_program_never_goes_to_the_host(tiny_root):
    def calls_back(x: jax.Array) -> jax.Array:
        return jax.pure_callback(lambda y: y, x, x)

    assert TO_HOST.search(jax.jit(calls_back).lower(jnp.ones(2)).compile().as_text()), "the search finds nothing"
    for several in (False, True):
        assert not TO_HOST.search(outcome(tiny_root, several=several).program)


def test_keys_decide_what_is_sampled(tiny_root):
    """Another key each step and each seed; the same bits from the same ones."""
    this, first = bench(tiny_root), outcome(tiny_root)
    again, other = this.run(2), this.run(1, seed=1)
    assert again.metrics == first.metrics
    for left, right in zip(jax.tree.leaves(again.parameters), jax.tree.leaves(first.parameters), strict=True):
        assert left.tobytes() == right.tobytes()
    tokens = [first.samples[0]["tokens"], first.samples[1]["tokens"], other.samples[0]["tokens"]]
    assert all((tokens[i] != tokens[j]).any() for i, j in ((0, 1), (0, 2), (1, 2)))
    groups = tokens[0].reshape(8, 4, -1)
    assert all(len(np.unique(group, axis=0)) > 1 for group in groups), "responses to one prompt should differ"


def test_padding_after_the_stop_token_cannot_overflow(tiny_root, tiny_config):
    """Its log-prob may be anything: a policy that has unlearned the padding token there gives no NaN."""
    this = bench(tiny_root)
    parameters = this.read()
    policy = {**parameters, "head": parameters["head"].at[tiny_config.pad_token_id].multiply(1000)}
    result = this.run(1, parameters=policy)
    assert not result.samples[0]["mask"].all()
    finite = {name: bool(np.isfinite(value)) for name, value in result.metrics[0].items()}
    assert all(finite.values()), finite
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.parameters[1]))


def test_samples_as_text(tiny_root):
    this, ours = bench(tiny_root), outcome(tiny_root)
    texts = list(decoded_samples(this.tokenizer, "", ours.samples[0], 4))
    assert len(texts) == 8
    rows = ours.samples[0]
    for row, sample in enumerate(texts):
        assert sample["prompt"].startswith("<|im_start|>system\n专家。<|im_end|>")
        assert sample["prompt"].endswith("<|im_start|>assistant\n")
        assert sample["completion"] == this.tokenizer.decode(rows["tokens"][row][rows["mask"][row]])
        assert sample["tokens"] == rows["mask"][row].sum() == len(sample["token_ids"])
        assert sample["completion"] == this.tokenizer.decode(sample["token_ids"])
        assert sample["reward"] == rows["rewards"][row]
        assert sum(rule.weight * sample["rewards"][rule.name] for rule in this.config.rewards) == pytest.approx(
            sample["reward"], abs=1e-6
        )
        assert sample["advantage"] == rows["advantages"][row]


@pytest.mark.slow
def test_a_step_without_anything_to_learn_changes_nothing(tiny_root):
    """All rewards equal and no KL term: the loss is 0, the parameters stay, bit for bit."""
    rules = (ThinkFormatRule(), AnswerSetRule())
    this = Bench(tiny_root, rewards=rules, objective=ObjectiveSection(kl_coefficient=0.0))
    result = this.run(1)
    assert result.metrics[0]["frac_reward_zero_std"] == 1
    assert result.metrics[0]["loss"] == result.metrics[0]["grad_norm"] == result.metrics[0]["kl"] == 0
    assert largest_difference(result.parameters[1], result.parameters[0]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True], ids=["one update", "several"])
def test_groups_that_all_fall_out_change_nothing(several, tiny_root):
    """Dynamic sampling keeps no prompt, since a rule is the same for all: AdamW's moments, its count of updates, and
    the parameters stay, with weight decay and moments of two updates before; what is of nothing is absent."""
    never = PatternRule(pattern="never said by anyone", name="never")
    changes = {"minibatch_prompts": 4, "passes_per_step": 2} if several else {}
    this = Bench(
        tiny_root,
        optimizer=optax.adamw(1e-2, weight_decay=0.1),
        schedule=lambda count: 0.1 * count,
        rewards=(never, *RULES),
        dynamic_sampling=DynamicSamplingSection(16, "never"),
        **changes,
    )
    state = this.state(this.read())
    moments = jax.tree.map(lambda leaf: leaf + 2, state.optimizer_state)  # and two updates
    state = dataclasses.replace(state, optimizer_state=moments)
    before = jax.device_get(state)
    state, outputs = this.step(state, this.reference, this.rules, this.batch, jax.random.key(0))
    after, outputs = jax.device_get((state, outputs))
    assert largest_difference(after.parameters, before.parameters) == 0
    assert largest_difference(after.optimizer_state, before.optimizer_state) == 0
    assert after.step == before.step + 1
    metrics, absent = outputs["metrics"], outputs["absent"]
    assert (metrics["skipped_updates"], metrics["empty_updates"]) == (0, 4 if several else 1)
    assert metrics["learning_rate"] == pytest.approx(0.1), "of the second update, which is the last one that was made"
    assert (metrics["dynamic_sampling/sampled_prompts"], metrics["dynamic_sampling/kept_prompts"]) == (16, 0)
    gone = {name for name, is_absent in absent.items() if is_absent}
    assert {"reward", "reward_std", "frac_reward_zero_std", "rewards/never/mean", "loss", "kl", "entropy"} <= gone
    assert not {"completions/mean_length", "num_tokens", "learning_rate"} & gone


def test_updates_without_a_token_are_no_part_of_the_means(tiny_root):
    """Dynamic sampling keeps half of the prompts: of two minibatches the second has nothing to learn from. The loss and
    the norm are those of the first, as where both are one."""
    this, samples = bench(tiny_root, several=True), outcome(tiny_root, several=True).samples[0]
    sampled = Sampled(
        {"tokens": samples["prompts"], "mask": samples["prompt_mask"]},
        Rollout(samples["tokens"], samples["mask"], np.zeros(samples["tokens"].shape, np.float32)),
        {name: values.reshape(8, 4) for name, values in samples["rewards_by_rule"].items()},
        np.arange(8) < 4,
        {},
    )
    found = []
    for minibatch in (4, 8):
        config = dataclasses.replace(
            this.config, minibatch_prompts=minibatch, dynamic_sampling=DynamicSamplingSection(8, "ascii")
        )
        learn = jax.jit(dataclasses.replace(this.iteration, config=config).learn, compiler_options=FAST)
        outputs = learn(this.state(this.read()), this.reference, sampled, {})[1]
        found.append(jax.device_get(outputs["metrics"]))
    two, one = found
    assert (two["empty_updates"], one["empty_updates"]) == (1, 0)
    for name in ("loss", "grad_norm", "kl", "entropy"):
        assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-7), name


@pytest.mark.slow
def test_it_learns(tiny_root):
    """To answer in ASCII, from chance: three seeds of one program."""
    rules = (PatternRule(pattern="[ -~]+", name="ascii"),)
    changes = {
        "rewards": rules,
        "objective": ObjectiveSection(kl_coefficient=0.0),
        "max_new_tokens": 3,
        "generations_per_prompt": 8,
    }
    this = Bench(tiny_root, optimizer=optax.adam(1e-2), **changes)
    for seed in range(3):
        rewards = [metrics["reward"] for metrics in this.run(30, seed=seed).metrics]
        first, last = np.mean(rewards[:3]), np.mean(rewards[-3:])
        assert last > first + 0.3, f"seed {seed}: the reward went from {first:.2f} to {last:.2f}"


def test_configs_that_cannot_be_split_are_refused(tiny_root):
    for changes in ({"minibatch_prompts": 3}, {"minibatch_prompts": 4, "micro_batch_prompts": 3}):
        with pytest.raises(ValueError, match="must divide"):
            dataclasses.replace(grpo_config(tiny_root), **changes)


def test_who_reads_a_response_sees_what_the_template_has_opened(tiny_root):
    """Functions on the host, and samples."""
    this = bench(tiny_root)
    tokenizer = copy.deepcopy(this.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant\n<think>\n{{ '' }}")
    setup = SimpleNamespace(tokenizer=tokenizer, model=SimpleNamespace(config=this.model))
    record = RlPrompt((Message("user", "问"),), "B", "single")
    prompt = grpo_run.Prompt(prompt_tokens(tokenizer, record.messages, PromptSection("", "")), record, 0)
    seen = []

    def judge(prompts, completions, records):
        seen.extend(zip(prompts, completions, strict=True))
        return [1.0] * len(prompts)

    ids = tokenizer.encode("想</think>答", add_special_tokens=False)
    tokens = np.asarray([[*ids, this.model.stop_token_ids[0]]], np.int32)
    function = LoadedFunction(FunctionReward(function="a:judge"), judge)
    grpo_run.judged(
        [function], setup, opened_text(tokenizer), [prompt], np.asarray([0]), tokens, np.ones_like(tokens, bool)
    )
    asked = "<|im_start|>user\n问<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert seen == [(asked, "<think>\n想</think>答")]
    rows = {key: value[:1] for key, value in outcome(tiny_root).samples[0].items() if key != "rewards_by_rule"}
    rows |= {"tokens": tokens, "mask": np.ones_like(tokens, bool), "rewards_by_rule": {}}
    (sample,) = decoded_samples(tokenizer, opened_text(tokenizer), rows, 1)
    assert sample["completion"] == "<think>\n想</think>答" + tokenizer.decode(tokens[0, -1:])
