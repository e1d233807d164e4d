"""Kills training runs of a tiny model at random moments, resumes them, and compares them with runs left alone.

    python scripts/benchmarks/kill_and_resume.py --sft 20 --grpo 10 --sigterm 10 --json

Every second run is killed on other devices than it is resumed on: several virtual devices, or several processes. A
third of the SIGKILLs wait for a checkpoint that is being written. SIGTERM goes to one process only. What each process
reads is written down, so that examples that are lost or trained on twice are counted and not concluded from losses.
Exits with 1 if a run did not come out as it should. Ctrl-C ends it with a summary of what is done.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support import training_fixtures as fixtures  # noqa: E402 - the tiny model, its data, configs

TOLERANCE = 1e-5  # of losses and rewards on another number of devices
PATIENCE = 900  # seconds
COMPARED = ("loss", "grad_norm", "evaluation_loss", "reward", "evaluation_reward")


@dataclass(frozen=True)
class Layout:
    """How many processes, and how many virtual devices each has."""

    processes: int = 1
    devices: int = 1

    def __str__(self) -> str:
        return f"{self.processes}×{self.devices}"


ONE = Layout()
OTHERS = (Layout(1, 2), Layout(2, 1), Layout(1, 4))


@dataclass(frozen=True)
class Case:
    """One run that is killed once: how, where, and on what it goes on."""

    number: int
    verb: str
    signal: signal.Signals
    before: Layout
    after: Layout
    in_write: bool  # whether to wait for a checkpoint that is being written


@dataclass(frozen=True)
class Outcome:
    """What became of it. `step`: the last one logged when the signal was sent."""

    case: Case
    step: int
    writing: bool
    seconds_to_exit: float
    identical: bool
    difference: float  # the largest of COMPARED, relative to the value where that is above 1
    lost: int
    repeated: int
    faults: tuple[str, ...]


def main() -> None:
    """Run all cases; print a table or one object."""
    if sys.argv[1:2] == ["child"]:
        _child(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft", type=int, default=20, help="SFT runs killed with SIGKILL (default 20)")
    parser.add_argument("--grpo", type=int, default=10, help="GRPO runs killed with SIGKILL (default 10)")
    parser.add_argument("--sigterm", type=int, default=10, help="runs of both told to stop with SIGTERM (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = []
        with contextlib.suppress(KeyboardInterrupt):
            for outcome in run_all(Path(folder), cases(arguments.sft, arguments.grpo, arguments.sigterm), chance):
                outcomes.append(outcome)
    rows = summary(outcomes)
    if arguments.json:
        print(json.dumps({"runs": [_plain(outcome) for outcome in outcomes], "summary": rows}))
    else:
        _print_table(rows)
    if any(outcome.faults for outcome in outcomes):
        sys.exit(1)


def cases(sft: int, grpo: int, sigterm: int) -> list[Case]:
    """What is to be done: every second run changes its layout, a third of the kills are during a write."""
    plan = [("sft", signal.SIGKILL)] * sft + [("grpo", signal.SIGKILL)] * grpo
    plan += [(("sft", "grpo")[number % 2], signal.SIGTERM) for number in range(sigterm)]
    made = []
    for number, (verb, which) in enumerate(plan):
        before = after = ONE
        if number // 2 % 2:  # pairs, so that both verbs of SIGTERM get both
            other = OTHERS[number // 4 % len(OTHERS)]
            before, after = (ONE, other) if number % 2 else (other, ONE)
        made.append(Case(number, verb, which, before, after, which == signal.SIGKILL and number % 3 == 0))
    return made


def run_all(work: Path, todo: Sequence[Case], chance: random.Random) -> Iterator[Outcome]:
    """The runs left alone, then each case."""
    fixtures.make_model(work / "model")
    fixtures.write_sft_data(work / "sft.jsonl", 24)
    fixtures.write_prompts(work / "rl.jsonl", 16)
    fixtures.write_sft_data(work / "held_out_sft.jsonl", 9)
    fixtures.write_prompts(work / "held_out_rl.jsonl", 22)  # the first 16 are trained on, and set aside
    whole = {}
    for verb in sorted({case.verb for case in todo}):
        whole[verb] = Training(work, verb, f"{verb}-whole")
        whole[verb].finish(ONE)
        if faults := whole[verb].faults():
            raise SystemExit(f"the {verb} run left alone: {'; '.join(faults)}")
    for number, case in enumerate(todo, start=1):
        training = Training(work, case.verb, f"{case.verb}-{case.number}")
        outcome = run_case(case, training, whole[case.verb], chance)
        print(f"{number}/{len(todo)}: {_line(outcome)}", file=sys.stderr, flush=True)
        shutil.rmtree(training.run)
        yield outcome


def run_case(case: Case, training: "Training", whole: "Training", chance: random.Random) -> Outcome:
    """Kill a run once, resume it, compare it with the one left alone."""
    last = whole.steps()
    after = chance.randrange(0, last)
    step, writing, seconds, faults = training.interrupt(case, after, chance.uniform(0.0, 0.3))
    training.finish(case.after)
    faults += training.faults()
    lost, repeated = training.lost_and_repeated()
    mine, others = training.metrics(), whole.metrics()
    difference = 0.0
    if [line["step"] for line in mine] != [line["step"] for line in others]:
        faults.append("its metrics are not of the same steps")
    else:
        pairs = [(a[name], b[name]) for a, b in zip(mine, others, strict=True) for name in COMPARED if name in b]
        difference = max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)
    identical = mine == others
    if case.before == case.after and not identical:
        faults.append("on the same devices, and not identical")
    if difference > TOLERANCE:
        faults.append(f"differs by {difference:.1e}")
    if lost or repeated:
        faults.append(f"{lost} examples lost, {repeated} repeated")
    return Outcome(case, step, writing, seconds, identical, difference, lost, repeated, tuple(faults))


class Training:
    """A run of the command in as many processes as asked, one or several times."""

    def __init__(self, work: Path, verb: str, name: str) -> None:
        from psyche_jax.config import CheckpointSection, OptimizerSection

        self._work, self._verb = work, verb
        self.run = work / name
        self._traces: list[list[Path]] = []  # of each life, of each process
        make = {"sft": fixtures.sft_config, "grpo": fixtures.grpo_config}[verb]
        config = make(
            work,
            name,
            epochs={"sft": 8.0, "grpo": 6.0}[verb],
            # A large epsilon: else Adam makes whole steps of the rounding of another order of summation.
            optimizer=OptimizerSection(learning_rate=1e-3, epsilon=1e-2, warmup=0),
            checkpoints=CheckpointSection(every_steps=2, every_seconds=None),
            evaluate_every_steps=3,
        )
        held_out = str(work / {"sft": "held_out_sft.jsonl", "grpo": "held_out_rl.jsonl"}[verb])
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, evaluation=held_out))
        self._items = {"sft": 24, "grpo": 16}[verb]
        self._config = fixtures.write_config(config, work / f"{name}.yaml")

    def start(self, layout: Layout) -> list[subprocess.Popen]:
        """In the background."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        flags = "--xla_backend_optimization_level=0"  # the same everywhere; compiling takes most of the time
        if layout.devices > 1:
            flags += f" --xla_force_host_platform_device_count={layout.devices}"
        environment = {
            **os.environ,
            "XLA_FLAGS": flags,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self._work / "cache"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        started, traces = [], []
        for process in range(layout.processes):
            traces.append(self._work / f"{self.run.name}-{len(self._traces)}-{process}.trace")
            command = [sys.executable, __file__, "child", str(traces[-1]), self._verb, "--config", str(self._config)]
            if layout.processes > 1:
                for place in (
                    f"coordinator=127.0.0.1:{port}",
                    f"num_processes={layout.processes}",
                    f"process_id={process}",
                ):
                    command += ["--set", f"distributed.{place}"]
            started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        self._traces.append(traces)
        return started

    def finish(self, layout: Layout) -> None:
        """To the end."""
        processes = self.start(layout)
        said = [process.communicate(timeout=PATIENCE)[1] for process in processes]
        if any(process.returncode for process in processes):
            raise SystemExit(f"{self.run.name} on {layout} failed:\n" + "\n".join(said))

    def interrupt(self, case: Case, after: int, delay: float) -> tuple[int, bool, float, list[str]]:
        """Start, and send the signal once `after` steps are logged, and `delay` seconds later or during a write.

        Returns:
          The last step logged then, whether a checkpoint was being written, seconds from the signal to the end of all
          processes, and what was wrong with that end.
        """
        processes = self.start(case.before)
        deadline = time.monotonic() + PATIENCE
        while self.steps() < after and _all_run(processes):
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.run.name}: step {after} did not come")
            time.sleep(0.002)
        if case.in_write:
            while not self._writing() and _all_run(processes):
                time.sleep(0.0002)
        else:
            time.sleep(delay if after else delay * 30)  # before the first step there is much else to kill
        step = self.steps()
        sent = time.monotonic()
        receivers = processes if case.signal == signal.SIGKILL else processes[-1:]
        for process in receivers:
            process.send_signal(case.signal)
        said = [process.communicate(timeout=PATIENCE)[1] for process in processes]
        seconds = time.monotonic() - sent
        writing = self._writing()
        faults = []
        if case.signal == signal.SIGTERM and (self.run / "state.json").is_file():
            state = fixtures.state_of(self.run)
            if state["status"] not in ("preempted", "done"):
                faults.append(f"after SIGTERM its state is {state['status']}: {said[-1][-300:]}")
        return step, writing, seconds, faults

    def steps(self) -> int:
        """The last step that is logged."""
        path = self.run / "metrics.jsonl"
        return self.metrics()[-1]["step"] if path.is_file() and path.stat().st_size else 0

    def metrics(self) -> list[dict[str, float]]:
        """What does not depend on the clock."""
        return fixtures.metrics_of(self.run) or [{"step": 0}]

    def faults(self) -> list[str]:
        """What is wrong with the finished run, by itself."""
        faults = []
        steps = [line["step"] for line in self.metrics()]
        if steps != list(range(steps[-1] + 1)):
            faults.append(f"its metrics are of the steps {steps}")
        if (state := fixtures.state_of(self.run))["status"] != "done":
            faults.append(f"its state is {state['status']}")
        if left := [path.name for path in (self.run / "checkpoints").iterdir() if "tmp" in path.name]:
            faults.append(f"it left {', '.join(left)}")
        return faults

    def lost_and_repeated(self) -> tuple[int, int]:
        """How often an example was missing in an epoch, or was there again, in what the final state was trained on."""
        counted: dict[int, list[int]] = {}
        for life in self._traces:  # what a later life reads again, the earlier had done for nothing
            found = [_read_trace(path) for path in life if path.is_file()]
            for of_process in found:
                counted |= of_process
            if any(of_process.get(step, items) != items for of_process in found for step, items in counted.items()):
                raise SystemExit(f"{self.run.name}: its processes read other batches")
        order = [item for step in sorted(counted) for item in counted[step]]
        lost = repeated = 0
        for start in range(0, len(order), self._items):
            times = Counter(order[start : start + self._items])
            repeated += sum(count - 1 for count in times.values())
            lost += self._items - len(times)
        return lost, repeated

    def _writing(self) -> bool:
        return any((self.run / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def summary(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for each verb, signal, and whether the devices stayed the same."""
    rows = []
    for verb in ("sft", "grpo"):
        for which in (signal.SIGKILL, signal.SIGTERM):
            for same in (True, False):
                group = [
                    outcome
                    for outcome in outcomes
                    if (outcome.case.verb, outcome.case.signal) == (verb, which)
                    and (outcome.case.before == outcome.case.after) == same
                ]
                if group:
                    rows.append(
                        {
                            "verb": verb,
                            "signal": which.name,
                            "devices": "same" if same else "other",
                            "runs": len(group),
                            "in_a_checkpoint_write": sum(outcome.writing for outcome in group),
                            "identical": sum(outcome.identical for outcome in group),
                            "largest_difference": max(outcome.difference for outcome in group),
                            "examples_lost": sum(outcome.lost for outcome in group),
                            "examples_repeated": sum(outcome.repeated for outcome in group),
                            "longest_seconds_to_exit": round(max(outcome.seconds_to_exit for outcome in group), 1),
                            "faulty_runs": sum(bool(outcome.faults) for outcome in group),
                        }
                    )
    return rows


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        return
    print("| " + " | ".join(name.replace("_", " ") for name in rows[0]) + " |")
    print("| " + " | ".join("---" for _ in rows[0]) + " |")
    for row in rows:
        values = (f"{value:.1e}" if isinstance(value, float) and value < 0.1 else str(value) for value in row.values())
        print("| " + " | ".join(values) + " |")


def _line(outcome: Outcome) -> str:
    case = outcome.case
    text = f"{case.verb} on {case.before}, {case.signal.name} at step {outcome.step}"
    text += f"{' in a checkpoint write' if outcome.writing else ''}, resumed on {case.after}: "
    return text + ("; ".join(outcome.faults) or ("identical" if outcome.identical else f"{outcome.difference:.1e}"))


def _plain(outcome: Outcome) -> dict[str, Any]:
    values = {entry.name: getattr(outcome, entry.name) for entry in dataclasses.fields(outcome)}
    case = values.pop("case")
    places = {"before": str(case.before), "after": str(case.after)}
    return {"number": case.number, "verb": case.verb, "signal": case.signal.name, **places, **values}


def _all_run(processes: Sequence[subprocess.Popen]) -> bool:
    return all(process.poll() is None for process in processes)


def _read_trace(path: Path) -> dict[int, list[int]]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return dict(json.loads(line) for line in lines if line.endswith("\n"))


def _child(trace: Path, command: Sequence[str]) -> None:
    """The command `psyche`, which also writes down which items it reads for which step."""
    from psyche_jax import cli
    from psyche_jax.data import streams

    indices_of_steps = streams.batch_indices

    def traced(*arguments: Any) -> Any:
        indices_of = indices_of_steps(*arguments)

        def indices(step: int) -> list[int]:
            found = indices_of(step)
            with trace.open("a", encoding="utf-8") as file:
                file.write(json.dumps([step, found]) + "\n")
            return found

        return indices

    streams.batch_indices = traced
    sys.exit(cli.main(command))


if __name__ == "__main__":
    main()
