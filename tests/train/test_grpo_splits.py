"""GRPO iterations in parts: micro-batches, eight devices, two programs. Nothing changes but the order of sums."""

import dataclasses

import jax
import numpy as np
import pytest
from support.iterations import ALL, FAST, FSDP, Bench, bench, compare, outcome
from support.training_fixtures import RULES, largest_difference

from psyche_jax.config import ObjectiveSection, RolloutSection
from psyche_jax.rewards import FunctionReward
from psyche_jax.rewards.score import compile_rules


@pytest.mark.slow
def test_micro_batches_change_nothing(tiny_root, figure):
    """2 prompts at once in place of 8."""
    expected = outcome(tiny_root)
    compare(Bench(tiny_root, micro_batch_prompts=2).run(2), expected, figure, "micro-batches")


WIDE = ObjectiveSection("gspo", kl_coefficient=0.05, mask_truncated=True, top_entropy=0.5, sampler_cap=1.0001)


@pytest.mark.slow
def test_micro_batches_change_nothing_of_what_looks_at_the_whole_batch(tiny_root, figure):
    """The limit of entropy, masked truncated responses, two passes; also against the objective by hand."""
    this = [Bench(tiny_root, objective=WIDE, passes_per_step=2, micro_batch_prompts=size) for size in (2, 8)]
    ours, expected = (bench.run(2) for bench in this)
    compare(ours, expected, figure, "micro-batches, gspo")
    metrics, samples = ours.metrics[0], ours.samples[0]
    stops = np.isin(samples["tokens"], this[0].model.stop_token_ids).any(axis=1)
    assert metrics["completions/clipped_ratio"] == pytest.approx(1 - stops.mean())
    assert metrics["completions/mean_length"] == pytest.approx(samples["mask"].sum(axis=1).mean())
    ratios = [metrics[f"sampling/importance_sampling_ratio/{part}"] for part in ("min", "mean", "max")]
    assert 0.999 < ratios[0] <= ratios[1] <= ratios[2] <= 1.00011
    assert largest_difference(ours.parameters[1], ours.parameters[0]) > 0


def test_two_programs_are_the_one(tiny_root, figure):
    """A function that says what a rule says gives the same update; where it says nothing, less is learned from."""
    this, expected = bench(tiny_root), outcome(tiny_root)
    iteration = dataclasses.replace(
        this.iteration,
        config=dataclasses.replace(this.config, rewards=(*RULES[1:], FunctionReward(function="a:ascii"))),
    )
    rules = compile_rules(iteration.config.rules, this.bytes, this.model.stop_token_ids)
    key = jax.random.fold_in(jax.random.key(8), 0)  # as `run` draws
    sample, learn = iteration.programs()
    state = this.state(this.read())
    sampled = sample.lower(state.parameters, rules, this.batch, key).compile(FAST)(
        state.parameters, rules, this.batch, key
    )
    rows = jax.device_get(sampled.rollout)
    assert (rows.tokens == expected.samples[0]["tokens"]).all()
    values = expected.samples[0]["rewards_by_rule"]["ascii"].reshape(8, 4)
    learn = learn.lower(state, this.reference, sampled, {"ascii": values}).compile(FAST)
    new, outputs = learn(state, this.reference, sampled, {"ascii": values})
    figure(
        "GRPO parameters, two programs",
        largest_difference(jax.device_get(new.parameters), expected.parameters[1]),
        1e-5,
    )
    for name, value in expected.metrics[0].items():
        assert float(outputs["metrics"][name]) == pytest.approx(value, rel=1e-5, abs=1e-6), name
    some = values.copy()
    some[0] = some[1, 2] = np.nan
    _, outputs = learn(this.state(this.read()), this.reference, sampled, {"ascii": some})
    total = outputs["samples"]["rewards"].reshape(8, 4)
    np.testing.assert_allclose(total[0], expected.samples[0]["rewards"].reshape(8, 4)[0] - values[0], atol=1e-6)
    advantages = outputs["samples"]["advantages"].reshape(8, 4)
    assert advantages[1, 2] == 0
    group = np.delete(np.asarray(total[1], np.float64), 2)
    assert np.delete(advantages[1], 2) == pytest.approx((group - group.mean()) / (group.std(ddof=1) + 1e-4), abs=1e-4)
    assert float(outputs["metrics"]["rewards/ascii/mean"]) == pytest.approx(np.nanmean(some), abs=1e-6)


def test_slots_change_nothing(tiny_root, figure):
    """A quarter of the responses at once, in more steps."""
    ours, expected = Bench(tiny_root, rollout=RolloutSection(8)).run(2), outcome(tiny_root)
    for left, right in zip(ours.metrics, expected.metrics, strict=True):
        assert left.pop("decoding_steps") > 2 * right["decoding_steps"]
        left["decoding_steps"] = right["decoding_steps"]
    compare(ours, expected, figure, "slots")


@pytest.mark.parametrize("mesh", [FSDP, ALL], ids=["fsdp 8", "data 2, fsdp 2, tensor 2"])
def test_eight_devices_equal_one(mesh, tiny_root, figure):
    compare(outcome(tiny_root, mesh), outcome(tiny_root), figure, "8 devices")


def test_decoding_splits_weights_where_training_spreads_rows(tiny_root, figure):
    """Eight devices, of which pairs share the heads while decoding."""
    this = Bench(tiny_root, FSDP, rollout=RolloutSection(slots=16, tensor=2))
    ours, expected = this.run(2), outcome(tiny_root)
    for left, right in zip(ours.metrics, expected.metrics, strict=True):
        left["decoding_steps"] = right["decoding_steps"]
    compare(ours, expected, figure, "8 devices, pairs while decoding")
    kernel = this.read()["layers"]["up_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 48, 32 // 8)


@pytest.mark.slow
def test_eight_devices_equal_one_with_minibatches(tiny_root, figure):
    """Parts of a step keep all devices busy and in the same order: 4 micro-batches of 8 responses."""
    compare(outcome(tiny_root, FSDP, True), outcome(tiny_root, several=True), figure, "8 devices, minibatches")
