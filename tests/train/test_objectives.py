"""Advantages, losses and gradients against TRL's and veRL's values, and against loops in plain numpy."""

import itertools
from pathlib import Path

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_jax.train.objectives import clipped_policy_loss, group_advantages, token_weights, zero_std_groups

ORACLE = Path(__file__).parents[3] / "shared" / "oracles" / "grpo_seed0.npz"
AGGREGATIONS = ("grpo", "dapo", "dr_grpo", "bnpo")
LIMITS = {"float64": 1e-10, "float32": 1e-6}
# Our name and clip for each of the oracle's cases, and into how many micro-batches the batch goes.
CASES = {
    **{
        f"trl|{name}|beta={beta}|kl_bias_corr=False": (name, beta, 0.2, 1)
        for name, beta in itertools.product(AGGREGATIONS, (0.0, 0.04))
    },
    **{f"trl|{name}|beta=0.0|2 micro-batches": (name, 0.0, 0.2, 2) for name in AGGREGATIONS},
    "trl|dapo|eps=(.2,.28)": ("dapo", 0.0, 0.28, 1),
    "trl|dapo|on-policy(old=None)|beta=0.04|kl_bias_corr=False": ("dapo", 0.04, 0.2, 1),
    "verl|vanilla|token-mean": ("dapo", 0.0, 0.2, 1),
    "verl|vanilla|token-mean|kl=k3*0.04": ("dapo", 0.04, 0.2, 1),
    "verl|vanilla|token-mean|eps=(.2,.28)": ("dapo", 0.0, 0.28, 1),
}


@pytest.fixture(scope="module")
def oracle():
    if not ORACLE.is_file():
        pytest.skip(f"{ORACLE}: absent; the values of TRL and veRL are not part of the repository")
    return dict(np.load(ORACLE))


def total_loss(log_probs, old, reference, advantages, mask, aggregation, clip_high, beta, parts=1):
    """The loss of one update as `grpo.Iteration` makes it, but from given log-probs; old None: on-policy."""
    old = jax.lax.stop_gradient(log_probs) if old is None else old
    terms = clipped_policy_loss(log_probs, old, reference, advantages, 0.2, clip_high, beta)
    return jnp.sum(terms.loss * token_weights(mask, aggregation, parts))


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_of_trl_and_verl(case, dtype, oracle, figure):
    aggregation, beta, clip_high, parts = CASES[case]
    with jax.enable_x64(dtype == "float64"):
        inputs = {name: jnp.asarray(oracle[f"in|{name}"], dtype) for name in ("logps", "old_logps", "ref_logps")}
        advantages = jnp.asarray(oracle[f"{case.split('|')[0]}|adv|group"], dtype)
        mask = jnp.asarray(oracle["in|mask"], bool)
        old = None if "on-policy" in case else inputs["old_logps"]
        loss, gradient = jax.value_and_grad(total_loss)(
            inputs["logps"], old, inputs["ref_logps"], advantages, mask, aggregation, clip_high, beta, parts
        )
        assert gradient.dtype == dtype
    figure(f"GRPO loss, {dtype}", abs(float(loss) - oracle[f"{case}|loss"]), LIMITS[dtype])
    figure(f"GRPO gradient, {dtype}", np.abs(np.asarray(gradient) - oracle[f"{case}|grad"]).max(), LIMITS[dtype])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_trl(scale, oracle, figure):
    with jax.enable_x64(True):
        ours = group_advantages(jnp.asarray(oracle["in|rewards"].reshape(-1, int(oracle["in|G"]))), scale)
    # TRL's own are float32.
    figure("advantages", np.abs(np.asarray(ours).reshape(-1) - oracle[f"trl|adv|{scale}"]).max(), 5e-8)


def plain_advantages(rewards, scale):
    """The definition, a group at a time."""
    whole = rewards.reshape(-1).std(ddof=1)
    rows = []
    for group in rewards:
        centered = group - group.mean()
        std = {"group": group.std(ddof=1), "batch": whole, "none": 1 - 1e-4}[scale]
        rows.append(np.zeros_like(group) if group.min() == group.max() else centered / (std + 1e-4))
    return np.stack(rows)


