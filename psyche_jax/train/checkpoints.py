"""Orbax checkpoints: parameters, optimizer state and what it takes to go on; and opening any kind of model.

A checkpoint folder holds `tokenizer/` and one folder a step with `parameters`, `optimizer` (absent from imported
models) and `metadata`; each of them has its checksums.
"""

import contextlib
import dataclasses
import datetime
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint import checkpoint_managers

from psyche_jax.config import PromptSection
from psyche_jax.config_files import config_to_dict, parse_config
from psyche_jax.errors import UserError, first_reason
from psyche_jax.files import absolute, as_path, bucket_errors, files_under, in_bucket, new_folder, read_json
from psyche_jax.model.config import ModelConfig, model_config_from_dict, read_hf_config
from psyche_jax.model.huggingface import copy_tokenizer, is_tokenizer, read_parameters
from psyche_jax.model.qwen2 import Parameters, build
from psyche_jax.model.sharding import Sharding
from psyche_jax.train.checksums import FILE as CHECKSUMS
from psyche_jax.train.checksums import check_files, write_checksums
from psyche_jax.train.mismatches import array_differences, metadata_differences
from psyche_jax.train.state import TrainState
from psyche_jax.train.streaming import save_args, stream_handler

FORMAT = 2  # 1 had no checksums
SAVE_SECONDS = 1200  # how long writing one in the background may take, with all that is tried again
_GLANCE = 1 << 16
PROMPT_FILE = "psyche_prompt.json"  # in an exported folder: the system prompt and instruction it was trained with


@dataclass(frozen=True)
class StoredModel:
    """A model on disk, its weights not yet read. `prompt` is the one it was trained with, None if not known."""

    config: ModelConfig
    tokenizer_folder: Path
    prompt: PromptSection | None
    weights: Path  # a Hugging Face folder, or the folder of one step of a checkpoint

    def read_parameters(self, sharding: Sharding, dtype: jnp.dtype) -> Parameters:
        """Read the weights straight to where they belong on the mesh.

        Raises:
          UserError: they are missing, broken, or not those of `config`.
        """
        if (self.weights / "config.json").is_file():
            return read_parameters(self.weights, self.config, sharding, dtype)
        self.check()
        abstract = abstract_parameters(self.config, sharding, dtype)
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                return checkpointer.restore(absolute(self.weights / "parameters"), abstract)
        except jax.errors.JaxRuntimeError:
            raise  # of the device, not of the files
        except Exception as error:  # Orbax raises bare Exceptions on broken files
            raise UserError(f"{self.weights}: the checkpoint is broken: {first_reason(error)}") from None

    def check(self) -> None:
        """Whether the weights of a checkpoint are as they were written; a Hugging Face folder holds no checksums.

        Raises:
          UserError: they are not.
        """
        if not (self.weights / "config.json").is_file():
            read_step_metadata(self.weights, ("parameters",))


def identity(model: StoredModel) -> str:
    """A hash of what a model's weights are, from a few bytes of each file: cheap for large models.

    It is that of the config and of each file's name, size, first and last 64 KiB; the same for a copy of the folder.
    """
    root = model.weights if (model.weights / "config.json").is_file() else model.weights / "parameters"
    digest = hashlib.sha256(repr(dataclasses.astuple(model.config)).encode())
    with bucket_errors(root):
        for path in files_under(root):
            name = path.relative_to(root).as_posix()
            if root == model.weights and not name.endswith(".safetensors"):
                continue  # of a Hugging Face folder the weights, whatever else lies beside
            status: Any = path.stat()
            size = status.length if in_bucket(path) else status.st_size
            digest.update(f"{name} {size} ".encode())
            with path.open("rb") as file:
                digest.update(file.read(_GLANCE))
                file.seek(max(0, size - _GLANCE))
                digest.update(file.read(_GLANCE))
    return digest.hexdigest()[:16]


def check_reference(checkpoints: Path, reference: str) -> None:
    """Whether the checkpoints, if there are any yet, are of a run with this reference policy (see `identity`).

    Raises:
      UserError: of one with another.
    """
    if not checkpoints.is_dir() or not any(_is_step(child) for child in checkpoints.iterdir()):
        return
    known = read_checkpoint_metadata(find_checkpoint(checkpoints)).get("reference_identity", reference)
    if known != reference:
        raise UserError(
            f"model.path: the model there has changed since this run began (its weights are {reference}, those of the "
            f"reference policy were {known}); put the former one there, or start a new run"
        )


