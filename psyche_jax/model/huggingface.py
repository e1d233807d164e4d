"""Weights and tokenizers between Hugging Face folders and this package. Needs no torch."""

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from safetensors import SafetensorError, safe_open

from psyche_jax.errors import UserError, first_reason
from psyche_jax.model.config import ModelConfig, hf_config, hf_generation_config
from psyche_jax.model.linear import Parameters
from psyche_jax.model.qwen2 import build
from psyche_jax.model.sharding import Sharding
from psyche_jax.model.template_trial import excess
from psyche_jax.storage.arrays import Index, ReadPart, all_finite, blocks, read_ahead
from psyche_jax.storage.files import in_bucket, read_json, write_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
)
_INDEX = "model.safetensors.index.json"
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json")
MODEL_FILES = (
    "*.safetensors",
    _INDEX,
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
)
_LAYER_NAMES = {
    "input_norm/scale": "input_layernorm.weight",
    "q_proj/kernel": "self_attn.q_proj.weight",
    "q_proj/bias": "self_attn.q_proj.bias",
    "k_proj/kernel": "self_attn.k_proj.weight",
    "k_proj/bias": "self_attn.k_proj.bias",
    "v_proj/kernel": "self_attn.v_proj.weight",
    "v_proj/bias": "self_attn.v_proj.bias",
    "o_proj/kernel": "self_attn.o_proj.weight",
    "o_proj/bias": "self_attn.o_proj.bias",
    "q_norm/scale": "self_attn.q_norm.weight",
    "k_norm/scale": "self_attn.k_norm.weight",
    "post_attention_norm/scale": "post_attention_layernorm.weight",
    "gate_proj/kernel": "mlp.gate_proj.weight",
    "up_proj/kernel": "mlp.up_proj.weight",
    "down_proj/kernel": "mlp.down_proj.weight",
}
_ADAPTER_NAMES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
_TOP_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head": "lm_head.weight",
}
FLOATS = ("F64", "F32", "F16", "BF16")
_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16"}
_SHARD_BYTES = 4 * 2**30
_PROCESSOR_TEMPLATE = "chat_template.json"  # where processors kept it
_TEMPLATE_SECONDS = 5
_TEMPLATE_CHARACTERS = 100_000
_OF_A_SESSION = ("backend", "is_local", "local_files_only")  # transformers 5 saves how it was loaded


def tensor_names(path: str, layers: int) -> list[str]:
    """Names in Hugging Face's files of the parameter at `path` ("layers/q_proj/kernel"): one for each layer.

    Those of an adapter's factors are `peft`'s.
    """
    if path in _TOP_NAMES:
        return [_TOP_NAMES[path]]
    module, _, factor = path.rpartition("/")
    if factor == "kernel_scale":  # which exported folders do not have
        return [f"{name}_scale" for name in tensor_names(f"{module}/kernel", layers)]
    if factor in _ADAPTER_NAMES:
        of_map = tensor_names(f"{module}/kernel", layers)
        return [f"base_model.model.{name.removesuffix('weight')}{_ADAPTER_NAMES[factor]}" for name in of_map]
    name = _LAYER_NAMES[path.removeprefix("layers/")]
    return [f"model.layers.{layer}.{name}" for layer in range(layers)]


