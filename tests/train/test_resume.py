"""Runs that are told to stop, or killed, and go on: the same numbers, bit for bit, as runs left alone."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from support.training_fixtures import (
    RULES,
    execution,
    grpo_config,
    metrics_of,
    sft_config,
    state_of,
    write_config,
    write_prompts,
)

import psyche_jax
from psyche_jax.config import (
    AdapterSection,
    CheckpointSection,
    DynamicSamplingSection,
    GrpoDataSection,
    ObjectiveSection,
)
from psyche_jax.rewards import FunctionReward
from psyche_jax.train.run_files import read_lines
from psyche_jax.train.stored_models import open_model


class Command:
    """`psyche sft` or `psyche grpo` as users run it, with one cache of compiled programs.

    With one device, since programs of several CPU devices can deadlock when they come from the cache (XLA of jax
    0.10.2: each device enters another all-gather first).
    """

    def __init__(self, verb: str, config: Any, root: Path) -> None:
        self.run = Path(config.run.dir)
        path = write_config(config, root / f"{self.run.name}.yaml")
        self.arguments = [sys.executable, "-m", "psyche_jax.cli", verb, "--config", str(path)]
        self.environment = {
            **os.environ,
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(root / "cache"),
            "PYTHONPATH": os.pathsep.join([str(Path(psyche_jax.__file__).parents[1]), str(root)]),
        }

    def start(self) -> subprocess.Popen:
        """In the background."""
        return subprocess.Popen(self.arguments, env=self.environment, stderr=subprocess.PIPE, text=True)

    def finish(self) -> str:
        """To the end, which must be a good one; what it said."""
        process = self.start()
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said
        assert state_of(self.run)["status"] == "done"
        return said

    def stop(self, number: signal.Signals, after: int) -> tuple[int, str]:
        """Start, send a signal once that many steps are logged, and give exit code and what was said."""
        process = self.start()
        try:
            deadline = time.monotonic() + 300
            while self.steps() < after and process.poll() is None:
                assert time.monotonic() < deadline, "no step was done"
                time.sleep(0.01)
            process.send_signal(number)
            said = process.communicate(timeout=120)[1]
        finally:
            process.kill()
        return process.returncode, said

    def steps(self) -> int:
        """The last step that is logged."""
        path = self.run / "metrics.jsonl"
        return max((line["step"] for line in read_lines(path)), default=0) if path.is_file() else 0


def last_parameters(run: Path) -> list[bytes]:
    """Of the run's last checkpoint."""
    model = open_model(str(run))
    return [leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(parameters_of(model)))]


def parameters_of(model):
    return model.read_parameters(execution(1).sharding, jnp.dtype("float32"))


def same_run(run: Path, whole: Path, steps: int) -> None:
    """Every step once, in order, with the same numbers; the same parameters in the end."""
    lines = metrics_of(run)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert lines == metrics_of(whole)
    for path in whole.glob("samples.jsonl"):  # SFT writes none
        assert read_lines(run / path.name) == read_lines(path)
    assert last_parameters(run) == last_parameters(whole)


@pytest.fixture(scope="module")
def work(tiny_root, tmp_path_factory):
    """Where the runs of this module go, reading the model and data of `tiny_root`."""
    folder = tmp_path_factory.mktemp("resume")
    for name in ("model", "sft.jsonl", "rl.jsonl"):
        (folder / name).symlink_to(tiny_root / name)
    return folder


@pytest.mark.slow
def test_sft_stopped_by_sigterm_goes_on(work):
    """Preempted between two checkpoints, as TPU VMs are: it saves, says so, exits with 1, and goes on from there."""
    checkpoints = CheckpointSection(every_steps=20, keep=2)
    whole, command = (
        Command("sft", sft_config(work, run, epochs=16.0, checkpoints=checkpoints), work)
        for run in ("sft-whole", "sft-stopped")
    )
    whole.finish()
    code, said = command.stop(signal.SIGTERM, after=3)
    state = state_of(command.run)
    assert (code, state["status"]) == (1, "preempted"), said
    assert 3 <= state["step"] < 40
    assert said.strip().splitlines()[-1] == (
        f"psyche sft: stopped by SIGTERM after step {state['step']}; start the same command again to resume"
    )
    assert "stopped by SIGTERM" in state["reason"]
    assert "Traceback" not in said
    assert (command.run / "checkpoints" / str(state["step"]) / "parameters").is_dir()
    assert [line["step"] for line in metrics_of(command.run)] == list(range(1, state["step"] + 1))
    assert f"sft: resuming after step {state['step']}" in command.finish()
    same_run(command.run, whole.run, 40)
    assert state_of(command.run)["reason"] == ""


