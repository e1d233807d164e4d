"""Opening any kind of stored model: a Hugging Face folder, a checkpoint folder or one step of it, a run.

A checkpoint folder holds `tokenizer/` and one folder a step with `parameters`, `optimizer` (absent from imported
models) and `metadata`; each of them has its checksums.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from psyche_jax.config import PromptSection
from psyche_jax.config_files import parse_config
from psyche_jax.data.chat import end_of_turn_id
from psyche_jax.errors import UserError, first_reason
from psyche_jax.model.adapters import as_trained, joined, merged, merged_parts, trained
from psyche_jax.model.config import ModelConfig, model_config_from_dict, read_hf_config
from psyche_jax.model.huggingface import (
    WeightFiles,
    copy_tokenizer,
    is_tokenizer,
    load_tokenizer,
    placed,
    read_parameters,
    unsound_tensors,
)
from psyche_jax.model.int8 import from_int8, in_int8, original_of
from psyche_jax.model.linear import Parameters
from psyche_jax.model.qwen2 import build
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, make_mesh
from psyche_jax.storage.arrays import Index, ReadPart, all_finite
from psyche_jax.storage.files import absolute, as_path, bucket_errors, in_bucket, new_folder, read_json, write_json
from psyche_jax.train.checkpoints import abstract_like, checkpoint_metadata
from psyche_jax.train.step_folders import (
    CHECKSUMS,
    FORMAT,
    PEFT_CONFIG,
    check_files,
    checksums_of,
    find_checkpoint,
    read_checkpoint_metadata,
    read_step_metadata,
    step_folders,
    write_checksums,
)
from psyche_jax.train.streaming import StoredArrays, stream_handler


def with_stop_tokens(config: ModelConfig, folder: Path) -> ModelConfig:
    """`config` with the stop tokens of the tokenizer in `folder`, if there is one, after its own.

    Raises:
      UserError: there is none at all; a token is named that the model does not have; or the tokenizer is broken.
    """
    stops = list(config.stop_token_ids)
    if is_tokenizer(folder):
        tokenizer = load_tokenizer(folder)
        if (size := max(tokenizer.get_vocab().values()) + 1) > config.vocab_size:  # ids may have gaps
            raise UserError(f"{folder}: the tokenizer has ids for {size} tokens, the model only {config.vocab_size}")
        if tokenizer.eos_token_id is not None:
            stops.append(tokenizer.eos_token_id)
        if tokenizer.chat_template is not None:
            with contextlib.suppress(UserError):  # a template without an end of turn adds nothing
                stops.append(end_of_turn_id(tokenizer))
    if not stops:
        raise UserError(
            f"{folder}: no stop token is set, so no response could end; "
            "add eos_token_id to generation_config.json, or eos_token to tokenizer_config.json"
        )
    for token in (*stops, config.bos_token_id, config.pad_token_id):
        if token is not None and token >= config.vocab_size:
            raise UserError(f"{folder}: token id {token} (bos, eos or pad) is not below vocab_size {config.vocab_size}")
    return dataclasses.replace(config, stop_token_ids=tuple(dict.fromkeys(stops)))


ORIGIN = "origin.json"  # in an imported checkpoint: its name on the hub, licence, language, by the keys of cards there
PROMPT_FILE = "psyche_prompt.json"  # in an exported folder: the system prompt and instruction it was trained with


@dataclass(frozen=True)
class StoredModel:
    """A model on disk, its weights not yet read.

    `prompt` is the one it was trained with, `max_new_tokens` the longest response of its GRPO; None if not known.
    """

    config: ModelConfig
    tokenizer_folder: Path
    prompt: PromptSection | None
    weights: Path  # a Hugging Face folder, or the folder of one step of a checkpoint
    base: "Base | None" = None  # where `weights` are adapters: what they are added to
    max_new_tokens: int | None = None

    @property
    def origin(self) -> "StoredModel":
        """The model that adapters were first trained on, through all stages; itself where there are none."""
        return self if self.base is None else self.base.model.origin

    def read_parameters(self, sharding: Sharding, dtype: jnp.dtype) -> Parameters:
        """Read the weights straight to where they belong on the mesh.

        Raises:
          UserError: they are missing, broken, or not those of `config`.
        """
        if (self.weights / "config.json").is_file():
            return read_parameters(self.weights, self.config, sharding, dtype)
        self.check()
        dtype = jnp.dtype("int8") if self.config.int8 else dtype
        base = None if self.base is None else self.base.model.read_merged(sharding, dtype)
        return joined(base, self._read_stored(sharding, dtype))

    def read_merged(self, sharding: Sharding, dtype: jnp.dtype) -> Parameters:
        """The same without adapters: these are merged into their base, whose weights are of `dtype` (int8: those of the
        linear maps). What is int8, or is to be, goes by way of the host, piece by piece."""
        int8 = dtype == jnp.int8
        if self.base is None and self.config.int8 == int8:
            return self.read_parameters(sharding, dtype)
        if int8 or self.config.int8:
            config = as_trained(self.config, "int8" if int8 else "float32", None)
            read, _ = self.reader(np.dtype(np.float32 if int8 else dtype))
            return placed(in_int8(read, config) if int8 else read, config, sharding, dtype)
        assert self.base is not None
        self.check()
        base = self.base.model.read_merged(sharding, dtype)
        return merged(self.config, base, self._read_stored(sharding, dtype), sharding)

    def reader(
        self, kind: np.dtype, original: "StoredModel | None" = None
    ) -> tuple[ReadPart, Callable[[str], tuple[int, ...]] | None]:
        """What reads parts of the parameters in a floating-point dtype, adapters merged into them in float32; and in
        which blocks they are stored. `original`: what is read in place of the int8 that the base of adapters is."""
        if (self.weights / "config.json").is_file():
            weights = WeightFiles(self.weights)
            weights.check(self.config)
            return lambda path, part: weights.read(path, part, kind), None
        self.check()
        chunk: Callable[[str], tuple[int, ...]] | None
        if self.base is None:
            arrays = StoredArrays(self.weights, self.config)
            read, chunk = from_int8(arrays.read) if self.config.int8 else arrays.read, arrays.chunk
        else:
            of_base, chunk = self.base.model.reader(np.dtype(np.float32))
            if original is not None:
                stored = StoredArrays(self.base.model.weights, self.base.model.config)
                of_base = original_of(stored.read, original.reader(np.dtype(np.float32))[0], original.weights)
            read = merged_parts(self.config, of_base, self.read_adapters())

        def finite(path: str, index: Index) -> np.ndarray:
            values = read(path, index).astype(kind, copy=False)
            if not all_finite(values):
                raise UserError(f"{self.weights}: {path} has values that are not finite in {kind}; use another model")
            return values

        return finite, chunk

    def read_adapters(self) -> Parameters:
        """The adapters alone, on the host, as they are stored."""
        assert self.base is not None
        one = Sharding(make_mesh(1, 1, 1, jax.local_devices()[:1]), TRAIN_RULES)
        return jax.device_get(self._read_stored(one, jnp.dtype("float32")))

    def _read_stored(self, sharding: Sharding, dtype: jnp.dtype) -> Parameters:
        """What the checkpoint holds: all parameters, or the adapters."""
        abstract = trained(abstract_parameters(self.config, sharding, dtype))
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                parameters = checkpointer.restore(absolute(self.weights / "parameters"), abstract)
        except jax.errors.JaxRuntimeError:
            raise  # of the device, not of the files
        except Exception as error:  # Orbax raises bare Exceptions on broken files
            raise UserError(f"{self.weights}: the checkpoint is broken: {first_reason(error)}") from None
        if names := unsound_tensors(parameters, sharding):
            raise UserError(f"{self.weights}: {names[0]} has values that are not finite; use an earlier checkpoint")
        return parameters

    def check_shapes(self) -> None:
        """Raise UserError unless a Hugging Face folder holds the tensors that its config names."""
        if self.base is not None:
            self.base.model.check_shapes()
        if (self.weights / "config.json").is_file():
            WeightFiles(self.weights).check(self.config)

    def check(self) -> None:
        """Raise UserError unless a checkpoint's weights are as they were written; other folders hold no checksums.

        Of adapters also the base is looked at: it must be the one that they were trained on.
        """
        if not (self.weights / "config.json").is_file():
            read_step_metadata(self.weights, ("parameters",))
        if self.base is not None and identity(self.base.model) != self.base.identity:
            raise UserError(
                f"{self.weights}: its adapters were trained on another base than the model that is now at "
                f"{self.base.model.weights}; put the original back"
            )


@dataclass(frozen=True)
class Base:
    """The model that adapters are added to, and what `identity` said of it when they were trained."""

    model: StoredModel
    identity: str

    def as_metadata(self) -> dict[str, str]:
        """For a checkpoint of adapters: where the base is, and what."""
        return {"path": str(absolute(self.model.weights)), "identity": self.identity}


def identity(model: StoredModel) -> str:
    """A hash of what a model's weights are: the name, size and CRC32C of each of their files, which are read whole.

    The same for a copy of the folder; of objects in a bucket the CRC32C is the bucket's.
    """
    of_hugging_face = (model.weights / "config.json").is_file()
    root = model.weights if of_hugging_face else model.weights / "parameters"
    files = checksums_of(root, ".safetensors" if of_hugging_face else "")
    parts = sorted((name, entry["bytes"], entry["crc32c"]) for name, entry in files.items())
    if model.base is not None:
        return hashlib.sha256(repr([*parts, model.base.identity]).encode()).hexdigest()[:16]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def save_imported(
    folder: Path, model: StoredModel, parameters: Parameters, origin: dict[str, Any] | None = None
) -> None:
    """Write a model as a new checkpoint folder, at step 0, without optimizer state.

    Args:
      folder: local or in a bucket.
      model: whose tokenizer, config and prompt it gets.
      parameters: a tree of `streaming.StreamedArray`s, which are read while they are written.
      origin: what cards of models that are trained from it will say of it.

    Raises:
      UserError: the folder exists, or its bucket cannot be used.
    """
    with new_folder(folder) as partial:
        (partial / "tokenizer").mkdir(parents=True)
        if origin:
            write_json(partial / ORIGIN, origin)
        write_tokenizer(model.tokenizer_folder, partial / "tokenizer")
        more = {} if model.base is None else {"base": model.base.as_metadata()}
        metadata = {**checkpoint_metadata(model.config, model.prompt, **more), "format": FORMAT, "step": 0}
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        handlers = {"parameters": stream_handler(), "metadata": ocp.JsonCheckpointHandler()}
        with ocp.CheckpointManager(absolute(partial), options=options, item_handlers=handlers) as manager:
            items = {
                "parameters": ocp.args.PyTreeSave(parameters),
                "metadata": ocp.args.JsonSave(metadata),
            }
            manager.save(0, args=ocp.args.Composite(**items))
        write_checksums(partial / "0")


def write_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer into a checkpoint folder, its checksums last.

    Raises:
      UserError: there is none in `source`, or the bucket cannot be used.
    """
    copy_tokenizer(source, target)
    write_checksums(target)


