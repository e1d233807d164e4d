"""SFT on packed data sets: the loss of the examples apart, each host its rows, mixtures, and what is refused."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bucket import running_bucket
from hypothesis import given, settings
from hypothesis import strategies as st
from training_fixtures import PROMPT, execution, metrics_of, sft_config

from psyche_jax import hosts
from psyche_jax.config import SftDataSection
from psyche_jax.data.dataset import open_dataset
from psyche_jax.data.examples import open_examples
from psyche_jax.data.packing import PackConfig, pack, unpacked_rows
from psyche_jax.data.streams import batches, pad_examples
from psyche_jax.errors import UserError
from psyche_jax.model.huggingface import load_tokenizer, read_parameters
from psyche_jax.train.sft import next_token_loss, train_sft


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


def test_training_on_a_packed_data_set_resumes_and_learns(tiny_root, packed, tmp_path):
    data = SftDataSection(f"{packed}/packed", max_length=96)
    config = sft_config(tiny_root, epochs=4.0, data=data)
    run = lambda name: dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / name)))
    train_sft(run("whole"))
    losses = [line["loss"] for line in metrics_of(tmp_path / "whole")]
    rows = len(open_dataset(f"{packed}/packed"))
    assert len(losses) == -(-4 * rows // 8)
    assert losses[-1] < losses[0]


def test_data_that_does_not_fit(tiny_root, packed, tmp_path):
    for train, message in (
        (f"{packed}/longer", "rows have 128 tokens, over data.max_length 96"),
        ({f"{packed}/packed": 1.0, str(tiny_root / "sft.jsonl"): 1.0}, "pack both, or neither"),
        (f"{packed}/none", "none: is no data set"),
    ):
        config = sft_config(tiny_root, data=SftDataSection(train, max_length=96))
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "run")))
        with pytest.raises(UserError, match=message):
            train_sft(config)
        assert not (tmp_path / "run").exists()


HOSTS = (1, 2, 3, 4, 8)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=3, max_size=3),
    seed=st.integers(0, 2**32 - 1),
    stop=st.integers(0, 6),
)
def test_any_hosts_and_any_step_of_stopping_give_the_same_batches(sizes, weights, seed, stop):
    """On 1, 2, 3, 4 and 8 hosts; a run that stops at `stop` goes on with other hosts."""
    items = list(range(sum(sizes)))
    parts = list(zip(sizes, weights, strict=False))
    batch_size, steps = 24, 8

    def on(count, steps):
        of_hosts = []
        for host in range(count):
            rows = slice(host * batch_size // count, (host + 1) * batch_size // count)
            read = batches(items, batch_size, seed, lambda x: {"items": np.asarray(x)}, steps, parts, rows)
            of_hosts.append([batch["items"] for batch in read])
        return [np.concatenate(parts).tolist() for parts in zip(*of_hosts, strict=True)]

    expected = on(1, range(steps))
    for number, count in enumerate(HOSTS):
        before, after = count, HOSTS[-1 - number]
        assert on(before, range(stop)) + on(after, range(stop, steps)) == expected
    # Within each part every epoch holds every item once.
    sequence = [item for batch in expected for item in batch]
    first = 0
    for size in sizes:
        own = [item for item in sequence if first <= item < first + size]
        for start in range(0, len(own), size):
            epoch = own[start : start + size]
            assert len(set(epoch)) == len(epoch)
            if len(epoch) == size:
                assert set(epoch) == set(range(first, first + size))
        first += size


def test_weights_are_shares_of_the_batches():
    parts = [(10, 1.0), (1000, 3.0), (5, 0.5)]
    read = batches(list(range(1015)), 9, 0, lambda x: {"items": np.asarray(x)}, range(100), parts)
    items = np.concatenate([batch["items"] for batch in read])
    shares = Counter("abc"[int(item >= 10) + int(item >= 1010)] for item in items)
    assert shares == {"a": 200, "b": 600, "c": 100}


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
