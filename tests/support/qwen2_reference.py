"""Random models of transformers, Qwen2 and other families, and the port run on the same folders and tokens."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from support.optional_torch import torch

from psyche_jax.model.config import ModelConfig, read_hf_config
from psyche_jax.model.decode import Rollout, generate
from psyche_jax.model.huggingface import read_parameters
from psyche_jax.model.linear import Parameters
from psyche_jax.model.log_probs import TokenScores, token_scores
from psyche_jax.model.qwen2 import Execution, bind
from psyche_jax.model.sampling import Sampling
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, make_mesh

transformers.utils.logging.disable_progress_bar()
# Nearly all the time of these tests is compilation; this takes more than a third off it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Shape(NamedTuple):
    """What differs between the random models; `str()` of one is its test id."""

    tied: bool
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    inner: int
    layers: int
    vocabulary: int
    family: str = "qwen2"
    rope: str = "default"  # a name in ROPES
    bias: bool = False  # attention_bias

    def __str__(self) -> str:
        head = "tied" if self.tied else "untied"
        attention = f"{self.heads}:{self.kv_heads}of{self.head_dim}{'-bias' if self.bias else ''}"
        family = "" if self.family == "qwen2" else f"{self.family}-"
        rope = "" if self.rope == "default" else f"-{self.rope}"
        return f"{family}{self.layers}x{self.width}-{attention}-{self.inner}-{self.vocabulary}{head}{rope}"


PLACES = 16  # the length at which models with scaled RoPE would have been trained first
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": PLACES},
    "yarn-told": {
        **{"factor": 4.0, "original_max_position_embeddings": PLACES, "attention_factor": 0.8},
        **{"beta_fast": 3.0, "beta_slow": 0.3, "truncate": False},
    },
    "llama3": {
        **{"factor": 4.0, "original_max_position_embeddings": PLACES},
        **{"low_freq_factor": 0.5, "high_freq_factor": 2.0},
    },
}


# 1 to 8 key-value heads, 1 to 8 query heads for each, odd sizes wherever the architecture allows them.
SHAPES = [
    Shape(True, 1, 1, 8, 24, 40, 1, 61),
    Shape(False, 4, 2, 16, 64, 96, 3, 131),
    Shape(True, 8, 8, 4, 36, 52, 2, 97),
    Shape(False, 6, 3, 10, 50, 77, 2, 203),
    Shape(False, 8, 1, 6, 48, 33, 4, 59),
    Shape(True, 14, 7, 8, 112, 60, 2, 89),
    Shape(False, 16, 8, 2, 33, 17, 2, 71),
    Shape(True, 9, 3, 14, 37, 41, 5, 101),
    Shape(False, 5, 5, 2, 7, 3, 1, 3),
]
# One that is not the simplest in any way, for tests that need no more than one.
SMALL = Shape(False, 6, 3, 8, 40, 56, 3, 101)


def reference(
    shape: Shape, folder: Path, seed: int = 0, dtype: str = "float32", **saving: Any
) -> transformers.PreTrainedModel:
    """A random model of transformers, saved to `folder`; biases and norms are random as well."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(
        shape.family,
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        initializer_range=0.2,
        # Far from the defaults of both sides, so that one which is not read shows.
        rope_parameters={"rope_type": shape.rope.split("-")[0], "rope_theta": 20_000.0, **ROPES[shape.rope]},
        **({"attention_bias": True} if shape.bias else {}),
        rms_norm_eps=1e-3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder, **saving)
    return model


def reference_logits(model: transformers.PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits of unpadded `tokens` by transformers."""
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens, np.int64))).logits.float().numpy()


def one_device(compute_dtype: str = "float32") -> Execution:
    """The first device alone."""
    sharding = Sharding(make_mesh(devices=jax.devices()[:1]), TRAIN_RULES)
    return Execution(sharding, jnp.dtype(compute_dtype))


class Port(NamedTuple):
    """The port's side: what `read` gives and every jitted function below takes."""

    config: ModelConfig
    parameters: Parameters
    execution: Execution


def read(folder: Path, execution: Execution | None = None) -> Port:
    """Read a model folder in float32."""
    execution = execution or one_device()
    config = read_hf_config(folder)
    return Port(config, read_parameters(folder, config, execution.sharding, jnp.float32), execution)


class Batch(NamedTuple):
    """Rows of tokens; `segments` 0 is padding."""

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray


def apart(tokens: np.ndarray) -> Batch:
    """Rows without any padding."""
    tokens = np.asarray(tokens, np.int32)
    return Batch(tokens, np.ones_like(tokens), np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape))


