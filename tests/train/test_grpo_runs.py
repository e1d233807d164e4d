"""What `train_grpo` gives each step: a key, prompts and the reference. The steps themselves are left out."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from training_fixtures import execution, grpo_config, largest_difference, state_of

from psyche_jax.errors import UserError
from psyche_jax.model.huggingface import read_parameters
from psyche_jax.train import grpo

NUMBERS = ("loss", "grad_norm", "num_tokens", "reward", "kl", "completions/mean_length")
NAMES = ("tokens", "mask", "answers")
STEPS = 8


@pytest.fixture
def train(root, tiny_config, monkeypatch):
    """`train(run, seed, fail_at)` runs 8 steps that only note what they get: key, prompts with answers."""
    start = read_parameters(root / "model", tiny_config, execution(8).sharding, jnp.dtype("float32"))

    def train(run, seed=3, fail_at=None):
        seen = []

        def step(state, reference, rules, prompts, key):
            if len(seen) + 1 == fail_at:
                raise UserError("no more")
            assert largest_difference(reference, start) == 0, "the reference is the model that training starts from"
            rows = jax.device_get(prompts)
            texts = {(row[mask].tobytes(), int(a)) for row, mask, a in zip(*(rows[n] for n in NAMES), strict=True)}
            seen.append((jax.random.key_data(key).tobytes(), frozenset(texts)))
            moved = jax.tree.map(lambda x: x + 1, state.parameters)
            return dataclasses.replace(state, parameters=moved), {"metrics": dict.fromkeys(NUMBERS, 1.0), "samples": {}}

        monkeypatch.setattr(grpo.Iteration, "program", lambda _: step)
        monkeypatch.setattr(grpo, "decoded_samples", lambda *_: [])
        config = grpo_config(root, run, epochs=4.0)
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=seed))
        try:
            grpo.train_grpo(config)
        except UserError:
            assert state_of(root / run)["status"] == "failed"
        return seen

    return train


def test_keys_and_prompts_of_the_steps(train):
    """A new key each step; each epoch holds every prompt once; another seed gives other keys and another order."""
    seen, other = train("run"), train("other", seed=4)
    assert len(seen) == len(other) == STEPS
    assert len({key for key, _ in seen + other}) == 2 * STEPS
    for epoch in range(0, STEPS, 2):
        assert len(seen[epoch][1] | seen[epoch + 1][1]) == 16
    assert len({prompts for _, prompts in seen + other}) > STEPS, "the order changes with epoch and seed"


def test_a_run_that_failed_goes_on_with_the_same_steps(train):
    """Saved every second step, failed in the fifth: step 5 is the first of the second start."""
    whole = train("whole")
    first, second = train("run", fail_at=6), train("run")
    assert first == whole[:5]
    assert second == whole[4:]
