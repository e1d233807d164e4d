"""Orbax checkpoints: parameters, optimizer state and what it takes to go on; and opening any kind of model.

A checkpoint folder holds `tokenizer/` and one folder a step with `parameters`, `optimizer` (absent from imported
models) and `metadata`.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from psyche_jax.config import PromptSection, config_to_dict, parse_config
from psyche_jax.errors import UserError
from psyche_jax.files import new_folder, read_json
from psyche_jax.model.config import ModelConfig, model_config_from_dict, read_hf_config
from psyche_jax.model.huggingface import copy_tokenizer, read_parameters
from psyche_jax.model.qwen2 import Parameters, build
from psyche_jax.model.sharding import Sharding
from psyche_jax.train.state import TrainState

FORMAT = 1
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
        abstract = abstract_parameters(self.config, sharding, dtype)
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                return checkpointer.restore((self.weights / "parameters").absolute(), abstract)
        except (ValueError, OSError, KeyError) as error:
            raise UserError(f"{self.weights}: the checkpoint is broken: {str(error).splitlines()[0]}") from None


class Checkpoints:
    """The checkpoints of one run, written in the background."""

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self._folder = folder

    @property
    def latest(self) -> int | None:
        """The last step that was saved whole."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, metadata: dict[str, Any]) -> None:
        """Save after `step` steps. Returns when `state` may be changed; writing goes on in the background."""
        items = {
            "parameters": ocp.args.StandardSave(state.parameters),
            "optimizer": ocp.args.StandardSave(state.optimizer_state),
            "metadata": ocp.args.JsonSave({**metadata, "format": FORMAT, "step": step}),
        }
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, abstract: TrainState) -> TrainState:
        """The latest state, placed as `abstract` (of ShapeDtypeStructs with shardings) says.

        Raises:
          UserError: it is broken.
        """
        step = self._manager.latest_step()
        items = {
            "parameters": ocp.args.StandardRestore(abstract.parameters),
            "optimizer": ocp.args.StandardRestore(abstract.optimizer_state),
        }
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, OSError, KeyError) as error:
            raise UserError(
                f"{self._folder / str(step)}: the checkpoint is broken: {str(error).splitlines()[0]}; "
                "remove this folder to go on from the one before it"
            ) from None
        place = abstract.step.sharding
        return TrainState(jax.device_put(jnp.int32(step), place), restored["parameters"], restored["optimizer"])

    def close(self) -> None:
        """Wait until all is written; errors of background writes are raised here."""
        self._manager.wait_until_finished()
        self._manager.close()


def checkpoint_metadata(config: ModelConfig, prompt: PromptSection | None, **more: Any) -> dict[str, Any]:
    """What stands in a checkpoint beside arrays."""
    prompt_values = None if prompt is None else config_to_dict(prompt)
    return {"model": dataclasses.asdict(config), "prompt": prompt_values, **more}


def save_imported(folder: Path, model: StoredModel, parameters: Parameters) -> None:
    """Write a model as a new checkpoint folder, at step 0, without optimizer state.

    Raises:
      UserError: the folder exists.
    """
    with new_folder(folder) as partial:
        (partial / "tokenizer").mkdir()
        copy_tokenizer(model.tokenizer_folder, partial / "tokenizer")
        metadata = {**checkpoint_metadata(model.config, model.prompt), "format": FORMAT, "step": 0}
        with ocp.CheckpointManager(partial.absolute()) as manager:
            items = {
                "parameters": ocp.args.StandardSave(parameters),
                "metadata": ocp.args.JsonSave(metadata),
            }
            manager.save(0, args=ocp.args.Composite(**items))
            manager.wait_until_finished()


def open_model(path: str) -> StoredModel:
    """Find a Hugging Face folder, a checkpoint folder, one step of it, or a run (its latest checkpoint).

    Raises:
      UserError: `path` is none of these, or its config is broken.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        prompt = None
        if (folder / PROMPT_FILE).is_file():
            prompt = parse_config(PromptSection, read_json(folder / PROMPT_FILE), str(folder / PROMPT_FILE))
        return StoredModel(read_hf_config(folder), folder, prompt, folder)
    step_folder = find_checkpoint(folder)
    metadata = read_checkpoint_metadata(step_folder)
    values = metadata["prompt"]
    prompt = None if values is None else parse_config(PromptSection, values, str(step_folder))
    config = model_config_from_dict(metadata["model"])
    return StoredModel(config, step_folder.parent / "tokenizer", prompt, step_folder)


def find_checkpoint(folder: Path) -> Path:
    """The step folder that a run, a checkpoint folder or a step folder stands for.

    Raises:
      UserError: there is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model: neither a Hugging Face folder nor a checkpoint nor a run")
    if (folder / "parameters").is_dir() and folder.name.isdecimal():
        return folder
    root = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    steps = [child for child in root.iterdir() if child.name.isdecimal() and (child / "parameters").is_dir()]
    if not steps:
        raise UserError(f"{folder}: holds neither a config.json nor a checkpoint")
    return max(steps, key=lambda child: int(child.name))


def read_checkpoint_metadata(step_folder: Path) -> dict[str, Any]:
    """The metadata of one checkpoint.

    Raises:
      UserError: it is missing, or was written by a newer version.
    """
    metadata = read_json(step_folder / "metadata" / "metadata")
    if metadata.get("format", 0) > FORMAT:
        raise UserError(f"{step_folder}: was written by a newer version of psyche_jax; upgrade it")
    return metadata


def abstract_parameters(config: ModelConfig, sharding: Sharding, dtype: jnp.dtype) -> Parameters:
    """Shapes, dtypes and places of a model's parameters, as Orbax wants them for restoring."""
    abstract = build(config, dtype)[1]
    return abstract_like(nnx.to_pure_dict(abstract), sharding.of_parameters(abstract))


def abstract_like(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs of `tree` with `shardings`."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings)
