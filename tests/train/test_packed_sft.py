"""SFT on packed data sets: the loss of the examples apart, each host its rows, mixtures, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.bucket import running_bucket
from support.training_fixtures import PROMPT, execution, metrics_of, sft_config

from psyche_jax.config import SftDataSection
from psyche_jax.data.dataset import open_dataset
from psyche_jax.data.packing import PackConfig, pack, unpacked_rows
from psyche_jax.data.streams import pad_examples
from psyche_jax.errors import UserError
from psyche_jax.model.huggingface import load_tokenizer, read_parameters
from psyche_jax.train import hosts
from psyche_jax.train.sft import next_token_loss, open_examples, train_sft


@pytest.fixture(scope="module")
def packed(tiny_root):
    """An address of a packed data set in a bucket."""
    with running_bucket() as bucket:
        values = {"input": str(tiny_root / "sft.jsonl"), "tokenizer": str(tiny_root / "model"), "prompt": PROMPT}
        pack(PackConfig(out=f"{bucket}/packed", max_length=96, **values))
        pack(PackConfig(out=f"{bucket}/longer", max_length=128, **values))
        yield bucket


def test_a_packed_batch_has_the_loss_of_its_examples(tiny_root, tiny_config, packed):
    tokenizer = load_tokenizer(tiny_root / "model")
    how = execution(1)
    parameters = read_parameters(tiny_root / "model", tiny_config, how.sharding, jnp.dtype("float32"))

    def loss(batch):
        weights = batch["loss_mask"].astype(np.float32)
        return float(next_token_loss(tiny_config, how, parameters, {**batch, "weights": weights})[0]), weights.sum()

    apart = open_examples(str(tiny_root / "sft.jsonl"), tokenizer, PROMPT, 96)
    together = open_examples(f"{packed}/packed", tokenizer, PROMPT, 96)
    expected, tokens = loss(pad_examples(apart.items, 96))
    value, packed_tokens = loss(together.collate(together.items.read(range(len(together.items)))))
    assert packed_tokens == tokens
    assert value == pytest.approx(expected, rel=1e-5)


def test_training_on_a_packed_data_set_in_a_bucket_learns(tiny_root, packed, tmp_path):
    data = SftDataSection(f"{packed}/packed", max_length=96)
    config = sft_config(tiny_root, epochs=3.0, data=data)
    train_sft(dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "run"))))
    losses = [line["loss"] for line in metrics_of(tmp_path / "run")]
    rows = len(open_dataset(f"{packed}/packed"))
    assert len(losses) == -(-3 * rows // 8)
    assert losses[-1] < losses[0]


def test_data_that_does_not_fit(tiny_root, packed, tmp_path):
    for train, message in (
        (f"{packed}/longer", "rows have 128 tokens, over data.max_length 96"),
        ({f"{packed}/packed": 1.0, str(tiny_root / "sft.jsonl"): 1.0}, "pack both, or neither"),
        (f"{packed}/none", "none: is not a data set"),
    ):
        config = sft_config(tiny_root, data=SftDataSection(train, max_length=96))
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "run")))
        with pytest.raises(UserError, match=message):
            train_sft(config)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("axes", [(1, 8, 1), (2, 2, 2), (1, 2, 4), (8, 1, 1), (1, 1, 8)])
def test_rows_of_one_process_are_all_rows(axes):
    data, fsdp, tensor = axes
    place = execution(8, data, fsdp, tensor).sharding.named("batch", "sequence")
    assert hosts.own_rows(place, 16) == slice(0, 16)
    array = np.arange(64).reshape(16, 4)
    assert np.array_equal(jax.device_get(hosts.place({"a": array}, place, 0, 16)["a"]), array)


def test_a_mixture_of_packed_data_sets(tiny_root, packed):
    tokenizer = load_tokenizer(tiny_root / "model")
    source = {f"{packed}/packed": 1.0, f"{packed}/longer": 2.0}
    mixture = open_examples(source, tokenizer, PROMPT, 128)
    assert mixture.length == 128
    assert [weight for _, weight in mixture.parts] == [1.0, 2.0]
    contents = [list(open_dataset(where)) for where in source]
    assert mixture.items.read([len(contents[0]), 0, 1]) == [contents[1][0], contents[0][0], contents[0][1]]
    assert mixture.collate(contents[0])["tokens"].shape == (len(contents[0]), 128)
    assert np.array_equal(mixture.collate(contents[1])["tokens"], unpacked_rows(contents[1], 128)["tokens"])
