"""The loop that SFT and GRPO share: start or resume, step, log, checkpoint, stop when told to."""

import contextlib
import math
import signal
import sys
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
from psyche_jax.runs import PreemptedError, Run
from psyche_jax.train.checkpoints import Checkpoints, abstract_like
from psyche_jax.train.state import TrainState

StepFunction = Callable[[TrainState, Any, int], tuple[TrainState, dict[str, Any]]]


@dataclass(frozen=True)
class Program:
    """What a kind of training brings to the loop.

    `batches(first)` iterates over device batches from step `first` on. `step(state, batch, index)` gives the new
    state and a dict with `metrics` (float32 scalars on the device) and what else `after_step` wants.
    `after_step(run, state, index, outputs)` gives more metrics, or writes samples.
    """

    name: str
    total_steps: int
    batches: Callable[[int], Iterator[Any]]
    step: StepFunction
    after_step: Callable[[Run, TrainState, int, dict[str, Any]], dict[str, float]]
    headline: tuple[str, ...]  # the metrics that progress shows


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
      UserError: the loss is not finite.
    """
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(run.checkpoints, section.keep)))
        stopped = stack.enter_context(_stop_signals())
        first = checkpoints.latest or 0
        run.continue_from(first)
        if first >= program.total_steps:
            _say(f"{program.name}: all {first} steps are done already")
            run.write_state("done", first)
            return
        if first == 0:
            state = initial()
        else:
            state = checkpoints.restore(abstract_like(abstract, jax.tree.map(lambda x: x.sharding, abstract)))
            _say(f"{program.name}: going on after step {first}")
        progress = Progress(program, first)
        started = time.perf_counter()
        profile = stack.enter_context(contextlib.closing(_Profile(run.folder / "profile", first + 2, profile_steps)))
        index = first
        for index, batch in enumerate(program.batches(first), start=first + 1):
            profile.before(index)
            state, outputs = program.step(state, batch, index - 1)
            metrics = {name: float(value) for name, value in jax.device_get(outputs["metrics"]).items()}
            profile.after(index)
            now = time.perf_counter()
            metrics["step_time"] = now - started
            metrics["tokens_per_second"] = metrics["num_tokens"] / metrics["step_time"]
            metrics["tokens_per_second_per_device"] = metrics["tokens_per_second"] / jax.device_count()
            if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
                raise UserError(
                    f"{program.name}: the loss or gradient of step {index} is not finite; "
                    "lower optimizer.learning_rate, or start from the last checkpoint with other data"
                )
            metrics |= program.after_step(run, state, index, outputs)
            run.log_metrics(index, metrics)
            progress.update(index, metrics)
            stop = hosts.on_any(bool(stopped))
            if index == program.total_steps or index % section.every_steps == 0 or stop:
                checkpoints.save(state, index, metadata)
                run.write_state("running", index)
            if stop and index < program.total_steps:
                checkpoints.close()
                signal_name = stopped[0] if stopped else "another host"
                raise PreemptedError(
                    f"stopped by {signal_name} after step {index}; start the same command again to go on"
                )
            started = time.perf_counter()
        progress.close()
    run.write_state("done", index)


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
    def __init__(self, folder: Path, first: int, steps: int) -> None:
        self._folder, self._first, self._last, self._steps = folder, first, first + steps - 1, steps
        self._tracing = False

    def before(self, step: int) -> None:
        if self._steps and step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True

    def after(self, step: int) -> None:
        if step == self._last:
            self.close()

    def close(self) -> None:
        """Write the trace, also where the run ended before all its steps were traced."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
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
