"""The port against transformers' own Qwen2, in float32."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psyche_jax.model.config import ModelConfig, read_hf_config
from psyche_jax.model.huggingface import read_parameters
from psyche_jax.model.qwen2 import Execution, bind
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, make_mesh

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# (tied, query heads, kv heads, head_dim, width, inner width, layers, vocabulary)
SHAPES = [
    (True, 1, 1, 8, 24, 40, 1, 61),
    (False, 4, 2, 16, 64, 96, 3, 131),
    (True, 8, 8, 4, 36, 52, 2, 97),
    (False, 6, 3, 10, 50, 77, 2, 203),
    (False, 8, 1, 6, 48, 33, 4, 59),
    (True, 14, 7, 8, 112, 60, 2, 89),
]


def execution() -> Execution:
    sharding = Sharding(make_mesh(devices=jax.devices()[:1]), TRAIN_RULES)
    return Execution(sharding, jnp.dtype("float32"))


def reference(shape: tuple, folder: Path, seed: int = 0):
    tied, heads, kv_heads, head_dim, width, inner, layers, vocabulary = shape
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0 * (seed + 1)},
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def load(folder: Path) -> tuple[ModelConfig, dict, Execution]:
    run = execution()
    config = read_hf_config(folder)
    return config, read_parameters(folder, config, run.sharding, jnp.float32), run


def forward(config, parameters, run, tokens, segments=None):
    tokens = jnp.asarray(tokens)
    segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments)
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)

    @jax.jit
    def program(parameters, tokens, segments, positions):
        model = bind(config, parameters)
        return model.logits(model(tokens, segments, positions, run))

    return np.asarray(program(parameters, tokens, segments, positions))


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape, tmp_path, record_property):
    model = reference(shape, tmp_path)
    config, parameters, run = load(tmp_path)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (3, 37))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    difference = np.abs(forward(config, parameters, run, tokens) - expected).max()
    print(f"{shape}: max |difference of logits| {difference:.2e}")
    assert np.abs(expected).max() > 0.5
    assert difference <= 1e-4
