"""`token_scores` against a whole log-softmax: values, gradients, entropy, and that no whole logits exist."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.qwen2_reference import jit, one_device, worst

from psyche_jax.model import log_probs
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.log_probs import token_scores
from psyche_jax.model.qwen2 import bind, initialize

LENGTH = 11
TINY = ModelConfig(
    vocab_size=53,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request):
    config = TINY if not request.param else ModelConfig(**{**vars(TINY), "tie_word_embeddings": True})
    parameters = initialize(config, jax.random.key(0), one_device().sharding, jnp.float32)
    # Larger than a fresh model's, so that distributions are far from even.
    return config, jax.tree.map(lambda x: 20 * np.asarray(x) if x.ndim > 1 else x, parameters)


def batch(rows=3, length=LENGTH):
    keys = jax.random.split(jax.random.key(1), 2)
    hidden = 0.7 * jax.random.normal(keys[0], (rows, length, TINY.hidden_size))
    return hidden, jax.random.randint(keys[1], (rows, length), 0, TINY.vocab_size)


def whole(config, parameters, hidden, targets, temperature):
    """Log-probabilities and entropy from logits that stand whole."""
    log_softmax = jax.nn.log_softmax(bind(config, parameters).logits(hidden) / temperature, axis=-1)
    chosen = jnp.take_along_axis(log_softmax, targets[..., None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(log_softmax) * log_softmax, axis=-1)


def weighted(scores):
    """A loss to which each log-probability and each entropy contributes differently; and the scores."""
    weights = np.random.default_rng(2).normal(size=(2, *scores[0].shape)).astype(np.float32)
    return jnp.sum(weights[0] * scores[0] + weights[1] * scores[1]), scores


@functools.partial(jit, static_argnums=0)
def exactly(config, parameters, hidden, targets, temperature):
    def plain(parameters, hidden):
        return weighted(whole(config, parameters, hidden, targets, temperature))

    return jax.value_and_grad(plain, (0, 1), has_aux=True)(parameters, hidden)


# Tokens a chunk, over three rows of 11: one position at a time, 3, 4 (neither divides 11), and more than all.
@pytest.mark.parametrize(("chunk_tokens", "temperature"), [(1, 1.0), (9, 0.6), (14, 1.7), (2048, 0.6)])
@pytest.mark.parametrize("read", ["_read_targets", "_sum_targets"], ids=["here", "as on TPUs"])
def test_chunks_equal_the_whole(chunk_tokens, temperature, read, model, figure, monkeypatch):
    monkeypatch.setattr(log_probs, "_read_targets", getattr(log_probs, read))
    config, parameters = model
    hidden, targets = batch()

    def chunked(parameters, hidden):
        bound = bind(config, parameters)
        return weighted(token_scores(bound, hidden, targets, one_device(), temperature, chunk_tokens))

    (_, ours), our_gradients = jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(parameters, hidden)
    (_, exact), gradients = exactly(config, parameters, hidden, targets, temperature)
    assert ours.log_probs.shape == ours.entropy.shape == targets.shape
    assert ours.log_probs.dtype == ours.entropy.dtype == jnp.float32
    assert np.std(exact[1]) > 0.1
    figure("log-probs by chunks", worst(ours.log_probs, exact[0]), 1e-5)
    figure("entropy by chunks", worst(ours.entropy, exact[1]), 1e-5)
    pairs = list(zip(jax.tree.leaves(our_gradients), jax.tree.leaves(gradients), strict=True))
    assert sum(np.any(np.asarray(gradient)) for _, gradient in pairs) == 2  # the head's and the hidden states'
    for ours, exact in pairs:
        figure("gradients by chunks", worst(ours, exact) / max(1.0, np.abs(np.asarray(exact)).max()), 1e-5)


def test_entropy_of_known_distributions(model):
    config, parameters = model
    _, targets = batch(rows=1)

    @jit
    def run(parameters, hidden, targets):
        return token_scores(bind(config, parameters), hidden, targets, one_device())

    scores = run(parameters, jnp.zeros((1, LENGTH, 24)), targets)
    np.testing.assert_allclose(scores.entropy, np.log(TINY.vocab_size), rtol=1e-6)
    np.testing.assert_allclose(scores.log_probs, -np.log(TINY.vocab_size), rtol=1e-6)
    head = parameters["embedding" if config.tie_word_embeddings else "head"]
    certain = jnp.broadcast_to(1e4 * head[7], (1, LENGTH, 24))
    scores = run(parameters, certain, jnp.full((1, LENGTH), 7))
    np.testing.assert_allclose(scores.entropy, 0, atol=1e-3)
    np.testing.assert_allclose(scores.log_probs, 0, atol=1e-6)


def shapes_in(program):
    """Sizes of all float arrays in the compiled forward and backward passes."""
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", program.compile().as_text())}


def test_whole_logits_never_stand(model):
    config, parameters = model
    rows, length = 4, 38
    hidden, targets = batch(rows, length)

    def loss(scores):
        return lambda parameters, hidden: scores(parameters, hidden)[0].sum()

    def by_chunks(parameters, hidden):
        return token_scores(bind(config, parameters), hidden, targets, one_device(), chunk_tokens=20)

    def plain(parameters, hidden):
        return whole(config, parameters, hidden, targets, 1.0)

    def most(scores):
        program = jit(jax.grad(loss(scores), (0, 1))).lower(parameters, hidden)
        sizes = [np.prod(shape) for shape in shapes_in(program) if TINY.vocab_size in shape]
        return max(sizes) // TINY.vocab_size

    assert most(plain) == rows * length
    # The chunk's logits, or the head itself.
    assert most(by_chunks) <= max(20, TINY.hidden_size)