class WeightFiles:
    """The tensors of a model folder's safetensors, single or sharded with an index, read slice by slice."""

    def __init__(self, folder: Path) -> None:
        index, whole = folder / _INDEX, folder / "model.safetensors"
        if adapter := next((name for name in _ADAPTER_FILES if (folder / name).is_file()), None):
            raise UserError(f"{folder}: {adapter} would be left out; move it to another folder and import that")
        if index.is_file():
            content = read_json(index)
            weight_map = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{index}: has no weight_map, which says in which file each tensor is")
            files = {name: folder / str(file) for name, file in weight_map.items()}
            # Path.is_file raises where a name is too long to be one.
            if absent := sorted({path.name[:99] for path in files.values() if not os.path.isfile(path)}):  # noqa: PTH113
                raise UserError(f"{index}: names files that are absent: {_some(absent)}")
        elif whole.is_file():
            files = {}
        else:
            raise UserError(f"{folder}: has no model.safetensors and no model.safetensors.index.json")
        paths = sorted(set(files.values())) or [whole]
        if whole not in paths and whole.is_file():  # which transformers would read
            raise UserError(f"{index}: does not name model.safetensors, which is there too; remove the outdated one")
        self._slices: dict[str, Any] = {}
        for path in paths:
            try:
                handle = safe_open(path, framework="np")
                found = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: is broken or cut short ({error}); copy it again") from None
            if twice := sorted(found.keys() & self._slices.keys()):
                raise UserError(f"{path}: holds tensors that another file of the folder holds too: {_some(twice)}")
            self._slices |= found
        if missing := sorted(set(files) - set(self._slices)):
            raise UserError(f"{index}: names tensors that are in no file: {_some(missing)}")
        self.folder = folder

    def check(self, config: ModelConfig) -> None:
        """Compare names, shapes and dtypes with what `config` needs.

        Raises:
          UserError: naming the missing, extra, mis-shaped and quantized tensors, or a tied head of its own values.
        """
        if config.num_hidden_layers > len(self._slices):  # whose names would be many
            raise UserError(
                f"{self.folder}: weights do not fit config.json: num_hidden_layers is {config.num_hidden_layers}, "
                f"and the files hold {len(self._slices)} tensors"
            )
        expected = dict(expected_shapes(config))
        found = {n for n in self._slices if not n.endswith("rotary_emb.inv_freq")}  # a buffer in old exports
        head, embedding = _TOP_NAMES["head"], _TOP_NAMES["embedding"]
        repeated = config.tie_word_embeddings and head in found
        if repeated:
            expected[head] = expected[embedding]
        faults = []
        if missing := sorted(set(expected) - found):
            faults.append(f"missing {_some(missing)}")
        if extra := sorted(found - set(expected)):
            faults.append(f"extra {_some(extra)}")
        shapes = {name: tuple(self._slices[name].get_shape()) for name in found & set(expected)}
        if wrong := sorted(f"{n} {shapes[n]}, not {expected[n]}" for n in shapes if shapes[n] != expected[n]):
            faults.append(f"mis-shaped {_some(wrong)}")
        dtypes = {name: self._slices[name].get_dtype() for name in shapes}
        if quantized := sorted(f"{n} {dtypes[n]}" for n in dtypes if dtypes[n] not in FLOATS):
            faults.append(f"not in floating point {_some(quantized)}")
        if faults:
            raise UserError(f"{self.folder}: weights do not fit config.json: {'; '.join(faults)}")
        if repeated and not self._equal(head, embedding):
            raise UserError(
                f"{self.folder}: {head} differs from {embedding}, which config.json's tie_word_embeddings would use "
                "instead; set that to false if the head is separate"
            )

    def _equal(self, one: str, other: str) -> bool:
        shape, kind = self._slices[one].get_shape(), np.dtype(np.float32)
        return all(
            np.array_equal(self._part(one, index, kind), self._part(other, index, kind))
            for index in blocks(shape, (1, *shape[1:]))
        )

    def _part(self, name: str, index: Index, dtype: np.dtype) -> np.ndarray:
        try:
            with np.errstate(over="ignore"):  # what overflows is infinite, and is refused
                values = self._slices[name][index].astype(dtype, copy=False)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.folder}: {name} cannot be read ({error}); copy the files again") from None
        if not all_finite(values):
            raise UserError(f"{self.folder}: {name} has values that are not finite in {dtype}; use other weights")
        return values

    def read(self, path: str, index: Index, dtype: np.dtype) -> np.ndarray:
        """The part `index` of the parameter at `path` ("layers/q_proj/kernel"), whose layers are tensors of their own.

        Every slice of `index` has a start and a stop.

        Raises:
          UserError: the file cannot be read there, or holds NaN or infinity.
        """
        if path in _TOP_NAMES:
            return self._part(_TOP_NAMES[path], index, dtype)
        name = f"model.layers.{{}}.{_LAYER_NAMES[path.removeprefix('layers/')]}"
        layers = range(index[0].start, index[0].stop)
        parts = [self._part(name.format(layer), index[1:], dtype) for layer in layers]
        return np.stack(parts) if len(parts) > 1 else parts[0][None]


def _some(names: Sequence[str]) -> str:
    """All of `names` if they are few, else the first of them and how many more there are."""
    return ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:4])} and {len(names) - 4} more"


def read_parameters(folder: Path, config: ModelConfig, sharding: Sharding, dtype: jnp.dtype) -> Parameters:
    """Read a model folder's weights straight to where they belong on the mesh.

    Raises:
      UserError: files are absent or broken, or tensors do not fit `config` (each named).
    """
    weights = WeightFiles(folder)
    weights.check(config)
    return placed(lambda path, index: weights.read(path, index, np.dtype(dtype)), config, sharding, dtype)


