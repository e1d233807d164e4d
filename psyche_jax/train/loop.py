"""The loop that SFT and GRPO share: start or resume, step, log, checkpoint, stop when told to."""

import contextlib
import math
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from tqdm import tqdm

from psyche_jax import hosts
from psyche_jax.config import CheckpointSection
from psyche_jax.errors import UserError
from psyche_jax.files import bucket_errors, files_under, in_bucket
from psyche_jax.model.flops import peak_of_all_devices
from psyche_jax.runs import PreemptedError, Run
from psyche_jax.train.checkpoints import Checkpoints, abstract_like
from psyche_jax.train.compilations import count_compilations
from psyche_jax.train.state import TrainState

StepFunction = Callable[[TrainState, Any, int], tuple[TrainState, dict[str, Any]]]


@dataclass(frozen=True)
class Evaluation:
    """What is measured on data that is never trained on: before the first step, every so many, and after the last.

    The checkpoint whose `best` metric is the highest (or the lowest) is kept beside the latest ones.
    """

    every_steps: int
    measure: Callable[[TrainState], dict[str, float]]
    best: str
    higher_is_better: bool


@dataclass(frozen=True)
class Program:
    """What a kind of training brings to the loop.

    `batches(first)` iterates over device batches from step `first` on. `step(state, batch, index)` gives the new
    state and a dict with `metrics` (float32 scalars on the device) and what else `after_step` wants.
    `after_step(run, index, metrics, outputs)` writes samples, or warns.
    """

    name: str
    total_steps: int
    batches: Callable[[int], Iterator[Any]]
    step: StepFunction
    headline: tuple[str, ...]  # the metrics that progress shows
    max_skipped_steps: int  # how many steps in a row may be skipped for a gradient that is not finite
    flops: Callable[[dict[str, float]], float]  # of the model in a step with these metrics
    after_step: Callable[[Run, int, dict[str, float], dict[str, Any]], None] = lambda *_: None
    evaluation: Evaluation | None = None


def run_training(
    program: Program,
    run: Run,
    initial: Callable[[], TrainState],
    abstract: TrainState,
    metadata: dict[str, Any],
    section: CheckpointSection,
    profile_steps: int = 0,
) -> None:
    """Train from the last checkpoint, or from `initial()`, to the last step.

    Args:
      program: what is trained.
      run: where it is written.
      initial: makes the state of step 0.
      abstract: shapes and shardings of the state, for restoring.
      metadata: stored with every checkpoint.
      section: when to save, how many to keep.
      profile_steps: trace that many steps, after the first, into the run's `profile` folder.

    Raises:
      PreemptedError: SIGTERM or SIGINT came; what was done is saved.
      UserError: the gradients of `max_skipped_steps` steps in a row were not finite; the state before them is saved.
    """
    evaluation = program.evaluation
    with contextlib.ExitStack() as stack:
        best = None if evaluation is None else (evaluation.best, evaluation.higher_is_better)
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(run.checkpoints, section.keep, best)))
        stopped = stack.enter_context(_stop_signals())
        compilations = stack.enter_context(count_compilations())
        first = checkpoints.latest or 0
        run.continue_from(first or -1)
        if first >= program.total_steps:
            _say(f"{program.name}: all {first} steps are done already")
            run.write_state("done", first)
            return
        evaluations = _Evaluations(evaluation, program.total_steps, run, first)
        if first == 0:
            state = initial()
            if evaluation is not None:
                run.log_metrics(0, evaluation.measure(state))
        else:
            state = checkpoints.restore(abstract_like(abstract, jax.tree.map(lambda x: x.sharding, abstract)))
            _say(f"{program.name}: going on after step {first}")
        progress = Progress(program, first)
        skipped = 0  # steps in a row
        peak = peak_of_all_devices()
        started = time.perf_counter()
        profile = stack.enter_context(contextlib.closing(_Profile(run.folder / "profile", first + 2, profile_steps)))
        index = first
        for index, batch in enumerate(program.batches(first), start=first + 1):
            profile.before(index)
            state, outputs = program.step(state, batch, index - 1)
            metrics = {name: float(value) for name, value in jax.device_get(outputs["metrics"]).items()}
            metrics["compilations"] = float(len(compilations))
            compilations.clear()
            profile.after(index)
            now = time.perf_counter()
            metrics["step_time"] = now - started
            metrics["tokens_per_second"] = metrics["num_tokens"] / metrics["step_time"]
            metrics["tokens_per_second_per_device"] = metrics["tokens_per_second"] / jax.device_count()
            if peak is not None:
                metrics["mfu"] = program.flops(metrics) / metrics["step_time"] / peak
            program.after_step(run, index, metrics, outputs)
            skipped = skipped + 1 if metrics["skipped_updates"] else 0
            if skipped:
                _say(f"{program.name}: step {index}: the loss or gradient is not finite; the update was skipped")
            found, is_best = evaluations.after(index, state)
            metrics |= found
            run.log_metrics(index, metrics)
            progress.update(index, metrics)
            stop = hosts.on_any(bool(stopped))
            broken = skipped >= program.max_skipped_steps
            if index == program.total_steps or index % section.every_steps == 0 or stop or broken or is_best:
                run.flush()  # before, so that a step that is saved is logged
                checkpoints.save(state, index, metadata, found)
                run.write_state("running", index, **evaluations.best_so_far())
            if broken:
                raise UserError(
                    f"{program.name}: the loss or gradient of step {index} is not finite, as in the "
                    f"{skipped - 1} steps before; lower optimizer.learning_rate, or start again with other data"
                )
            if stop and index < program.total_steps:
                checkpoints.close()
                signal_name = stopped[0] if stopped else "another host"
                raise PreemptedError(
                    f"stopped by {signal_name} after step {index}; start the same command again to go on"
                )
            started = time.perf_counter()
        progress.close()
    run.write_state("done", index)


