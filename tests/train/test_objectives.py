"""Advantages, losses and gradients against TRL's and veRL's values, and against loops in plain numpy."""

import itertools
import math
from pathlib import Path

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_jax.config import ObjectiveSection
from psyche_jax.train.objectives import (
    PolicyTokens,
    group_advantages,
    high_entropy_tokens,
    kl_terms,
    policy_loss,
    sampler_correction,
    token_weights,
    total_rewards,
    zero_std_groups,
)

ORACLE = Path(__file__).parents[3] / "shared" / "oracles" / "grpo_seed0.npz"
AGGREGATIONS = ("grpo", "dapo", "dr_grpo", "bnpo")
LIMITS = {"float64": 1e-10, "float32": 1e-6}


def objective(name="grpo", beta=0.0, **changes):
    return ObjectiveSection(name=name, kl_coefficient=beta, **changes)


# Our objective for each of the oracle's cases.
CASES = {
    **{
        f"trl|{name}|beta={beta}|kl_bias_corr=False": objective(name, beta)
        for name, beta in itertools.product(AGGREGATIONS, (0.0, 0.04))
    },
    **{f"trl|{name}|beta=0.04|kl_bias_corr=True": objective(name, 0.04, kl_unbiased=True) for name in AGGREGATIONS},
    **{f"trl|{name}|beta=0.0|2 micro-batches": objective(name) for name in AGGREGATIONS},
    "trl|dapo|eps=(.2,.28)": objective("dapo", clip_high=0.28),
    "trl|dapo|delta=1.1": objective("dapo", clip_delta=1.1),
    "trl|grpo|seq-IS(gspo) eps=(3e-4,4e-4)": objective("gspo", clip_low=3e-4, clip_high=4e-4),
    "trl|dapo|top_entropy=0.2": objective("dapo", top_entropy=0.2),
    "trl|cispo|eps_high=5": objective("cispo", clip_low=1.0, clip_high=4.0),  # TRL's is 1 + ours, and no limit below
    **{
        f"trl|dapo|on-policy(old=None)|beta=0.04|kl_bias_corr={unbiased}": objective("dapo", 0.04, kl_unbiased=unbiased)
        for unbiased in (False, True)
    },
    "verl|vanilla|token-mean": objective("dapo"),
    "verl|vanilla|token-mean|kl=k3*0.04": objective("dapo", 0.04),
    "verl|vanilla|token-mean|eps=(.2,.28)": objective("dapo", clip_high=0.28),
    "verl|vanilla|seq-mean-token-mean": objective("grpo"),
    "verl|vanilla|seq-mean-token-mean|kl=k3*0.04": objective("grpo", 0.04),
    "verl|gspo eps=(3e-4,4e-4)": objective("gspo", clip_low=3e-4, clip_high=4e-4),
    "verl|cispo": objective("cispo"),
}


@pytest.fixture(scope="module")
def oracle():
    if not ORACLE.is_file():
        pytest.skip(f"{ORACLE}: absent; the values of TRL and veRL are not part of the repository")
    return dict(np.load(ORACLE))


def total_loss(log_probs, old, reference, entropy, advantages, mask, objective, parts=1):
    """The loss of one update as `grpo.Iteration` makes it, but from given log-probs; old None: on-policy."""
    old = jax.lax.stop_gradient(log_probs) if old is None else old
    learned = None
    if objective.top_entropy < 1:
        learned = high_entropy_tokens(entropy, mask, objective.top_entropy)
    weights = token_weights(mask, objective.name, parts)
    total = 0.0
    for rows in np.split(np.arange(len(mask)), parts):
        part = [None if x is None else x[rows] for x in (log_probs, old, reference, entropy, advantages, mask)]
        terms = policy_loss(PolicyTokens(*part, None if learned is None else learned[rows]), objective)
        total += jnp.sum(terms.loss * weights[rows])
    return total


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_of_trl_and_verl(case, dtype, oracle, figure):
    parts = 2 if "micro" in case else 1
    with jax.enable_x64(dtype == "float64"):
        names = ("logps", "old_logps", "ref_logps", "entropies")
        log_probs, old, reference, entropy = (jnp.asarray(oracle[f"in|{name}"], dtype) for name in names)
        advantages = jnp.asarray(oracle[f"{case.split('|')[0]}|adv|group"], dtype)
        mask = jnp.asarray(oracle["in|mask"], bool)
        old = None if "on-policy" in case else old
        loss, gradient = jax.value_and_grad(total_loss)(
            log_probs, old, reference, entropy, advantages, mask, CASES[case], parts
        )
        assert gradient.dtype == dtype
    expected, slope, limit = oracle[f"{case}|loss"], oracle[f"{case}|grad"], LIMITS[dtype]
    if case.startswith("verl") and CASES[case].name in ("grpo", "gspo"):
        share = oracle["in|mask"].any(axis=1).mean()  # veRL's mean leaves wholly masked sequences out
        expected, slope = expected * share, slope * share
        limit = max(limit, 1e-9)  # and veRL adds 1e-8 to the number of tokens
    figure(f"GRPO loss, {dtype}, of {case.split('|')[0]}", abs(float(loss) - expected), limit)
    figure(f"GRPO gradient, {dtype}, of {case.split('|')[0]}", np.abs(np.asarray(gradient) - slope).max(), limit)


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


