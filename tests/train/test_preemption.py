"""Told to stop in the middle of an evaluation: saved, and made up for when the run goes on."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.training_fixtures import grpo_config, metrics_of, sft_config, state_of, write_sft_data

import psyche_jax
from psyche_jax.config import CheckpointSection, LoggingSection
from psyche_jax.data.records import Message, RlPrompt, write_records
from psyche_jax.train import hosts, runs
from psyche_jax.train.checkpoints import Checkpoints
from psyche_jax.train.grpo_run import train_grpo
from psyche_jax.train.loop import Evaluation, Training
from psyche_jax.train.preemption import Stop, StoppedError, listening
from psyche_jax.train.runs import PreemptedError, Run, open_run
from psyche_jax.train.setup import abstract_like
from psyche_jax.train.sft import train_sft
from psyche_jax.train.state import TrainState
from psyche_jax.train.step_folders import find_checkpoint


def toy_training(folder, check=None, keep=2, target=1.0):
    """Five steps that change a number to 0, 1, 3, 6, 10; evaluated in three batches before them, after 2, 4 and 5: the
    best is the nearest to `target`."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    start = TrainState(jnp.int32(0), {"w": jnp.zeros(3)}, {"moment": jnp.ones(3)})
    abstract = abstract_like(start, jax.tree.map(lambda _: place, start))

    @jax.jit
    def step(state, batch):
        new = TrainState(state.step + 1, {"w": state.parameters["w"] + batch}, state.optimizer_state)
        return new, {"loss": new.parameters["w"].sum(), "num_tokens": jnp.float32(3), "skipped_updates": jnp.float32(0)}

    def measure(state, check_stop):
        for _ in range(3):
            check_stop()
        return {"distance": abs(float(state.parameters["w"][0]) - target)}

    with (
        mock.patch.object(Stop, "check", check or Stop.check),
        open_run(folder, "toy", {"a": 1}, LoggingSection()) as run,
        listening() as stop,
        Training(
            "toy",
            run,
            stop,
            header=["about it"],
            total_steps=5,
            metadata={"model": {}},
            checkpoints=CheckpointSection(every_steps=100, keep=keep),
            max_skipped_steps=3,
            evaluation=Evaluation(2, measure, "distance", higher_is_better=False),
            headline=("loss",),
            flops=lambda _: 1.0,
            memory_settings="",
        ) as this,
    ):
        if this.finished():
            return
        state = this.begin(lambda: start, abstract)
        for _, batch in this.steps(np.arange(5, dtype=np.float32)[this.first :]):
            state, metrics = step(state, batch)
            this.end_step(state, this.measured(metrics))


def signal_at(number):
    """`Stop.check`, which sends this process SIGTERM before it is called for the given time."""
    check = Stop.check
    calls = iter(range(1, 10**6))

    def checked(stop):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        check(stop)

    return checked


def stopped(folder, call):
    """Train with SIGTERM in that batch of all evaluations; returns the step that it was stopped after."""
    with pytest.raises(PreemptedError) as error:
        toy_training(folder, signal_at(call))
    step = state_of(folder)["step"]
    assert state_of(folder)["status"] == "preempted"
    assert str(error.value) == f"stopped by SIGTERM after step {step}; start the same command again to resume"
    assert all("distance" not in line for line in metrics_of(folder) if line["step"] == step)
    return step


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "whole"
    toy_training(folder)
    assert state_of(folder)["best"] == {"step": 2, "distance": 0.0}
    return folder


def same(folder, whole):
    assert metrics_of(folder) == metrics_of(whole)
    assert [line["step"] for line in metrics_of(folder) if "distance" in line] == [0, 2, 4, 5]
    assert (state_of(folder)["status"], state_of(folder)["best"]) == ("done", state_of(whole)["best"])
    steps = {path.name for path in (folder / "checkpoints").iterdir()}
    assert {"2", "5"} <= steps


