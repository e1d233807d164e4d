"""Typed configs from YAML with `extends:` and `--set`, checked before any work begins, and back to YAML."""

import dataclasses
import difflib
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import pydantic
import yaml

from psyche_jax.errors import UsageError

Config = TypeVar("Config")
_adapter: Callable[[Any], pydantic.TypeAdapter[Any]] = functools.cache(pydantic.TypeAdapter)  # to make one takes long


def load_config(kind: type[Config], path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, what it `extends`, and `key=value` overrides into a checked config.

    Args:
      kind: the dataclass.
      path: of the file, or the name of a config that comes with the package, see `find_config`.
      overrides: as `--set` takes them.

    Raises:
      UsageError: the file is missing or broken, or a key or value is wrong (named, with the nearest valid key).
    """
    return parse_config(kind, read_values(path, overrides), str(path))


def read_values(path: Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What `load_config` checks: the YAML file with what it `extends`, if there is one, and the overrides in it.

    Raises:
      UsageError: the file is missing or broken, or an override is.
    """
    values = {} if path is None else _read_yaml(find_config(path))
    for override in overrides:
        _override(values, override)
    return values


def find_config(path: Path, folder: Path = Path()) -> Path:
    """The config file at `path`, seen from `folder`, or else the one of that name that comes with the package.

    `.yaml` may be left out, and `configs/` may come before a name, as it does in a checkout.

    Raises:
      UsageError: there is neither, with the names that are nearest.
    """
    shipped = Path(str(files("psyche_jax") / "configs"))
    places = [folder / path, folder / f"{path}.yaml"]
    if path.parent in (Path(), Path("configs")):
        places += [shipped / path.name, shipped / f"{path.name}.yaml"]
    found = next((place for place in places if place.exists() and not place.is_dir()), None)
    if found is not None:
        return found
    names = sorted(file.stem for file in shipped.glob("*.yaml"))
    nearest = difflib.get_close_matches(path.name.removesuffix(".yaml"), names, 3) or ([] if path.suffix else names)
    hint = f"; configs that come with psyche_jax: {', '.join(nearest)}" if nearest else ""
    reason = "Is a directory" if places[0].is_dir() else "No such file or directory"
    raise UsageError(f"{places[0]}: the config cannot be read ({reason}){hint}")


def parse_config(kind: type[Config], values: Mapping[str, Any], origin: str) -> Config:
    """Check a mapping and turn it into the dataclass `kind`; `origin` names it in messages.

    A kind that has `renamed` reads old names of keys, and says on stderr what they are called now.
    """
    try:
        if renamed := getattr(kind, "renamed", None):
            values, note = renamed(values)
            if note:
                print(f"{origin}: {note}", file=sys.stderr, flush=True)
        config = _adapter(kind).validate_python(values)
        _refuse_truth_values(values, config_to_dict(config))
        return config
    except pydantic.ValidationError as error:
        # A misspelt key is missing too; of a union's members the one that has read most says what is wrong.
        wrong = sorted(error.errors(), key=lambda one: ("missing" in one["type"], -len(one["loc"])))
        raise UsageError(f"{origin}: {_describe(kind, wrong[0])}") from None
    except UsageError as error:
        raise UsageError(f"{origin}: {error}") from None


def config_to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a config, every field present, as `config.yaml` holds them."""
    return _adapter(type(config)).dump_python(config, mode="json")


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML with keys in the order given and Chinese as it is."""
    return yaml.dump(dict(values), Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=110)


class _Loader(yaml.SafeLoader):
    """Refuses a mapping with a key twice, of which PyYAML would take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes strings with rare line ends, which PyYAML else writes bare and reads back as spaces."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    rare = any(end in text for end in "\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if rare else None)


_Dumper.add_representer(str, _represent_text)


def parse_yaml_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
      UsageError: it cannot be read, or holds something else.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UsageError(f"{path}: the config cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not a config (YAML, as UTF-8 text)") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: an impossible date
        raise UsageError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a config must be a mapping of keys to values")
    return values


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UsageError(f"{path}: `extends` leads back to this file")
    values = parse_yaml_mapping(path)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise UsageError(f"{path}: `extends` must be the path of another config, not {parent!r}")
    return _merged(_read_yaml(find_config(Path(parent), path.parent), (*seen, path.resolve())), values)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {override}: must have the form key=value, for example run.seed=1")
    try:
        value = yaml.load(text, _Loader)
    except (ValueError, RecursionError, yaml.YAMLError):
        raise UsageError(f"--set {override}: the value is not valid YAML") from None
    *parents, last = key.split(".")
    node: Any = values
    try:
        for parent in parents:
            node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})
        node[int(last) if isinstance(node, list) else last] = value
    except (TypeError, ValueError, IndexError, AttributeError):
        raise UsageError(f"--set {override}: there is no {key!r} to set") from None


def _refuse_truth_values(given: Any, read: Any, name: str = "") -> None:
    """Refuse true and false (to YAML 1.1 also yes, no, on, off) as numbers, where pydantic takes them for 1 and 0."""
    if isinstance(given, Mapping) and isinstance(read, dict):
        pairs = [(key, value, read[key]) for key, value in given.items()]
    elif isinstance(given, list) and isinstance(read, list):
        pairs = list(zip(range(len(given)), given, read, strict=True))
    elif isinstance(given, bool) and not isinstance(read, bool):
        raise UsageError(f"{name}: must be a number, not {given}")
    else:
        return
    for key, value, result in pairs:
        _refuse_truth_values(value, result, f"{name}.{key}" if name else str(key))


# By pydantic's names of errors.
_BOUNDS = {
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:.10g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:.10g}",
}

_TYPES = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    "string_type": "must be text",
    **dict.fromkeys(("dataclass_type", "dict_type", "model_type"), "must be a section of keys and values"),
    **dict.fromkeys(("list_type", "tuple_type"), "must be a list"),
}
# Names in TRL and transformers, and the keys here (docs/from_other_tools.md).
_ELSEWHERE = {
    "lr": ("optimizer.learning_rate",),
    "lr_scheduler_type": ("optimizer.schedule",),
    "warmup_steps": ("optimizer.warmup",),
    "warmup_ratio": ("optimizer.warmup",),
    "num_train_epochs": ("epochs",),
    "per_device_train_batch_size": ("prompts_per_step", "batch_size"),
    "gradient_accumulation_steps": ("micro_batch_prompts", "micro_batch_size"),
    "num_generations": ("generations_per_prompt",),
    "max_completion_length": ("max_new_tokens",),
    "beta": ("objective.kl_coefficient",),
    "epsilon": ("objective.clip_low",),
    "epsilon_high": ("objective.clip_high",),
    "loss_type": ("objective.name",),
    "lora_r": ("adapter.rank",),
    "lora_rank": ("adapter.rank",),
    "lora_alpha": ("adapter.alpha",),
    "output_dir": ("run.dir",),
    "save_steps": ("checkpoints.every_steps",),
    "save_total_limit": ("checkpoints.keep",),
    "eval_steps": ("evaluate_every_steps",),
    "model_name_or_path": ("model.path",),
    "bf16": ("model.compute_dtype",),
    "gradient_checkpointing": ("model.remat",),
}


def _describe(kind: type, error: Any) -> str:
    location = error["loc"]
    # Behind the index of a rule pydantic names the rule's kind, which is not a key of any config.
    pairs = zip((None, *location), location, strict=False)
    parts = [str(part) for before, part in pairs if not isinstance(before, int)]
    parts = [part for part in parts if part != "str" and not part.startswith("dict[")]  # members of a union
    name = ".".join(parts)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        siblings = _field_names(_section_at(kind, location[:-1]))
        alike = difflib.get_close_matches(parts[-1], siblings, 1) or _by_initials(parts[-1], siblings)
        nearest = [".".join([*parts[:-1], key]) for key in alike]
        elsewhere = [key for key in _keys(kind) if key.rpartition(".")[2] == parts[-1]]
        of_others = [key for key in _ELSEWHERE.get(parts[-1], ()) if key in _keys(kind)]
        hints = [f"did you mean {key!r}?" for key in of_others or nearest or elsewhere]
        return f"unknown key {name!r}; {hints[0] if hints else 'valid keys here: ' + ', '.join(siblings)}"
    if error["type"] == "invalid_key":
        section = "".join(f"{part}." for part in parts[:-1])
        return f"the key {section}{error['input']} is no text, as YAML reads it; put it in quotes, or correct it"
    if error["type"] in ("missing", "missing_argument"):
        return f"the key {name!r} is missing"
    if bound := _BOUNDS.get(error["type"]):
        return f"{name} {bound.format(**error['ctx'])}, not {error['input']!r}"
    where = f"{name}: " if name else ""
    if error["type"] == "value_error":
        return where + error["msg"].removeprefix("Value error, ")
    # The message of pydantic in our words; behind its comma it repeats why.
    said = error["msg"].replace("Input should be", "must be", 1).partition(", unable")[0]
    return f"{where}{_TYPES.get(error['type'], said)}, not {error['input']!r}"


def _by_initials(name: str, keys: Sequence[str]) -> list[str]:
    """The keys that `name` abbreviates: lr is learning_rate."""
    return [key for key in keys if "".join(word[0] for word in key.split("_")) == name]


def _section_at(kind: Any, location: Sequence[str | int]) -> Any:
    """The dataclass to which `location`, as pydantic gives it, leads from `kind`."""
    for part in location:
        if isinstance(part, int):
            kind = get_args(kind)[0]
        elif dataclasses.is_dataclass(kind):
            kind = _present(get_type_hints(kind)[part])
        else:
            kind = next(rule for rule in get_args(kind) if get_args(get_type_hints(rule)["rule"]) == (part,))
    return kind


def _keys(kind: Any, prefix: str = "") -> list[str]:
    keys = []
    hints = get_type_hints(kind)
    for name in _field_names(kind):
        keys.append(prefix + name)
        if dataclasses.is_dataclass(section := _present(hints[name])):
            keys += _keys(section, f"{prefix}{name}.")
    return keys


def _present(kind: Any) -> Any:
    """The type of a section that may be absent (`Section | None`) where it is there; any other type as it is."""
    kinds = [one for one in get_args(kind) if one is not type(None)]
    return kinds[0] if type(None) in get_args(kind) and len(kinds) == 1 else kind


def _field_names(kind: Any) -> list[str]:
    return [entry.name for entry in dataclasses.fields(kind)]
