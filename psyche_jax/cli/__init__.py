"""The command `psyche`: one verb for each step of the recipe."""

import argparse
import sys
from collections.abc import Callable, Sequence

import psyche_jax
from psyche_jax.cli import data, evaluation, serving, synthesis, training
from psyche_jax.errors import UserError, first_reason


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 1 (it failed) or 2 (it was used wrongly)."""
    parsed = parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except UserError as error:
        return _failed(parsed.verb, str(error), error.exit_code, error.details)
    except KeyboardInterrupt:
        again = "; start the same command again to go on" if parsed.verb in ("synth", "select", "eval") else ""
        return _failed(parsed.verb, f"interrupted{again}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _failed(parsed.verb, f"{where}{error.strerror or error}")
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = first_reason(error)
        return _failed(parsed.verb, f"out of memory; use smaller batches or more devices ({reason})")
    return 0


def _failed(verb: str, message: str, exit_code: int = 1, details: Sequence[str] = ()) -> int:
    """Say in one line why a command failed, and in one more for each detail."""
    print(f"psyche {verb}: {' '.join(message.split())}", file=sys.stderr)
    for detail in details:
        print(f"  {' '.join(detail.split())}", file=sys.stderr)
    return exit_code


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="psyche",
        description="Turn a Qwen or Llama base model into a domain reasoning model: SFT, GRPO, evaluation, export.",
        epilog="Start here: psyche demo --out runs/demo",
    )
    parser.add_argument("--version", action="version", version=f"psyche {psyche_jax.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str, example: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"Example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.set_defaults(run=run)
        return verb

    for room in (synthesis, data, training, evaluation, serving):
        room.add_verbs(add)
    return parser
