"""What SFT and GRPO both prepare: devices, the model that is trained, its state."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from psyche_jax.config import AdapterSection, GrpoConfig, MeshSection, ModelSection, PromptSection
from psyche_jax.data.packing import template_hash, tokenizer_hash
from psyche_jax.errors import UsageError
from psyche_jax.model.adapters import as_trained, initial_adapters, num_trained
from psyche_jax.model.config import ModelConfig, check_architecture
from psyche_jax.model.huggingface import is_tokenizer, load_tokenizer
from psyche_jax.model.linear import Parameters
from psyche_jax.model.qwen2 import Execution, build
from psyche_jax.model.sharding import Sharding, check_mesh_fits, training_sharding
from psyche_jax.storage.files import bucket_errors, in_bucket, new_folder, write_text
from psyche_jax.train.checkpoints import abstract_like
from psyche_jax.train.runs import Run
from psyche_jax.train.state import TrainState, state_shardings, trained_shapes
from psyche_jax.train.stored_models import (
    Base,
    StoredModel,
    holds_tokenizer,
    identity,
    open_model,
    with_stop_tokens_of,
    write_tokenizer,
)


@dataclass(frozen=True)
class Setup:
    """A model on its mesh, with its tokenizer and how programs compute.

    `model`: what training starts from; `config`: of what is trained, with the adapter that this run adds, if any.
    """

    model: StoredModel
    config: ModelConfig
    dtype: jnp.dtype
    tokenizer: Any
    execution: Execution

    def read_parameters(self, dtype: str | None = None) -> Parameters:
        """The model's weights, placed for training, in `model.dtype` unless `dtype` is given (int8: see `Linear`).

        Adapters that it has already are merged into them.
        """
        return self.model.read_merged(self.execution.sharding, self.dtype if dtype is None else jnp.dtype(dtype))

    def read_base(self) -> Parameters | None:
        """What this run's adapters are added to, which never changes; None where all weights are trained."""
        return None if self.config.adapter is None else self.read_parameters()

    def read_trained(self, seed: int) -> Parameters:
        """What training begins with: the weights, or adapters that change nothing yet."""
        if self.config.adapter is None:
            return self.read_parameters()
        return initial_adapters(self.config, jax.random.key(seed), self.execution.sharding)


def prepare(
    model: ModelSection,
    mesh: MeshSection,
    longest: int,
    longest_name: str,
    run: Path | None = None,
    decoding_tensor: int | None = None,
    adapter: AdapterSection | None = None,
) -> Setup:
    """Build the mesh and open the model, whose weights are read later.

    Args:
      model, mesh, adapter: sections of the config.
      longest: how many tokens the longest sequence may have.
      longest_name: the config keys to name in the error.
      run: the run's folder; one that resumes keeps the stop tokens it began with.
      decoding_tensor: over how many devices decoding splits weights, if not over `mesh.tensor`.

    Raises:
      UserError: the mesh is impossible; the model is missing, broken, or fits neither the mesh nor that length.
    """
    sharding = training_sharding(mesh.data, mesh.fsdp, mesh.tensor, decoding_tensor)
    stored = open_model(model.path)
    if run is not None:
        stored = with_stop_tokens_of(stored, run / "checkpoints")
    check_architecture(model.architecture, stored.config, model.path)
    _check_dtype(model, stored)
    stored.check_shapes()
    check_mesh_fits(sharding, stored.config)
    execution = Execution(sharding, jnp.dtype(model.compute_dtype), model.remat, model.attention)
    if longest > (limit := stored.config.max_positions):
        raise UsageError(f"{longest_name}: {longest} tokens are more than the model's max_position_embeddings {limit}")
    tokenizer = load_tokenizer(stored.tokenizer_folder)
    config = as_trained(stored.config, model.dtype, adapter)
    return Setup(stored, config, jnp.dtype(model.dtype), tokenizer, execution)


def _check_dtype(model: ModelSection, stored: StoredModel) -> None:
    """Raise UsageError unless weights that are stored in int8 can be had in `model.dtype`."""
    if not stored.origin.config.int8:
        return
    if stored.base is None:
        if model.dtype != "int8":
            raise UsageError(f"model.dtype: the weights at {model.path} are int8; set it to int8, not {model.dtype}")
    elif model.dtype == "int8":
        raise UsageError(
            f"model.dtype: what {model.path} learned is smaller than the steps of its int8 base and would be lost in a "
            "merge; set bfloat16, or train over the original model with model.dtype int8"
        )


