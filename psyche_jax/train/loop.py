"""What the loops of SFT and GRPO share: start or resume, log, evaluate, checkpoint, stop when told to."""

import contextlib
import math
import resource
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from psyche_jax.config import CheckpointSection
from psyche_jax.config_files import parse_yaml_mapping
from psyche_jax.data.dataset import MANIFEST
from psyche_jax.data.parts import HELD_OUT
from psyche_jax.errors import UserError, first_reason
from psyche_jax.model.flops import peak_of_all_devices
from psyche_jax.storage.files import bucket_errors, files_under, in_bucket
from psyche_jax.train import hosts
from psyche_jax.train.checkpoints import Checkpoints, abstract_like
from psyche_jax.train.preemption import Stop, StoppedError
from psyche_jax.train.progress import Progress
from psyche_jax.train.runs import PreemptedError, Run
from psyche_jax.train.state import TrainState
from psyche_jax.train.step_folders import set_aside_look_alikes

Batch = TypeVar("Batch")

_COMPILATION = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def count_compilations() -> Iterator[list[float]]:
    """Within the block the list that this yields grows by the seconds of each compilation."""
    found: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILATION:
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


class SavePace:
    """Says after which steps a checkpoint is due. Measures by a clock that nobody sets.

    Orbax's ContinuousCheckpointingPolicy goes by the wall clock, and saves when so much work could have been lost
    already, not before another step makes it so much.
    """

    def __init__(self, section: CheckpointSection, clock: Callable[[], float] = time.monotonic) -> None:
        self._section = section
        self._clock = clock
        self._saved = self._before = clock()

    def due(self, step: int, writing: bool) -> bool:
        """Whether to save after `step`; every process must ask after every step, and gets what the first one finds.

        That is after every `every_steps`, and where another step as long as the last one would make more than
        `every_seconds` of work since the last checkpoint, unless that is still being written (`writing`).
        """
        now = self._clock()
        length, self._before = now - self._before, now
        limit = self._section.every_seconds
        if limit is None:
            return step % self._section.every_steps == 0
        late = not writing and now - self._saved + length > limit
        return bool(hosts.from_first(np.asarray(late))) or step % self._section.every_steps == 0

    def saved(self) -> None:
        """A checkpoint of the last step that was asked for is on its way."""
        self._saved = self._before


_GIB = 2**30


