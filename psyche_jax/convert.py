"""Models between Hugging Face folders and checkpoints: `psyche import` and `psyche export`."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jinja2
import numpy as np
from flax import nnx, traverse_util
from jax import numpy as jnp
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

import psyche_jax
from psyche_jax.config import LINEAR_MAPS, AdapterSection, Dtype, PromptSection, StoredDtype
from psyche_jax.config_files import config_to_dict, dump_yaml, parse_config, parse_yaml_mapping
from psyche_jax.data.dataset import MANIFEST
from psyche_jax.errors import UsageError, UserError
from psyche_jax.model.adapters import adapters_of, as_trained, num_trained
from psyche_jax.model.config import SHAPE
from psyche_jax.model.huggingface import (
    FLOATS,
    MODEL_FILES,
    WeightFiles,
    copy_tokenizer,
    is_tokenizer,
    make_portable,
    stream_weights,
    tensor_names,
)
from psyche_jax.model.int8 import in_int8
from psyche_jax.model.qwen2 import build
from psyche_jax.storage import hub
from psyche_jax.storage.arrays import Index, all_finite
from psyche_jax.storage.files import as_path, in_bucket, new_folder, read_json, write_json, write_text
from psyche_jax.train.run_files import read_state
from psyche_jax.train.step_folders import PEFT_CONFIG
from psyche_jax.train.stored_models import (
    ORIGIN,
    PROMPT_FILE,
    Base,
    StoredModel,
    exported_prompt,
    identity,
    open_model,
    save_imported,
    with_stop_tokens,
)
from psyche_jax.train.streaming import StreamedArray, streamed_parameters

_SECONDS_A_LINE = 10.0


@dataclass(frozen=True)
class Conversion:
    """A model that was written anew: what it is, its numbers with their dtype and bytes, how long that took."""

    model: StoredModel
    num_parameters: int
    dtype: str
    num_bytes: int
    seconds: float

    def __str__(self) -> str:
        size, rate = (tqdm.format_sizeof(x, "B") for x in (self.num_bytes, self.num_bytes / self.seconds))
        return f"{self.num_parameters:,} parameters as {self.dtype}, {size} in {self.seconds:.1f} s, {rate}/s"


def import_model(source: str | Path, checkpoint: str | Path, dtype: StoredDtype, base: str | None = None) -> Conversion:
    """Write a Hugging Face model, or the adapters of a `peft` folder, as a new checkpoint folder, piece by piece.

    Args:
      source: a folder of either kind, or `hub:NAME` or `hub:NAME@REVISION`, which is downloaded first.
      checkpoint: the new folder, local or in a bucket.
      dtype: of the weights written; int8: of those of linear maps.
      base: the model that adapters are for; None: the one that their folder names.

    Raises:
      UserError: the source is broken or cannot be had, the checkpoint exists or cannot be written.
    """
    on_hub = isinstance(source, str) and source.startswith(hub.PREFIX)
    folder = hub.download(str(source), ("README.md", *MODEL_FILES)) if on_hub else as_path(source)
    target = as_path(checkpoint)
    if (folder / PEFT_CONFIG).is_file() and not (folder / "config.json").is_file():
        if dtype == "int8":
            raise UsageError(f"--dtype int8: {source} holds adapters, which cannot be int8; leave it out")
        return _import_adapters(folder, target, np.dtype(jnp.dtype(dtype)), base)
    if base is not None:
        raise UsageError(f"--base is for a folder with {PEFT_CONFIG} and without config.json, which {source} is not")
    stored = open_model(str(folder))
    if stored.weights != folder:
        raise UserError(f"{source}: is already a checkpoint; `psyche import` takes a Hugging Face folder")
    weights = WeightFiles(folder)
    weights.check(stored.config)
    stored = replace(stored, config=as_trained(stored.config, dtype, None))
    kind = np.dtype("float32" if dtype == "int8" else jnp.dtype(dtype))

    def as_it_is(path: str, index: Index) -> np.ndarray:
        return weights.read(path, index, kind)

    read = in_int8(as_it_is, stored.config) if dtype == "int8" else as_it_is
    parameters = streamed_parameters(stored.config, kind, lambda path, index: progress.add(read(path, index)))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))
    origin = hub.license_and_language(folder)
    if (name := hub.repository(str(source))) is not None:
        origin["base_model"] = name
    with _Progress("import", target, stored.config.num_parameters, dtype, size) as progress:
        try:
            save_imported(target, stored, parameters, origin)
        except ValueError as error:  # what TensorStore raises when a disk is full or a bucket forbids
            raise UserError(f"{checkpoint}: cannot be written: {error}") from None
    return progress.result(stored)


def export_model(
    source: str,
    folder: Path,
    dtype: Dtype,
    push: str | None = None,
    adapters_only: bool = False,
    base: str | None = None,
) -> Conversion:
    """Write a checkpoint, or a run's latest one, as a new Hugging Face folder that plain transformers loads.

    Besides weights and configs it holds the tokenizer, its chat template, the prompt that the model was trained
    with and a model card. Weights are read and written piece by piece. Adapters are merged into those of their base,
    in float32, and the sum is rounded once. Weights of int8 are taken times their scales, unless they were made when
    they were read, or `base` is given: then it is the original that adapters are merged into.

    Args:
      source: a checkpoint or a run, local or in a bucket, or a Hugging Face folder.
      folder: the new folder.
      dtype: of the weights written.
      push: a repository of the Hugging Face hub that gets the folder too; made, as a private one, if there is none.
      adapters_only: write a folder that `peft` loads over the base instead.
      base: the model that the int8 base of adapters was made from.

    Raises:
      UserError: the source is broken, the folder exists or cannot be written, or the hub refuses; `base` is another
        model, or not asked for.
    """
    stored = open_model(source)
    original = None if base is None else _original(source, stored, base, adapters_only)
    kind = np.dtype(jnp.dtype(dtype))
    if adapters_only and stored.base is None:
        raise UsageError(f"--adapters: {source} has none, all of its weights were trained; leave the flag out")
    number = num_trained(stored.config) if adapters_only else stored.config.num_parameters
    progress = _Progress("export", folder, number, str(kind), number * kind.itemsize)
    with progress, new_folder(folder) as partial:
        if push is not None:
            hub.create(push)  # a missing permission shows before the work, not after it
        copy_tokenizer(stored.tokenizer_folder, partial)
        make_portable(partial)
        if stored.prompt is not None:
            write_json(partial / PROMPT_FILE, config_to_dict(stored.prompt))
        write_text(partial / "README.md", model_card(stored, folder.name, adapters_only, original))
        if adapters_only:
            _export_adapters(stored, partial, kind, progress)
        else:
            read, chunk = stored.reader(kind, original)
            config = as_trained(stored.config, dtype, None)
            stream_weights(partial, config, kind, lambda path, part: progress.add(read(path, part)), chunk)
    if push is not None:
        hub.upload(folder, push)
    return progress.result(stored)


def _original(source: str, stored: StoredModel, base: str, adapters_only: bool) -> StoredModel:
    """The model at `base`, from which the int8 base of the adapters in `stored` was made.

    Raises:
      UserError: it was not, or there is no such base.
    """
    over = None if stored.base is None else stored.base.model
    if adapters_only or over is None or over.base is not None or not over.config.int8:
        raise UsageError(f"--base is for merging adapters over an int8 checkpoint, which {source} does not hold")
    original = open_model(base)
    for field in SHAPE:
        if getattr(original.config, field) != getattr(stored.config, field):
            raise UserError(f"--base: {base} is not the model that {source} was trained on: its {field} differs")
    return original


_PEFT_WEIGHTS = "adapter_model.safetensors"
# Of what `peft` writes into a config, what changes no number or is looked at. Anything else must be off, also what a
# later version adds.
_PEFT_KNOWN = (
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
)
_PEFT_STARTS = (True, False, None, "gaussian", "eva", "mica", "orthogonal")  # all others change the base too


def _export_adapters(stored: StoredModel, folder: Path, kind: np.dtype, progress: "_Progress") -> None:
    """Write what `peft.PeftModel.from_pretrained(base, folder)` loads."""
    adapter = stored.config.adapter
    assert adapter is not None and stored.base is not None
    tensors: dict[str, np.ndarray] = {}
    for path, stacked in traverse_util.flatten_dict(stored.read_adapters(), sep="/").items():
        names = tensor_names(path, stored.config.num_hidden_layers)
        tensors |= zip(names, progress.add(stacked.astype(kind)), strict=True)
    save_file(tensors, folder / _PEFT_WEIGHTS, {"format": "pt"})
    values = {
        "base_model_name_or_path": str(stored.base.model.weights),
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": adapter.rank,
        "target_modules": list(adapter.targets),
        "task_type": "CAUSAL_LM",
    }
    write_json(folder / PEFT_CONFIG, values)


def _import_adapters(folder: Path, target: Path, kind: np.dtype, base: str | None) -> Conversion:
    values = read_json(folder / PEFT_CONFIG)
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        raise UserError(f"{folder / PEFT_CONFIG}: does not describe low-rank adapters (peft_type LORA)")
    if extras := [name for name, value in values.items() if value and name not in _PEFT_KNOWN]:
        raise UserError(f"{folder / PEFT_CONFIG}: {', '.join(extras)} is set, which is not supported; train without it")
    if values.get("bias", "none") != "none":
        raise UserError(f"{folder / PEFT_CONFIG}: bias is {values['bias']!r}; only 'none' is supported")
    if (start := values.get("init_lora_weights")) not in _PEFT_STARTS:
        raise UserError(
            f"{folder / PEFT_CONFIG}: init_lora_weights is {start!r}, which changes the base; let peft convert them to "
            "plain adapters (path_initial_model_for_weight_conversion)"
        )
    place = values.get("base_model_name_or_path") if base is None else base
    if not isinstance(place, str) or not place:
        raise UserError(f"{folder / PEFT_CONFIG}: names no base (base_model_name_or_path); give it with --base")
    try:
        model = open_model(place)
    except UserError as error:
        raise UserError(f"{folder}: its base cannot be opened: {error}; give it with --base") from None
    tensors = _peft_tensors(folder / _PEFT_WEIGHTS)
    layers = model.config.num_hidden_layers
    targets = [name for name in LINEAR_MAPS if any(f".{name}." in tensor for tensor in tensors)]
    section = {"rank": values.get("r"), "alpha": values.get("lora_alpha"), "targets": targets}
    config = replace(model.config, adapter=parse_config(AdapterSection, section, str(folder / PEFT_CONFIG)))
    shapes = traverse_util.flatten_dict(adapters_of(nnx.to_pure_dict(build(config)[1])), sep="/")
    expected = {name: leaf.shape[1:] for path, leaf in shapes.items() for name in tensor_names(path, layers)}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(expected | found):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{folder}: the adapters do not fit the base {model.weights}: {name} is "
                f"{found.get(name, 'missing')}, and {expected.get(name, 'no such tensor')} is expected; "
                "give their own base with --base"
            )
    for name in expected:
        if not _is_adapted(values, name.removeprefix("base_model.model.").rpartition(".lora_")[0], folder):
            raise UserError(
                f"{folder / PEFT_CONFIG}: leaves out {name}, which is in {_PEFT_WEIGHTS}; remove one of the two"
            )
    tokenizer = folder if is_tokenizer(folder) else model.tokenizer_folder
    config = with_stop_tokens(config, tokenizer)
    number = num_trained(config)
    with _Progress("import", target, number, str(kind), number * kind.itemsize) as progress:

        def leaf(path: str) -> StreamedArray:
            with np.errstate(over="ignore"):  # what overflows is infinite, and is refused
                stacked = np.stack([tensors[name] for name in tensor_names(path, layers)]).astype(kind)
            if not all_finite(stacked):
                raise UserError(f"{folder}: {path} has values that are not finite in {kind}; use other adapters")
            return StreamedArray(stacked.shape, kind, stacked.shape, lambda index: progress.add(stacked[index]))

        parameters = traverse_util.unflatten_dict({path: leaf(path) for path in shapes}, sep="/")
        prompt = exported_prompt(folder) or model.prompt
        stored = StoredModel(config, tokenizer, prompt, folder, Base(model, identity(model)))
        save_imported(target, stored, parameters)
    return progress.result(stored)


def _is_adapted(values: Mapping[str, Any], module: str, folder: Path) -> bool:
    """Whether `peft` adds adapters to `module`, by what their config says of modules and layers."""

    def among(names: Any) -> bool:
        if isinstance(names, str):
            return names == "all-linear" or re.fullmatch(names, module) is not None
        return any(f".{module}".endswith(f".{name}") for name in names or ())

    try:
        chosen = among(values.get("target_modules")) or among(
            [name.removesuffix(".weight") for name in values.get("target_parameters") or ()]
        )
        layers = values.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers
        return (
            chosen and not among(values.get("exclude_modules")) and (not layers or int(module.split(".")[2]) in layers)
        )
    except (re.error, AttributeError, TypeError) as error:
        raise UserError(f"{folder / PEFT_CONFIG}: which modules have adapters cannot be read ({error})") from None


def _peft_tensors(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file() and (pickled := path.with_suffix(".bin")).is_file():
        raise UserError(f"{pickled}: is a pickle, which is not read; save the adapters with safe_serialization=True")
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                if (kind := file.get_slice(name).get_dtype()) not in FLOATS:
                    raise UserError(f"{path}: {name} is {kind}, which is not supported; save the adapters as float32")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is missing, broken or cut short ({error}); copy it again") from None


class _Progress:
    """Bytes done of the weights to write: a bar on a terminal, now and then a line elsewhere."""

    def __init__(self, verb: str, target: Path, number: int, dtype: str, size: int) -> None:
        self._verb = verb
        self._dtype, self._number = dtype, number
        self._total = size
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
        return Conversion(model, self._number, self._dtype, self._total, time.perf_counter() - self._started)

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


def model_card(stored: StoredModel, name: str, adapters_only: bool = False, original: StoredModel | None = None) -> str:
    """The card of a model: its base, data, config and scores, as far as the run that it comes from tells them.

    `adapters_only`: of its adapters, which are nothing without their base; `original`: what these are merged into, if
    that is not their base.

    Raises:
      UserError: the run's config, state or evaluations are not as psyche writes them.
    """
    template = (files("psyche_jax") / "model_card.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["dumped"] = dump_yaml
    try:
        stages = _stages(stored.weights)
        return environment.from_string(template).render(
            name=name,
            head=_head(stored, stages),
            model=stored.config,
            base=stored.base.model.weights if adapters_only and stored.base is not None else None,
            int8=_about_int8(stored, adapters_only, original),
            prompt=stored.prompt or PromptSection(),
            stages=stages,
            version=psyche_jax.__version__,
            commit=code_version(),
        )
    except (jinja2.TemplateError, LookupError, TypeError) as error:
        raise UserError(
            f"{_run_of(stored.weights)}: its config, state or evaluations were changed by hand ({error})"
        ) from None


def _head(stored: StoredModel, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The part of the card's YAML that says whence the model comes, as far as its base and its data tell."""
    begun = as_path(stages[-1]["config"]["model"]["path"]) if stages else stored.origin.weights
    facts = hub.license_and_language(begun)
    for folder in (begun, begun.parent):  # a checkpoint, or a step of it
        if (folder / ORIGIN).is_file():
            facts = read_json(folder / ORIGIN)
    trained = [stage["config"]["data"]["train"] for stage in stages]
    places = [place for train in trained for place in ([train] if isinstance(train, str) else train)]
    if datasets := sorted(_hub_datasets(places)):
        facts["datasets"] = datasets
    return facts


