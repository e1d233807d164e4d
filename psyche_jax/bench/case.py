"""What a benchmark measures: a config of SFT or GRPO and the shape of a model, from options or from a file."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from psyche_jax.bench.options import MODEL, OPTIONS, What
from psyche_jax.config import DynamicSamplingSection, GrpoConfig, SftConfig
from psyche_jax.config_files import parse_config, read_values
from psyche_jax.errors import UsageError
from psyche_jax.model.adapters import as_trained
from psyche_jax.model.config import ModelConfig
from psyche_jax.plan.compile import PlanConfig, find_architecture
from psyche_jax.plan.rollout import draw_lengths

# Where no file says it: nothing is read or written there. One of the rewards differs by response, for a gradient.
_BASE = {"run.dir": "none", "model.path": "none: random weights", "data.train": "none: random tokens"}
_REWARDS = [{"rule": "think_format", "weight": 0.5}, {"rule": "answer_set"}, {"rule": "repetition", "ngram": 1}]
_SMALLEST_VOCABULARY = 64  # in which no token of a random model is likely (`measure.py` makes responses end by that)


@dataclass(frozen=True)
class Case:
    """`lengths`: of the responses of a step, in their order; None: all are as long as can be."""

    what: What
    config: PlanConfig
    model: ModelConfig
    lengths: tuple[int, ...] | None = None

    @property
    def shape(self) -> dict[str, Any]:
        """All sizes, by the names of the options."""
        model = {name: getattr(self.model, option.key) for name, option in MODEL.items()}
        options = OPTIONS[self.what]
        return model | {name: reduce(getattr, option.key.split("."), self.config) for name, option in options.items()}


def make_case(
    what: What,
    given: Mapping[str, Any] | None = None,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    lengths: str | None = None,
) -> Case:
    """What the options ask for.

    An option sets a key of the config, whether that is the file's or the default one; the model's shape comes from the
    options where the config names no model.

    Args:
      what: which program.
      given: options by name; those that are absent have their defaults or, with a file, what that says.
      file: a config of SFT or GRPO, or the name of one that comes with the package.
      overrides: as `--set` takes them; they come after `given`.
      lengths: of responses, as `draw_lengths` takes them.

    Raises:
      UsageError: the file is no config of that program; a value cannot be, by itself or beside the others.
      UserError: the model that the config names is not there, nor its architecture.
    """
    given = given or {}
    config = _config(what, given, file, overrides)
    sizes = {name: given[name] for name in MODEL if name in given}
    if file is None and config.model.architecture is None:
        model = _model({name: option.default for name, option in MODEL.items()} | sizes)
        model = as_trained(model, config.model.dtype, config.adapter)
    elif sizes:
        flag = f"--{next(iter(sizes)).replace('_', '-')}"
        raise UsageError(f"{flag}: the config already sets the model's shape; leave out one of the two")
    else:
        model = find_architecture(config)[0]

    # What ends a response: no token of the vocabulary; or one that is drawn where it is made to be, and nowhere else.
    if lengths is None:
        return Case(what, config, dataclasses.replace(model, stop_token_ids=(model.vocab_size,)))
    assert isinstance(config, GrpoConfig)
    if model.vocab_size < _SMALLEST_VOCABULARY:
        raise UsageError(
            f"--lengths needs a vocabulary of at least {_SMALLEST_VOCABULARY} tokens, not {model.vocab_size}"
        )
    responses = config.prompts_per_step * config.generations_per_prompt
    drawn = tuple(draw_lengths(lengths, responses, config.max_new_tokens))
    return Case(what, config, dataclasses.replace(model, stop_token_ids=(0,)), drawn)


def _config(what: What, given: Mapping[str, Any], file: Path | None, overrides: Sequence[str]) -> PlanConfig:
    """The file's or the default one, with what is given in it."""
    options = OPTIONS[what]
    chosen = {name: given[name] for name in options if name in given}
    keys: dict[str, Any] = {}
    if file is None:
        chosen = {name: option.default for name, option in options.items() if option.default is not None} | chosen
        keys = dict(_BASE) if what == "sft" else {**_BASE, "rewards": _REWARDS}
    # One response a prompt, which decoding can do, is no config of GRPO.
    single = what == "rollout" and chosen.get("generations") == 1
    keys |= {options[name].key: value for name, value in chosen.items() if not (single and name == "generations")}
    values = read_values(file, [*(f"{key}={json.dumps(value)}" for key, value in keys.items()), *overrides])
    kind: type[PlanConfig] = SftConfig if what == "sft" else GrpoConfig
    _check_kind(what, kind, values, file)
    config = parse_config(kind, values, "options" if file is None else str(file))
    if isinstance(config, GrpoConfig):
        # As `psyche plan` has it: functions take no time, and no prompt is sampled in vain.
        rewards = config.rules or GrpoConfig.rewards
        config = dataclasses.replace(config, rewards=rewards, dynamic_sampling=DynamicSamplingSection())
        if single:
            config = dataclasses.replace(config, generations_per_prompt=1)
    return config


def _check_kind(what: What, kind: type[PlanConfig], values: Mapping[str, Any], file: Path | None) -> None:
    names = {of: {field.name for field in dataclasses.fields(of)} for of in (SftConfig, GrpoConfig)}
    other = SftConfig if kind is GrpoConfig else GrpoConfig
    if strange := [key for key in values if key in names[other] - names[kind]]:
        wanted, found = ("SFT", "GRPO") if kind is SftConfig else ("GRPO", "SFT")
        where = "--set" if file is None else f"--config {file}"
        raise UsageError(f"{where}: {strange[0]} is a key of {found}; psyche bench {what} takes a config of {wanted}")


def _model(sizes: Mapping[str, Any]) -> ModelConfig:
    width, heads, kv_heads = sizes["width"], sizes["heads"], sizes["kv_heads"]
    if width % (2 * heads):
        raise UsageError(f"--width {width} must be a multiple of twice --heads {heads}")
    if heads % kv_heads:
        raise UsageError(f"--heads {heads} must be a multiple of --kv-heads {kv_heads}")
    return ModelConfig(head_dim=width // heads, **{MODEL[name].key: value for name, value in sizes.items()})