def holds_tokenizer(folder: Path) -> bool:
    """Whether `write_tokenizer` wrote there and came to its end."""
    return is_tokenizer(folder) and (folder / CHECKSUMS).is_file()


def open_model(path: str) -> StoredModel:
    """Find a Hugging Face folder, a checkpoint folder, one step of it, or a run (its latest checkpoint; RUN/best: its
    best one).

    Checkpoints and runs may be in a bucket.

    Raises:
      UserError: `path` is none of these, or its config is broken, or its bucket cannot be used.
    """
    folder = as_path(path)
    with bucket_errors(folder):
        return _open_model(folder)


def _open_model(folder: Path) -> StoredModel:
    if (folder / "config.json").is_file():
        if in_bucket(folder):
            raise UserError(f"{folder}: is a Hugging Face folder in a bucket; copy it to a disk (gcloud storage cp -r)")
        return StoredModel(with_stop_tokens(read_hf_config(folder), folder), folder, exported_prompt(folder), folder)
    if (folder / PEFT_CONFIG).is_file():
        raise UserError(f"{folder}: is a folder of adapters; import it first: psyche import {folder} CHECKPOINT")
    step_folder = find_checkpoint(folder)
    metadata = read_checkpoint_metadata(step_folder)
    try:
        values = metadata["prompt"]
        config = model_config_from_dict(metadata["model"])
        of_base = None if config.adapter is None else (metadata["base"]["path"], metadata["base"]["identity"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{step_folder}: the checkpoint's metadata are broken: {first_reason(error)}") from None
    prompt = None if values is None else parse_config(PromptSection, values, str(step_folder))
    tokenizer = step_folder.parent / "tokenizer"
    if holds_tokenizer(tokenizer):
        check_files(tokenizer)
    try:
        base = None if of_base is None else Base(open_model(of_base[0]), of_base[1])
    except UserError as error:
        raise UserError(f"{step_folder}: the base of its adapters cannot be opened: {error}") from None
    run = metadata.get("config")
    longest = run.get("max_new_tokens") if isinstance(run, dict) else None
    return StoredModel(with_stop_tokens(config, tokenizer), tokenizer, prompt, step_folder, base, longest)


def exported_prompt(folder: Path) -> PromptSection | None:
    """The prompt that an exported model was trained with, None where the folder does not say."""
    path = folder / PROMPT_FILE
    return parse_config(PromptSection, read_json(path), str(path)) if path.is_file() else None


def with_stop_tokens_of(model: StoredModel, checkpoints: Path) -> StoredModel:
    """`model` with the stop tokens that a run's checkpoints, if there are any, were trained with."""
    with bucket_errors(checkpoints):
        if not checkpoints.is_dir() or not step_folders(checkpoints)[0]:
            return model
        try:
            known = read_checkpoint_metadata(find_checkpoint(checkpoints))["model"]["stop_token_ids"]
            return replace(model, config=replace(model.config, stop_token_ids=tuple(known)))
        except (UserError, LookupError, TypeError):  # a broken checkpoint: restoring it says so, and what to do
            return model


def abstract_parameters(config: ModelConfig, sharding: Sharding, dtype: jnp.dtype) -> Parameters:
    """Shapes, dtypes and places of a model's parameters, as Orbax wants them for restoring."""
    abstract = build(config, dtype)[1]
    return abstract_like(nnx.to_pure_dict(abstract), sharding.of_parameters(abstract))
