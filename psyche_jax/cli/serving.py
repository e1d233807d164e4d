"""Talking with a model: chat, serve."""

import argparse
import json
import os
import sys
from pathlib import Path

from psyche_jax.cli import start
from psyche_jax.cli.arguments import AddVerb, add_set, add_thinking


def add_verbs(add: AddVerb) -> None:
    """Put this module's verbs into the parser."""
    verb = add(
        "chat",
        _chat,
        "Chat with a model in the terminal.",
        "psyche chat runs/demo/grpo --show-reasoning",
    )
    verb.add_argument(
        "model", metavar="MODEL", help="a Hugging Face folder, a checkpoint, a run, or an endpoint: URL[#MODEL]"
    )
    verb.add_argument("--config", type=Path, help="a YAML file of settings, as for serve; see docs/config.md")
    add_set(verb, "limits.new_tokens=512")
    verb.add_argument("--system", default="", metavar="TEXT", help="a system prompt in place of the model's own")
    verb.add_argument("--show-reasoning", action="store_true", help="do not fold <think>…</think>")
    _add_conversation(verb)

    verb = add(
        "serve",
        _serve,
        "Serve a model on this machine: an OpenAI-compatible endpoint and a web page.",
        "psyche serve runs/demo/grpo --port 8000",
    )
    verb.add_argument("model", metavar="MODEL", help="a Hugging Face folder, a checkpoint or a run")
    verb.add_argument("--config", type=Path, help="a YAML file of settings; see docs/config.md")
    add_set(verb, "limits.new_tokens=512")
    verb.add_argument("--host", help="default 127.0.0.1; any other address needs a token in PSYCHE_SERVE_TOKEN")
    verb.add_argument("--port", type=int, metavar="N", help="default 8000; 0 takes any free port")
    verb.add_argument("--name", help="the model's name for clients (default: the last part of MODEL)")
    _add_conversation(verb)


def _add_conversation(verb: argparse.ArgumentParser) -> None:
    """Options of whatever talks with people."""
    verb.add_argument("--plain", action="store_true", help="add no system prompt and no instruction to the messages")
    add_thinking(verb)
    verb.add_argument("--region", metavar="CODE", help="region whose hotline the crisis gate names (default CN)")
    verb.add_argument("--crisis-log", metavar="FILE", help="log crisis events to this file, without any text")
    verb.add_argument(
        "--no-crisis-gate", action="store_true", help="check neither messages nor replies: the model answers all"
    )


def _chat(arguments: argparse.Namespace) -> None:
    from psyche_jax.serve.config import serve_config
    from psyche_jax.train.step_folders import check_model

    changes = [*arguments.overrides, *_conversation(arguments)]
    config = serve_config(arguments.config, changes, {"model": arguments.model})
    check_model(config.model)
    start.start_jax()
    from psyche_jax.serve.chat import chat

    chat(config, arguments.system, arguments.show_reasoning)


def _serve(arguments: argparse.Namespace) -> None:
    from psyche_jax.serve.config import serve_config
    from psyche_jax.train.step_folders import check_model

    flags = {"model": arguments.model, "host": arguments.host, "port": arguments.port, "name": arguments.name}
    config = serve_config(arguments.config, [*arguments.overrides, *_conversation(arguments)], flags)
    check_model(config.model)
    start.start_jax()
    from psyche_jax.serve.server import announce, serve

    try:
        serve(config, lambda address: announce(config, address))
    except KeyboardInterrupt:  # before it serves, while another thread may be compiling: that cannot be broken off, and
        print("psyche serve: interrupted", file=sys.stderr, flush=True)
        os._exit(1)  # must not outlive the interpreter


def _conversation(arguments: argparse.Namespace) -> list[str]:
    """The options of `_add_conversation` as changes of a config."""
    changes = ["prompt.system=''", "prompt.instruction=''"] if arguments.plain else []
    changes += [f"thinking={json.dumps(arguments.thinking == 'on')}"] if arguments.thinking else []
    changes += ["crisis.gate=false"] if arguments.no_crisis_gate else []
    for key, value in (("crisis.region", arguments.region), ("crisis.log", arguments.crisis_log)):
        changes += [f"{key}={json.dumps(value)}"] if value else []
    return changes
