"""Qwen3, Llama and scaled RoPE against transformers: what `test_parity` and its neighbours show of Qwen2."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from support.qwen2_reference import (
    PLACES,
    Batch,
    Shape,
    apart,
    jit,
    logits,
    loss_and_gradient,
    packed,
    padded,
    read,
    reference,
    reference_logits,
    sample,
    scores,
    torch,
    worst,
)

from psyche_jax.model.config import ModelConfig, RopeScaling, read_hf_config
from psyche_jax.model.flops import layer_weights
from psyche_jax.model.huggingface import expected_shapes, tensor_names, write_weights
from psyche_jax.model.log_probs import token_scores
from psyche_jax.model.qwen2 import Execution, bind
from psyche_jax.model.rotary import rotary_tables
from psyche_jax.model.sampling import Sampling
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, make_mesh

# Heads whose sizes have nothing to do with the width, with and without biases, tied or not; every kind of RoPE.
SHAPES = [
    Shape(True, 4, 2, 16, 24, 40, 2, 61, "qwen3"),
    Shape(False, 8, 4, 6, 32, 56, 3, 101, "qwen3", "yarn", bias=True),
    Shape(True, 6, 3, 16, 40, 56, 2, 89, "qwen2", "yarn-told"),
    Shape(False, 4, 4, 12, 36, 33, 2, 71, "llama", bias=True),
    Shape(True, 6, 2, 16, 48, 60, 2, 97, "llama", "llama3"),
]
LENGTHS = (5, 1, 17, 12)


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def models(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return request.param, reference(request.param, folder, seed=1), read(folder), folder


def rows_of(shape, lengths=LENGTHS):
    random = np.random.default_rng(1)
    return [random.integers(0, shape.vocabulary, length) for length in lengths]


def test_logits(models, figure):
    """Also at four times the length that RoPE was stretched from."""
    shape, model, port, _ = models
    tokens = np.random.default_rng(0).integers(0, shape.vocabulary, (3, 4 * PLACES))
    expected = reference_logits(model, tokens)
    assert np.abs(expected).max() > 0.5
    figure("logits, random models of other families", worst(logits(port, apart(tokens)), expected), 1e-4)


def test_gradients(models, figure):
    shape, model, port, _ = models
    batch = apart(np.random.default_rng(0).integers(0, shape.vocabulary, (2, 21)))

    def loss(parameters):
        bound = bind(port.config, parameters)
        hidden = bound(batch.tokens, batch.segments, batch.positions, port.execution)
        targets = jnp.roll(jnp.asarray(batch.tokens), -1, axis=1)
        return -token_scores(bound, hidden, targets, port.execution, chunk_tokens=10).log_probs[:, :-1].mean()

    gradients = jit(jax.grad(loss))(port.parameters)
    tokens = torch.tensor(batch.tokens, dtype=torch.long)
    model.model.embed_tokens.padding_idx = None  # torch gives the embedding of that id no gradient
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    named, seen = dict(model.named_parameters()), set()
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        path = "/".join(entry.key for entry in path)
        for layer, name in enumerate(tensor_names(path, shape.layers)):
            ours = np.asarray(gradient[layer] if path.startswith("layers/") else gradient)
            theirs = named[name].grad.numpy()
            # What softmax does not see (a bias of all keys, where RoPE turns it little) is near zero on both sides.
            figure("gradient, relative to its largest", worst(ours, theirs) / max(np.abs(theirs).max(), 1e-3), 1e-4)
            seen.add(name)
    assert seen == set(named)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_and_packed_equal_unpadded(side, models, figure):
    shape, _, port, _ = models
    rows = rows_of(shape)
    alone = [scores(port, apart(row[None]))[0] for row in rows]
    batch = padded(rows, 25, side, np.random.default_rng(2).integers(0, shape.vocabulary, (len(rows), 25)))
    sequence = packed(rows, sum(LENGTHS) + 3)
    together, in_one = scores(port, batch), scores(port, sequence)[0]
    for row, own in enumerate(alone):
        if len(own) > 1:
            figure("padded log-probs", worst(together[row][batch.segments[row] > 0][:-1], own[:-1]), 1e-5)
            figure("packed log-probs", worst(in_one[sequence.segments[0] == row + 1][:-1], own[:-1]), 1e-5)


def test_greedy_text_and_sampled_log_probs(models, figure):
    """64 tokens are transformers' own; what is drawn has the log-probs that training gives it."""
    shape, model, port, _ = models
    rows = rows_of(shape, (5, 1, 9, 8))
    batch = padded(rows, 11, "left", np.zeros((len(rows), 11)))
    expected = model.generate(
        torch.tensor(batch.tokens, dtype=torch.long),
        attention_mask=torch.tensor(batch.segments, dtype=torch.long),
        max_new_tokens=64,
        do_sample=False,
        pad_token_id=0,
    )[:, 11:].numpy()
    tokens = sample(*port[:2], batch, port.execution, Sampling(64, temperature=0.0)).tokens
    assert np.unique(expected).size > 8
    assert np.asarray(tokens).tolist() == expected.tolist()

    tokens, mask, log_probs = map(np.asarray, sample(*port[:2], batch, port.execution, Sampling(20)))
    assert mask.all()
    segments = np.concatenate([batch.segments, mask], axis=1).astype(np.int32)
    positions = np.maximum(segments.cumsum(axis=1) - 1, 0).astype(np.int32)
    whole = Batch(np.concatenate([batch.tokens, tokens], axis=1).astype(np.int32), segments, positions)
    figure("sampler to trainer, |Δ log-prob|", worst(scores(port, whole)[:, 10:-1], log_probs), 1e-4)


