"""Batches: a pure function of data, seed and step; padding."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_jax.data.chat import TokenizedExample
from psyche_jax.data.streams import batch_indices, batches, length_bucket, pad_examples, pad_prompts


def stream(items, batch_size, seed, first, last):
    """Batches as plain lists."""
    return [batch["items"] for batch in batches(items, batch_size, seed, lambda x: {"items": x}, range(first, last))]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 23),
    st.integers(1, 9),
    st.sampled_from([0, 1, 42, 2**32 - 1]),
    st.integers(0, 12),
    st.integers(0, 12),
)
def test_batches_are_a_pure_function_of_the_step(size, batch_size, seed, first, steps):
    items = list(range(size))
    whole = stream(items, batch_size, seed, 0, first + steps)
    assert len(whole) == first + steps
    assert all(len(batch) == batch_size for batch in whole)
    assert stream(items, batch_size, seed, first, first + steps) == whole[first:]
    # Epochs follow each other without a gap, also within a batch.
    sequence = [item for batch in whole for item in batch]
    for start in range(0, len(sequence) - size + 1, size):
        assert sorted(sequence[start : start + size]) == items
    rest = sequence[len(sequence) // size * size :]
    assert len(set(rest)) == len(rest)


def test_every_epoch_and_every_seed_shuffles_anew():
    items = list(range(30))
    epochs = [tuple(epoch) for epoch in stream(items, 30, 7, 0, 20)]
    assert len(set(epochs)) == 20
    assert tuple(items) not in epochs
    assert len({tuple(stream(items, 30, seed, 0, 1)[0]) for seed in range(20)}) == 20


def test_buckets():
    buckets = [length_bucket(length, 32768) for length in range(1, 32769)]
    assert all(length <= bucket for length, bucket in enumerate(buckets, start=1))
    assert buckets == sorted(buckets)
    assert set(buckets) == {16, *(2**n for n in range(5, 16)), *(3 * 2**n for n in range(3, 14))}
    assert all(bucket < 1.5 * length for length, bucket in enumerate(buckets, start=1) if length > 16)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_no_bucket_is_over_the_largest(length, largest):
    bucket = length_bucket(min(length, largest), largest)
    assert min(length, largest) <= bucket <= largest


rows = st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=60), min_size=1, max_size=5)


@given(rows, st.sampled_from([60, 64, 1000]))
def test_pad_prompts(prompts, largest):
    batch = pad_prompts(prompts, largest)
    assert {name: array.dtype for name, array in batch.items()} == {"tokens": np.int32, "mask": bool}
    assert (
        batch["tokens"].shape == batch["mask"].shape == (len(prompts), length_bucket(max(map(len, prompts)), largest))
    )
    for prompt, tokens, mask in zip(prompts, batch["tokens"], batch["mask"], strict=True):
        assert tokens[mask].tolist() == prompt
        assert mask[-len(prompt) :].all()
        assert mask.sum() == len(prompt)
        assert not tokens[~mask].any()


@given(rows, st.sampled_from([60, 64, 1000]), st.integers(0, 2**60))
def test_pad_examples(tokens, largest, bits):
    examples = [
        TokenizedExample(np.asarray(row, np.int32), np.asarray([bits >> i & 1 for i in range(len(row))], bool))
        for row in tokens
    ]
    batch = pad_examples(examples, largest)
    shape = (len(tokens), length_bucket(max(map(len, tokens)), largest))
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
        "tokens": (np.int32, shape),
        "segments": (np.int32, shape),
        "positions": (np.int32, shape),
        "loss_mask": (bool, shape),
    }
    for index, example in enumerate(examples):
        size = len(example.tokens)
        assert batch["tokens"][index, :size].tolist() == example.tokens.tolist()
        assert batch["loss_mask"][index, :size].tolist() == example.loss_mask.tolist()
        assert batch["segments"][index].tolist() == [1] * size + [0] * (shape[1] - size)
        assert not batch["tokens"][index, size:].any()
        assert not batch["loss_mask"][index, size:].any()
        assert batch["positions"][index].tolist() == list(range(shape[1]))


def test_what_is_too_long_is_an_error():
    with pytest.raises(ValueError, match="broadcast"):
        pad_prompts([[1] * 20], 16)
    with pytest.raises(ValueError, match="broadcast"):
        pad_examples([TokenizedExample(np.ones(20, np.int32), np.ones(20, bool))], 16)


HOSTS = (1, 2, 3, 4, 8)


@settings(max_examples=6)  # Grain's shuffle is slow on sets as small as these
@given(
    sizes=st.lists(st.sampled_from([17, 48, 130]), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=3, max_size=3),
    seed=st.integers(0, 2**32 - 1),
    stop=st.integers(0, 5),
)
def test_any_hosts_and_any_step_of_stopping_give_the_same_batches(sizes, weights, seed, stop):
    """On 1, 2, 3, 4 and 8 hosts; a run that stops at `stop` goes on with other hosts."""
    parts = list(zip(sizes, weights, strict=False))
    batch_size, steps = 24, 6

    def on(count, steps):
        of_hosts = []
        for host in range(count):
            rows = slice(host * batch_size // count, (host + 1) * batch_size // count)
            indices = batch_indices(parts, batch_size, seed, rows)
            of_hosts.append([indices(step) for step in steps])
        return [list(itertools.chain(*of_all)) for of_all in zip(*of_hosts, strict=True)]

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
    parts = [(10, 2.0), (1000, 6.0), (5, 1.0), (7, 1.0)]
    indices = batch_indices(parts, 10, 0)
    items = itertools.chain(*map(indices, range(100)))
    shares = Counter("abcd"[int(item >= 10) + int(item >= 1010) + int(item >= 1015)] for item in items)
    assert shares == {"a": 200, "b": 600, "c": 100, "d": 100}


class Several(list):
    """Items that note which of them are read."""

    def read(self, indices):
        return [self[index] for index in indices]


def test_a_host_reads_only_its_rows():
    items = Several(range(100))
    whole = stream(items, 12, 5, 0, 10)
    for host in range(3):
        rows = slice(4 * host, 4 * host + 4)
        read = batches(items, 12, 5, lambda x: {"items": x}, range(10), rows=rows)
        assert [batch["items"] for batch in read] == [batch[rows] for batch in whole]
