"""Large arrays in blocks: how they are cut, read ahead and looked through for what is not finite."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias, TypeVar

import numpy as np

Index: TypeAlias = tuple[slice, ...]
ReadPart: TypeAlias = Callable[[str, Index], np.ndarray]
"""The part `index`, every slice with a start and a stop, of the parameter at a path ("layers/q_proj/kernel")."""
Job = TypeVar("Job")
Result = TypeVar("Result")

# One layer's largest matrix of a 7B model (18944 × 3584) is one piece; a few of them are in memory at a time.
PIECE_ELEMENTS = 80 * 2**20


def blocks(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[Index]:
    """Cut an array of `shape`, stored in chunks, into blocks of whole chunks, in row-major order.

    A block has `PIECE_ELEMENTS` elements at most, unless a single chunk has more.
    """
    block = list(chunk)
    for axis in reversed(range(len(shape))):
        block[axis] = min(shape[axis], block[axis] * max(1, PIECE_ELEMENTS // math.prod(block)))
        if block[axis] < shape[axis]:
            break
    starts = (range(0, size, step) for size, step in zip(shape, block, strict=True))
    for corner in itertools.product(*starts):
        bounds = zip(corner, block, shape, strict=True)
        yield tuple(slice(start, min(start + step, size)) for start, step, size in bounds)


def read_ahead(read: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[tuple[Job, Result]]:
    """Each job with what `read` returns for it; the next one is read in a thread while this one is used."""
    with ThreadPoolExecutor(1) as reader:
        waiting = None
        for job in jobs:
            following = job, reader.submit(read, job)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def all_finite(values: np.ndarray) -> bool:
    """Return whether there is no NaN and no infinity: both have all bits of the exponent set, cheap to find."""
    bits = values.view(f"u{values.itemsize}")
    infinity = np.array(np.inf, values.dtype).view(bits.dtype)
    return not values.size or bool((bits & infinity).max() < infinity)