def placed(read: ReadPart, config: ModelConfig, sharding: Sharding, dtype: jnp.dtype) -> Parameters:
    """A model's parameters on the mesh, each part of which `read` gives in the dtype that it is to have."""
    abstract = build(config, dtype)[1]
    flat_shardings = traverse_util.flatten_dict(sharding.of_parameters(abstract), sep="/")
    flat_shapes = traverse_util.flatten_dict(nnx.to_pure_dict(abstract), sep="/")

    def place(path: str) -> jax.Array:
        shape = flat_shapes[path].shape

        def part(index: Index | None) -> np.ndarray:
            assert index is not None
            whole = tuple(slice(*bounds.indices(size)) for bounds, size in zip(index, shape, strict=True))
            return read(path, whole)

        return jax.make_array_from_callback(shape, flat_shardings[path], part)

    return traverse_util.unflatten_dict({path: place(path) for path in flat_shapes}, sep="/")


def unsound_tensors(parameters: Parameters, sharding: Sharding) -> list[str]:
    """Names of the tensors, as in Hugging Face's files, that hold NaN or infinity; looked for on their devices."""
    flat = traverse_util.flatten_dict(parameters, sep="/")

    @partial(jax.jit, out_shardings=sharding.named())
    def sound(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
        layered = {path: 1 if path.startswith("layers/") else 0 for path in flat}
        return {path: jnp.isfinite(x).all(range(layered[path], x.ndim)) for path, x in flat.items()}

    return [
        name
        for path, flags in jax.device_get(sound(flat)).items()
        for name, flag in zip(tensor_names(path, flags.size), flags.ravel(), strict=True)
        if not flag
    ]


def write_weights(folder: Path, config: ModelConfig, parameters: Parameters) -> None:
    """Write parameters that are in memory as a model's weights, in their own dtype; see `stream_weights`."""
    flat = traverse_util.flatten_dict(parameters, sep="/")
    dtype = np.dtype(next(iter(flat.values())).dtype)
    stream_weights(folder, config, dtype, lambda path, index: np.asarray(flat[path][index]))


def stream_weights(
    folder: Path,
    config: ModelConfig,
    dtype: np.dtype,
    read: ReadPart,
    chunk: Callable[[str], tuple[int, ...]] | None = None,
) -> None:
    """Write weights as safetensors, sharded with an index when over 4 GiB, and the configs.

    Args:
      folder: where they are written.
      config: of the model.
      dtype: float32 or bfloat16, of the files.
      read: gives the part `index` of the parameter at a path, in `dtype`; called in the files' order, in a thread.
      chunk: in which blocks the parameter at a path is stored, so that none is read twice.
    """
    tensors = {
        name: (path, layer if path.startswith("layers/") else None)
        for path in traverse_util.flatten_dict(nnx.to_pure_dict(build(config)[1]), sep="/")
        for layer, name in enumerate(tensor_names(path, config.num_hidden_layers))
    }
    shapes = dict(expected_shapes(config))
    shards = _shards({name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()})

    def jobs(names: list[str]) -> Iterator[tuple[str, Index]]:
        for name in names:
            path, layer = tensors[name]
            rows = chunk(path)[0 if layer is None else 1] if chunk else 1
            for index in blocks(shapes[name], (rows, *shapes[name][1:])):
                yield path, index if layer is None else (slice(layer, layer + 1), *index)

    for file, names in shards.items():
        with (folder / file).open("wb") as out:
            out.write(_header({name: shapes[name] for name in names}, dtype))
            for _, values in read_ahead(lambda job: read(*job), jobs(names)):
                out.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
            out.flush()
            os.fsync(out.fileno())
    if len(shards) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / _INDEX, index)
    write_json(folder / "config.json", hf_config(config, str(dtype)))
    write_json(folder / "generation_config.json", hf_generation_config(config))


def _shards(sizes: dict[str, int]) -> dict[str, list[str]]:
    """Names of files, each with those of its tensors; `sizes` are the tensors' bytes, in order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled + size > _SHARD_BYTES and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": names for number, names in enumerate(shards, start=1)}


def _header(shapes: dict[str, tuple[int, ...]], dtype: np.dtype) -> bytes:
    """The start of a safetensors file: the length of a JSON object, and that object, which says where tensors are."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": _DTYPE_NAMES[str(dtype)], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight
    return len(text).to_bytes(8, "little") + text