def _hub_datasets(places: Iterable[str]) -> set[str]:
    """The data sets of the hub that are at `places` or that what is there was made from, followed through manifests."""
    found: set[str] = set()
    ahead, seen = list(places), set[str]()
    while ahead:
        place = ahead.pop()
        if name := hub.repository(place):
            found.add(name)
        elif place not in seen and not in_bucket(place) and (Path(place) / MANIFEST).is_file():
            seen.add(place)
            made = read_json(Path(place) / MANIFEST)["config"]
            # By import; by pack; by decontaminate (what it was compared with is not trained on); by select; by synth.
            origins = [made.get("source"), made.get("input"), made.get("decontaminated", {}).get("train")]
            origins += [made.get("questions"), *made.get("sources", {}).values()]
            for origin in origins:
                ahead += [origin] if isinstance(origin, str) else origin or []
    return found


def _about_int8(stored: StoredModel, adapters_only: bool, original: StoredModel | None) -> str:
    """What the card says of a model that is, or was trained over, int8; of another one nothing."""
    de_quantized = stored.origin.config.int8 and original is None
    if stored.base is None or not stored.config.int8:
        return "The weights of its linear layers are dequantized from int8." if de_quantized else ""
    trained = "The adapters were trained over the base in int8 (one scale per output)"
    if adapters_only:
        return f"{trained}."
    if de_quantized:
        return f"{trained} and are merged into these weights, dequantized."
    return f"{trained} and are merged into the original weights of `{(original or stored.origin).weights}`."


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
