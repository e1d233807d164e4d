"""Try a chat template in a process of its own, within limits of time and memory.

A template is a program: one step of it may take for ever (`9**(9**9)`, which Jinja computes as it compiles) or all
memory. That process runs this file, and needs only Jinja.
"""

import contextlib
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MOST_MEMORY = 2**30  # bytes
_WALL_SECONDS = 60  # where the machine has other things to do
_NO_MEMORY = 77  # exit status


@lru_cache(maxsize=16)
def excess(template: str, turns: str, seconds: int) -> str:
    """Why a template is not to be run: that it takes more than `seconds` of a CPU, or too much memory. Else empty.

    `turns` is JSON, a list of messages. What else may be wrong with the template is not this function's matter.
    """
    try:
        ended = subprocess.run(
            [sys.executable, "-P", __file__],
            input=json.dumps([template, turns, seconds]).encode(),
            timeout=_WALL_SECONDS,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it runs for more than {_WALL_SECONDS} seconds"
    except OSError:  # no process can be started here
        return ""
    if ended.returncode == -signal.SIGXCPU:
        return f"it runs for more than {seconds} seconds"
    if ended.returncode in (_NO_MEMORY, -signal.SIGKILL):
        return f"it takes more than {_MOST_MEMORY // 2**20:,} MiB of memory"
    return ""


class _Generation(Extension):
    """The tag that transformers has for what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _render(template: str, turns: Sequence[Mapping[str, str]]) -> None:
    """As transformers does it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: form}
    program = environment.from_string(template)
    names = {"bos_token": "<s>", "eos_token": "</s>", "tools": None, "documents": None}
    for length in range(1, len(turns) + 1):
        program.render(messages=turns[:length], add_generation_prompt=length == 1, **names)


def main() -> None:
    """Render what comes on stdin, within limits of the system."""
    template, turns, seconds = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    try:
        _render(template, json.loads(turns))
    except MemoryError:
        sys.exit(_NO_MEMORY)
    except Exception:  # the caller will meet it, and name it
        sys.exit(1)


if __name__ == "__main__":
    main()
