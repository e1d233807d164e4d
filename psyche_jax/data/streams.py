"""Batches of fixed shapes. The batch of step n is a pure function of the data, the seed and n."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import grain
import numpy as np

from psyche_jax.data.chat import TokenizedExample

Batch = dict[str, np.ndarray]
Item = TypeVar("Item")

_PREFETCH = 4


def batches(
    items: Sequence[Item],
    batch_size: int,
    seed: int,
    collate: Callable[[list[Item]], Batch],
    steps: range,
) -> Iterator[Batch]:
    """Batches of `steps`, in order, prepared ahead by threads.

    The items are shuffled anew in each epoch and follow each other without a gap, so that batch n holds positions
    n·batch_size to (n+1)·batch_size of that endless sequence, whichever step a run starts from.
    """
    epochs = max(1, math.ceil(steps.stop * batch_size / len(items)))  # not endless: Grain cannot batch that by ones
    dataset = grain.MapDataset.source(_Source(items)).shuffle(seed=seed).repeat(epochs)
    dataset = dataset.batch(batch_size, batch_fn=lambda batch: collate(list(batch)))
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH)
    return iter(dataset.slice(slice(steps.start, steps.stop)).to_iter_dataset(reading))


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


class _Source:
    """A sequence as Grain's random-access source."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        return self._items[index]
