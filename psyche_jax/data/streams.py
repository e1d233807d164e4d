"""Batches of fixed shapes. The batch of step n is a pure function of the data, the seed and n."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import grain
import numpy as np

from psyche_jax.data.chat import TokenizedExample

Batch = dict[str, np.ndarray]
Item = TypeVar("Item")
Part = tuple[int, float]
"""How many of the items, one after the other, belong together, and which share of all batches they get."""

_THREADS = 2
_PREFETCH = 4


@runtime_checkable
class ReadsSeveral(Protocol[Item]):
    """Items that are better read together than one by one."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[Item]:
        """The items at these places."""


def batches(
    items: Sequence[Any] | ReadsSeveral[Any],
    batch_size: int,
    seed: int,
    collate: Callable[[list[Any]], Batch],
    steps: range,
    parts: Sequence[Part] = (),
    rows: slice = slice(None),
    prefetch: int = _PREFETCH,
) -> Iterator[Batch]:
    """Batches of `steps`, in order, prepared ahead by threads.

    The items are shuffled anew in each epoch and follow each other without a gap, so that batch n holds positions
    n·batch_size to (n+1)·batch_size of that endless sequence, whichever step a run starts from.

    Args:
      items: what is trained on.
      batch_size: items of a batch on all hosts together.
      seed: of the shuffling.
      collate: makes a batch of items.
      steps: which batches.
      parts: sizes and weights of what the items are a mixture of; each part is shuffled by itself and goes through
        epochs of its own. None: all are one.
      rows: which places of every batch are read: this host's.
      prefetch: how many batches may be ready.
    """
    indices_of = batch_indices(parts or [(len(items), 1.0)], batch_size, seed, rows)

    def batch(step: int) -> Batch:
        indices = indices_of(step)
        if isinstance(items, ReadsSeveral):
            return collate(items.read(indices))
        return collate([items[index] for index in indices])

    reading = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(steps).map(batch).to_iter_dataset(reading))


def batch_indices(
    parts: Sequence[Part], batch_size: int, seed: int, rows: slice = slice(None)
) -> Callable[[int], list[int]]:
    """What gives the indices of the items of step n's batch, or of its `rows`; arguments as of `batches`."""
    sequences = []
    first = 0
    for number, (size, _) in enumerate(parts):
        own_seed = (seed + number * 0x9E3779B1) % 2**32  # epochs count the seed up by ones
        sequences.append(grain.MapDataset.range(first, first + size).shuffle(seed=own_seed).repeat())
        first += size
    turns, earlier = _turns([weight for _, weight in parts])
    shares = np.bincount(turns)

    def index(place: int) -> int:
        period, turn = divmod(place, len(turns))
        part = turns[turn]
        return sequences[part][int(period * shares[part] + earlier[turn])]

    return lambda step: [index(place) for place in range(step * batch_size, (step + 1) * batch_size)[rows]]


def _turns(weights: Sequence[float]) -> tuple[list[int], list[int]]:
    """Which part comes at each place of a period, and how often it came before in it; shares are exact to 0.1 %.

    The part that is furthest behind its share comes next (smooth weighted round-robin). `grain.MapDataset.mix` has
    another order, in which a run that was begun with this one could not resume.
    """
    counts = [max(1, round(1000 * weight / sum(weights))) for weight in weights]
    counts = [count // math.gcd(*counts) for count in counts]
    period = sum(counts)
    given = [0] * len(counts)
    turns, earlier = [], []
    for turn in range(1, period + 1):
        part = max(range(len(counts)), key=lambda part: counts[part] * turn - given[part] * period)
        turns.append(part)
        earlier.append(given[part])
        given[part] += 1
    return turns, earlier


def length_bucket(length: int, largest: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, … that holds `length`, at most `largest`: few shapes to compile."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return min(size, largest)


def pad_examples(examples: Sequence[TokenizedExample], largest: int) -> Batch:
    """Right-pads examples: `tokens`, `segments`, `positions` int32 and `loss_mask` bool, [examples, bucket]."""
    length = length_bucket(max(len(example.tokens) for example in examples), largest)
    shape = (len(examples), length)
    batch = {
        "tokens": np.zeros(shape, np.int32),
        "segments": np.zeros(shape, np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (len(examples), 1)),
        "loss_mask": np.zeros(shape, bool),
    }
    for row, example in enumerate(examples):
        size = len(example.tokens)
        batch["tokens"][row, :size] = example.tokens
        batch["segments"][row, :size] = 1
        batch["loss_mask"][row, :size] = example.loss_mask
    return batch


def pad_prompts(prompts: Sequence[Sequence[int]], largest: int) -> Batch:
    """Left-pads prompts: `tokens` int32 and `mask` bool, [prompts, bucket]."""
    length = length_bucket(max(map(len, prompts)), largest)
    tokens = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return {"tokens": tokens, "mask": mask}