def plain_loss(log_probs, old, reference, entropy, advantages, mask, objective, parts=1):
    """The definitions in loops: the loss and its derivative by each token's log-prob."""
    token_loss, slope = np.zeros(mask.shape), np.zeros(mask.shape)
    low, high, delta = 1 - objective.clip_low, 1 + objective.clip_high, objective.clip_delta or math.inf
    rows, length = mask.shape
    counts = mask.sum(axis=1)
    limit = np.quantile(entropy[mask], 1 - objective.top_entropy) if mask.any() else 0.0
    for i, t in zip(*np.nonzero(mask), strict=True):
        ratio = token_ratio = np.exp(log_probs[i, t] - old[i, t])
        if objective.name == "gspo":
            ratio = np.exp((log_probs[i] - old[i])[mask[i]].mean())
        if entropy[i, t] >= limit:
            advantage, within, under = advantages[i], min(max(ratio, low), high), min(ratio, delta)
            if objective.name == "cispo":
                token_loss[i, t] = -within * advantage * log_probs[i, t]
                slope[i, t] += -within * advantage
            else:
                token_loss[i, t] = -min(under * advantage, within * advantage)
                if under * advantage <= within * advantage and ratio <= delta:
                    # A token of the sequence's ratio moves all of its tokens' losses.
                    share = mask[i] / counts[i] if objective.name == "gspo" else np.eye(length)[t]
                    slope[i] += -ratio * advantage * share
        distance = reference[i, t] - log_probs[i, t]
        kl, kl_slope = {
            "k1": (-distance, 1.0),
            "k2": (distance**2 / 2, -distance),
            "k3": (np.exp(distance) - distance - 1, 1 - np.exp(distance)),
        }[objective.kl_estimator]
        if objective.kl_unbiased:
            kl, kl_slope = kl * token_ratio, kl_slope * token_ratio + kl * token_ratio
        token_loss[i, t] += objective.kl_coefficient * kl - objective.entropy_coefficient * entropy[i, t]
        slope[i, t] += objective.kl_coefficient * kl_slope
    weights = np.zeros(mask.shape)
    for i in range(rows):
        size = rows // parts
        part = slice(i // size * size, (i // size + 1) * size)
        by_sequence = 1 / max(counts[i], 1) / rows
        by_token = 1 / max(counts.sum(), 1)
        weights[i] = {
            "grpo": by_sequence,
            "gspo": by_sequence,
            "dapo": by_token,
            "cispo": by_token,
            "dr_grpo": 1 / (rows * length),
            "bnpo": 1 / max(counts[part].sum(), 1) / parts,
        }[objective.name]
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


OBJECTIVES = (
    st.builds(
        objective,
        st.sampled_from([*AGGREGATIONS, "gspo"]),
        st.sampled_from([0.04, 0.5]),
        clip_low=st.sampled_from([0.2, 1.0]),
        clip_high=st.sampled_from([0.2, 0.28]),
        clip_delta=st.sampled_from([None, 1.5]),
        kl_estimator=st.sampled_from(["k1", "k2", "k3"]),
        entropy_coefficient=st.sampled_from([0.0, 0.01]),
        top_entropy=st.sampled_from([1.0, 0.3]),
    )
    | st.builds(
        objective,
        st.just("cispo"),
        st.just(0.04),
        kl_estimator=st.sampled_from(["k1", "k3"]),
        kl_unbiased=st.booleans(),
    )
    | st.builds(objective, st.just("cispo"), st.sampled_from([0.0, 0.04]), clip_low=st.sampled_from([0.2, 1.0]))
)


@settings(deadline=None, max_examples=60)
@given(
    mask=hnp.arrays(bool, (6, 5)), seed=st.integers(0, 2**16), objective=OBJECTIVES, parts=st.sampled_from([1, 2, 3])
)
def test_loss_and_gradient_follow_the_definition(mask, seed, objective, parts):
    """Also in micro-batches: only bnpo depends on how a batch is split."""
    random = np.random.default_rng(seed)
    log_probs, old, reference = -random.exponential(1.0, (3, 6, 5))
    advantages = random.normal(size=6) * random.integers(0, 2, 6)
    inputs = (log_probs, old, reference, random.exponential(1.0, (6, 5)), advantages)
    expected_loss, expected_gradient = plain_loss(*inputs, mask, objective, parts)
    with jax.enable_x64(True):
        loss, gradient = jax.value_and_grad(total_loss)(*map(jnp.asarray, inputs), jnp.asarray(mask), objective, parts)
    assert abs(float(loss) - expected_loss) < 1e-10
    np.testing.assert_allclose(np.asarray(gradient), expected_gradient, atol=1e-10)


@pytest.mark.parametrize("name", [*AGGREGATIONS, "gspo", "cispo"])
def test_a_wholly_masked_batch_has_zero_loss_and_gradient(name):
    ones = jnp.ones((4, 3))
    loss, gradient = jax.value_and_grad(total_loss)(
        *(-ones, -2 * ones, -3 * ones, ones, jnp.ones(4), jnp.zeros((4, 3), bool)),
        objective(name, 0.04, top_entropy=0.5),
    )
    assert float(loss) == 0
    assert (np.asarray(gradient) == 0).all()


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
@pytest.mark.parametrize("parts", [2, 3, 6])
def test_parts_of_a_batch_add_up(aggregation, parts):
    """Only bnpo depends on how a batch is split, by its definition."""
    mask = jnp.asarray(np.random.default_rng(0).random((6, 5)) < 0.6)
    assert (token_weights(mask, aggregation, parts) == token_weights(mask, aggregation)).all()


def test_clips_are_marked_where_they_cut():
    """Below 0.8 with a negative advantage, above 1.28 with a positive one; elsewhere the ratio counts as it is."""
    ratios = jnp.asarray([[0.5, 1.0, 2.0]] * 3)
    section = objective(clip_high=0.28)
    advantages, mask = jnp.asarray([1.0, -1.0, 0.0]), jnp.ones((3, 3), bool)
    tokens = PolicyTokens(jnp.log(ratios), 0 * ratios, 0 * ratios, 0 * ratios, advantages, mask)
    terms = policy_loss(tokens, section)
    np.testing.assert_allclose(terms.loss, [[-0.5, -1, -1.28], [0.8, 1, 2], [0, 0, 0]], atol=1e-6)
    assert terms.clipped_low.tolist() == [[False] * 3, [True, False, False], [False] * 3]
    assert terms.clipped_high.tolist() == [[False, False, True], [False] * 3, [False] * 3]
    assert not terms.clipped_delta.any()
    np.testing.assert_allclose(terms.kl, 1 / ratios + jnp.log(ratios) - 1, atol=1e-6)
    two_sided = policy_loss(tokens, objective(clip_high=0.28, clip_delta=1.5))
    np.testing.assert_allclose(two_sided.loss, [[-0.5, -1, -1.28], [0.8, 1, 1.5], [0, 0, 0]], atol=1e-6)
    assert two_sided.clipped_delta.tolist() == [[False] * 3, [False, False, True], [False] * 3]
    weights = policy_loss(tokens, objective("cispo"))
    assert weights.clipped_low.tolist() == [[True, False, False]] * 3, "cispo cuts weights whatever the advantage"
    assert weights.clipped_high.tolist() == [[False, False, True]] * 3
    sequence = policy_loss(tokens, objective("gspo"))
    np.testing.assert_allclose(sequence.loss, [[-1] * 3, [1] * 3, [0] * 3], atol=1e-6)
    assert not (sequence.clipped_low | sequence.clipped_high).any(), "the ratios of a sequence have the mean 1"


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_responses_that_do_not_count_leave_the_others_as_they_were(scale):
    """What they hold changes nothing; a group with one response that counts teaches nothing."""
    random = np.random.default_rng(0)
    rewards = random.normal(size=(4, 5)).astype(np.float32)
    counted = np.ones((4, 5), bool)
    counted[1, 2:4] = counted[2, 1:] = counted[3] = False
    ours = np.asarray(group_advantages(jnp.asarray(rewards), scale, jnp.asarray(counted)))
    other = group_advantages(jnp.asarray(np.where(counted, rewards, 99)), scale, jnp.asarray(counted))
    assert (ours == other).all()
    whole = rewards[counted].std(ddof=1)
    for row, keep in enumerate(counted):
        group = rewards[row, keep]
        expected = np.zeros(5)
        if len(group) > 1:
            std = {"group": group.std(ddof=1), "batch": whole, "none": 1 - 1e-4}[scale]
            expected[keep] = (group - group.mean()) / (std + 1e-4)
        np.testing.assert_allclose(ours[row], expected, atol=1e-5)
    assert zero_std_groups(jnp.asarray(rewards), jnp.asarray(counted)).tolist() == [False, False, True, True]


def test_kl_gradients_on_policy():
    """Expected over a distribution's own samples: k2, and k1 and k3 times the ratio, give the KL's gradient; k1 alone
    gives none."""
    with jax.enable_x64(True):
        logits = jnp.asarray([0.3, -1.0, 0.7, 0.1])
        reference = jax.nn.log_softmax(jnp.asarray([-0.2, 0.5, 0.4, -1.0]))

        def kl(logits):
            log_probs = jax.nn.log_softmax(logits)
            return jnp.sum(jnp.exp(log_probs) * (log_probs - reference))

        def surrogate(logits, estimator, unbiased):
            log_probs = jax.nn.log_softmax(logits)
            fixed = jax.lax.stop_gradient(log_probs)
            value = kl_terms(log_probs, reference)[estimator]
            return jnp.sum(jnp.exp(fixed) * value * (jnp.exp(log_probs - fixed) if unbiased else 1.0))

        expected = jax.grad(kl)(logits)
        for estimator in ("k1", "k3"):
            np.testing.assert_allclose(jax.grad(surrogate)(logits, estimator, True), expected, atol=1e-12)
        np.testing.assert_allclose(jax.grad(surrogate)(logits, "k2", False), expected, atol=1e-12)
        np.testing.assert_allclose(jax.grad(surrogate)(logits, "k1", False), 0, atol=1e-12)


def test_sampler_corrections_are_truncated():
    trainer = jnp.log(jnp.asarray([[0.5, 0.1, 1.0, 1e-30]]))
    sampler = jnp.log(jnp.asarray([[0.25, 0.2, 1e-30, 1.0]]))
    np.testing.assert_allclose(sampler_correction(trainer, sampler, 3.0), [[2.0, 0.5, 3.0, 0.0]], rtol=1e-5, atol=1e-9)


def test_rewards_that_are_absent():
    """Absent for a group: its totals go without it. Absent for some of a group: they do not count. All absent: none."""
    none = np.nan
    values = {
        "rule": np.asarray([[1.0, 0.0, 1.0]] * 3 + [[none] * 3]),
        "judge": np.asarray([[0.5, 1.0, 0.0], [none] * 3, [0.5, none, 0.0], [none] * 3]),
    }
    total, counted = total_rewards(values, {"rule": 1.0, "judge": 2.0})
    assert counted.tolist() == [[True] * 3, [True] * 3, [True, False, True], [False] * 3]
    expected = [[2.0, 2.0, 1.0], [1.0, 0.0, 1.0], [2.0, 0.0, 1.0], [0.0] * 3]
    np.testing.assert_allclose(np.where(counted, total, 0), expected)
