"""Eight virtual CPU devices against one, and what the compiled programs hold and send."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from support.qwen2_reference import Shape, loss_and_gradient, one_device, padded, read, reference, sample, worst

from psyche_jax.errors import UsageError
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.qwen2 import Execution, initialize
from psyche_jax.model.sampling import Sampling
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, check_mesh_fits, make_mesh, training_sharding

SHAPE = Shape(False, 8, 4, 6, 64, 88, 2, 136)
ROWS, LENGTH = 8, 20
# Shape of each parameter on one device, on a mesh of data 2 x fsdp 2 x tensor 2 and of fsdp 2 x tensor 4.
SHARDS = {
    "embedding": ((68, 32), (34, 32)),
    "head": ((34, 64), (17, 64)),
    "final_norm/scale": ((64,), (64,)),
    "layers/input_norm/scale": ((2, 64), (2, 64)),
    "layers/post_attention_norm/scale": ((2, 64), (2, 64)),
    "layers/q_proj/kernel": ((2, 24, 32), (2, 12, 32)),
    "layers/q_proj/bias": ((2, 24), (2, 12)),
    "layers/k_proj/kernel": ((2, 12, 32), (2, 6, 32)),
    "layers/k_proj/bias": ((2, 12), (2, 6)),
    "layers/v_proj/kernel": ((2, 12, 32), (2, 6, 32)),
    "layers/v_proj/bias": ((2, 12), (2, 6)),
    "layers/o_proj/kernel": ((2, 32, 24), (2, 32, 12)),
    "layers/gate_proj/kernel": ((2, 44, 32), (2, 22, 32)),
    "layers/up_proj/kernel": ((2, 44, 32), (2, 22, 32)),
    "layers/down_proj/kernel": ((2, 32, 44), (2, 32, 22)),
}


def on(sizes, remat="none"):
    return Execution(Sharding(make_mesh(*sizes), TRAIN_RULES), jnp.dtype("float32"), remat)


def batch():
    random = np.random.default_rng(0)
    rows = [random.integers(0, 132, length) for length in (20, 3, 11, 20, 7, 1, 15, 16)]
    return padded(rows, LENGTH, "left", np.zeros((ROWS, LENGTH)))


SAMPLING = Sampling(12, temperature=1.0, generations_per_prompt=2)
GREEDY = Sampling(12, temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    reference(SHAPE, folder)
    return folder


@pytest.fixture(scope="module")
def uneven_folder(tmp_path_factory):
    """A model whose vocabulary the tensor axis divides, but not all eight devices."""
    folder = tmp_path_factory.mktemp("uneven")
    reference(SHAPE._replace(vocabulary=132), folder)
    return folder


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory):
    """A model whose vocabulary no axis divides."""
    folder = tmp_path_factory.mktemp("odd")
    reference(SHAPE._replace(vocabulary=133), folder)
    return folder


@pytest.fixture(scope="module")
def odd_tied_folder(tmp_path_factory):
    """The same with one matrix for embedding and head."""
    folder = tmp_path_factory.mktemp("odd_tied")
    reference(SHAPE._replace(vocabulary=133, tied=True), folder)
    return folder


def test_there_are_eight_devices():
    assert len(jax.devices()) == 8


@functools.cache
def scores_alone(folder):
    config, parameters, execution = read(folder, one_device())
    return jax.tree.map(np.asarray, loss_and_gradient(config, parameters, batch(), execution))


@functools.cache
def responses_alone(folder, sampling):
    config, parameters, execution = read(folder, one_device())
    return jax.tree.map(np.asarray, sample(config, parameters, batch(), execution, sampling))


@pytest.mark.parametrize(
    ("sizes", "remat", "model"),
    [
        ((2, 2, 2), "full", "folder"),
        ((1, 8, 1), "none", "folder"),
        ((1, 2, 4), "dots", "folder"),
        ((8, 1, 1), "full", "folder"),
        ((1, 2, 4), "none", "uneven_folder"),
        ((2, 2, 2), "none", "odd_folder"),
        ((1, 2, 4), "full", "odd_tied_folder"),
    ],
    ids=str,
)
def test_scores_and_gradients(sizes, remat, model, request, figure):
    folder = request.getfixturevalue(model)
    config, parameters, execution = read(folder, on(sizes, remat))
    (loss, (scores, logits)), gradients = loss_and_gradient(config, parameters, batch(), execution)
    (one_loss, (one_scores, one_logits)), one_gradients = scores_alone(folder)
    figure("8 devices to 1: loss", worst(loss, one_loss), 5e-5)
    figure("8 devices to 1: logits, relative", worst(logits, one_logits) / np.abs(one_logits).max(), 5e-5)
    real = batch().segments > 0
    figure("8 devices to 1: log-probs", np.abs(scores.log_probs - one_scores.log_probs)[real].max(), 5e-5)
    figure("8 devices to 1: entropy", np.abs(scores.entropy - one_scores.entropy)[real].max(), 5e-5)
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(one_gradients), strict=True)
    figure("8 devices to 1: gradients", max(worst(one, other) for one, other in pairs), 5e-5)


@pytest.mark.parametrize(
    ("sizes", "sampling", "model"),
    [
        ((2, 2, 2), SAMPLING, "folder"),
        ((1, 8, 1), GREEDY, "folder"),
        ((1, 2, 4), SAMPLING, "folder"),
        ((2, 2, 2), GREEDY, "folder"),
        ((8, 1, 1), GREEDY, "folder"),
        ((2, 2, 2), SAMPLING, "odd_folder"),
        ((1, 2, 4), SAMPLING, "odd_tied_folder"),
        ((1, 2, 4), GREEDY, "odd_folder"),
    ],
    ids=lambda value: f"temperature {value.temperature}" if isinstance(value, Sampling) else str(value),
)
def test_responses(sizes, sampling, model, request, figure):
    folder = request.getfixturevalue(model)
    config, parameters, execution = read(folder, on(sizes))
    rollout, one = sample(config, parameters, batch(), execution, sampling), responses_alone(folder, sampling)
    assert (rollout.tokens == one.tokens).all()
    assert (rollout.mask == one.mask).all()
    figure("8 devices to 1: sampler's log-probs", worst(rollout.log_probs, one.log_probs), 5e-5)


@pytest.mark.parametrize(
    ("made", "sizes", "column"), [("read", (2, 2, 2), 0), ("read", (1, 2, 4), 1), ("initialized", (2, 2, 2), 0)]
)
def test_parameters_lie_in_parts(made, sizes, column, folder):
    config, parameters, execution = read(folder, on(sizes))
    if made == "initialized":
        parameters = initialize(config, jax.random.key(0), execution.sharding, jnp.float32)
    flat = traverse_util.flatten_dict(parameters, sep="/")
    assert {name: array.sharding.shard_shape(array.shape) for name, array in flat.items()} == {
        name: shapes[column] for name, shapes in SHARDS.items()
    }
    # Each part is the slice of the file that it should be.
    if made == "read":
        whole = traverse_util.flatten_dict(read(folder, one_device())[1], sep="/")
        for name, array in flat.items():
            for shard in array.addressable_shards:
                assert (np.asarray(shard.data) == np.asarray(whole[name])[shard.index]).all()


def operations(program, kind):
    """(shape, name within the program) of every operation of that kind in the compiled program of one device."""
    pattern = rf"= \w+\[([\d,]*)\]\S* {kind}(?:-start)?\(.*op_name=\"([^\"]*)\""
    return [
        (tuple(int(x) for x in dims.split(",") if x), name) for dims, name in re.findall(pattern, program.as_text())
    ]


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4), (1, 8, 1)], ids=str)
def test_training_splits_batch_heads_and_vocabulary(sizes, folder):
    data, fsdp, tensor = sizes
    config, parameters, execution = read(folder, on(sizes))
    program = loss_and_gradient.lower(config, parameters, batch(), execution).compile()
    text = program.as_text()
    rows = ROWS // (data * fsdp)
    arrays = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}
    # The scores of a layer's attention and the residual stream, as one device holds them.
    assert any({rows, 4 // tensor}.issubset(shape) and shape[-2:] == (LENGTH, LENGTH) for shape in arrays)
    assert (rows, LENGTH, 64) in arrays
    # Each device holds an eighth of the logits of a chunk of 5 positions, split by rows or by vocabulary.
    chunks = {shape for shape in arrays if len(shape) == 3 and shape[1] == 5 and shape[2] % 17 == 0}
    assert {int(np.prod(shape)) for shape in chunks} == {ROWS * 5 * 136 // 8}, chunks
    # Nor does any device hold more rows of a layer's inner activations than its own.
    inner = {shape for shape in arrays if len(shape) == 3 and shape[1] == LENGTH and shape[2] % 11 == 0}
    kept = (2, rows * LENGTH, 88 // tensor)  # what backward needs of both layers, rows and positions as one axis
    assert inner - {kept} == {(rows, LENGTH, 88 // tensor)}
    # Arguments are the parts, not the wholes.
    total = sum(x.size for x in jax.tree.leaves(parameters))
    held = sum(int(np.prod(x.sharding.shard_shape(x.shape))) for x in jax.tree.leaves(parameters))
    assert held < 1.1 * total / (fsdp * tensor)
    assert abs(program.memory_analysis().argument_size_in_bytes - 4 * held) < 16 * ROWS * LENGTH
    # Weights are gathered layer by layer, not all layers at once.
    gathered = [shape for shape, name in operations(program, "all-gather") if "while/body" in name]
    assert any(np.prod(shape) == 88 // tensor * 64 for shape in gathered), gathered
    assert not any(np.prod(shape) >= 2 * 88 // tensor * 64 for shape in gathered), gathered


@pytest.mark.parametrize("sizes", [(1, 2, 4), (1, 8, 1)], ids=str)
def test_decoding_gathers_no_weights_in_its_loop(sizes, folder):
    tensor = sizes[2]
    config, parameters, execution = read(folder, on(sizes))
    program = sample.lower(config, parameters, batch(), execution, SAMPLING).compile()
    gathered = operations(program, "all-gather")
    once = {shape for shape, name in gathered if "while/body" not in name}
    assert (2, 88 // tensor, 64) in once  # one change of layout, all layers together
    # Where prompts are read, their vectors travel: each of the devices that share weights has rows of its own.
    reading = {shape for shape, name in gathered if "layer_loop" in name and "decoding_loop" not in name}
    assert reading == ({(ROWS // 2, LENGTH, 64)} if tensor > 1 else set())
    # At each step only the 16 tokens' vectors do, and for each the block of 128 weights that it is drawn from.
    inside = {shape for shape, name in gathered if "while/body" in name} - reading
    assert all(np.prod(shape) <= 2 * ROWS * 128 for shape in inside), inside


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((3, 1, 1), "does not divide the 8 devices"),
        ((2, 2, 1), "needs 4 devices, and there are 8"),
        ((16, 1, 1), "does not divide the 8 devices"),
        ((-1, -1, 1), "at most one may be -1"),
        ((0, -1, 1), "must be positive"),
        ((2, -2, 2), "must be positive"),
    ],
)
def test_meshes_that_cannot_be(sizes, expected):
    with pytest.raises(UsageError, match=expected):
        make_mesh(*sizes)


def test_mesh_sizes():
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(2, 4, -1).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert make_mesh(devices=jax.devices()[:1]).devices.size == 1


def test_sizes_while_training_and_while_decoding():
    sharding = training_sharding(2, -1, 1, decoding_tensor=2)
    assert sharding.sizes == {"data": 2, "fsdp": 4, "tensor": 1}
    assert sharding.for_decoding().sizes == {"data": 2, "fsdp": 2, "tensor": 2}
    assert training_sharding(2, -1, 2).sizes == training_sharding(2, -1, 2, decoding_tensor=2).sizes
    with pytest.raises(UsageError, match=r"rollout\.tensor: 3 does not divide mesh\.fsdp 8"):
        training_sharding(1, 8, 1, decoding_tensor=3)


@pytest.mark.parametrize(
    ("sizes", "field", "value"),
    [
        ((1, 2, 4), "num_attention_heads", 6),
        ((1, 2, 4), "num_key_value_heads", 2),
        ((1, 2, 4), "intermediate_size", 90),
        ((1, 8, 1), "hidden_size", 60),
    ],
)
def test_model_that_the_mesh_does_not_divide(sizes, field, value):
    fields = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 6,
    }
    check_mesh_fits(Sharding(make_mesh(*sizes), TRAIN_RULES), ModelConfig(**fields))
    fields[field] = value
    if field == "num_attention_heads":
        fields["num_key_value_heads"] = 2
    with pytest.raises(UsageError, match=rf"{field} {value}"):
        check_mesh_fits(Sharding(make_mesh(*sizes), TRAIN_RULES), ModelConfig(**fields))
