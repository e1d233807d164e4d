"""Models between Hugging Face folders and checkpoints: `psyche import` and `psyche export`."""

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any

import jinja2
import numpy as np
from jax import numpy as jnp
from tqdm import tqdm

import psyche_jax
from psyche_jax.config import Dtype, PromptSection
from psyche_jax.config_files import config_to_dict, dump_yaml, parse_yaml_mapping
from psyche_jax.errors import UserError
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.huggingface import MODEL_FILES, WeightFiles, copy_tokenizer, make_portable, stream_weights
from psyche_jax.storage import hub
from psyche_jax.storage.arrays import Index, all_finite
from psyche_jax.storage.files import as_path, in_bucket, new_folder, read_json, write_json, write_text
from psyche_jax.train.checkpoints import PROMPT_FILE, StoredModel, open_model, save_imported
from psyche_jax.train.runs import read_state
from psyche_jax.train.streaming import StoredArrays, streamed_parameters

_SECONDS_A_LINE = 10.0


@dataclass(frozen=True)
class Conversion:
    """A model that was written anew: what it is, the dtype and bytes of its weights, how long that took."""

    model: StoredModel
    dtype: str
    num_bytes: int
    seconds: float

    def __str__(self) -> str:
        size, rate = (tqdm.format_sizeof(x, "B") for x in (self.num_bytes, self.num_bytes / self.seconds))
        number = self.model.config.num_parameters
        return f"{number:,} parameters as {self.dtype}, {size} in {self.seconds:.1f} s, {rate}/s"


def import_model(source: str | Path, checkpoint: str | Path, dtype: Dtype) -> Conversion:
    """Write a Hugging Face model as a new checkpoint folder, piece by piece.

    Args:
      source: a Hugging Face folder, or `hub:NAME` or `hub:NAME@REVISION`, which is downloaded first.
      checkpoint: the new folder, local or in a bucket.
      dtype: of the weights written.

    Raises:
      UserError: the source is broken or cannot be had, the checkpoint exists or cannot be written.
    """
    on_hub = isinstance(source, str) and source.startswith(hub.PREFIX)
    folder = hub.download(str(source), MODEL_FILES) if on_hub else as_path(source)
    target = as_path(checkpoint)
    stored = open_model(str(folder))
    if stored.weights != folder:
        raise UserError(f"{source}: is a checkpoint already; `psyche import` takes a Hugging Face folder")
    weights = WeightFiles(folder)
    weights.check(stored.config)
    kind = np.dtype(jnp.dtype(dtype))
    with _Progress("import", target, stored.config, kind) as progress:

        def read(path: str, index: Index) -> np.ndarray:
            return progress.add(weights.read(path, index, kind))

        try:
            save_imported(target, stored, streamed_parameters(stored.config, kind, read))
        except ValueError as error:  # what TensorStore raises when a disk is full or a bucket forbids
            raise UserError(f"{checkpoint}: cannot be written: {error}") from None
    return progress.result(stored)


def export_model(source: str, folder: Path, dtype: Dtype, push: str | None = None) -> Conversion:
    """Write a checkpoint, or a run's latest one, as a new Hugging Face folder that plain transformers loads.

    Besides weights and configs it holds the tokenizer, its chat template, the prompt that the model was trained
    with and a model card. Weights are read and written piece by piece.

    Args:
      source: a checkpoint or a run, local or in a bucket, or a Hugging Face folder.
      folder: the new folder.
      dtype: of the weights written.
      push: a repository of the Hugging Face hub that gets the folder too; made, as a private one, if there is none.

    Raises:
      UserError: the source is broken, the folder exists or cannot be written, or the hub refuses.
    """
    stored = open_model(source)
    kind = np.dtype(jnp.dtype(dtype))
    with _Progress("export", folder, stored.config, kind) as progress, new_folder(folder) as partial:
        if push is not None:
            hub.create(push)  # a missing permission shows before the work, not after it
        copy_tokenizer(stored.tokenizer_folder, partial)
        make_portable(partial)
        if stored.prompt is not None:
            write_json(partial / PROMPT_FILE, config_to_dict(stored.prompt))
        write_text(partial / "README.md", model_card(stored, folder.name))
        _export_weights(stored, partial, kind, progress)
    if push is not None:
        hub.upload(folder, push)
    return progress.result(stored)


def _export_weights(stored: StoredModel, folder: Path, kind: np.dtype, progress: "_Progress") -> None:
    if (stored.weights / "config.json").is_file():
        weights = WeightFiles(stored.weights)
        weights.check(stored.config)
        stream_weights(folder, stored.config, kind, lambda path, part: progress.add(weights.read(path, part, kind)))
        return
    stored.check()
    arrays = StoredArrays(stored.weights, stored.config)

    def read(path: str, index: Index) -> np.ndarray:
        values = arrays.read(path, index).astype(kind, copy=False)
        if not all_finite(values):
            raise UserError(f"{stored.weights}: {path} holds values that are not finite in {kind}; take another one")
        return progress.add(values)

    stream_weights(folder, stored.config, kind, read, arrays.chunk)


class _Progress:
    """Bytes done of the weights to write: a bar on a terminal, now and then a line elsewhere."""

    def __init__(self, verb: str, target: Path, config: ModelConfig, kind: np.dtype) -> None:
        self._verb = verb
        self._dtype = str(kind)
        self._total = config.num_parameters * kind.itemsize
        self._done = 0
        self._started = self._said = time.perf_counter()
        if not in_bucket(target):
            _check_space(target, self._total)
        self._bar = tqdm(total=self._total, desc=verb, unit="B", unit_scale=True) if sys.stderr.isatty() else None

    def add(self, values: np.ndarray) -> np.ndarray:
        """Count `values`, and return them."""
        self._done += values.nbytes
        if self._bar is not None:
            self._bar.update(values.nbytes)
        elif (now := time.perf_counter()) - self._said > _SECONDS_A_LINE:
            self._said = now
            done, total = (tqdm.format_sizeof(x, "B") for x in (self._done, self._total))
            print(f"{self._verb}: {done} of {total}", file=sys.stderr, flush=True)
        return values

    def result(self, model: StoredModel) -> Conversion:
        """What was done, once all of it is."""
        return Conversion(model, self._dtype, self._total, time.perf_counter() - self._started)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()


def _check_space(target: Path, size: int) -> None:
    """Raise UserError unless the disk of `target`, which need not exist, has `size` bytes left."""
    place = next(folder for folder in (target.absolute(), *target.absolute().parents) if folder.exists())
    usage = shutil.disk_usage(place)
    if usage.total and usage.free < size:  # some network disks do not say
        needed, left = (tqdm.format_sizeof(x, "B") for x in (size, usage.free))
        raise UserError(f"{target}: needs {needed}, and only {left} are left on its disk")


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
            commit=code_version(),
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
        state = read_state(run)
        stage = {"run": run.name, "state": state, "config": config, "evaluations": evaluations}
        stages.append({**stage, "yaml": dump_yaml(config)})
        run = _run_of(as_path(config["model"]["path"]))
    return stages


def _run_of(model: Path) -> Path:
    """The folder of the run, if it is one, that `model` is: a run, its `checkpoints`, or one of these."""
    if model.parent.name == "checkpoints":
        return model.parents[1]
    return model.parent if model.name == "checkpoints" else model


def code_version() -> str:
    """The commit of the code, or its version when it does not run from a checkout."""
    checkout = Path(__file__).parents[1]
    commit = ""
    if (checkout / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return commit or f"version {psyche_jax.__version__}"