class _Evaluations:
    """When a run is evaluated, and which step was the best so far."""

    def __init__(self, evaluation: Evaluation | None, last: int, run: Run, done: int) -> None:
        self._evaluation, self._last = evaluation, last
        self._best: tuple[float, int] | None = None  # value and step
        for line in run.metrics() if evaluation is not None else ():
            if line["step"] <= done:
                self._compare(line, line["step"])

    def after(self, step: int, state: TrainState) -> tuple[dict[str, float], bool]:
        """What is measured after `step` (nothing, if it is not due), and whether it is the best so far."""
        if self._evaluation is None or (step % self._evaluation.every_steps and step != self._last):
            return {}, False
        found = self._evaluation.measure(state)
        return found, self._compare(found, step)

    def best_so_far(self) -> dict[str, Any]:
        """For `state.json`: which step, and its value."""
        if self._evaluation is None or self._best is None:
            return {}
        return {"best": {"step": self._best[1], self._evaluation.best: self._best[0]}}

    def _compare(self, metrics: dict[str, float], step: int) -> bool:
        assert self._evaluation is not None
        value = metrics.get(self._evaluation.best)
        if value is None or not math.isfinite(value) or step == 0:  # before the first step there is no checkpoint
            return False
        better = self._best is None or (
            value > self._best[0] if self._evaluation.higher_is_better else value < self._best[0]
        )
        if better:
            self._best = value, step
        return better


class Progress:
    """A bar on a terminal, plain lines elsewhere."""

    def __init__(self, program: Program, first: int) -> None:
        self._program = program
        self._bar = (
            tqdm(total=program.total_steps, initial=first, desc=program.name, unit="step")
            if sys.stderr.isatty() and hosts.is_first()
            else None
        )
        self._every = max(1, program.total_steps // 10)

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Show a finished step."""
        shown = {name: f"{metrics[name]:.4g}" for name in self._program.headline if name in metrics}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()
        elif step % self._every == 0 or step in (1, self._program.total_steps):
            text = ", ".join(f"{name} {value}" for name, value in shown.items())
            _say(f"{self._program.name}: step {step}/{self._program.total_steps}: {text}")

    def close(self) -> None:
        """Leave the finished bar on the screen."""
        if self._bar is not None:
            self._bar.close()


class _Profile:
    """Traces some steps into a folder. The profiler writes to disks alone: for a bucket the files are copied there."""

    def __init__(self, folder: Path, first: int, steps: int) -> None:
        self._folder, self._first, self._last, self._steps = folder, first, first + steps - 1, steps
        self._traced: Path | None = None  # while it goes on: where to

    def before(self, step: int) -> None:
        if self._steps and step == self._first:
            self._traced = Path(tempfile.mkdtemp()) if in_bucket(self._folder) else self._folder
            jax.profiler.start_trace(str(self._traced))

    def after(self, step: int) -> None:
        if step == self._last:
            self.close()

    def close(self) -> None:
        """Write the trace, also where the run ended before all its steps were traced."""
        if self._traced is None:
            return
        traced, self._traced = self._traced, None
        jax.profiler.stop_trace()
        if traced != self._folder:
            with bucket_errors(self._folder):
                for file in files_under(traced):
                    (self._folder / file.relative_to(traced).as_posix()).write_bytes(file.read_bytes())
            shutil.rmtree(traced)
        _say(f"profile: {self._folder}")


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """Within the block SIGTERM and SIGINT only put their name into the list that this yields."""
    received: list[str] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)

    previous = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    if hosts.is_first():
        print(line, file=sys.stderr, flush=True)