@contextlib.contextmanager
def out_of_memory(settings: str) -> Iterator[None]:
    """Within the block, what XLA raises where memory does not suffice is one line.

    Args:
      settings: what to set otherwise.

    Raises:
      UserError: memory did not suffice.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
            raise
        raise UserError(f"out of memory; {settings} ({first_reason(error)})") from None


def _memory() -> dict[str, float]:
    """Peaks so far in GiB: of the fullest device of this host, where devices say so, and of this process."""
    found = {"memory/host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}  # Linux counts in KiB
    known = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    if peaks := [peak for peak in known if peak is not None]:
        found["memory/device_gib"] = max(peaks) / _GIB
    return found


def check_memory(program: jax.stages.Compiled, settings: str) -> None:
    """Compare what a program will ask for when it runs with what its devices have left.

    A TPU's compiler refuses by itself what is too large; a GPU's leaves it to the allocator, in the step that first
    meets the shape. Where devices do not say how much memory they have (CPUs), nothing can be compared.

    Args:
      program: compiled; its arguments are on the devices already.
      settings: what to set otherwise.

    Raises:
      UserError: it does not fit.
    """
    memory: Any = program.memory_analysis()
    if memory is None:
        return
    wanted = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    for device in jax.local_devices():
        known = device.memory_stats() or {}
        if "bytes_limit" not in known:
            return
        free = known["bytes_limit"] - known.get("bytes_in_use", 0)
        if wanted > free:
            raise UserError(
                f"out of memory: the largest step needs {wanted / _GIB:.2f} GiB on top of what is on {device}, which "
                f"has {free / _GIB:.2f} GiB left; {settings}"
            )


@dataclass(frozen=True)
class Evaluation:
    """What is measured on data that is never trained on: before the first step, every so many, and after the last.

    `measure` calls its second argument between its batches, and ends where that raises. The checkpoint whose `best`
    metric is the highest (or the lowest) is kept beside the latest ones.
    """

    every_steps: int
    measure: Callable[[TrainState, Callable[[], None]], dict[str, float | None]]
    best: str
    higher_is_better: bool


class Training(contextlib.AbstractContextManager["Training"]):
    """What SFT and GRPO do alike around their steps: resume, measure, log, save, and stop when told to.

    ```
    with Training(...) as this:  # resumes the run from its last checkpoint, or begins it
        if this.finished():
            return
        state = this.begin(initial, abstract, lower_largest)
        for step, batch in this.steps(batches_from(this.first)):
            state, outputs = train_step(state, batch)
            this.end_step(state, this.measured(outputs["metrics"]))
    ```

    Args:
      name: what is trained, `sft` or `grpo`.
      run: where it is written.
      stop: whether it was told to stop.
      header: lines that say what is trained, where and on what.
      total_steps: how many there are.
      metadata: stored with every checkpoint.
      checkpoints: when to save, how many to keep.
      max_skipped_steps: how many steps in a row may be skipped for a gradient that is not finite.
      evaluation: what is measured beside.
      headline: the metrics that are shown.
      flops: those of the model in a step with given metrics.
      memory_settings: what to set otherwise where memory does not suffice.
      profile_steps: trace that many steps, after the first, into the run's `profile` folder.

    Raises:
      PreemptedError: SIGTERM or SIGINT came; what was done is saved.
      UserError: the gradients of `max_skipped_steps` steps in a row were not finite; the state before them is saved.
        Or memory does not suffice, if that can be known before the first step.
    """

    def __init__(
        self,
        name: str,
        run: Run,
        stop: Stop,
        *,
        header: Sequence[str] = (),
        total_steps: int,
        metadata: dict[str, Any],
        checkpoints: CheckpointSection,
        max_skipped_steps: int,
        evaluation: Evaluation | None,
        headline: tuple[str, ...],
        flops: Callable[[dict[str, Any]], float],
        memory_settings: str,
        profile_steps: int = 0,
    ) -> None:
        self.name, self.run, self.total_steps, self._header = name, run, total_steps, header
        self._stop, self._metadata, self._section = stop, metadata, checkpoints
        self._evaluation, self._headline, self._flops = evaluation, headline, flops
        self._max_skipped_steps, self._memory_settings = max_skipped_steps, memory_settings
        self._profile_steps = profile_steps
        self._skipped = 0  # steps in a row
        self._progress: Progress | None = None  # until there are steps

    def __enter__(self) -> "Training":
        with contextlib.ExitStack() as stack:
            stack.enter_context(out_of_memory(self._memory_settings))
            run, section = self.run, self._section
            logged = max((line["step"] for line in run.metrics()), default=None)  # where the state cannot tell
            set_aside_look_alikes(run.checkpoints, logged if run.saved is None else run.saved)
            self._checkpoints = Checkpoints(run.checkpoints, section.keep, section.keep_every_hours)
            stack.enter_context(contextlib.closing(self._checkpoints))
            self._compilations = stack.enter_context(count_compilations())
            self.first = self._checkpoints.latest or 0  # the steps that are done already
            self.step = run.current = self.first  # the one that is being done, or the last
            run.continue_from(self.first or -1)
            self._profile = _Profile(run.folder / "profile", self.first + 2, self._profile_steps)
            stack.enter_context(contextlib.closing(self._profile))
            self._evaluations = _Evaluations(self._evaluation, self.total_steps, run, self.first, self._stop)
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            self._open.__exit__(kind, error, traceback)  # waits for what is being saved
        finally:
            self._note_saved(self._checkpoints.saved)
        if kind is None:
            self.run.write_state("done")
            if self._progress is not None:
                result = [f"{name} {value}" for name, value in self._progress.shown.items()]
                if self.run.best is not None:
                    result.append(f"the best at step {self.run.best['step']}")
                self._say_end(f"done in {self._progress.took}: {', '.join(result)}")

    def _note_saved(self, step: int) -> None:
        """For `state.json`, which whoever reads a run goes by: nothing in it is still being written."""
        self.run.saved, self.run.best = step, self._evaluations.best_until(step)

    def _say_end(self, what: str) -> None:
        folder = self.run.folder
        command = shlex.join(["psyche", "eval", str(folder), "--bench", _bench_for(folder)])
        hosts.say(f"{self.name}: {what}; {folder}; next: {command}")

    def finished(self) -> bool:
        """Whether there is nothing left to do, which is said.

        Raises:
          UserError: the last checkpoint is of another run, or not whole.
        """
        if self.first < self.total_steps or self._evaluations.missed:
            return False
        self._checkpoints.check(self._metadata, self.run.accepted)
        self._say_end(f"all {self.first} steps are already done")
        return True

    def begin(
        self,
        initial: Callable[[], TrainState],
        abstract: TrainState,
        lower_largest: Callable[[TrainState], Iterable[Any]] = lambda _: (),
    ) -> TrainState:
        """The state to start from: the last checkpoint's, or `initial()`.

        Args:
          initial: makes the state of step 0.
          abstract: shapes and shardings of the state, for restoring.
          lower_largest: the programs for the largest shapes, lowered: what does not fit fails before the first step.
        """
        for line in (*self._header, f"folder: {self.run.folder}"):
            hosts.say(f"{self.name}: {line}")
        if self.first == 0:
            state = initial()
        else:
            places = jax.tree.map(lambda x: x.sharding, abstract)
            state = self._checkpoints.restore(abstract_like(abstract, places), self._metadata, self.run.accepted)
            hosts.say(f"{self.name}: resuming after step {self.first}")
        self._note_saved(self.first)  # its state may be lost, or its latest checkpoint
        self.run.write_state("running")
        self._compile(lower_largest(state))
        if self._evaluations.missed:
            hosts.say(f"{self.name}: evaluating after step {self.first}")
            try:
                self.run.add_metrics(self.first, self._evaluations.measure(self.first, state))
            except StoppedError:
                raise _preempted(self._stop, self.first) from None
            self._note_saved(self.first)
            self.run.write_state("running")
        return state

    def _compile(self, programs: Iterable[Any]) -> None:
        """Compile what is lowered, and see that it fits. How long that takes is kept for whoever starts it again."""
        last = self.run.compile_seconds
        hosts.say(f"{self.name}: compiling the step (once{'' if last is None else f'; {last:.0f} s last time'})")
        started = time.perf_counter()
        for lowered in programs:
            check_memory(lowered.compile(), self._memory_settings)
        seconds = round(time.perf_counter() - started, 1)
        self.run.write_state("running", compile_seconds=seconds, total_steps=self.total_steps)

    def steps(self, batches: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
        """The steps that are left, with their batches. Each must end with `end_step`."""
        self._progress = progress = Progress(self.name, self.first, self.total_steps, self._headline)
        self._pace = SavePace(self._section)
        self._peak = peak_of_all_devices()
        self._started = time.perf_counter()
        for step, batch in enumerate(batches, start=self.first + 1):
            self.step = step
            self._profile.before(step)
            yield step, batch
            self._started = time.perf_counter()
        progress.close()

    def measured(self, on_device: dict[str, Any], absent: dict[str, Any] | None = None) -> dict[str, Any]:
        """Wait for a step, and give its metrics as numbers, with time and throughput.

        Args:
          on_device: float32 scalars.
          absent: by name, whether a metric is of nothing in this step: it is None then.
        """
        found, left_out = jax.device_get((on_device, absent or {}))
        metrics: dict[str, Any] = {
            name: None if left_out.get(name, False) else float(value) for name, value in found.items()
        }
        metrics["compilations"] = float(len(self._compilations))
        self._compilations.clear()
        self._profile.after(self.step)
        metrics["step_time"] = time.perf_counter() - self._started
        metrics["tokens_per_second"] = metrics["num_tokens"] / metrics["step_time"]
        metrics |= _memory()
        metrics["tokens_per_second_per_device"] = metrics["tokens_per_second"] / jax.device_count()
        if self._peak is not None:
            metrics["mfu"] = self._flops(metrics) / metrics["step_time"] / self._peak
        return metrics

    def end_step(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """Evaluate, log, and save if it is time to; raise if the run must end here."""
        step, last = self.step, self.step == self.total_steps
        self._skipped = self._skipped + 1 if metrics["skipped_updates"] else 0
        if self._skipped:
            hosts.say(f"{self.name}: step {step}: the loss or gradient is not finite; the update was skipped")

        stopped_in_evaluation = False
        if self._evaluations.due(step):
            try:
                metrics |= self._evaluations.measure(step, state)
            except StoppedError:  # it is made up for when the run resumes
                stopped_in_evaluation = True
        self.run.log_metrics(step, metrics)
        self.run.reach(step)
        if self._progress is not None:
            self._progress.update(step, metrics)

        # Every process asks for all of these after every step: some are agreed on between them.
        stopped = stopped_in_evaluation or self._stop.requested(step)
        broken = self._skipped >= self._max_skipped_steps
        best = self._evaluations.best_until(step)
        is_best = best is not None and best["step"] == step
        due = self._pace.due(step, self._checkpoints.writing)
        if last or due or stopped or broken or is_best:
            self.run.confirm_lock()
            self.run.flush()  # before, so that a step that is saved is logged
            # Not yet this one: if the process is killed while it is written, the run resumes from the one before. The
            # best until then stays as long as the state names it: until the next one is saved, or the run ends.
            self._checkpoints.wait()
            self._note_saved(self._checkpoints.saved)
            self.run.write_state("running")
            bests = (best,) if last else (best, self.run.best)
            self._checkpoints.bests = [one["step"] for one in bests if one is not None]
            self._checkpoints.save(state, step, self._metadata)
            self._pace.saved()
        if broken:
            first = step - self._skipped + 1
            steps = f"step {step} is" if first == step else f"steps {first} to {step} is"
            raise UserError(
                f"{self.name}: the loss or gradient of {steps} not finite; lower optimizer.learning_rate, or start "
                "again with other data"
            )
        if stopped and (not last or stopped_in_evaluation):
            self._checkpoints.close()
            raise _preempted(self._stop, step)


def _preempted(stop: Stop, step: int) -> PreemptedError:
    return PreemptedError(f"stopped by {stop} after step {step}; start the same command again to resume")


class _Evaluations:
    """When a run is evaluated, and which step was the best so far."""

    def __init__(self, evaluation: Evaluation | None, last: int, run: Run, done: int, stop: Stop) -> None:
        self._evaluation, self._last, self._stop = evaluation, last, stop
        self._bests: list[tuple[int, float]] = []  # steps with their values, each better than those before
        evaluated = set()
        if evaluation is not None:
            if run.best is not None and run.best["step"] <= done:  # `metrics.jsonl` may be lost
                self._compare(run.best.get(evaluation.best), run.best["step"])
            for line in run.metrics():
                if run.evaluated_otherwise < line["step"] <= done and evaluation.best in line:
                    evaluated.add(line["step"])
                    self._compare(line[evaluation.best], line["step"])
        self.missed = self.due(done) and (done == 0 or done not in evaluated)  # the run begins, or was stopped in it

    def due(self, step: int) -> bool:
        """Whether there is to be one after `step`."""
        if self._evaluation is None:
            return False
        return step % self._evaluation.every_steps == 0 or step == self._last

    def measure(self, step: int, state: TrainState) -> dict[str, float | None]:
        """What is measured after `step`.

        Raises:
          StoppedError: the run was told to stop meanwhile.
        """
        assert self._evaluation is not None
        found = self._evaluation.measure(state, self._stop.check)
        self._compare(found.get(self._evaluation.best), step)
        return found

    def best_until(self, step: int) -> dict[str, Any] | None:
        """The first of the best steps until `step`, and its value; the one before all training is none of them."""
        known = [best for best in self._bests if best[0] <= step]
        return {"step": known[-1][0], self._evaluation.best: known[-1][1]} if self._evaluation and known else None

    def _compare(self, value: Any, step: int) -> None:
        """`value` may come of a file that was changed by hand."""
        assert self._evaluation is not None
        if step == 0 or not isinstance(value, int | float) or not math.isfinite(value):  # there is no checkpoint at 0
            return
        best = self._bests[-1][1] if self._bests else None
        if best is None or (value > best if self._evaluation.higher_is_better else value < best):
            self._bests.append((step, value))


class _Profile:
    """Traces some steps into a folder. The profiler writes to disks alone: for a bucket the files are copied there."""

    def __init__(self, folder: Path, first: int, steps: int) -> None:
        self._folder, self._first, self._last, self._steps = folder, first, first + steps - 1, steps
        self._traced: Path | None = None  # while tracing: where to

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
        hosts.say(f"profile: {self._folder}")


def _bench_for(run: Path) -> str:
    """What a run is best measured on: what `psyche data import` held out of its data, else the samples."""
    train = parse_yaml_mapping(run / "config.yaml").get("data", {}).get("train", ())
    beside = [Path(place).parent / HELD_OUT for place in ([train] if isinstance(train, str) else train)]
    return next((str(place) for place in beside if (place / MANIFEST).is_file()), "samples")
