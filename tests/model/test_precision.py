"""What a config says of numbers is what programs compute: float32 products everywhere, bfloat16 with one sum."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psyche_jax.errors import UsageError
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.decode import generate
from psyche_jax.model.kernels import self_attention
from psyche_jax.model.log_probs import response_hidden, token_scores
from psyche_jax.model.qwen2 import Execution, bind, build, initialize
from psyche_jax.model.sampling import Sampling
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, make_mesh

PROMPTS, GENERATIONS, LENGTH, NEW = 2, 2, 8, 24


def one_device() -> Sharding:
    return Sharding(make_mesh(devices=jax.devices()[:1]), TRAIN_RULES)


def model(layers: int, width: int) -> ModelConfig:
    return ModelConfig(512, width, 3 * width, layers, 4, 2, width // 4, tie_word_embeddings=True, stop_token_ids=(1,))


def sample(config, execution, parameters):
    tokens = jax.random.randint(jax.random.key(1), (PROMPTS, LENGTH), 2, config.vocab_size)
    mask = jnp.ones_like(tokens, bool)
    sampling = Sampling(NEW, 1.0, GENERATIONS)
    return generate(config, parameters, tokens, mask, jax.random.key(2), sampling, execution), (tokens, mask)


def trained_log_probs(config, execution, parameters, rollout, prompts):
    policy = bind(config, parameters)
    hidden = response_hidden(policy, *prompts, rollout.tokens, rollout.mask, execution, share_prompt=True)
    return token_scores(policy, hidden, rollout.tokens, execution).log_probs


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_float32_is_multiplied_as_float32(platform):
    """Read from the programs of rollout, log-probs and gradient, as they are lowered for that backend."""
    config, execution = model(2, 32), Execution(one_device(), jnp.dtype("float32"), "full")

    def program(parameters):
        rollout, prompts = sample(config, execution, parameters)

        def loss(parameters):
            return trained_log_probs(config, execution, parameters, rollout, prompts).sum()

        return jax.grad(loss)(parameters)

    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), build(config)[1].to_pure_dict())
    text = jax.jit(program).trace(abstract).lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > 40
    for line in products:
        assert re.search(r"precision = \[HIGHEST, HIGHEST\]", line), line


def test_kernels_in_one_bfloat16_pass_are_refused_in_float32():
    query = jnp.ones((1, 128, 2, 128))
    with pytest.raises(UsageError, match=r"bfloat16 pass; use auto"):
        self_attention(query, query, query, jnp.ones((1, 128), jnp.int32), "splash", one_device())


def test_in_bfloat16_sampler_and_trainer_agree(figure):
    """Layers add to a float32 sum and SwiGLU rounds once: else each program rounds at other places (1.6e-3 here)."""
    config, execution = model(24, 64), Execution(one_device(), jnp.dtype("bfloat16"), "full")
    parameters = initialize(config, jax.random.key(0), execution.sharding, jnp.float32)
    parameters = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, parameters)
    rollout, prompts = jax.jit(lambda parameters: sample(config, execution, parameters))(parameters)
    trained = jax.jit(lambda *arguments: trained_log_probs(config, execution, *arguments))(parameters, rollout, prompts)
    difference = np.abs(trained - rollout.log_probs)[np.asarray(rollout.mask)]
    figure("sampler to trainer, bfloat16, 24 random layers, mean |Δ log-prob|", difference.mean(), 1e-3)
