"""Responses read after their prompt, each with it or all of a group with one: the same scores and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.qwen2_reference import jit
from support.tiny import save_model

from psyche_jax.model.config import read_hf_config
from psyche_jax.model.huggingface import read_parameters
from psyche_jax.model.log_probs import response_hidden, token_scores
from psyche_jax.model.qwen2 import Execution, bind
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, make_mesh

PROMPTS, GROUP, PROMPT_LENGTH, LENGTH = 4, 3, 10, 6


def group_of(vocabulary: int, side: str) -> tuple[np.ndarray, ...]:
    """Prompts of several lengths, one of them of a single token; responses that end at several places."""
    random = np.random.default_rng(2)
    tokens = random.integers(0, vocabulary, (PROMPTS, PROMPT_LENGTH)).astype(np.int32)
    ahead = np.asarray([0, 3, 9, 5])[:, None]
    mask = np.arange(PROMPT_LENGTH) >= ahead
    mask = mask if side == "left" else mask[:, ::-1]
    responses = random.integers(0, vocabulary, (PROMPTS * GROUP, LENGTH)).astype(np.int32)
    ends = random.integers(1, LENGTH + 1, (PROMPTS * GROUP, 1))
    return tokens, mask, responses, np.arange(LENGTH) < ends


@pytest.mark.parametrize(
    ("side", "remat", "mesh"), [("left", "none", (1, 1, 1)), ("right", "full", (1, 1, 1)), ("left", "dots", (2, 2, 2))]
)
def test_sharing_the_prompt_changes_nothing(side, remat, mesh, tmp_path, figure):
    folder = save_model(tmp_path / "model")
    config = read_hf_config(folder)
    tokens, mask, responses, response_mask = group_of(config.vocab_size, side)
    weights = np.random.default_rng(3).normal(size=responses.shape).astype(np.float32) * response_mask
    sharding = Sharding(make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))]), TRAIN_RULES)
    execution = Execution(sharding, jnp.dtype("float32"), remat)
    parameters = read_parameters(folder, config, sharding, jnp.dtype("float32"))

    def loss(parameters, share_prompt):
        model = bind(config, parameters)
        hidden = response_hidden(model, tokens, mask, responses, response_mask, execution, share_prompt)
        scores = token_scores(model, hidden, jnp.asarray(responses), execution)
        return jnp.sum(scores.log_probs * weights), scores.log_probs

    gradient = jit(jax.grad(loss, has_aux=True), static_argnums=1)
    ours, log_probs = jax.device_get(gradient(parameters, True))
    expected, expected_log_probs = jax.device_get(gradient(parameters, False))
    difference = np.abs(log_probs - expected_log_probs)[response_mask].max()
    figure("shared prompt, |Δ log-prob|", difference, 5e-5)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        figure("shared prompt, gradient relative to its largest", np.abs(one - other).max() / np.abs(other).max(), 1e-5)
