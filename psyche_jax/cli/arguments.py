"""What the verbs share: options and checks of them."""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from psyche_jax.errors import UsageError


class AddVerb(Protocol):
    """Makes the parser of one verb, which calls `run`."""

    def __call__(
        self, name: str, run: Callable[[argparse.Namespace], None], text: str, example: str
    ) -> argparse.ArgumentParser: ...


def add_config(
    verb: argparse.ArgumentParser, what: str, required: bool = True, example: str = "optimizer.learning_rate=1e-6"
) -> None:
    """`--config` and `--set`. `what` says what it is a config of and names one that comes with the package."""
    verb.add_argument(
        "--config",
        type=_config,
        required=required,
        help=f"{what}: a YAML file, or the name of a config that comes with psyche_jax",
    )
    add_set(verb, example)


def _config(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a YAML file or a config that comes with psyche_jax")
    return Path(text)


def add_set(verb: argparse.ArgumentParser, example: str) -> None:
    """`--set`, as every verb with a config has it; `example` is a change of one of its keys."""
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help=f"set one config key, for example {example}; may be repeated",
    )


def add_thinking(verb: argparse.ArgumentParser) -> None:
    """`--thinking`, as every verb that asks a model has it: "on", "off", or None if not given."""
    verb.add_argument(
        "--thinking",
        choices=("on", "off"),
        help="set the chat template's enable_thinking, if it has one (default: as in training)",
    )


def check_at_least(name: str, value: float | None, least: int) -> None:
    """Refuse a number below `least`; None is one that was not given."""
    if value is not None and value < least:
        raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


def check_seed(seed: int) -> None:
    """Refuse a seed that is not a 32-bit number."""
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed must be from 0 to 4294967295, not {seed}")


def say_skipped(records: Iterable[str]) -> None:
    """Name on stderr the records that are left out."""
    for record in records:
        print(f"skipped: {record}", file=sys.stderr)


def warn_of_gates(servers: Mapping[str, str | None]) -> None:
    """Say at which of `servers` (base URL: key) an answer may be the crisis gate's and not the model's."""
    from psyche_jax.llm.server import gate_warnings

    for line in gate_warnings(servers):
        print(f"warning: {line}", file=sys.stderr)
