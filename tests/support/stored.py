"""Models as they are stored, adapters and int8 with them, run as training and serving do."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from support.qwen2_reference import jit
from support.training_fixtures import execution

from psyche_jax.model.config import ModelConfig
from psyche_jax.model.linear import Parameters
from psyche_jax.model.qwen2 import Execution, bind
from psyche_jax.model.sharding import DECODE_RULES
from psyche_jax.serve.engine import Batch, Engine, RowSettings
from psyche_jax.train.stored_models import open_model

FLOAT32 = jnp.dtype("float32")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 300, (3, 17)), jnp.int32)


@functools.partial(jit, static_argnums=0)
def logits_of(config: ModelConfig, parameters: Parameters, tokens: jax.Array) -> jax.Array:
    """Of whole sequences, [rows, length, vocabulary]."""
    model = bind(config, parameters)
    ones = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return model.logits(model(tokens, ones, positions, execution(1)))


def parameters_at(path: Path) -> tuple[ModelConfig, Parameters]:
    """What is computed with, adapters apart from their base."""
    stored = open_model(str(path))
    return stored.config, stored.read_parameters(execution(1).sharding, FLOAT32)


def served_tokens(path: Path) -> list[Any]:
    """What the engine of `psyche serve` says, greedily, to two prompts."""
    here = Execution(dataclasses.replace(execution(1).sharding, rules=DECODE_RULES), FLOAT32)
    stored = open_model(str(path))
    engine = Engine(stored.config, stored.read_parameters(here.sharding, FLOAT32), here, 8)
    batch = Batch()
    engine.join(batch, [[5, 6, 7], [9, 8]], [RowSettings(8, 0.0, 1.0, 1)] * 2)
    return engine.advance(batch).tokens.tolist()