@pytest.mark.slow
def test_grpo_killed_and_stopped_goes_on(work):
    """Killed without warning, then interrupted by the user, then left alone."""
    checkpoints = CheckpointSection(every_steps=6, keep=2)
    whole, command = (
        Command("grpo", grpo_config(work, run, epochs=16.0, checkpoints=checkpoints), work)
        for run in ("grpo-whole", "grpo-stopped")
    )
    whole.finish()
    code, _ = command.stop(signal.SIGKILL, after=13)  # 12 waits until 6 is written
    assert code == -signal.SIGKILL
    assert state_of(command.run)["status"] == "running", "nobody was left to write another state"
    done = command.steps()
    assert done >= 13
    code, said = command.stop(signal.SIGINT, after=done + 2)
    saved = [int(line.split()[-1]) for line in said.splitlines() if line.startswith("grpo: resuming after step")]
    assert saved and saved[0] in range(0, done + 1, 6), said
    assert (code, state_of(command.run)["status"]) == (1, "preempted"), said
    assert state_of(command.run)["step"] < 32
    command.finish()
    same_run(command.run, whole.run, 32)
    samples = read_lines(whole.run / "samples.jsonl")
    assert sorted({line["step"] for line in samples}) == [1, 10, 20, 30, 32]
    compiled = [line["compilations"] for line in read_lines(whole.run / "metrics.jsonl")]
    assert compiled[0] > 0 and not any(compiled[8:]), "once every length of prompts was seen, nothing is compiled"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_adapters_killed_go_on(kind, work):
    """Killed without warning between two checkpoints: the same adapters in the end as without.

    Of SFT with moments in bfloat16, which are stored as they are.
    """
    make = {"sft": sft_config, "grpo": grpo_config}[kind]
    checkpoints = CheckpointSection(every_steps=3, keep=2)
    adapter = AdapterSection(rank=4, targets=("q_proj", "v_proj", "down_proj"))
    made = [
        make(work, run, epochs=8.0, checkpoints=checkpoints, adapter=adapter)
        for run in (f"{kind}-adapters-whole", f"{kind}-adapters-killed")
    ]
    if kind == "sft":
        halved = {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"}
        made = [replace(config, optimizer=replace(config.optimizer, **halved)) for config in made]
    whole, command = (Command(kind, config, work) for config in made)
    whole.finish()
    code, said = command.stop(signal.SIGKILL, after=7)
    assert code == -signal.SIGKILL, said
    assert f"{kind}: resuming after step" in command.finish()
    same_run(command.run, whole.run, {"sft": 20, "grpo": 16}[kind])


@pytest.mark.slow
def test_ctrl_c_twice_while_compiling(work):
    """Answered at once, and it ends at once: nothing is half-written, and the same command starts it again."""
    command = Command("sft", sft_config(work, "quit"), work)
    command.environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    command.environment["XLA_FLAGS"] = "--xla_cpu_parallel_codegen_split_count=1"
    process = command.start()
    try:
        deadline = time.monotonic() + 120
        while not (command.run / "checkpoints" / "tokenizer").is_dir():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        for line in ("stopping after this step, saving", "quit by Ctrl-C"):
            process.send_signal(signal.SIGINT)
            assert any(line in said for said in process.stderr)
        assert process.wait(timeout=30) == 130
    finally:
        process.kill()
        process.stderr.close()
    assert state_of(command.run)["status"] == "preempted"
    assert state_of(command.run)["step"] == 0
    command.finish()


JUDGE = """
import asyncio

async def judge(prompts, completions, records):
    await asyncio.sleep(0.01)
    assert all(record["messages"][0]["content"] in prompt for prompt, record in zip(prompts, records, strict=True))
    return [None if record["answer"] == "D" else len(set(text)) / 6 for text, record in zip(completions, records)]
"""


@pytest.mark.slow
def test_grpo_with_everything_on_goes_on(work):
    """Two programs, a coroutine between them, dynamic sampling, several passes, held-out reward: stopped, resumed."""
    (work / "my_judge.py").write_text(JUDGE)
    write_prompts(work / "more.jsonl", 21)
    whole, command = (
        Command(
            "grpo",
            grpo_config(
                work,
                run,
                epochs=4.0,
                checkpoints=CheckpointSection(every_steps=3, keep=1),
                data=GrpoDataSection(str(work / "rl.jsonl"), 64, str(work / "more.jsonl")),
                evaluate_every_steps=2,
                objective=ObjectiveSection("cispo", kl_coefficient=0.05, kl_unbiased=True, entropy_coefficient=0.01),
                passes_per_step=2,
                minibatch_prompts=4,
                dynamic_sampling=DynamicSamplingSection(16, "ascii"),
                rewards=(*RULES, FunctionReward(function="my_judge:judge", weight=0.5)),
            ),
            work,
        )
        for run in ("everything-whole", "everything-stopped")
    )
    assert "16 records skipped" in whole.finish(), "those of more.jsonl that are trained on"
    code, said = command.stop(signal.SIGTERM, after=1)
    assert (code, state_of(command.run)["status"]) == (1, "preempted"), said
    command.finish()
    start, *lines = metrics_of(whole.run)
    assert start["step"] == 0 and "reward" not in start
    assert [line["step"] for line in lines if "evaluation_reward" in line] == [2, 4]
    assert [start, *lines] == metrics_of(command.run)
    assert last_parameters(command.run) == last_parameters(whole.run)
    best = max(lines, key=lambda line: line.get("evaluation_reward", -9))
    for run in (whole.run, command.run):
        assert state_of(run)["best"] == {"step": best["step"], "evaluation_reward": best["evaluation_reward"]}
        assert open_model(str(run / "best")).weights.name == str(best["step"])
    samples = read_lines(whole.run / "samples.jsonl")
    assert samples == read_lines(command.run / "samples.jsonl")
    for sample in samples:
        assert sample["policy_step"] == sample["step"] - 1
        assert sample["rewards"].keys() == {"ascii", "repetition", "length", "judge"}
    assert {line["dynamic_sampling/sampled_prompts"] for line in lines} <= {8, 16}