def plain_loss(log_probs, old, reference, advantages, mask, aggregation, clip_high, beta, parts=1):
    """The definitions in loops: the loss and its derivative by each token's log-prob."""
    token_loss, slope = np.zeros(mask.shape), np.zeros(mask.shape)
    for i, t in zip(*np.nonzero(mask), strict=True):
        ratio, advantage = np.exp(log_probs[i, t] - old[i, t]), advantages[i]
        within = min(max(ratio, 0.8), 1 + clip_high)
        distance = reference[i, t] - log_probs[i, t]
        token_loss[i, t] = -min(ratio * advantage, within * advantage) + beta * (np.exp(distance) - distance - 1)
        unclipped = ratio * advantage <= within * advantage
        slope[i, t] = -ratio * advantage * unclipped + beta * (1 - np.exp(distance))
    rows, length = mask.shape
    counts = mask.sum(axis=1)
    weights = np.zeros(mask.shape)
    for i in range(rows):
        size = rows // parts
        part = slice(i // size * size, (i // size + 1) * size)
        weights[i] = {
            "grpo": 1 / max(counts[i], 1) / rows,
            "dapo": 1 / max(counts.sum(), 1),
            "dr_grpo": 1 / (rows * length),
            "bnpo": 1 / max(counts[part].sum(), 1) / parts,
        }[aggregation]
    return (token_loss * weights).sum(), slope * weights


@settings(deadline=None, max_examples=60)
@given(
    rewards=hnp.arrays(
        np.float64, (3, 4), elements=st.one_of(st.sampled_from([0.0, 0.5, 1.0, 0.1]), st.floats(-100, 100, width=32))
    ),
    equal=st.sets(st.integers(0, 2)),
    scale=st.sampled_from(["group", "batch", "none"]),
)
def test_advantages_follow_the_definition(rewards, equal, scale):
    for group in equal:
        rewards[group] = rewards[group, 0]
    for dtype, limit in (("float64", 1e-9), ("float32", 2e-3)):
        with jax.enable_x64(dtype == "float64"):
            given_rewards = jnp.asarray(rewards, dtype)
            ours = np.asarray(group_advantages(given_rewards, scale))
            zero = np.asarray(zero_std_groups(given_rewards))
        # float32 of nearly equal rewards: what is lost in the mean is divided by a small std.
        loss = limit * (1 + np.abs(rewards).max() * (1e3 if dtype == "float32" else 1e-3))
        np.testing.assert_allclose(ours, plain_advantages(rewards, scale), atol=loss)
        assert np.isfinite(ours).all()
        assert zero[list(equal)].all()
        assert (ours[zero] == 0).all(), "a group whose rewards are all equal teaches nothing, exactly"


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e-30, -7.7, 1e6])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_zero(value, scale):
    """The mean of n equal floats need not be that float; the advantage must be zero all the same."""
    for generations in (2, 3, 5, 7, 8):
        advantages = np.asarray(group_advantages(jnp.full((3, generations), value, jnp.float32), scale))
        assert (advantages == 0).all()


@settings(deadline=None, max_examples=40)
@given(
    mask=hnp.arrays(bool, (6, 5)),
    seed=st.integers(0, 2**16),
    aggregation=st.sampled_from(AGGREGATIONS),
    clip_high=st.sampled_from([0.2, 0.28]),
    beta=st.sampled_from([0.0, 0.04]),
    parts=st.sampled_from([1, 2, 3]),
)
def test_loss_and_gradient_follow_the_definition(mask, seed, aggregation, clip_high, beta, parts):
    random = np.random.default_rng(seed)
    log_probs, old, reference = -random.exponential(1.0, (3, 6, 5))
    advantages = random.normal(size=6) * random.integers(0, 2, 6)
    inputs = (log_probs, old, reference, advantages)
    expected_loss, expected_gradient = plain_loss(*inputs, mask, aggregation, clip_high, beta, parts)
    with jax.enable_x64(True):
        loss, gradient = jax.value_and_grad(total_loss)(
            *map(jnp.asarray, inputs), jnp.asarray(mask), aggregation, clip_high, beta, parts
        )
    assert abs(float(loss) - expected_loss) < 1e-10
    np.testing.assert_allclose(np.asarray(gradient), expected_gradient, atol=1e-10)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_wholly_masked_batch_has_zero_loss_and_gradient(aggregation):
    ones = jnp.ones((4, 3))
    loss, gradient = jax.value_and_grad(total_loss)(
        -ones, -2 * ones, -3 * ones, jnp.ones(4), jnp.zeros((4, 3), bool), aggregation, 0.2, 0.04
    )
    assert float(loss) == 0
    assert (np.asarray(gradient) == 0).all()


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("parts", [2, 3, 6])
def test_parts_of_a_batch_add_up(aggregation, parts):
    """Only bnpo depends on how a batch is split, by its definition."""
    mask = jnp.asarray(np.random.default_rng(0).random((6, 5)) < 0.6)
    assert (token_weights(mask, aggregation, parts) == token_weights(mask, aggregation)).all()


def test_clips_are_marked_where_they_cut():
    """Below 0.8 with a negative advantage, above 1.28 with a positive one; elsewhere the ratio counts as it is."""
    ratios = jnp.asarray([[0.5, 1.0, 2.0]] * 3)
    terms = clipped_policy_loss(jnp.log(ratios), 0 * ratios, 0 * ratios, jnp.asarray([1.0, -1.0, 0.0]), 0.2, 0.28, 0.0)
    np.testing.assert_allclose(terms.loss, [[-0.5, -1, -1.28], [0.8, 1, 2], [0, 0, 0]], atol=1e-6)
    assert terms.clipped_low.tolist() == [[False] * 3, [True, False, False], [False] * 3]
    assert terms.clipped_high.tolist() == [[False, False, True], [False] * 3, [False] * 3]
    np.testing.assert_allclose(terms.kl, 1 / ratios + jnp.log(ratios) - 1, atol=1e-6)
