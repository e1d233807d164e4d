"""Linear maps in int8: the weights of each output are whole numbers up to 127, times a float32 scale of that output.

The scale is the largest absolute weight / 127. Embedding, head, norms and biases are not quantized: they are bfloat16.
`Linear` in `model/linear.py` computes with them. Arrays here are NumPy's, on their way from files.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from psyche_jax.errors import UserError
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.qwen2 import build
from psyche_jax.storage.arrays import Index, ReadPart

_LARGEST = np.float32(127)
_OTHERS = np.dtype(jnp.bfloat16)


def scales(weights: np.ndarray) -> np.ndarray:
    """Of float32 weights [..., out, in], float32 [..., out]; that of an output whose weights are all zero is 1."""
    largest = np.maximum(weights.max(axis=-1), -weights.min(axis=-1))
    return np.where(largest > 0, largest / _LARGEST, np.float32(1))


def quantized(weights: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The int8 that are nearest to float32 `weights` [..., out, in], given the scales of their outputs."""
    return np.rint(weights / scale[..., None]).astype(np.int8)


def in_int8(read: ReadPart, config: ModelConfig) -> ReadPart:
    """What reads a model's parameters in int8, given what reads them in float32; of kernels a layer at a time.

    Scales are those of whole outputs: of a part that has not all of their inputs, these are read as well.
    """
    shapes = traverse_util.flatten_dict(nnx.to_pure_dict(build(config)[1]), sep="/")
    known: dict[tuple[str, int, int, int], np.ndarray] = {}

    def scale_of(path: str, layer: int, rows: slice) -> np.ndarray:
        key = path, layer, rows.start, rows.stop
        if key not in known:
            whole = (slice(layer, layer + 1), rows, slice(0, shapes[path].shape[2]))
            known[key] = scales(read(path, whole)[0])
        return known[key]

    def of_layer(path: str, layer: int, rows: slice, columns: slice) -> np.ndarray:
        weights = read(path, (slice(layer, layer + 1), rows, columns))[0]
        if weights.shape[1] == shapes[path].shape[2]:
            known[path, layer, rows.start, rows.stop] = scales(weights)  # so that nothing is read twice
        return quantized(weights, scale_of(path, layer, rows))

    def part(path: str, index: Index) -> np.ndarray:
        if path.endswith("/kernel"):
            result = np.empty([bounds.stop - bounds.start for bounds in index], np.int8)
            for number, layer in enumerate(range(index[0].start, index[0].stop)):
                result[number] = of_layer(path, layer, *index[1:])
            return result
        if path.endswith("/kernel_scale"):
            kernel = path.removesuffix("_scale")
            return np.stack([scale_of(kernel, layer, index[1]) for layer in range(index[0].start, index[0].stop)])
        return read(path, index).astype(_OTHERS)

    return part


def from_int8(read: ReadPart) -> ReadPart:
    """What reads a model's parameters in float32, given what reads them as they are stored, in int8."""

    def part(path: str, index: Index) -> np.ndarray:
        values = read(path, index).astype(np.float32)
        if path.endswith("/kernel"):
            values *= read(f"{path}_scale", index[:2])[..., None]
        return values

    return part


def original_of(stored: ReadPart, read: ReadPart, folder: Path) -> ReadPart:
    """`read`, which must give what `stored` gives in int8.

    Raises:
      UserError: where a part is read that gives something else; `folder` is where it is read.
    """

    def part(path: str, index: Index) -> np.ndarray:
        values = read(path, index)
        if path.endswith("/kernel"):
            found = quantized(values, stored(f"{path}_scale", index[:2]))
        else:
            found = values.astype(_OTHERS)
        if not np.array_equal(found, stored(path, index)):
            raise UserError(f"--base: {folder} is not what the int8 base was made from: its {path} differs")
        return values

    return part
