"""Gradients in micro-batches equal those of the whole batch: tied and untied heads, both dtypes, also under `-O`."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psyche_jax.model.config import ModelConfig
from psyche_jax.model.qwen2 import Execution, initialize
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, make_mesh
from psyche_jax.train.sft import next_token_loss
from psyche_jax.train.state import accumulate_gradients

ROWS, LENGTH, VOCABULARY = 8, 12, 96
LIMITS = {"float32": 1e-5, "bfloat16": 0.03}  # bfloat16 has 8 bits, and a sum of four is rounded four times


def largest_errors(tied: bool, dtype: str, compute_dtype: str, mesh: tuple[int, int, int]) -> dict[str, float]:
    """Of each parameter's gradient in 4 micro-batches, against the whole batch; relative to its largest number."""
    config = ModelConfig(VOCABULARY, 32, 48, 2, 4, 2, 8, tie_word_embeddings=tied)
    sharding = Sharding(make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))]), TRAIN_RULES)
    execution = Execution(sharding, jnp.dtype(compute_dtype), "none")
    parameters = initialize(config, jax.random.key(0), sharding, jnp.dtype(dtype))
    parameters = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, parameters)  # else the softmax is nearly even
    random = np.random.default_rng(1)
    batch = {
        "tokens": random.integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32),
        "segments": np.ones((ROWS, LENGTH), np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)),
        "weights": random.uniform(size=(ROWS, LENGTH)).astype(np.float32) / ROWS,
    }
    batch = jax.device_put(batch, sharding.named("batch"))
    loss = functools.partial(next_token_loss, config, execution)
    places = jax.tree.map(lambda x: x.sharding, parameters)

    @functools.partial(jax.jit, static_argnums=2)
    def gradients(parameters, batch, micro_batches):
        value, _, gradients = accumulate_gradients(loss, parameters, batch, micro_batches, sharding, places)
        return {"loss": value, **gradients}

    whole, parts = (jax.device_get(gradients(parameters, batch, count)) for count in (1, 4))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(whole)]
    pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True)
    # A key's bias changes nothing: its gradient is what rounding leaves, and is compared with what a bias can have.
    return {
        path: float(np.abs(np.subtract(a, b, dtype=np.float32)).max() / max(np.abs(a.astype(np.float32)).max(), 1e-2))
        for path, (a, b) in zip(paths, pairs, strict=True)
    }


@pytest.mark.parametrize(
    ("mesh", "tied", "compute_dtype"),
    [  # of the three, every pair
        ((1, 1, 1), True, "float32"),
        ((1, 1, 1), False, "bfloat16"),
        ((1, 2, 2), True, "bfloat16"),
        ((1, 2, 2), False, "float32"),
    ],
    ids=str,
)
def test_micro_batches_change_no_gradient(mesh, tied, compute_dtype, figure):
    errors = largest_errors(tied, "float32", compute_dtype, mesh)
    assert len(errors) == 16 - tied
    figure(f"gradients in micro-batches, {compute_dtype}", max(errors.values()), LIMITS[compute_dtype])


def test_nothing_rests_on_assertions():
    """Under `python -O` JAX itself checks less, and a gradient that is mixed up would be silent."""
    program = "import test_gradients as t; print(max(t.largest_errors(True, *['float32'] * 2, (1, 1, 1)).values()))"
    result = subprocess.run(
        [sys.executable, "-O", "-c", f"import sys; sys.path.append('..'); {program}"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(result.stdout) <= LIMITS["float32"]
