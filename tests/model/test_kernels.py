"""Every attention kernel gives the same result and gradient, padded, packed and sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psyche_jax.errors import UsageError
from psyche_jax.model.kernels import AttentionKernel, self_attention
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
    ("kernel", "length", "head_dim"), [("xla", 130, 16), ("blocked", 600, 8), ("splash", 256, 128)]
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


def test_splash_refuses_what_it_cannot_do():
    sharding = Sharding(make_mesh(devices=jax.devices()[:1]), TRAIN_RULES)
    x = jnp.zeros((1, 100, 2, 64))
    with pytest.raises(UsageError, match="multiples of 128"):
        self_attention(x, x, x, jnp.ones((1, 100), jnp.int32), "splash", sharding)
