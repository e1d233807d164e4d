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
    [("xla", 130, 16), ("blocked", 600, 8), ("splash", 256, 128), ("splash", 256, 64), ("splash", 200, 64)],
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
        ("splash", SharedPrompt(48, 3, 50), 64),
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


@pytest.mark.parametrize(
    ("kernel", "head_dim", "dtype", "reason"),
    [
        ("splash", 40, "bfloat16", "splash needs a head_dim in multiples of 64, not 40; use auto"),
        ("cudnn", 20, "bfloat16", "cudnn needs a head_dim in multiples of 8, not 20; use auto"),
        ("splash", 64, "float32", "splash multiplies float32 in one bfloat16 pass"),
        ("cudnn", 64, "float32", "cudnn multiplies float32 in one bfloat16 pass"),
        ("splash", 64, "bfloat16", "splash is for a TPU, not a CPU; use auto"),
        ("cudnn", 64, "bfloat16", "cudnn is for a GPU, not a CPU; use auto"),
    ],
)
def test_kernels_refuse_what_they_cannot_do(kernel: AttentionKernel, head_dim, dtype, reason):
    sharding = Sharding(make_mesh(devices=jax.devices()[:1]), TRAIN_RULES)
    x = jnp.zeros((1, 100, 2, head_dim), dtype)
    with pytest.raises(UsageError, match=f"model.attention: {reason}"):
        self_attention(x, x, x, jnp.ones((1, 100), jnp.int32), kernel, sharding)


@pytest.mark.parametrize("length", [6, 7])
def test_cudnn_gets_even_lengths(length, monkeypatch):
    """Others it refuses in training, with a traceback; data.max_length may be odd."""
    at_length, attend = [], jax.nn.dot_product_attention

    def on_a_cpu(query, *rest, implementation, **more):
        at_length.append((query.shape[1], implementation))
        return attend(query, *rest, implementation="xla", **more)

    sharding = Sharding(make_mesh(devices=jax.devices()[:1]), TRAIN_RULES)
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, length, 2, 8), jnp.bfloat16)
    segments = jnp.ones((1, length), jnp.int32)
    expected = self_attention(query, key, value, segments, "xla", sharding)
    monkeypatch.setattr(jax.nn, "dot_product_attention", on_a_cpu)
    monkeypatch.setattr(Sharding, "platform", "gpu")
    found = self_attention(query, key, value, segments, "auto", sharding)
    assert at_length == [(length + length % 2, "cudnn")]
    np.testing.assert_allclose(found.astype(float), expected.astype(float), atol=0.02)