def trained_on(setup: Setup, prompt: PromptSection, data: str, evaluation: str | None) -> dict[str, str]:
    """Hashes of all that a run learns from, by kind: see `train/run_changes.py`. The model's weights are read whole.

    Args:
      setup: the model.
      prompt: what is added to bare turns.
      data, evaluation: hashes of the records that are used.
    """
    contents = {
        "data": data,
        "tokenizer": tokenizer_hash(setup.tokenizer)[:16],
        "template": template_hash(setup.tokenizer, prompt)[:16],
        "base": identity(setup.model),
    }
    return contents if evaluation is None else {**contents, "evaluation": evaluation}


def about_base(setup: Setup, contents: Mapping[str, str]) -> dict[str, Any]:
    """For the metadata of checkpoints: of adapters, the base without which they are nothing.

    `contents` is what `trained_on` gave.
    """
    return {} if setup.config.adapter is None else {"base": Base(setup.model, contents["base"]).as_metadata()}


def header(setup: Setup) -> list[str]:
    """What a run says at its start: the model and what of it is trained, the devices and their mesh."""
    config, mesh = setup.config, setup.execution.sharding.mesh
    stored = "int8" if config.int8 else setup.dtype.name
    adapters = "" if config.adapter is None else f"; adapters with {num_trained(config):,} parameters are trained"
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return [
        f"model: {setup.model.weights}, {config.model_type}, {config.num_parameters:,} parameters in {stored}, "
        f"computing in {setup.execution.compute_dtype.name}{adapters}",
        f"devices: {mesh.size} × {mesh.devices.flat[0].device_kind}, processes: {jax.process_count()}, mesh: {axes}",
    ]


def check_rows(rows: int, name: str, sharding: Sharding) -> None:
    """Raise UsageError unless `rows` can be spread over the batch axes of the mesh."""
    places = sharding.parts("batch")
    if rows % places:
        raise UsageError(f"{name}: {rows} rows cannot be spread over data × fsdp = {places} devices; use a multiple")


def check_grpo_rows(config: GrpoConfig, sharding: Sharding) -> None:
    """Raise UsageError unless prompts, slots and micro-batches can be spread over the mesh."""
    check_rows(config.prompts_per_step, "prompts_per_step", sharding)
    rows = config.prompts_per_micro_batch * config.generations_per_prompt
    check_rows(rows, "micro_batch_prompts × generations_per_prompt", sharding)
    groups = sharding.for_decoding().parts("batch")
    if config.slots % groups:
        over = f"data × fsdp = {groups} devices"
        if config.rollout.tensor is not None:
            over = f"data × fsdp / rollout.tensor = {groups} groups of devices"
        raise UsageError(f"rollout.slots: {config.slots} rows cannot be spread over {over}; use a multiple")


def abstract_state(setup: Setup, optimizer: optax.GradientTransformation) -> tuple[TrainState, TrainState]:
    """The state's shapes with their shardings, and the shardings alone."""
    return abstract_train_state(setup.config, setup.dtype, setup.execution.sharding, optimizer)


def abstract_train_state(
    config: ModelConfig, dtype: jnp.dtype, sharding: Sharding, optimizer: optax.GradientTransformation
) -> tuple[TrainState, TrainState]:
    """As `abstract_state`, of a model that need not be on disk."""
    abstract_parameters = build(config, dtype)[1]
    shardings = state_shardings(optimizer, abstract_parameters, sharding)
    plain = trained_shapes(abstract_parameters)
    shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), plain, jax.eval_shape(optimizer.init, plain))
    return abstract_like(shapes, shardings), shardings


def keep_tokenizer(run: Run, setup: Setup) -> None:
    """Put the tokenizer beside the run's checkpoints, so that each checkpoint is a model by itself."""
    if not run.writes:
        return
    if not in_bucket(run.folder):
        run.checkpoints.mkdir(exist_ok=True)
    target = run.checkpoints / "tokenizer"
    with bucket_errors(target):
        if in_bucket(target):  # a start that was killed may have left some files
            if not holds_tokenizer(target):
                write_tokenizer(setup.model.tokenizer_folder, target)
        elif not is_tokenizer(target):
            with new_folder(target) as partial:
                write_tokenizer(setup.model.tokenizer_folder, partial)


def report_skipped(run: Run, warning: str, lines: Sequence[str]) -> None:
    """Give a warning, if there is one, and name each record that was skipped: the first ones on stderr, all of them
    in the run's folder."""
    if not run.writes:
        return
    if warning:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    if not lines:
        return
    write_text(run.folder / "set_aside.txt", "".join(f"{line}\n" for line in lines))
    for line in lines[:5]:
        print(f"skipped: {line}", file=sys.stderr)
    count = "1 record" if len(lines) == 1 else f"{len(lines)} records"
    print(f"{count} skipped, listed in {run.folder / 'set_aside.txt'}", file=sys.stderr)
