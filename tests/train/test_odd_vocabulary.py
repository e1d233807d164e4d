"""4,097 rows of vocabulary on fsdp 2 × tensor 2: the numbers of one device, and exported as it was."""

import contextlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.iterations import Bench, compare
from support.training_fixtures import PROMPT, execution, largest_difference, make_model, write_prompts, write_sft_data
from test_checkpoints import FLOAT32, leaves, state_on
from test_sft import several, train

from psyche_jax.convert import export_model
from psyche_jax.data.chat import tokenize_example
from psyche_jax.data.dataset import load_records
from psyche_jax.data.records import SftExample
from psyche_jax.model.huggingface import load_tokenizer, read_parameters, write_weights
from psyche_jax.train.checkpoints import Checkpoints, checkpoint_metadata

SPLIT = (1, 2, 2)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("odd")
    write_sft_data(root / "sft.jsonl")
    write_prompts(root / "rl.jsonl")
    return root


@pytest.fixture(scope="module")
def config(root):
    """Rows without a token are said rarely, so that responses are text, and rewards differ."""
    config = make_model(root / "model", 4097)
    parameters = read_parameters(root / "model", config, execution(1).sharding, FLOAT32)
    head = parameters["head"].at[len(load_tokenizer(root / "model")) :].multiply(0.1)
    write_weights(root / "model", config, {**parameters, "head": head})
    return config


@pytest.mark.slow
def test_sft(root, config, figure):
    tokenizer = load_tokenizer(root / "model")
    records = load_records(SftExample, root / "sft.jsonl").good
    batches = several([tokenize_example(tokenizer, record.messages, PROMPT) for record in records])
    ours, parameters = train(root, config, execution(4, *SPLIT), batches, micro_batches=2)
    expected, one_device = train(root, config, execution(1), batches)
    for line, other in zip(ours, expected, strict=True):
        figure("SFT loss, odd vocabulary", abs(line["loss"] - other["loss"]), 1e-5)
        figure("SFT gradient norm, odd vocabulary", abs(line["grad_norm"] / other["grad_norm"] - 1), 1e-5)
    figure("SFT parameters, odd vocabulary", largest_difference(parameters, one_device), 1e-4)


@pytest.mark.slow
def test_grpo(root, config, figure):
    """The same tokens are sampled, and no token that there is not."""
    # A seed by which no gradient is rounding alone: AdamW would make a whole step of it, in either direction.
    ours = Bench(root, SPLIT, micro_batch_prompts=2).run(2, seed=7)
    compare(ours, Bench(root).run(2, seed=7), figure, "odd vocabulary")
    assert largest_difference(ours.parameters[2], ours.parameters[0]) > 0
    assert all(sample["tokens"].max() < config.vocab_size for sample in ours.samples)


def test_parameters_and_moments_are_split_over_all_devices(root, config):
    state, _ = state_on(root, config, execution(4, *SPLIT))
    matrices = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4097, config.hidden_size)]
    assert len(matrices) == 2 * 3, "embedding and head, each with its moments"
    for leaf in matrices:
        assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // 4}


def test_checkpoints_go_to_other_meshes_and_come_out_as_they_were(root, config, tmp_path):
    metadata = checkpoint_metadata(config, PROMPT, seed=5, config={})
    state, _ = state_on(root, config, execution(4, *SPLIT))
    folder = tmp_path / "checkpoints"
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(state, 4, metadata)
    shutil.copytree(root / "model", folder / "tokenizer")
    for mesh in ((1, 1, 1), (1, 8, 1), (2, 1, 4)):
        _, abstract = state_on(root, config, execution(int(np.prod(mesh)), *mesh))
        with contextlib.closing(Checkpoints(folder)) as checkpoints:
            assert leaves(checkpoints.restore(abstract, metadata)) == leaves(state)
    export_model(str(folder), tmp_path / "exported", "float32")
    ours, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "exported", root / "model"))
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (ours[name].shape, ours[name].tobytes()) == (tensor.shape, tensor.tobytes()), name
    assert leaves(read_parameters(tmp_path / "exported", config, execution(4, *SPLIT).sharding, FLOAT32)) == leaves(
        state.parameters
    )