def test_the_best_that_a_state_names_is_always_there(tmp_path, monkeypatch):
    """Also while the next best is being written, and once that is whole: a process may be killed at any time."""
    folder, seen = tmp_path / "run", []

    def look(*_):
        if (best := state_of(folder).get("best")) is not None:
            assert find_checkpoint(folder / "best").name == str(best["step"])
            seen.append(best["step"])

    def write_state(run, *arguments, **more):
        written(run, *arguments, **more)
        look()

    def seal(checkpoints):
        time.sleep(0.3)
        look()
        sealed(checkpoints)

    written, sealed = Run.write_state, Checkpoints._seal
    monkeypatch.setattr(runs, "_STATE_SECONDS", 0.0)
    monkeypatch.setattr(Run, "write_state", write_state)
    monkeypatch.setattr(Checkpoints, "_seal", seal)
    toy_training(folder, look, keep=1, target=10.0)
    assert sorted({*seen}) == [2, 4, 5]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"5"}


def test_a_run_says_what_it_does_and_its_state_follows(tmp_path, monkeypatch, capsys):
    """Each step is seen in it at once; `step` stays what is saved whole, which nothing is before the last step."""
    monkeypatch.setattr(runs, "_STATE_SECONDS", 0.0)
    seen, reach = [], Run.reach

    def look(run, step):
        reach(run, step)
        seen.append((state_of(run.folder)["step"], state_of(run.folder)["current_step"]))

    with mock.patch.object(Run, "reach", look):
        toy_training(tmp_path / "run")
    assert seen == [(0, step) for step in range(1, 6)]
    state = state_of(tmp_path / "run")
    assert (state["step"], state["current_step"]) == (5, 5)
    said = capsys.readouterr().err.splitlines()
    assert said[:4] == [
        "toy: about it",
        f"toy: folder: {tmp_path}/run",
        "toy: compiling the step (once)",
        "toy: evaluating after step 0",
    ]
    end = f"the best at step 2; {tmp_path}/run; next: psyche eval {tmp_path}/run --bench samples"
    assert re.fullmatch(rf"toy: done in \d\d:\d\d: loss 30, {re.escape(end)}", said[-1])
    # Again: there is nothing to do, which is said.
    toy_training(tmp_path / "run")
    (again,) = capsys.readouterr().err.splitlines()
    assert again.startswith(f"toy: all 5 steps are already done; {tmp_path}/run; next: ")


def test_compiling_is_announced_with_what_it_took_last_time(tmp_path, capsys):
    stopped(tmp_path / "run", 5)
    path = tmp_path / "run" / "state.json"
    path.write_text(json.dumps({**state_of(tmp_path / "run"), "compile_seconds": 27.4}))
    toy_training(tmp_path / "run")
    assert "toy: compiling the step (once; 27 s last time)" in capsys.readouterr().err


@pytest.mark.parametrize(("call", "step"), [(2, 0), (4, 2), (6, 2), (9, 4), (12, 5)])
def test_sigterm_within_an_evaluation(call, step, whole, tmp_path):
    """In one before training, in the first and last batch of one amid it, and in the last of all."""
    assert stopped(tmp_path / "run", call) == step
    with contextlib.suppress(FileNotFoundError):
        steps = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
        assert steps == {0: set(), 2: {"2"}, 4: {"2", "4"}, 5: {"2", "5"}}[step]
    toy_training(tmp_path / "run")
    same(tmp_path / "run", whole)


def test_stopped_again_while_it_makes_up_for_an_evaluation(whole, tmp_path):
    assert stopped(tmp_path / "run", 4) == 2
    for call in (1, 3):
        assert stopped(tmp_path / "run", call) == 2
    toy_training(tmp_path / "run")
    same(tmp_path / "run", whole)


@pytest.mark.slow
def test_sigterm_within_the_evaluation_of_sft(tiny_root, tmp_path):
    """Evaluated before the first step and after steps 2, 4 and 5, in two batches each time."""
    for name in ("model", "sft.jsonl"):
        (tmp_path / name).symlink_to(tiny_root / name)
    write_sft_data(tmp_path / "held_out.jsonl", 11)

    def config(run):
        made = sft_config(tmp_path, run, evaluate_every_steps=2, checkpoints=CheckpointSection(every_steps=100))
        return dataclasses.replace(
            made, data=dataclasses.replace(made.data, evaluation=str(tmp_path / "held_out.jsonl"))
        )

    train_sft(config("whole"))
    with mock.patch.object(Stop, "check", signal_at(4)), pytest.raises(PreemptedError, match="after step 2"):
        train_sft(config("stopped"))
    train_sft(config("stopped"))
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "whole")
    assert state_of(tmp_path / "stopped")["best"] == state_of(tmp_path / "whole")["best"]