def padded(rows: list[np.ndarray], length: int, side: str, fill: np.ndarray) -> Batch:
    """Rows of unequal length padded to `length` on the left, on the right, or on both sides with ids of `fill`."""
    tokens = fill.reshape(len(rows), length).astype(np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, values in enumerate(rows):
        spare = length - len(values)
        start = {"left": spare, "right": 0, "both": spare // 2}[side]
        window = slice(start, start + len(values))
        tokens[row, window], segments[row, window] = values, 1
        positions[row, window] = np.arange(len(values))
    return Batch(tokens, segments, positions)


def packed(rows: list[np.ndarray], length: int) -> Batch:
    """Rows one after another in a single sequence, with padding after them."""
    batch = Batch(*(np.zeros((1, length), np.int32) for _ in range(3)))
    start = 0
    for segment, row in enumerate(rows, start=1):
        window = slice(start, start + len(row))
        batch.tokens[0, window], batch.segments[0, window] = row, segment
        batch.positions[0, window] = np.arange(len(row))
        start += len(row)
    return batch


@functools.partial(jit, static_argnums=(0, 3, 4))
def _run(
    config: ModelConfig, parameters: Parameters, batch: Batch, execution: Execution, temperature: float
) -> tuple[jax.Array, TokenScores]:
    model = bind(config, parameters)
    hidden = model(batch.tokens, batch.segments, batch.positions, execution)
    targets = jnp.roll(batch.tokens, -1, axis=1)
    return model.logits(hidden), token_scores(model, hidden, targets, execution, temperature, chunk_tokens=64)


@functools.partial(jit, static_argnums=(0, 3))
def loss_and_gradient(
    config: ModelConfig, parameters: Parameters, batch: Batch, execution: Execution
) -> tuple[tuple[jax.Array, tuple[TokenScores, jax.Array]], Parameters]:
    """Loss, with log-probabilities and the last logits, and its gradient; the trainer's program in small."""

    def loss(parameters: Parameters) -> tuple[jax.Array, tuple[TokenScores, jax.Array]]:
        model = bind(config, parameters)
        hidden = model(batch.tokens, batch.segments, batch.positions, execution)
        # Chunks of 5 positions: 40 tokens over 8 rows.
        scores = token_scores(model, hidden, jnp.roll(batch.tokens, -1, axis=1), execution, chunk_tokens=40)
        real = batch.segments[:, :-1] > 0
        return -jnp.where(real, scores.log_probs[:, :-1], 0).sum() / real.sum(), (scores, model.logits(hidden[:, -1]))

    return jax.value_and_grad(loss, has_aux=True)(parameters)


@functools.partial(jit, static_argnums=(0, 3, 4))
def sample(
    config: ModelConfig, parameters: Parameters, batch: Batch, execution: Execution, sampling: Sampling
) -> Rollout:
    """Responses to the rows of `batch`, by one key."""
    return generate(config, parameters, batch.tokens, batch.segments > 0, jax.random.key(3), sampling, execution)


def logits(port: Port, batch: Batch) -> np.ndarray:
    """All logits of the port."""
    return np.asarray(_run(*port[:2], batch, port.execution, 1.0)[0])


def scores(port: Port, batch: Batch, temperature: float = 1.0) -> np.ndarray:
    """Log-probability of the token after each position, as the trainer computes it; the last column means nothing."""
    return np.array(_run(*port[:2], batch, port.execution, temperature)[1].log_probs)


def worst(one: np.ndarray, other: np.ndarray) -> float:
    """The largest absolute difference; NaN anywhere gives NaN, which is under no limit."""
    assert np.shape(one) == np.shape(other)
    return float(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).max())
