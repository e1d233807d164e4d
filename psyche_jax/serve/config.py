"""How `psyche serve` serves: where, with which limits, with or without the crisis gate."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt

from psyche_jax.config import Dtype, MeshSection, PromptSection, Section
from psyche_jax.config_files import parse_config, read_values
from psyche_jax.errors import UsageError


@dataclass(frozen=True)
class LimitsSection(Section):
    """Limits on one request, one client and all of them together."""

    body_bytes: PositiveInt = 1_048_576  # of one request
    body_seconds: PositiveFloat = 30.0  # for the request's head to arrive, and again for its body
    new_tokens: PositiveInt = 2048  # the longest response
    choices: PositiveInt = 8  # the largest `n`
    rows: PositiveInt = 16  # responses decoded at once
    waiting: PositiveInt = 64  # requests that may wait; further ones get 429
    per_minute: PositiveInt = 600  # requests from one client
    request_seconds: PositiveFloat = 600.0  # from request to the end of its response
    shutdown_seconds: PositiveFloat = 30.0  # for running requests to finish once the server is told to stop

    def __post_init__(self) -> None:
        if self.choices > self.rows:
            raise UsageError(f"choices {self.choices} exceed the {self.rows} rows decoded at once")


@dataclass(frozen=True)
class CrisisSection(Section):
    """The gate before generation and the filter after it (docs/crisis.md)."""

    gate: bool = True  # false: neither gate nor filter, every message goes to the model
    region: str = "CN"  # region of the hotline
    log: str | None = None  # file for crisis events, without any text
    classifier: bool = True  # decides, but for attempts, plans and active ideation that a rule has found
    # who is asked about messages that the gate lets pass: `served` (the served model) or an endpoint, URL#MODEL
    second_opinion: str | None = None

    def __post_init__(self) -> None:
        other = self.second_opinion
        if other is not None and not re.fullmatch(r"served|https?://[^#]+#.+", other):
            raise UsageError(f"second_opinion must be `served`, or URL#MODEL of an endpoint, not {other!r}")


@dataclass(frozen=True)
class ServeConfig(Section):
    """One model behind an OpenAI-compatible endpoint."""

    model: str  # a Hugging Face folder, a checkpoint or a run
    name: str | None = None  # the model's name for clients; None: the last part of `model`
    host: str = "127.0.0.1"  # the address to listen on; 0.0.0.0: all
    port: Annotated[int, Field(ge=0, lt=65536)] = 8000  # 0: any free port
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7  # default for requests; the published recipe's
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9  # the same
    prompt: PromptSection | None = None  # None: as the model was trained
    thinking: bool | None = None  # `enable_thinking` of the chat template; None: as in `prompt`, or as trained
    warm: bool = True  # compile the programs for a first conversation before serving
    compute_dtype: Dtype = "float32"  # of activations and matrix products
    mesh: MeshSection = field(default_factory=MeshSection)
    limits: LimitsSection = field(default_factory=LimitsSection)
    crisis: CrisisSection = field(default_factory=CrisisSection)


def serve_config(path: Path | None, overrides: Sequence[str], flags: Mapping[str, Any]) -> ServeConfig:
    """The config from a YAML file, if there is one, `key=value` overrides and flags (None: not given), in that order.

    Raises:
      UsageError: a key or a value is wrong.
    """
    values = read_values(path, overrides) | {name: value for name, value in flags.items() if value is not None}
    return parse_config(ServeConfig, values, "the settings" if path is None else str(path))