def test_round_trip_is_bit_for_bit(models, tmp_path):
    shape, model, port, folder = models
    write_weights(tmp_path, port.config, port.parameters)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(again) is type(model)
    ours, theirs = again.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with (
        safe_open(tmp_path / "model.safetensors", "np") as one,
        safe_open(folder / "model.safetensors", "np") as other,
    ):
        assert sorted(one.keys()) == sorted(other.keys())
    assert read_hf_config(tmp_path) == port.config
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == model.config.architectures
    kept = ("model_type", "head_dim", "tie_word_embeddings", "rope_parameters", "attention_bias", "rms_norm_eps")
    for field in kept:
        assert getattr(again.config, field, None) == getattr(model.config, field, None), field
    assert again.config.eos_token_id == model.config.eos_token_id
    tokens = np.arange(60).reshape(2, 30) % shape.vocabulary
    assert (reference_logits(again, tokens) == reference_logits(model, tokens)).all()


def test_numbers_of_parameters(models):
    _, model, port, _ = models
    assert port.config.num_parameters == model.num_parameters()
    matrices = [p for name, p in model.model.layers[0].named_parameters() if "proj.weight" in name]
    assert layer_weights(port.config) == sum(p.numel() for p in matrices)


@pytest.mark.slow
def test_two_parts_of_the_heads(tmp_path, figure):
    """Scores, gradients and greedy text of a Qwen3 on a mesh with a tensor axis of two are those of one device."""
    shape = SHAPES[1]
    reference(shape, tmp_path)
    rows = [np.random.default_rng(n).integers(0, shape.vocabulary, length) for n, length in enumerate((20, 3, 11, 7))]
    batch = padded(rows, 20, "left", np.zeros((4, 20)))
    results, texts = [], []
    for devices, tensor in ((1, 1), (4, 2)):
        sharding = Sharding(make_mesh(tensor=tensor, devices=jax.devices()[:devices]), TRAIN_RULES)
        port = read(tmp_path, Execution(sharding, jnp.dtype("float32")))
        for norm in ("q_norm", "k_norm"):
            assert port.parameters["layers"][norm]["scale"].sharding.is_fully_replicated
        results.append(jax.tree.map(np.asarray, loss_and_gradient(*port[:2], batch, port.execution)))
        texts.append(np.asarray(sample(*port[:2], batch, port.execution, Sampling(12, temperature=0.0)).tokens))
    ((one_loss, _), one_gradients), ((loss, _), gradients) = results
    figure("4 devices to 1: loss", worst(loss, one_loss), 1e-5)
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(one_gradients), strict=True)
    figure("4 devices to 1: gradients", max(worst(one, other) for one, other in pairs), 1e-5)
    assert (texts[0] == texts[1]).all()


@st.composite
def scalings(draw):
    factor, length = draw(st.floats(1, 64)), draw(st.integers(1, 100_000))
    optional = functools.partial(st.one_of, st.none())
    if draw(st.booleans()):
        low = draw(st.floats(0.1, 4))
        high = low + draw(st.floats(0.1, 8))
        return RopeScaling("llama3", factor, length, low_freq_factor=low, high_freq_factor=high)
    return RopeScaling(
        "yarn",
        factor,
        length,
        attention_factor=draw(optional(st.floats(0.1, 2))),
        beta_fast=draw(optional(st.floats(5, 50))),
        beta_slow=draw(optional(st.floats(0.1, 4))),
        truncate=draw(optional(st.booleans())),
    )


@settings(max_examples=50)
@given(scalings(), st.integers(2, 64), st.floats(100, 1e7))
def test_frequencies_are_those_of_transformers(scaling, pairs, base):
    pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = ModelConfig(8, 64, 8, 1, 2, 2, head_dim=2 * pairs, rope_theta=base, rope_scaling=scaling)
    told = {name: value for name, value in dataclasses.asdict(scaling).items() if value is not None}
    theirs = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=2, head_dim=2 * pairs, rope_parameters={"rope_theta": base, **told}
    )
    expected, magnitude = ROPE_INIT_FUNCTIONS[scaling.rope_type](theirs)
    cosine, sine = (np.asarray(x, np.float64)[0, 0, 0] for x in rotary_tables(jnp.ones((1, 1)), config, jnp.float32))
    np.testing.assert_allclose(cosine, magnitude * np.cos(expected.double().numpy()), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(sine, magnitude * np.sin(expected.double().numpy()), rtol=2e-5)


def test_shapes_named_by_the_traits():
    """Which tensors a family has: no other test tells a missing bias from one of zeros."""
    names = {}
    for model_type, bias in (("qwen2", False), ("qwen3", False), ("qwen3", True), ("llama", False), ("llama", True)):
        config = ModelConfig(8, 64, 8, 1, 2, 1, head_dim=16, model_type=model_type, attention_bias=bias)
        layer = {name.removeprefix("model.layers.0.self_attn.") for name, _ in expected_shapes(config)}
        names[model_type, bias] = sorted(name for name in layer if name.endswith("bias") or "_norm" in name)
    biases = ["k_proj.bias", "q_proj.bias", "v_proj.bias"]
    assert names["qwen2", False] == biases
    assert names["qwen3", False] == ["k_norm.weight", "q_norm.weight"]
    assert names["llama", False] == []
    assert names["llama", True] == sorted([*biases, "o_proj.bias"])
    assert names["qwen3", True] == sorted([*biases, "o_proj.bias", "k_norm.weight", "q_norm.weight"])
