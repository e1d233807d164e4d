"""What must not change when a run resumes: settings that change its numbers, and what it is trained on."""

import dataclasses
import os
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

from psyche_jax.config import EXECUTION_SETTINGS, FOUND_BY_CONTENT, GrpoConfig, SftConfig
from psyche_jax.storage.files import in_bucket

Change: TypeAlias = Literal["config", "data", "evaluation", "tokenizer", "template", "base", "rewards"]
CHANGES: tuple[Change, ...] = get_args(Change)
EVALUATED: frozenset[Change] = frozenset({"evaluation", "tokenizer", "template", "rewards"})
"""What an evaluation depends on, besides the parameters: where it changes, values are not to be compared."""
Contents: TypeAlias = Mapping[str, str]
"""By what a run is trained on (all of `CHANGES` but the config): a hash of its content."""

_SCORING = ("rewards", "max_new_tokens")  # settings that an evaluation depends on
_CHANGED = {
    "data": "data.train: the training data have changed since this run began",
    "evaluation": "data.evaluation: the evaluation data have changed since this run began",
    "tokenizer": "the tokenizer at model.path has changed since this run began",
    "template": "the chat template at model.path, or the prompt section, has changed since this run began",
    "base": "model.path: the model there has changed since this run began",
    "rewards": "rewards: the Python functions that they name have changed since this run began",
}


def changes(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    old_contents: Contents | None = None,
    new_contents: Contents | None = None,
) -> dict[Change, list[str]]:
    """What has changed, by kind, a line for each.

    Args:
      old, new: configs, the old one as the run wrote it.
      old_contents, new_contents: what the run was, and would be, trained on. Where either is not known, the settings
        that say where it is are compared instead.
    """
    old, new = _complete_config(old), _complete_config(new)
    left_out = {*_without_effect(old), *(FOUND_BY_CONTENT if old_contents and new_contents else ())}
    found: dict[Change, list[str]] = {}
    was, now = _lasting(old, left_out), _lasting(new, left_out)
    scored, scores = ({name: values.pop(name) for name in _SCORING if name in values} for values in (was, now))
    if lines := differences(was, now):
        found["config"] = lines
    if lines := differences(scored, scores):
        found["rewards"] = lines
    if old_contents and new_contents:
        for kind in CHANGES[1:]:
            if old_contents.get(kind) != new_contents.get(kind):
                found[kind] = [*found.get(kind, []), _CHANGED[kind]]
                if kind == "template":
                    found[kind] += differences(old.get("prompt"), new.get("prompt"), "prompt")
    return found


def is_grpo(config: Mapping[str, Any]) -> bool:
    """Whether a run with this config is one of GRPO; else it is one of SFT."""
    return "objective" in config


def refused(found: Mapping[Change, list[str]], accepted: Collection[str]) -> list[str]:
    """The lines of the changes that were not accepted."""
    return [line for kind, lines in found.items() if kind not in accepted for line in lines]


def how_to_accept(found: Mapping[Change, list[str]], accepted: Collection[str]) -> str:
    """The flag that accepts the changes."""
    return f"--accept-changed {','.join(kind for kind in CHANGES if kind in found or kind in accepted)}"


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """A line for each value in `old` that `new` has otherwise."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in old
            for line in differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if old == new else [f"its {name} is {_as_yaml(old)}, not {_as_yaml(new)}"]


def _as_yaml(value: Any) -> str:
    return "null" if value is None else repr(value)


def _without_effect(config: Mapping[str, Any]) -> set[str]:
    """The settings that change no number, beyond rounding, of a run with this config."""
    found = set(EXECUTION_SETTINGS)
    sections = (config.get(name) for name in ("objective", "dynamic_sampling"))
    objective, sampling = (section if isinstance(section, dict) else {} for section in sections)
    if objective.get("name") == "bnpo":
        found.remove("micro_batch_prompts")
    if objective.get("kl_coefficient") == 0:  # no reference is read
        found |= {"reference_dtype", "objective.kl_estimator"}
    if config.get("adapter") is not None:  # the reference is their base
        found.add("reference_dtype")
    if sampling.get("candidate_prompts") is None:
        found.add("dynamic_sampling.rule")
    return found


def _lasting(config: Mapping[str, Any], left_out: Collection[str]) -> dict[str, Any]:
    """A config without what may change; places are spelled in one way."""
    kept = _without(config, left_out)
    for section, key in (("model", "path"), ("data", "train"), ("data", "evaluation")):
        if isinstance(values := kept.get(section), dict) and key in values:
            kept[section] = {**values, key: _one_spelling(values[key])}
    return kept


def _complete_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return _complete(GrpoConfig if is_grpo(config) else SftConfig, config) if config else config


def _complete(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """A config on disk is complete: a key that it lacks is newer than the run, which had what is now the default."""
    result, types = dict(values), get_type_hints(kind)
    for entry in dataclasses.fields(kind):
        named = types[entry.name]
        section = next((one for one in (named, *get_args(named)) if dataclasses.is_dataclass(one)), None)
        inner = values.get(entry.name, {} if section is named else None)  # one that may be absent is not made up
        if isinstance(section, type) and isinstance(inner, Mapping):
            result[entry.name] = _complete(section, inner)
        elif entry.name not in values and entry.default is not dataclasses.MISSING:
            result[entry.name] = [*entry.default] if isinstance(entry.default, tuple) else entry.default  # as on disk
    return result


def _without(values: Mapping[str, Any], left_out: Collection[str], prefix: str = "") -> dict[str, Any]:
    return {
        key: _without(value, left_out, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in values.items()
        if f"{prefix}{key}" not in left_out
    }


def _one_spelling(place: Any) -> Any:
    """Of a path, or the paths that a mapping has as keys."""
    if isinstance(place, dict):
        return {_one_spelling(path): weight for path, weight in place.items()}
    if not isinstance(place, str):
        return place
    return place.rstrip("/") if in_bucket(place) else os.path.realpath(place)
