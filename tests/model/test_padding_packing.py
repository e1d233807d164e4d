"""Padding and packing never change what a token's logits and log-probabilities are."""

import numpy as np
import pytest
from support.qwen2_reference import SMALL, apart, logits, packed, padded, read, reference, scores, worst

LENGTHS = (5, 1, 17, 12, 5)


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    reference(SMALL, folder)
    return read(folder)


@pytest.fixture(scope="module")
def rows():
    # The pad id, 0, is a token like any other here.
    random = np.random.default_rng(1)
    return [random.integers(0, 4 if length == 17 else SMALL.vocabulary, length) for length in LENGTHS]


@pytest.fixture(scope="module")
def alone(port, rows):
    """Logits and log-probabilities of each row in a batch of its own, without padding."""
    batches = [apart(row[None]) for row in rows]
    return [(logits(port, batch)[0], scores(port, batch)[0]) for batch in batches]


@pytest.mark.parametrize("fill", ["zeros", "random"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding(side, fill, port, rows, alone, figure):
    size = (len(rows), 29)
    ids = np.zeros(size) if fill == "zeros" else np.random.default_rng(2).integers(0, SMALL.vocabulary, size)
    batch = padded(rows, 29, side, ids)
    all_logits, all_scores = logits(port, batch), scores(port, batch)
    assert np.isfinite(all_logits).all()
    assert np.isfinite(all_scores).all()
    for row, (own_logits, own_scores) in enumerate(alone):
        real = batch.segments[row] > 0
        figure("padded logits to unpadded", worst(all_logits[row, real], own_logits), 1e-5)
        if len(own_scores) > 1:
            difference = worst(all_scores[row, real][:-1], own_scores[:-1])
            figure("padded log-probs to unpadded", difference, 1e-5)


@pytest.mark.parametrize("spare", [0, 9])
def test_packing(spare, port, rows, alone, figure):
    batch = packed(rows, sum(LENGTHS) + spare)
    assert batch.segments.max() == len(rows)
    all_logits, all_scores = logits(port, batch)[0], scores(port, batch)[0]
    for segment, (own_logits, own_scores) in enumerate(alone, start=1):
        real = batch.segments[0] == segment
        figure("packed logits to those apart", worst(all_logits[real], own_logits), 1e-5)
        if len(own_scores) > 1:
            figure("packed log-probs to those apart", worst(all_scores[real][:-1], own_scores[:-1]), 1e-5)


def test_tokens_see_nothing_later_and_nothing_of_other_segments(port, rows):
    batch = packed(rows, sum(LENGTHS))
    before = logits(port, batch)[0]
    changed_at = int(np.flatnonzero(batch.segments[0] == 3)[7])
    tokens = batch.tokens.copy()
    tokens[0, changed_at] = (tokens[0, changed_at] + 1) % SMALL.vocabulary
    after = logits(port, batch._replace(tokens=tokens))[0]
    moved = np.flatnonzero((before != after).any(axis=-1))
    own_and_later = np.flatnonzero((batch.segments[0] == 3) & (np.arange(len(before)) >= changed_at))
    assert moved.tolist() == own_and_later.tolist()
