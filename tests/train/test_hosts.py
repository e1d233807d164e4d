"""Several processes on this machine, each with some virtual devices: what several hosts of a slice do."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.training_fixtures import execution, grpo_config, metrics_of, sft_config, state_of, write_config

from psyche_jax.config import CheckpointSection, OptimizerSection
from psyche_jax.convert import export_model
from psyche_jax.train.stored_models import open_model

DEVICES = 8


def start(
    root: Path, verb: str, processes: int, run: str, devices: int = DEVICES, **changes: Any
) -> list[subprocess.Popen]:
    """The command in so many processes, which share the devices, in the background."""
    make = {"sft": sft_config, "grpo": grpo_config}[verb]
    # A large epsilon: else Adam turns the rounding of another order of summation into whole steps.
    optimizer = OptimizerSection(learning_rate=1e-3, epsilon=1e-2, warmup=0)
    config = dataclasses.replace(make(root, run), **{"epochs": 1.0, "optimizer": optimizer, **changes})
    file = write_config(config, root / f"{run}.yaml")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}"}
    started = []
    for process in range(processes):
        places = (f"coordinator=127.0.0.1:{port}", f"num_processes={processes}", f"process_id={process}")
        overrides = [part for place in places for part in ("--set", f"distributed.{place}")]
        command = [sys.executable, "-m", "psyche_jax.cli", verb, "--config", str(file)]
        command += overrides if processes > 1 else []
        started.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root
            )
        )
    return started


def train(root: Path, verb: str, processes: int) -> Path:
    """Run the command to its end; returns the run's folder."""
    run = f"{verb}-{processes}"
    started = start(root, verb, processes, run)
    outputs = [process.communicate(timeout=400)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, "\n".join(outputs)
    # Only the first process talks.
    assert [f"{verb}: step" in output for output in outputs] == [True] + [False] * (processes - 1)
    assert state_of(root / run)["status"] == "done"
    return root / run


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_at_one_step(root):
    """The second of two is told to stop: both save the same step and end, and two go on from there."""
    changes = {"epochs": 100.0, "checkpoints": CheckpointSection(every_steps=1000)}
    processes = start(root, "sft", 2, "run", **changes)
    metrics = root / "run" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    first, second = (process.communicate(timeout=120)[0] for process in processes)
    assert [process.returncode for process in processes] == [1, 1], first + second
    state = state_of(root / "run")
    assert (state["status"], state["step"]) == ("preempted", len(metrics_of(root / "run")))
    assert state["step"] < 250
    assert f"stopped by another host after step {state['step']}" in first
    assert f"stopped by SIGTERM after step {state['step']}" in second
    assert (root / "run" / "checkpoints" / str(state["step"]) / "parameters").is_dir()
    processes = start(root, "sft", 2, "run", **changes)
    while len(metrics_of(root / "run")) <= state["step"]:
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    first, _ = (process.communicate(timeout=120)[0] for process in processes)
    assert f"resuming after step {state['step']}" in first


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["sft", "grpo"])
def test_several_processes_give_what_one_gives(verb, root):
    """Same losses (and rewards), same checkpoint, same export on 1, 2 and 4 processes with 8 devices in all."""
    one = train(root, verb, 1)
    export_model(str(one), root / "export-1", "float32")
    expected = load_file(root / "export-1" / "model.safetensors")
    for processes in (2, 4):
        several = train(root, verb, processes)
        names = ["loss", "grad_norm", *(["reward", "completions/mean_length"] if verb == "grpo" else [])]
        assert len(metrics_of(several)) == len(metrics_of(one)) >= 2
        for line, other in zip(metrics_of(several), metrics_of(one), strict=True):
            assert line["step"] == other["step"]
            np.testing.assert_allclose([line[n] for n in names], [other[n] for n in names], rtol=1e-5, atol=1e-6)
        export_model(str(several), root / f"export-{processes}", "float32")
        exported = load_file(root / f"export-{processes}" / "model.safetensors")
        assert exported.keys() == expected.keys()
        for name, tensor in exported.items():
            np.testing.assert_allclose(tensor, expected[name], atol=1e-5, err_msg=name)
    # A checkpoint of four processes is a model for one.
    stored = open_model(str(several))
    parameters = stored.read_parameters(execution(1).sharding, np.dtype("float32"))
    np.testing.assert_allclose(parameters["embedding"], expected["model.embed_tokens.weight"], atol=1e-5)


@pytest.mark.slow
def test_two_processes_of_one_device_each(root):
    """Collectives of one program that do not depend on each other came in another order in each: gloo aborted."""
    started = start(root, "grpo", 2, "one-each", devices=2, epochs=6.0)
    outputs = [process.communicate(timeout=400)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    assert state_of(root / "one-each")["status"] == "done"


def test_a_host_that_is_alone_says_so(root):
    """One process that expects another ends in one line that says what to do."""
    config = write_config(sft_config(root), root / "alone.yaml")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {
        "coordinator": f"127.0.0.1:{port}",
        "num_processes": 2,
        "process_id": 1,
        "timeout_seconds": 3,
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"distributed.{key}={value}")]
    result = subprocess.run(
        [sys.executable, "-m", "psyche_jax.cli", "sft", "--config", str(config), *overrides],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in result.stderr
    assert "every host" in result.stderr or "DEADLINE" in result.stderr, result.stderr
    assert result.returncode != 0
    assert not (root / "run").exists()
