"""The decoding kernel of TPUs: each row's own places of the ring, as plain attention finds them; and it compiles."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.tiny_plans import needs_libtpu

from psyche_jax.model import qwen2
from psyche_jax.model.attention import Source, joined, masked_scores, weigh
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.decode import generate
from psyche_jax.model.kernels import ring_attention, ring_block
from psyche_jax.model.qwen2 import Execution, initialize
from psyche_jax.model.sampling import Sampling
from psyche_jax.model.sharding import DECODE_RULES, TRAIN_RULES, Sharding, make_mesh
from psyche_jax.plan.slices import parse_topology

HEAD = 128


def on(*sizes, rules=DECODE_RULES):
    return Sharding(make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)]), rules)


# Of the three properties every pair is tried, not every triple.
_HEADS = [(1, 7, (1, 1, 1), 0), (2, 1, (1, 2, 2), 0), (8, 2, (1, 1, 1), 3), (4, 6, (2, 1, 1), 2)]
_PLACES = [(0, 256), (130, 384), (383, 384), (200, 512)]
_CASES = [
    (*place, *heads, ("float32", "bfloat16")[(turn + number) % 2])
    for turn, place in enumerate(_PLACES)
    for number, heads in enumerate(_HEADS)
]


@pytest.mark.parametrize(("place", "places", "kv_heads", "shared", "mesh", "spare", "dtype"), _CASES, ids=str)
def test_each_row_attends_to_its_own_places(place, places, kv_heads, shared, mesh, spare, dtype):
    """None, one, all; round the end of the ring; with rows of the cache that nobody decodes, and what is there NaN."""
    random, sharding = np.random.default_rng(place), on(*mesh)
    parts = sharding.parts("batch")
    lengths = np.array([0, 1, places, 5, 129, 257, *random.integers(0, places, 2)]).clip(0, places)
    rows = len(lengths)
    query = jnp.asarray(random.normal(size=(rows, kv_heads, shared, 1, HEAD)) * HEAD**-0.5, dtype)
    cache = random.normal(size=(2, 3, parts, rows // parts + spare, kv_heads, places, HEAD))
    age = (place - np.arange(places)) % places
    own = age < lengths[:, None]
    known = jnp.asarray(cache[:, 1, :, : rows // parts].reshape(2, rows, kv_heads, places, HEAD), dtype)
    cache[:, [0, 2]] = np.nan  # other layers
    cache[:, :, :, rows // parts :] = np.nan
    keys, values = jnp.asarray(cache.reshape(2, 3, -1, kv_heads, places, HEAD), dtype)
    largest = jnp.asarray(random.normal(size=(rows, kv_heads, shared, 1, 1)), jnp.float32)
    block = 256 if places % 256 == 0 else 128

    @jax.jit
    def by_kernel(query, largest, keys, values, place, lengths):
        return ring_attention(
            query, largest, keys, values, jnp.int32(1), place, lengths, block, sharding, interpret=True
        )

    top, part = by_kernel(query, largest, keys, values, jnp.int32(place), jnp.asarray(lengths, jnp.int32))
    source = Source(*known, jnp.asarray(own)[:, None])
    scores = masked_scores(query, source)
    expected_top = jnp.maximum(largest, scores.max(axis=-1, keepdims=True))
    expected = weigh(scores, expected_top, source, query.dtype)
    np.testing.assert_allclose(top, expected_top, atol=1e-5)
    np.testing.assert_allclose(part.total, expected.total, rtol=1e-5, atol=1e-5)
    # Weights are rounded relative to the same number: that a row is read in blocks changes nothing in bfloat16 either.
    np.testing.assert_allclose(part.output, expected.output, rtol=1e-4, atol=1e-4 if dtype == "float32" else 2e-3)
    assert (np.asarray(part.total)[lengths == 0] == 0).all()
    assert np.isfinite(joined((part, part), query.dtype)[lengths > 0]).all()


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "mesh"), [(None, (1, 1, 1)), (4, (1, 1, 1)), (8, (1, 2, 2))], ids=str)
def test_the_same_responses(slots, mesh, monkeypatch):
    """In slots with a queue, as the rows become fewer, and on a mesh: the tokens of the way without the kernel."""
    config = ModelConfig(300, 32, 48, 2, 4, 2, HEAD, pad_token_id=0, stop_token_ids=tuple(range(1, 300, 60)))
    execution = Execution(on(*mesh, rules=TRAIN_RULES), jnp.dtype("float32"))
    parameters = initialize(config, jax.random.key(0), execution.sharding, jnp.float32)
    tokens = jax.random.randint(jax.random.key(1), (4, 6), 1, 300)
    sampling = Sampling(128, generations_per_prompt=3, slots=slots)

    def decoded():
        return jax.jit(
            lambda parameters: generate(config, parameters, tokens, tokens > 0, jax.random.key(2), sampling, execution)
        )(parameters)

    expected, calls = decoded(), []

    def counted(*arguments):
        calls.append(arguments)
        return ring_attention(*arguments, interpret=True)

    monkeypatch.setattr(qwen2, "ring_attention", counted)
    monkeypatch.setattr(qwen2, "ring_block", lambda *arguments: 128)
    ours = decoded()
    assert calls
    assert len(set(np.asarray(expected.mask).sum(axis=1).tolist())) > 6, "ragged"
    assert (ours.tokens == expected.tokens).all()
    assert (ours.mask == expected.mask).all()
    np.testing.assert_allclose(ours.log_probs, expected.log_probs, atol=1e-4)


def test_where_it_is_not_used():
    """Off TPUs."""
    assert ring_block((2, 8, 2, 256, HEAD), jnp.dtype("bfloat16"), "splash", on(1, 1, 1)) == 0


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_it_compiles(topology):
    devices = parse_topology(topology).devices()
    sharding = Sharding(make_mesh(1, 2, 2, devices=devices), DECODE_RULES)
    shape = (3, 32, 4, 512, HEAD)
    block = partial(ring_block, kernel="splash", sharding=sharding)
    bfloat16 = jnp.dtype("bfloat16")
    assert block(shape, bfloat16) == 256
    assert block((*shape[:3], 384, HEAD), bfloat16) == 128
    assert block(shape, jnp.dtype("float32")) == 0, "products in one bfloat16 pass"
    assert block((*shape[:3], 500, HEAD), bfloat16) == block((*shape[:4], 64), bfloat16) == 0
    assert block((*shape[:3], 65536, HEAD), bfloat16) == 0, "more than a chip's own memory holds"
    assert block((3, 32, 3, 512, HEAD), bfloat16) == block((3, 31, 4, 512, HEAD), bfloat16) == 0
    assert ring_block(shape, bfloat16, "auto", sharding) == 0, "nobody has timed it"

    def array(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(sharding.mesh, PartitionSpec(*axes)))

    rows, heads = sharding.rules["batch"], "tensor"
    arguments = (
        array((32, 4, 7, 1, HEAD), bfloat16, rows, heads),
        array((32, 4, 7, 1, 1), jnp.float32, rows, heads),
        *[array(shape, bfloat16, None, rows, heads)] * 2,
        *[array((), jnp.int32)] * 2,
        array((32,), jnp.int32, rows),
    )
    program = jax.jit(lambda *arguments: ring_attention(*arguments, 256, sharding)).lower(*arguments).compile()
    assert program.memory_analysis().temp_size_in_bytes < 3 * 16 * 2 * 512 * HEAD * 2, "the cache is not copied"
    assert "tpu_custom_call" in program.as_text()
