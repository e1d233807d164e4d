"""The port against transformers' own Qwen2, in float32, on random models."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from support.qwen2_reference import (
    SHAPES,
    SMALL,
    apart,
    jit,
    logits,
    one_device,
    read,
    reference,
    reference_logits,
    torch,
    worst,
)

from psyche_jax.model.config import ModelConfig, read_hf_config
from psyche_jax.model.huggingface import tensor_names
from psyche_jax.model.log_probs import token_scores
from psyche_jax.model.qwen2 import bind
from psyche_jax.model.rotary import _rotate_halves, _rotate_whole, rotary_tables


def draw(vocabulary: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocabulary, shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits(shape, tmp_path, figure):
    model = reference(shape, tmp_path)
    tokens = draw(shape.vocabulary, 3, 37)
    expected = reference_logits(model, tokens)
    assert np.abs(expected).max() > 0.5
    figure("logits, random models", worst(logits(read(tmp_path), apart(tokens)), expected), 1e-4)


def test_logits_at_distant_positions(tmp_path, figure):
    model = reference(SMALL, tmp_path)
    batch = apart(draw(SMALL.vocabulary, 2, 19))
    batch = batch._replace(positions=batch.positions * 57 + 1000)
    with torch.no_grad():
        tokens, positions = (torch.tensor(x, dtype=torch.long) for x in (batch.tokens, batch.positions))
        expected = model(tokens, position_ids=positions).logits.numpy()
    # A float32 angle of 2,000 is only good to 1e-4.
    figure("logits, positions 1000 to 2026", worst(logits(read(tmp_path), batch), expected), 1e-3)


def test_logits_of_long_sequences(tmp_path, figure):
    """From 512 positions on, attention goes by blocks of queries."""
    model = reference(SMALL, tmp_path)
    tokens = draw(SMALL.vocabulary, 2, 530)
    difference = worst(logits(read(tmp_path), apart(tokens)), reference_logits(model, tokens))
    figure("logits, random models", difference, 1e-4)


def test_logits_from_sharded_weights(tmp_path, figure):
    model = reference(SMALL, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    tokens = draw(SMALL.vocabulary, 2, 11)
    difference = worst(logits(read(tmp_path), apart(tokens)), reference_logits(model, tokens))
    figure("logits, random models", difference, 1e-4)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "top-level"])
def test_rope_base_is_found_in_either_place(nested, tmp_path, figure):
    model = reference(SMALL, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_parameters"].pop("rope_theta") == 20_000
    if nested:
        config["rope_parameters"] = {"rope_theta": 20_000.0}
    else:
        config["rope_theta"] = 20_000.0
        config["rope_scaling"] = config.pop("rope_parameters") and None
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_hf_config(tmp_path).rope_theta == 20_000
    tokens = draw(SMALL.vocabulary, 2, 11)
    difference = worst(logits(read(tmp_path), apart(tokens)), reference_logits(model, tokens))
    figure("logits, random models", difference, 1e-4)


@pytest.mark.parametrize("base", [1e4, 1e6])
def test_rotary_tables(base, figure):
    config = ModelConfig(8, 256, 8, 1, 2, 2, head_dim=128, rope_theta=base)
    positions = np.concatenate([np.arange(300), np.arange(32_000, 32_768)])[None]
    tables = rotary_tables(jnp.asarray(positions), config, jnp.float32)
    angles = positions[0, :, None] * base ** (-np.arange(0, 128, 2) / 128)
    for table, exact in zip(tables, (np.cos(angles), np.sin(angles)), strict=True):
        error = np.abs(np.asarray(table)[0, :, 0] - exact)
        figure("rotary table, positions below 300, to float64", error[:300].max(), 1e-4)
        figure("rotary table, positions below 32768, to float64", error.max(), 5e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotation_as_a_tpu_computes_it(dtype):
    """By a product with a permutation: the same products and sums, and so in the gradient."""
    x, gradient = jax.random.normal(jax.random.key(0), (2, 2, 7, 3, 64)).astype(dtype)
    tables = rotary_tables(jnp.arange(14).reshape(2, 7), ModelConfig(8, 64, 8, 1, 1, 1, head_dim=64), dtype)

    @partial(jax.jit, static_argnums=0)
    def both_ways(rotated, x, gradient):
        turned, back = jax.vjp(lambda x: rotated(x, *tables), x)
        return turned, *back(gradient)

    rounding = 2.0 ** (-22 if dtype == jnp.float32 else -7)  # one compiler may fuse a product with a sum
    for whole, halves in zip(
        both_ways(_rotate_whole, x, gradient), both_ways(_rotate_halves, x, gradient), strict=True
    ):
        assert whole.dtype == dtype
        np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (whole, halves)), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gradients(tied, tmp_path, figure):
    model = reference(SMALL._replace(tied=tied), tmp_path)
    port = read(tmp_path)
    batch = apart(draw(SMALL.vocabulary, 2, 13))

    def loss(parameters):
        bound = bind(port.config, parameters)
        hidden = bound(batch.tokens, batch.segments, batch.positions, port.execution)
        targets = jnp.roll(jnp.asarray(batch.tokens), -1, axis=1)
        return -token_scores(bound, hidden, targets, port.execution, chunk_tokens=10).log_probs[:, :-1].mean()

    value, gradients = jit(jax.value_and_grad(loss))(port.parameters)
    tokens = torch.tensor(batch.tokens, dtype=torch.long)
    model.model.embed_tokens.padding_idx = None  # torch gives the embedding of that id no gradient
    expected = model(tokens, labels=tokens).loss
    expected.backward()
    figure("loss, random models", abs(float(value) - expected.item()), 1e-5)
    named = dict(model.named_parameters())
    seen = 0
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        path = "/".join(entry.key for entry in path)
        for layer, name in enumerate(tensor_names(path, SMALL.layers)):
            ours = np.asarray(gradient[layer] if path.startswith("layers/") else gradient)
            theirs = named[name].grad.numpy()
            figure("gradient, relative to its largest", worst(ours, theirs) / np.abs(theirs).max(), 1e-4)
            seen += 1
    assert seen == len(named)


def test_bfloat16_activations(tmp_path, figure):
    model = reference(SMALL, tmp_path)
    port = read(tmp_path, one_device("bfloat16"))
    tokens = draw(SMALL.vocabulary, 2, 17)
    exact = reference_logits(model, tokens)
    rounded = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    theirs = worst(reference_logits(rounded, tokens), exact)
    ours = worst(logits(port, apart(tokens)), exact)
    assert ours > 0
    figure("bfloat16 rounding of logits, to that of transformers", ours / theirs, 2.0)
