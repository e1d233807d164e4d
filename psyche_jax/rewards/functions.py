"""Rewards by Python functions on the host, such as an LLM that judges: found by name, called together, and checked."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import inspect
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from psyche_jax.errors import UsageError, UserError
from psyche_jax.llm.reply import printable
from psyche_jax.rewards.config import FunctionReward

_LARGEST = 1e9  # times the largest weight it has a square that float32 can sum: the std of a group stays finite
_LONGEST_FAULT = 1000  # characters

RewardFunction = Callable[[list[str], list[str], list[dict[str, Any]]], Any]
"""`(prompts, completions, records) -> list[float | None]`, or a coroutine function of the same."""


@dataclass(frozen=True)
class LoadedFunction:
    """A reward of a config with the function that it names, and the source of its module (one in C has none)."""

    reward: FunctionReward
    call: RewardFunction
    source: str = ""


@dataclass(frozen=True)
class FunctionValues:
    """What a function gave: one value a response, None where it has none; and what went wrong, "" if nothing did."""

    values: tuple[float | None, ...]
    fault: str = ""


def load_functions(rewards: Sequence[FunctionReward]) -> tuple[LoadedFunction, ...]:
    """Import what `module:function` names; modules in the current folder are found too.

    Raises:
      UsageError: it cannot be imported, or is not a function.
    """
    if rewards and (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    return tuple(map(_load, rewards))


def sources_hash(functions: Sequence[LoadedFunction]) -> str:
    """SHA-256 of the modules in which functions are found; what these import is not looked at."""
    return hashlib.sha256("\0".join(function.source for function in functions).encode()).hexdigest()


def call_functions(
    functions: Sequence[LoadedFunction], prompts: list[str], completions: list[str], records: list[dict[str, Any]]
) -> dict[str, FunctionValues]:
    """The values of all functions, by name, called at the same time on the same responses.

    A function that raises, takes longer than its `timeout_seconds`, or returns anything but one number or None a
    response gives no value at all (None for each), if `on_error` is `absent`.

    Raises:
      UserError: so did a function whose `on_error` is `stop`.
    """
    calls = [_Call(function, (prompts, completions, records), len(completions)) for function in functions]
    results = {}
    for call in calls:
        result = call.result()
        if result.fault and call.reward.on_error == "stop":
            raise UserError(result.fault)
        results[call.reward.name] = result
    return results


class _Call:
    """One call in a thread of its own: a function that never returns cannot be ended, only left behind."""

    def __init__(self, function: LoadedFunction, arguments: tuple[list[Any], ...], count: int) -> None:
        self.reward = function.reward
        self._count = count
        self._values: tuple[float | None, ...] = ()
        self._fault = ""
        self._error: BaseException | None = None
        self._deadline = time.monotonic() + self.reward.timeout_seconds
        self._thread = threading.Thread(target=self._run, args=(function.call, arguments), daemon=True)
        self._thread.start()

    def _run(self, function: RewardFunction, arguments: tuple[list[Any], ...]) -> None:
        try:
            answer = function(*(list(argument) for argument in arguments))
            if inspect.isawaitable(answer):
                answer = asyncio.run(_awaited(answer, self.reward.timeout_seconds))
            self._values, self._fault = _checked(answer, self._count)
        except BaseException as error:  # whatever it is, it must not be lost with the thread
            self._error = error

    def result(self) -> FunctionValues:
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        if self._thread.is_alive() or isinstance(self._error, _TookTooLongError):
            fault = f"took longer than timeout_seconds {self.reward.timeout_seconds:g}"
        elif self._error is not None:
            words = _words_of(self._error)
            fault = f"raised {type(self._error).__name__}{': ' if words else ''}{words}"
        elif not (fault := self._fault):
            return FunctionValues(self._values)
        where = f"reward function `{self.reward.name}` ({self.reward.function})"
        return FunctionValues((None,) * self._count, f"{where}: {fault}")


class _TookTooLongError(Exception):
    """A coroutine did, and was cancelled."""


async def _awaited(answer: Any, seconds: float) -> Any:
    try:
        async with asyncio.timeout(seconds) as limit:
            return await answer
    except TimeoutError:  # the limit's, or one of its own
        if limit.expired():
            raise _TookTooLongError from None
        raise


def _checked(answer: Any, count: int) -> tuple[tuple[float | None, ...], str]:
    """The values as floats, and what is wrong with them."""
    try:
        length = -1 if isinstance(answer, str | bytes | Mapping | Set) else len(answer)
    except TypeError:  # a number, or an array of one without a dimension
        length = -1
    if length < 0:
        return (), f"returned {type(answer).__name__}, not a list of numbers"
    if length != count:
        return (), f"returned {length} values for {count} completions"
    values: list[float | None] = []
    for index, value in enumerate(answer):
        if value is not None and not isinstance(value, Real):
            return (), f"returned {type(value).__name__} for completion {index}, neither a number nor None"
        try:
            number = None if value is None else float(value)
        except OverflowError:
            number = math.inf
        if number is not None and not abs(number) <= _LARGEST:
            return (), f"returned {number:g} for completion {index}; a reward must be from -1e9 to 1e9"
        values.append(number)
    return tuple(values), ""


def _words_of(error: BaseException) -> str:
    """What it says, in one line; nothing if that raises too."""
    with contextlib.suppress(Exception):
        return printable(" ".join(str(error).split()), _LONGEST_FAULT)
    return ""


def _load(reward: FunctionReward) -> LoadedFunction:
    module_name, _, name = reward.function.partition(":")
    try:
        module = function = importlib.import_module(module_name)
        for part in name.split("."):
            function = getattr(function, part)
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
        words = _words_of(error)
        raise UsageError(
            f"reward function `{reward.name}` ({reward.function}): cannot be imported: {type(error).__name__}: {words}"
        ) from None
    if not callable(function):
        raise UsageError(f"reward function `{reward.name}` ({reward.function}): is not a function")
    source = ""
    with contextlib.suppress(OSError, TypeError):
        source = inspect.getsource(module)
    return LoadedFunction(reward, function, source)