class Checkpoints:
    """The checkpoints of one run, written in the background.

    Kept are the latest ones, the one of step `best` if that is set, and one of every so many hours; see
    `CheckpointSection`.
    """

    def __init__(self, folder: Path, keep: int | None = None, keep_every_hours: float | None = None) -> None:
        self.best: int | None = None
        self._folder = folder
        policies: list[Any] = [checkpoint_managers.LatestN(keep), _ThatStep(lambda: self.best)]
        if keep_every_hours is not None:
            policies.append(EverySoOften(datetime.timedelta(hours=keep_every_hours)))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(timeout_secs=SAVE_SECONDS, post_finalization_callback=self._seal),
        )
        self._saving: int | None = None
        try:
            self._manager = ocp.CheckpointManager(absolute(folder), options=options)
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:
            raise UserError(f"{folder}: the checkpoints there cannot be read: {first_reason(error)}") from None

    @property
    def latest(self) -> int | None:
        """The last step that was saved whole."""
        return self._manager.latest_step()

    @property
    def writing(self) -> bool:
        """Whether one is being written."""
        return self._manager.is_saving_in_progress()

    def save(self, state: TrainState, step: int, metadata: dict[str, Any]) -> None:
        """Save after `step` steps. Returns when `state` may be changed; writing goes on in the background.

        Raises:
          UserError: this one, or the one before, cannot be written.
        """
        items = {
            "parameters": ocp.args.StandardSave(state.parameters, save_args(state.parameters)),
            "optimizer": ocp.args.StandardSave(state.optimizer_state, save_args(state.optimizer_state)),
            "metadata": ocp.args.JsonSave({**metadata, "format": FORMAT, "step": step}),
        }
        with self._write_errors():
            self._manager.wait_until_finished()
        self._saving = step
        with self._write_errors():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, abstract: TrainState, metadata: Mapping[str, Any]) -> TrainState:
        """The latest state, placed as `abstract` (of ShapeDtypeStructs with shardings) says.

        Raises:
          UserError: it is broken, or of another run than `metadata` and `abstract` describe: each difference is named.
        """
        step = self._manager.latest_step()
        folder = self._folder / str(step)
        wanted = {"parameters": abstract.parameters, "optimizer": abstract.optimizer_state}
        items = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        try:
            stored = read_step_metadata(folder, tuple(wanted))
            found = metadata_differences(stored, metadata)
            for name, tree in wanted.items():
                found += array_differences(folder / name, tree, name)
            if found:
                raise UserError(f"{folder}: the checkpoint is not of this run; {len(found)} differences:", found)
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except jax.errors.JaxRuntimeError:
            raise  # of the device, not of the files
        except UserError as error:
            if error.details:
                raise
            raise UserError(f"{error}; remove this folder to go on from the one before it") from None
        except Exception as error:  # Orbax raises bare Exceptions on broken files
            raise UserError(
                f"{folder}: the checkpoint is broken: {first_reason(error)}; "
                "remove this folder to go on from the one before it"
            ) from None
        place = abstract.step.sharding
        return TrainState(jax.device_put(jnp.int32(step), place), restored["parameters"], restored["optimizer"])

    def close(self) -> None:
        """Wait until all is written.

        Raises:
          UserError: it cannot be.
        """
        with self._write_errors():
            self._manager.wait_until_finished()
        self._manager.close()

    def _seal(self) -> None:
        """Write the checksums of what was just written, on the first process, before it counts as whole."""
        partial = self._folder / f"{self._saving}{ocp.path.step.TMP_DIR_SUFFIX}"
        # Where nothing can be renamed Orbax writes under the final name, and last a file that says that it is whole.
        write_checksums(partial if partial.is_dir() else self._folder / str(self._saving))

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except (UserError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # of TensorStore, gcsfs, or a deadline
            raise UserError(
                f"{self._folder / str(self._saving)}: the checkpoint cannot be written: {first_reason(error)}"
            ) from None


@dataclass(frozen=True)
class _ThatStep:
    """Orbax's policy to preserve the step that a function gives."""

    step: Callable[[], int | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [checkpoint.step == self.step() for checkpoint in checkpoints]


@dataclass(frozen=True)
class EverySoOften:
    """Orbax's EveryNSeconds for clocks that may be set: a jump, also one back, counts as time gone by.

    So a jump makes one checkpoint more stay, or the next stay later by less than `interval`; none else is lost.
    """

    interval: datetime.timedelta

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        kept: list[bool] = []
        last: datetime.datetime | None = None
        for checkpoint in checkpoints:
            kept.append(last is None or abs(checkpoint.time - last) >= self.interval)
            last = checkpoint.time if kept[-1] else last
        return kept


def checkpoint_metadata(model: ModelConfig, prompt: PromptSection | None, **more: Any) -> dict[str, Any]:
    """What stands in a checkpoint beside arrays."""
    prompt_values = None if prompt is None else config_to_dict(prompt)
    return {"model": dataclasses.asdict(model), "prompt": prompt_values, **more}


def save_imported(folder: Path, model: StoredModel, parameters: Parameters) -> None:
    """Write a model as a new checkpoint folder, at step 0, without optimizer state.

    Args:
      folder: local or in a bucket.
      model: whose tokenizer, config and prompt it gets.
      parameters: a tree of `streaming.StreamedArray`s, which are read while they are written.

    Raises:
      UserError: the folder exists, or its bucket cannot be used.
    """
    with new_folder(folder) as partial:
        (partial / "tokenizer").mkdir(parents=True)
        write_tokenizer(model.tokenizer_folder, partial / "tokenizer")
        metadata = {**checkpoint_metadata(model.config, model.prompt), "format": FORMAT, "step": 0}
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
            raise UserError(f"{folder}: a Hugging Face folder in a bucket; copy it to a disk (gcloud storage cp -r)")
        prompt = None
        if (folder / PROMPT_FILE).is_file():
            prompt = parse_config(PromptSection, read_json(folder / PROMPT_FILE), str(folder / PROMPT_FILE))
        return StoredModel(read_hf_config(folder), folder, prompt, folder)
    step_folder = find_checkpoint(folder)
    metadata = read_checkpoint_metadata(step_folder)
    try:
        values = metadata["prompt"]
        config = model_config_from_dict(metadata["model"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{step_folder}: the checkpoint's metadata are broken: {first_reason(error)}") from None
    prompt = None if values is None else parse_config(PromptSection, values, str(step_folder))
    tokenizer = step_folder.parent / "tokenizer"
    if holds_tokenizer(tokenizer):
        check_files(tokenizer)
    return StoredModel(config, tokenizer, prompt, step_folder)


def find_checkpoint(folder: Path) -> Path:
    """The step folder that a run (its latest), RUN/best, a checkpoint folder or a step folder stands for.

    Raises:
      UserError: there is none.
    """
    if folder.name == "best" and (folder.parent / "state.json").is_file():
        best = read_json(folder.parent / "state.json").get("best")
        if best is None:
            raise UserError(f"{folder}: there is none; the run has no data.evaluation to choose on, or is too young")
        return folder.parent / "checkpoints" / str(best["step"])
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model: neither a Hugging Face folder nor a checkpoint nor a run")
    if _is_step(folder):
        return folder
    root = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    steps = [child for child in root.iterdir() if _is_step(child)]
    if not steps:
        raise UserError(f"{folder}: holds neither a config.json nor a checkpoint")
    return max(steps, key=lambda child: int(child.name))


def _is_step(folder: Path) -> bool:
    """Whether it is one step, saved whole: in a bucket Orbax cannot rename, and marks a step as whole instead."""
    if not folder.name.isdecimal() or not (folder / "parameters").is_dir():
        return False
    return not in_bucket(folder) or ocp.path.step.is_path_finalized(folder)


def read_checkpoint_metadata(step_folder: Path) -> dict[str, Any]:
    """The metadata of one checkpoint.

    Raises:
      UserError: it is missing, or was written by a newer version.
    """
    metadata = read_json(step_folder / "metadata" / "metadata")
    if not isinstance(metadata, dict):
        raise UserError(f"{step_folder}: the checkpoint's metadata are broken: not a JSON object")
    if metadata.get("format", 0) > FORMAT:
        raise UserError(f"{step_folder}: was written by a newer version of psyche_jax; upgrade it")
    return metadata


def read_step_metadata(step_folder: Path, items: Sequence[str]) -> dict[str, Any]:
    """The metadata of one checkpoint, whose `items` and metadata are as they were written.

    Raises:
      UserError: they are not, something is missing, or it was written by a newer version.
    """
    metadata = read_checkpoint_metadata(step_folder)
    if metadata.get("format", 0) > 1 or (step_folder / CHECKSUMS).is_file():
        check_files(step_folder, (*items, "metadata"))
    return metadata


def abstract_parameters(config: ModelConfig, sharding: Sharding, dtype: jnp.dtype) -> Parameters:
    """Shapes, dtypes and places of a model's parameters, as Orbax wants them for restoring."""
    abstract = build(config, dtype)[1]
    return abstract_like(nnx.to_pure_dict(abstract), sharding.of_parameters(abstract))


def abstract_like(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs of `tree` with `shardings`."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings)
