"""Rewards by Python functions: what they are given, and whatever they may do wrong."""

import asyncio
import time

import numpy as np
import pytest

from psyche_jax.errors import UsageError, UserError
from psyche_jax.rewards import FunctionReward
from psyche_jax.rewards.functions import LoadedFunction, call_functions, load_functions

PROMPTS, COMPLETIONS = ["p", "p", "q"], ["a", "bb", "ccc"]
RECORDS = [{"answer": "A"}, {"answer": "A"}, {"answer": "B"}]


def loaded(call, **changes):
    return LoadedFunction(FunctionReward(function="module:judge", **changes), call)


def call(*functions):
    return call_functions(functions, PROMPTS, COMPLETIONS, RECORDS)


def test_values_and_what_they_come_from():
    seen = []

    def judge(prompts, completions, records):
        seen.append((prompts, completions, records))
        return [len(completions[0]), None, True]

    result = call(loaded(judge))
    assert result["judge"].values == (1.0, None, 1.0)
    assert result["judge"].fault == ""
    assert seen == [(PROMPTS, COMPLETIONS, RECORDS)]
    assert call(loaded(lambda p, c, r: np.asarray([0.5, 1, 2], np.float32)))["judge"].values == (0.5, 1.0, 2.0)


def test_what_a_function_does_to_its_arguments_others_do_not_see():
    def greedy(prompts, completions, records):
        completions.clear()
        return [0, 0, 0]

    values = call(loaded(greedy, name="greedy"), loaded(lambda p, c, r: [len(c)] * 3, name="other"))
    assert values["other"].values == (3.0, 3.0, 3.0)


def test_coroutines_and_functions_run_at_the_same_time():
    """Each waits until all three have begun."""
    begun = []

    async def asynchronous(prompts, completions, records):
        begun.append(1)
        while len(begun) < 3:
            await asyncio.sleep(0.001)
        return [1, 1, 1]

    def plain(prompts, completions, records):
        begun.append(1)
        while len(begun) < 3:
            time.sleep(0.001)
        return [2, 2, 2]

    functions = [loaded(f, name=n) for f, n in ((asynchronous, "a"), (asynchronous, "b"), (plain, "c"))]
    assert {name: result.values[0] for name, result in call(*functions).items()} == {"a": 1.0, "b": 1.0, "c": 2.0}


def raises(prompts, completions, records):
    raise KeyError("no\nkey")


def hangs(prompts, completions, records):
    time.sleep(30)


async def waits(prompts, completions, records):
    await asyncio.sleep(30)


async def times_out_by_itself(prompts, completions, records):
    raise TimeoutError("the judge's server")


class Unreadable(list):
    """Of which nothing can be had, and whose complaint would steer a terminal."""

    def __iter__(self):
        raise ValueError("\x1b[2J" + "x" * 10_000)


class SpeechlessError(Exception):
    def __str__(self):
        raise KeyError(self)


def speechless(prompts, completions, records):
    raise SpeechlessError


FAULTS = {
    raises: "raised KeyError: 'no\\nkey'",
    speechless: "raised SpeechlessError",
    hangs: "took longer than timeout_seconds 0.2",
    waits: "took longer than timeout_seconds 0.2",
    times_out_by_itself: "raised TimeoutError: the judge's server",
    (lambda p, c, r: [1.0, 2.0]): "returned 2 values for 3 completions",
    (lambda p, c, r: None): "returned NoneType, not a list of numbers",
    (lambda p, c, r: 1.0): "returned float, not a list of numbers",
    (lambda p, c, r: "abc"): "returned str, not a list of numbers",
    (lambda p, c, r: ["1", 2, 3]): "returned str for completion 0, neither a number nor None",
    (lambda p, c, r: [1, float("nan"), 3]): "returned nan for completion 1; a reward must be from -1e9 to 1e9",
    (lambda p, c, r: [1, 2, float("inf")]): "returned inf for completion 2; a reward must be from -1e9 to 1e9",
    (lambda p: [1, 2, 3]): "raised TypeError: ",
    (lambda p, c, r: {0: 1.0, 1: 0.0, 2: 1.0}): "returned dict, not a list of numbers",
    (lambda p, c, r: {0.1, 0.5, 0.3}): "returned set, not a list of numbers",
    (lambda p, c, r: np.array(0.5)): "returned ndarray, not a list of numbers",
    (lambda p, c, r: np.array([1, np.inf, 3], np.float16)): "returned inf for completion 1; a reward must be from",
    (lambda p, c, r: Unreadable([1, 2, 3])): "raised ValueError: [2J",
    (lambda p, c, r: [1, 10**400, 3]): "returned inf for completion 1; a reward must be from -1e9 to 1e9",
    (lambda p, c, r: [1, 10**5000, 3]): "returned inf for completion 1; a reward must be from -1e9 to 1e9",
    (lambda p, c, r: [1, 2, -1e30]): "returned -1e+30 for completion 2; a reward must be from -1e9 to 1e9",
    (lambda p, c, r: [1, 2, -1e39]): "returned -1e+39 for completion 2; a reward must be from -1e9 to 1e9",
}


@pytest.mark.parametrize(("function", "fault"), FAULTS.items(), ids=range(len(FAULTS)))
def test_whatever_goes_wrong_is_one_line(function, fault):
    with pytest.raises(UserError) as error:
        call(loaded(function, timeout_seconds=0.2))
    line = str(error.value)
    assert line.startswith(f"reward function `judge` (module:judge): {fault}")
    assert len(line.splitlines()) == 1 and line.isprintable() and len(line) < 1200
    result = call(loaded(function, timeout_seconds=0.2, on_error="absent"))["judge"]
    assert result.values == (None, None, None)
    assert result.fault == line


def test_functions_are_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_here.py").write_text(
        "class Judges:\n    @staticmethod\n    def kind(prompts, completions, records):\n        return [1, 2, 3]\n"
        "number = 3\n"
    )
    (tmp_path / "my_broken_rewards.py").write_text("raise RuntimeError('two\\nlines')\n")
    (tmp_path / "my_script_of_rewards.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere", *__import__("sys").path])
    (function,) = load_functions([FunctionReward(function="my_rewards_here:Judges.kind")])
    assert call(function)["Judges.kind"].values == (1.0, 2.0, 3.0)
    for name, fault in {
        "my_rewards_here:absent": "has no attribute 'absent'",
        "no_such_module:judge": "ModuleNotFoundError: No module named 'no_such_module'",
        "my_broken_rewards:judge": "RuntimeError: two lines",
        "my_script_of_rewards:judge": "cannot be imported: SystemExit: 0",
        "my_rewards_here:number": "is not a function",
    }.items():
        with pytest.raises(UsageError) as error:
            load_functions([FunctionReward(function=name)])
        assert fault in str(error.value)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "values",
    [
        {"function": "judge"},
        {"function": "a:"},
        {"function": "a b:c"},
        {"timeout_seconds": 0},
        {"weight": float("nan")},
        {"weight": -1e7},
    ],
)
def test_what_cannot_be_a_function_is_refused(values):
    with pytest.raises(UsageError):
        FunctionReward(**{"function": "module:judge", **values})
