"""Models between Hugging Face folders and checkpoints: `psyche import` and `psyche export`."""

import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jinja2
from safetensors import SafetensorError

import psyche_jax
from psyche_jax.config import Dtype, PromptSection, config_to_dict, dump_yaml, parse_yaml_mapping
from psyche_jax.errors import UserError
from psyche_jax.files import new_folder, read_json, write_json, write_text
from psyche_jax.model.huggingface import copy_tokenizer, write_weights
from psyche_jax.model.qwen2 import Parameters
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, check_mesh_fits, make_mesh
from psyche_jax.train.checkpoints import PROMPT_FILE, StoredModel, open_model, save_imported


def import_model(source: Path, checkpoint: Path, dtype: Dtype) -> StoredModel:
    """Write the Hugging Face folder `source` as a new checkpoint folder.

    Raises:
      UserError: the source is broken, or the checkpoint exists.
    """
    stored = open_model(str(source))
    if not (source / "config.json").is_file():
        raise UserError(f"{source}: is a checkpoint already; `psyche import` takes a Hugging Face folder")
    parameters = _read_parameters(stored, dtype)
    try:
        save_imported(checkpoint, stored, parameters)
    except ValueError as error:  # what Orbax raises when a disk is full
        raise UserError(f"{checkpoint}: cannot be written: {error}") from None
    return stored


def export_model(source: str, folder: Path, dtype: Dtype) -> StoredModel:
    """Write a checkpoint, or a run's latest one, as a new Hugging Face folder that plain transformers loads.

    Besides weights and configs it holds the tokenizer, its chat template, the prompt that the model was trained
    with and a model card.

    Raises:
      UserError: the source is broken, or the folder exists.
    """
    stored = open_model(source)
    with new_folder(folder) as partial:
        copy_tokenizer(stored.tokenizer_folder, partial)
        if stored.prompt is not None:
            write_json(partial / PROMPT_FILE, config_to_dict(stored.prompt))
        write_text(partial / "README.md", model_card(stored, folder.name))
        try:
            write_weights(partial, stored.config, _read_parameters(stored, dtype))
        except SafetensorError as error:
            raise UserError(f"{folder}: the weights cannot be written ({error})") from None
    return stored


def _read_parameters(stored: StoredModel, dtype: Dtype) -> Parameters:
    sharding = Sharding(make_mesh(), TRAIN_RULES)
    check_mesh_fits(sharding.mesh, stored.config)
    return stored.read_parameters(sharding, jnp.dtype(dtype))


def model_card(stored: StoredModel, name: str) -> str:
    """The card of a model: its base, data, config and scores, as far as the run that it comes from tells them.

    Raises:
      UserError: the run's config, state or evaluations are not as psyche writes them.
    """
    template = (files("psyche_jax") / "model_card.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    try:
        return environment.from_string(template).render(
            name=name,
            model=stored.config,
            prompt=stored.prompt or PromptSection(),
            stages=_stages(stored.weights),
            version=psyche_jax.__version__,
            commit=_commit(),
        )
    except (jinja2.TemplateError, LookupError, TypeError) as error:
        raise UserError(
            f"{_run_of(stored.weights)}: its config, state or evaluations were changed by hand ({error})"
        ) from None


def _stages(weights: Path) -> list[dict[str, Any]]:
    """The runs that led to a checkpoint, latest first, followed through `model.path` of their configs."""
    stages: list[dict[str, Any]] = []
    run = _run_of(weights)
    while (run / "config.yaml").is_file() and (run / "state.json").is_file() and len(stages) < 10:
        config = parse_yaml_mapping(run / "config.yaml")
        evaluations = [read_json(path) for path in sorted((run / "evaluations").glob("*.json"))]
        state = read_json(run / "state.json")
        stage = {"run": run.name, "state": state, "config": config, "evaluations": evaluations}
        stages.append({**stage, "yaml": dump_yaml(config)})
        run = _run_of(Path(config["model"]["path"]))
    return stages


def _run_of(model: Path) -> Path:
    """The folder of the run, if it is one, that `model` is: a run, its `checkpoints`, or one of these."""
    if model.parent.name == "checkpoints":
        return model.parents[1]
    return model.parent if model.name == "checkpoints" else model


def _commit() -> str:
    """The commit of the code, or its version when it does not run from a checkout."""
    checkout = Path(__file__).parents[1]
    commit = ""
    if (checkout / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return commit or f"version {psyche_jax.__version__}"