def is_tokenizer(folder: Path) -> bool:
    """Whether there is a fast tokenizer in `folder`."""
    return (folder / TOKENIZER_FILES[0]).is_file()


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files, chat template included; from and to local folders or buckets.

    The file that makes a folder a tokenizer (`is_tokenizer`) comes last, so that a copy is whole or none.

    Raises:
      UserError: there is no fast tokenizer in `source`.
    """
    if not is_tokenizer(source):
        _check_there(source)
        raise UserError(f"{source}: has no tokenizer.json; save it once with a fast tokenizer of transformers")
    for name in reversed(TOKENIZER_FILES):
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())


def _check_there(folder: Path) -> None:
    if not in_bucket(folder) and not folder.is_dir():
        raise UserError(f"{folder}: {'is a file, not a folder' if folder.exists() else 'no such folder'}")


def load_tokenizer(folder: Path) -> Any:
    """The `transformers` tokenizer of a folder; no code in the folder is run, nothing comes from the Hugging Face hub.

    Of several chat templates it has the one called `default`.

    Raises:
      UserError: the folder's tokenizer is missing or broken, or its chat template is, or has no bounds.
    """
    from transformers import PreTrainedTokenizerFast

    if not is_tokenizer(folder):
        _check_there(folder)
        raise UserError(f"{folder}: has no tokenizer.json")
    if in_bucket(folder):
        with tempfile.TemporaryDirectory() as local:
            copy_tokenizer(folder, Path(local))
            return load_tokenizer(Path(local))
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise bare Exceptions on broken files
        raise UserError(f"{folder}: the tokenizer cannot be read: {first_reason(error)}") from None
    tokenizer.chat_template = _default_template(folder, tokenizer.chat_template)
    if tokenizer.chat_template is not None:
        _try_template(folder, tokenizer)
    return tokenizer


def _default_template(folder: Path, found: Any) -> str | None:
    if found is None and (folder / _PROCESSOR_TEMPLATE).is_file():
        content = read_json(folder / _PROCESSOR_TEMPLATE)
        found = content.get("chat_template") if isinstance(content, dict) else content
    if isinstance(found, dict):
        if "default" not in found:
            names = ", ".join(map(str, found))
            raise UserError(f"{folder}: none of its chat templates ({names}) is called default; rename one")
        found = found["default"]
    if found is not None and not isinstance(found, str):
        raise UserError(f"{folder}: the tokenizer's chat template is broken: it is not text; use Qwen2.5's")
    return found


def _try_template(folder: Path, tokenizer: Any) -> None:
    """Render a short conversation, in bounds: a template is a program, and may run or write for ever.

    Raises:
      UserError: it fails, takes seconds or writes a book.
    """
    deadline = time.thread_time() + _TEMPLATE_SECONDS  # of a CPU: a busy machine is no fault of the template

    def look(*_: Any) -> Any:
        if time.thread_time() > deadline:
            raise TimeoutError(f"it runs for more than {_TEMPLATE_SECONDS} seconds")
        return look

    turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}]
    if reason := excess(tokenizer.chat_template, json.dumps(turns), _TEMPLATE_SECONDS):
        raise UserError(f"{folder}: the tokenizer's chat template is broken: {reason}; use Qwen2.5's")
    former = sys.gettrace()
    sys.settrace(look)  # called at each line, also of templates; in this thread only
    try:
        for length in (1, 2):
            text = tokenizer.apply_chat_template(turns[:length], tokenize=False, add_generation_prompt=length == 1)
            if len(text) > _TEMPLATE_CHARACTERS:
                raise ValueError(f"it writes {len(text):,} characters around {length} of one")
    except Exception as error:  # whatever a program can raise
        reason = first_reason(error)
        raise UserError(f"{folder}: the tokenizer's chat template is broken: {reason}; use Qwen2.5's") from None
    finally:
        sys.settrace(former)


def make_portable(folder: Path) -> None:
    """Rewrite a tokenizer's config so that transformers 4 reads it too: 5 has names of its own for some things."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    values = read_json(path)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    write_json(path, {name: value for name, value in values.items() if name not in _OF_A_SESSION})


def expected_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of the model: the embedding, layer by layer, the final norm, the head."""
    shapes = {p: v.shape for p, v in traverse_util.flatten_dict(nnx.to_pure_dict(build(config)[1]), sep="/").items()}
    stacked = [path for path in shapes if path.startswith("layers/")]
    yield _TOP_NAMES["embedding"], shapes["embedding"]
    for layer in range(config.num_hidden_layers):
        for path in stacked:
            yield tensor_names(path, config.num_hidden_layers)[layer], shapes[path][1:]
    for path in ("final_norm/scale", "head"):
        if path in shapes:
            yield _TOP_NAMES[path], shapes[path]
