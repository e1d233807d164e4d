"""Records from source texts: synth, select, review."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psyche_jax.cli.arguments import AddVerb, add_config, say_skipped, warn_of_gates
from psyche_jax.errors import UsageError, UserError

if TYPE_CHECKING:
    from psyche_jax.synth.config import LlmSection


def add_verbs(add: AddVerb) -> None:
    """Put this module's verbs into the parser."""
    for name, run, text in (
        ("synth", _synth, "Make training records from source texts, with LLMs behind the OpenAI protocol."),
        ("select", _select, "Let LLMs answer questions: those that any LLM gets right go to SFT, the others to RL."),
    ):
        verb = add(name, run, text, f"psyche {name} --config configs/{name}.yaml --set run.dir=runs/my_{name}")
        add_config(verb, f"settings of the run, such as {name}", example="calls.concurrency=4")
        if name == "synth":
            verb.add_argument("--stage", metavar="S", help="run only this stage; the stages before it must be done")
        verb.add_argument("--json", action="store_true", help="print the stages' reports as one JSON object")

    verb = add(
        "review",
        _review,
        "Serve a page on this machine where a person accepts, edits or rejects questions by keyboard.",
        "psyche review runs/synth --who Li",
    )
    verb.add_argument(
        "store", type=Path, metavar="STORE", help="the folder of a synth or select run, or its review.sqlite"
    )
    verb.add_argument("--who", help="the reviewer's name, stored with each decision (default: the login name)")
    verb.add_argument(
        "--blind",
        action="store_true",
        help="hide the others' decisions, for an independent second review",
    )
    verb.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: this machine only)")
    verb.add_argument("--port", type=int, default=0, help="default: any free port")
    files = verb.add_mutually_exclusive_group()
    files.add_argument(
        "--export", type=Path, metavar="FILE", help="write the queue as JSONL instead, to review elsewhere"
    )
    files.add_argument(
        "--import", type=Path, metavar="FILE", dest="load", help="read decisions from such a file instead"
    )


def _synth(arguments: argparse.Namespace) -> None:
    from psyche_jax.config_files import load_config
    from psyche_jax.synth.config import SynthConfig

    config = load_config(SynthConfig, arguments.config, arguments.overrides)
    from psyche_jax.synth.pipeline import STAGES, run_synth

    if arguments.stage is not None and arguments.stage not in STAGES:
        raise UsageError(f"--stage {arguments.stage}: no such stage; known: {', '.join(STAGES)}")
    warn_of_gates(_servers(config.llms))
    _print_stages(run_synth(config, arguments.stage), arguments.json)


def _select(arguments: argparse.Namespace) -> None:
    from psyche_jax.config_files import load_config
    from psyche_jax.synth.config import SelectConfig

    config = load_config(SelectConfig, arguments.config, arguments.overrides)
    from psyche_jax.synth.pipeline import run_select

    warn_of_gates(_servers(config.llms))
    _print_stages(run_select(config), arguments.json)


def _servers(llms: "Sequence[LlmSection]") -> dict[str, str | None]:
    """Base URLs and keys."""
    return {llm.base_url: os.environ.get(llm.key_env) if llm.key_env else None for llm in llms}


def _print_stages(reports: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(reports, ensure_ascii=False))
        return
    for name, report in reports.items():
        counts = ", ".join(f"{key} {value}" for key, value in report["counts"].items())
        aside = ", ".join(f"{value} {reason}" for reason, value in report["set_aside"].items())
        print(f"{name}: {counts}{'; skipped: ' + aside if aside else ''}")


def _review(arguments: argparse.Namespace) -> None:
    import getpass

    from psyche_jax.synth.review import STORE, ReviewStore, serve_review

    path = arguments.store / STORE if arguments.store.is_dir() else arguments.store
    if not path.is_file():
        raise UserError(f"{path}: there is no review queue; `psyche synth` makes one")
    who = arguments.who or getpass.getuser()
    store = ReviewStore(path)
    if arguments.export is not None:
        print(f"{arguments.export}: {store.export(arguments.export)} items")
    elif arguments.load is not None:
        taken, faults = store.load(arguments.load, who)
        say_skipped(faults)
        print(f"{path}: {taken} decisions imported, {len(faults)} skipped")
        if faults and not taken:
            raise UserError(f"{arguments.load}: holds no usable decision")
    else:
        serve_review(store, who, arguments.host, arguments.port, arguments.blind)
