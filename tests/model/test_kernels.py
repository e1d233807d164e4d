"""Every attention kernel gives the same result and gradient, padded, packed and sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psyche_jax.errors import UsageError
from psyche_jax.model.kernels import AttentionKernel, SharedPrompt, self_attention
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, make_mesh


def plain(query, key, value, segments):
    """Attention by the book, in NumPy and float64."""
    batch, length, heads, head_dim = query.shape
    repeat = heads // key.shape[2]
    key, value = np.repeat(key, repeat, axis=2), np.repeat(value, repeat, axis=2)
    output = np.zeros(query.shape)
    for b in range(batch):
        for q in range(length):
            seen = [k for k in range(q + 1) if segments[b, k] == segments[b, q] and segments[b, k] > 0]
            for h in range(heads if seen else 0):
                scores = key[b, seen, h] @ query[b, q, h] / np.sqrt(head_dim)
                weights = np.exp(scores - scores.max())
                output[b, q, h] = weights @ value[b, seen, h] / weights.sum()
    return output


@pytest.mark.parametrize(
    ("kernel", "length", "head_dim"),
    [("xla", 130, 16), ("blocked", 600, 8), ("splash", 256, 128), ("splash", 256, 64)],
)
@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 2)])
def test_kernels_agree_with_plain_attention(kernel: AttentionKernel, length, head_dim, mesh):
    random = np.random.default_rng(0)
    query = random.normal(size=(2, length, 4, head_dim)).astype(np.float32)
    key, value = random.normal(size=(2, 2, length, 2, head_dim)).astype(np.float32)
    segments = np.ones((2, length), np.int32)
    segments[0, length // 3 :] = 2  # packed
    segments[1, :5] = 0  # padded on the left
    segments[1, -7:] = 0  # and on the right
    sharding = Sharding(make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))]), TRAIN_RULES)
    weight = jnp.asarray(random.normal(size=query.shape) * (segments > 0)[..., None, None], jnp.float32)

    def weighted(kernel, query, key, value):
        output = self_attention(query, key, value, jnp.asarray(segments), kernel, sharding, interpret=True)
        return jnp.sum(output * weight), output

    gradient = jax.jit(jax.grad(weighted, argnums=(1, 2, 3), has_aux=True), static_argnums=0)
    gradients, output = gradient(kernel, query, key, value)
    expected_gradients, _ = gradient("xla", query, key, value)
    real = segments > 0
    expected = plain(query.astype(float), key.astype(float), value.astype(float), segments)
    np.testing.assert_allclose(np.asarray(output)[real], expected[real], atol=2e-5)
    for one, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-5)
    assert all(np.isfinite(leaf).all() for leaf in gradients)


@pytest.mark.parametrize(
    ("kernel", "shared", "head_dim"),
    [
        ("xla", SharedPrompt(9, 3, 7), 16),
        ("blocked", SharedPrompt(150, 2, 140), 8),
        ("splash", SharedPrompt(128, 2, 64), 128),
        ("splash", SharedPrompt(128, 2, 64), 64),
    ],
)
@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 2)])
def test_responses_share_a_prompt(kernel: AttentionKernel, shared: SharedPrompt, head_dim, mesh):
    """As if each response stood alone after its prompt: values, and gradients, the prompt's being the sum."""
    random = np.random.default_rng(1)
    prompt, count, length = shared.prompt_length, shared.responses, shared.response_length
    query = random.normal(size=(2, shared.length, 4, head_dim)).astype(np.float32)
    key, value = random.normal(size=(2, 2, shared.length, 2, head_dim)).astype(np.float32)
    segments = np.ones((2, shared.length), np.int32)
    segments[0, :3] = 0  # a prompt padded on the left
    segments[1, -length // 2 :] = 0  # a response that ended
    weight = random.normal(size=query.shape).astype(np.float32) * (segments > 0)[..., None, None]
    sharding = Sharding(make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))]), TRAIN_RULES)

    def together(query, key, value):
        output = self_attention(query, key, value, jnp.asarray(segments), kernel, sharding, shared, interpret=True)
        return jnp.sum(output * weight)

    def apart(query, key, value):
        total = jnp.float32(0)
        for response in range(count):
            at = np.r_[:prompt, prompt + response * length : prompt + (response + 1) * length]
            parts = (x[:, at] for x in (query, key, value))
            output = self_attention(*parts, jnp.asarray(segments[:, at]), "xla", sharding)
            said = slice(0 if response == 0 else prompt, None)  # what the prompt says counts once
            total += jnp.sum(output[:, said] * weight[:, at][:, said])
        return total

    (one, gradients), (other, expected) = (
        jax.jit(jax.value_and_grad(way, argnums=(0, 1, 2)))(query, key, value) for way in (together, apart)
    )
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5)


def test_splash_refuses_what_it_cannot_do():
    sharding = Sharding(make_mesh(devices=jax.devices()[:1]), TRAIN_RULES)
    x = jnp.zeros((1, 100, 2, 64))
    with pytest.raises(UsageError, match="multiples of 128"):
        self_attention(x, x, x, jnp.ones((1, 100), jnp.int32), "splash", sharding)