@pytest.mark.slow
def test_sigterm_within_the_held_out_reward_of_grpo(tiny_root, tmp_path):
    """In the second batch after step 1: it is made up for, to the same numbers."""
    for name in ("model", "rl.jsonl"):
        (tmp_path / name).symlink_to(tiny_root / name)
    held_out = [RlPrompt((Message("user", f"{number}？"),), "ABCD"[number % 4], "single") for number in range(11)]
    write_records(tmp_path / "held_out.jsonl", held_out)

    def config(run):
        made = grpo_config(tmp_path, run, epochs=1.0, evaluate_every_steps=1)
        return dataclasses.replace(
            made, data=dataclasses.replace(made.data, evaluation=str(tmp_path / "held_out.jsonl"))
        )

    train_grpo(config("whole"))
    with mock.patch.object(Stop, "check", signal_at(4)), pytest.raises(PreemptedError, match="after step 1"):
        train_grpo(config("stopped"))
    assert state_of(tmp_path / "stopped")["status"] == "preempted"
    train_grpo(config("stopped"))
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "whole")
    assert ["evaluation_reward" in line for line in metrics_of(tmp_path / "whole")] == [True] * 3


# A process that holds the interpreter's main thread in one call, as a compilation does, and is interrupted.
BUSY = """
import hashlib, sys
from pathlib import Path
from psyche_jax.config import LoggingSection
from psyche_jax.train.runs import open_run
from psyche_jax.train.preemption import listening

with open_run(Path(sys.argv[1]), "toy", {"a": 1}, LoggingSection()) as run, listening(run.write_last_words) as stop:
    run.saved = 3
    run.write_state("running")
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[2]))
    print("told" if stop.requested() else "not told", flush=True)
"""


def read_until(stream, words):
    """The lines up to the one that holds `words`, which must come within a minute."""
    lines = []
    for line in stream:
        lines.append(line)
        if words in line:
            return lines
    raise AssertionError(f"{words!r} is not in {lines}")


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_is_answered_while_the_main_thread_is_busy(presses, tmp_path):
    """At once; a second one ends the process, its state says so, and the folder is free and whole."""
    environment = {**os.environ, "PYTHONPATH": str(Path(psyche_jax.__file__).parents[1])}
    command = [sys.executable, "-c", BUSY, str(tmp_path / "run"), str(10**9 if presses == 2 else 10**7)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        read_until(process.stdout, "busy")
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        read_until(process.stderr, "stopping after this step, saving; Ctrl-C again to quit now")
        if presses == 1:
            assert "told" in process.communicate(timeout=60)[0]
            assert process.returncode == 0
            return
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=50)[1]
        assert time.monotonic() - started < 50
    finally:
        process.kill()
    assert process.returncode == 130
    assert "quit by Ctrl-C; work after step 3 is not saved; start the same command again to resume" in said
    assert "Traceback" not in said
    assert (state_of(tmp_path / "run")["status"], state_of(tmp_path / "run")["step"]) == ("preempted", 3)
    assert not list((tmp_path / "run").glob("*.partial"))
    with open_run(tmp_path / "run", "toy", {"a": 1}, LoggingSection()) as run:
        assert run.saved == 3


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with listening() as stop:
        assert not stop.requested()
        stop.check()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested()
        assert str(stop) == "SIGINT"
        with pytest.raises(StoppedError):
            stop.check()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_what_another_host_was_told_counts(monkeypatch):
    monkeypatch.setattr(hosts, "on_any", lambda _: True)
    with listening() as stop:
        assert stop.requested(3)
        assert str(stop) == "another host"
