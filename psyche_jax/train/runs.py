"""The folder of a run: config, metrics, samples and state, beside them TensorBoard and W&B."""

import json
import os
import platform
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import psyche_jax
from psyche_jax.config import LoggingSection
from psyche_jax.config_files import dump_yaml
from psyche_jax.errors import UsageError, UserError, first_reason
from psyche_jax.model.products import FLOAT32_PRECISION
from psyche_jax.storage.files import (
    GrowingFile,
    as_path,
    bucket_errors,
    in_bucket,
    make_folder,
    write_json,
    write_text,
)
from psyche_jax.storage.locks import Lock, LostLockError, locked
from psyche_jax.train import hosts
from psyche_jax.train.run_changes import EVALUATED, Contents
from psyche_jax.train.run_files import STATE, check_place, known_state, read_state, read_steps

Metrics = Mapping[str, float | None]


class Trackers:
    """All that `logging` names. One that fails is named in one line and left out from then on.

    Args:
      logging: the section of the config.
      folder: the run's.
      run_id: what W&B knows the run by: another for every run, the same when it resumes.

    Raises:
      UserError: one is not installed, or does not work with such a folder.
    """

    def __init__(self, logging: LoggingSection, folder: Path, run_id: str) -> None:
        self._trackers: dict[str, Any] = {}
        if logging.tensorboard:
            if in_bucket(folder):
                raise UsageError("logging.tensorboard needs a run.dir on a disk, not in a bucket")
            self._start("TensorBoard", lambda: _TensorBoard(folder))
        if logging.wandb_project:
            project = logging.wandb_project
            try:
                import wandb
            except ImportError:
                raise UserError(
                    "logging.wandb_project needs the package wandb: pip install 'psyche_jax[wandb]'"
                ) from None
            self._start("W&B", lambda: _WeightsAndBiases(wandb, project, folder, run_id))

    def write(self, step: int, metrics: Metrics) -> None:
        """Send the metrics of a step; those that are None were not there."""
        present = {name: value for name, value in metrics.items() if value is not None}
        for name, tracker in list(self._trackers.items()):
            with self._errors(name):
                tracker.write(step, present)

    def close(self) -> None:
        """Send all that waits."""
        for name, tracker in list(self._trackers.items()):
            with self._errors(name):
                tracker.close()

    def _start(self, name: str, make: Callable[[], Any]) -> None:
        with self._errors(name):
            self._trackers[name] = make()

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a library's, a server's, a disk's
            self._trackers.pop(name, None)
            print(
                f"{name}: {first_reason(error)}; the run continues without it (metrics.jsonl has everything)",
                file=sys.stderr,
                flush=True,
            )


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, wandb: Any, project: str, folder: Path, run_id: str) -> None:
        place = None if in_bucket(folder) else str(folder)
        self._run = wandb.init(project=project, dir=place, id=run_id, name=folder.name, resume="allow")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


Status: TypeAlias = Literal["running", "preempted", "done", "failed"]
_VERSIONS_OF = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")
_FLUSH_SECONDS = 30.0
_STATE_SECONDS = 5.0


class PreemptedError(UserError):
    """The run was told to stop, has saved where it was, and resumes when started again."""


class Run:
    """A run's folder, open for writing. Made by `open_run`. Of several processes only the first writes.

    Objects in a bucket cannot be appended to: there metrics and samples are kept in memory and written whole, twice a
    minute, before each checkpoint and at the end.

    `saved`: the steps that are saved whole, None if its state could not tell when it was opened; `best`: the best of
    them, with its value, if there is one; `current`: the step that it is at, or was; `compile_seconds`: what
    compiling took when it was last started, if that is known; `accepted`: what may have changed, see `open_run`;
    `evaluated_otherwise`: the last step of which an evaluation is not to be compared with those now.
    """

    def __init__(self, folder: Path, kind: str, logging: LoggingSection, lock: Lock | None = None) -> None:
        self.folder = folder
        self.saved: int | None = 0
        self.current = 0
        self.compile_seconds: float | None = None
        self.best: Mapping[str, Any] | None = None
        self.accepted: frozenset[str] = frozenset()
        self.evaluated_otherwise = -1
        self._files = {name: GrowingFile(folder / name) for name in ("metrics.jsonl", "samples.jsonl")}
        self.writes = hosts.is_first()
        self._kind = kind
        self._stated = time.monotonic()  # when `state.json` was written last
        self._lock = lock
        self._trackers: Trackers | None = None
        if self.writes:
            self._identity = _identity(folder)
            self._trackers = Trackers(logging, folder, self._identity["run_id"])

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    def continue_from(self, step: int) -> None:
        """Drop the metrics and samples of steps after `step`: they are done again."""
        for name, file in self._files.items():
            if self.writes and file.path.is_file():  # always written anew: its last line may be cut short
                self._rewrite(name, [line for line in read_steps(file.path) if line["step"] <= step])

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, which every process may read."""
        return read_steps(self.folder / "metrics.jsonl")

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Append one line to `metrics.jsonl` and send it to TensorBoard or W&B if they are on."""
        self._append("metrics.jsonl", {"step": step, **metrics})
        if self._trackers is not None:
            self._trackers.write(step, metrics)

    def add_metrics(self, step: int, metrics: Metrics) -> None:
        """Add what is measured late to the line of `step`, the last one; or a line, where that is not there."""
        if not self.writes:
            return
        lines, own = self.metrics(), {"step": step}
        if lines and lines[-1]["step"] == step:
            own = lines.pop()
        self._rewrite("metrics.jsonl", [*lines, {**own, **metrics}])
        if self._trackers is not None:
            self._trackers.write(step, metrics)

    def log_sample(self, step: int, sample: Mapping[str, Any]) -> None:
        """Append one line to `samples.jsonl`."""
        self._append("samples.jsonl", {"step": step, **sample})

    def confirm_lock(self) -> None:
        """To be called before what must not be written twice, by every process.

        Raises:
          UserError: another process has taken this run over; nothing more is written then.
        """
        error: UserError | None = None
        try:
            if self._lock is not None:
                self._lock.confirm()
        except UserError as lost:
            error = lost
        if hosts.on_any(error is not None):
            self.writes = False
            raise error or LostLockError(f"{self.folder}: another process took this run over; stopping")

    def write_state(self, status: Status, reason: str = "", **extra: Any) -> None:
        """Replace `state.json`, whose `step` and `best` are saved whole; what an earlier call stored in `extra` stays.

        Its `current_step` is for who looks on; nothing resumes from it.
        """
        if not self.writes:
            return
        self._stated = time.monotonic()
        steps = {"step": self.saved or 0, "current_step": self.current, "best": self.best}
        new = {"status": status, **steps, "reason": reason, "kind": self._kind, "time": time.time()}
        old = known_state(self.folder)
        write_json(self.folder / STATE, {**old, **self._identity, **new, **extra})

    def reach(self, step: int) -> None:
        """Note that `step` is done; `state.json` follows, but for what came sooner than it may be written again."""
        self.current = step
        every = _FLUSH_SECONDS if in_bucket(self.folder) else _STATE_SECONDS
        if time.monotonic() - self._stated >= every:
            self.write_state("running")

    def write_last_words(self) -> None:
        """For a process that ends at once: say so, and in `state.json`, at the step that was saved last."""
        reason = f"quit by Ctrl-C; work after step {self.saved or 0} is not saved"
        print(f"{self.folder}: {reason}; start the same command again to resume", file=sys.stderr, flush=True)
        with suppress(UserError, OSError):
            self.write_state("preempted", reason)

    def flush(self) -> None:
        """Put what was logged where a crash cannot reach it."""
        if not self.writes:
            return
        for file in self._files.values():
            file.flush()

    def close(self) -> None:
        """Flush everything."""
        self.flush()
        if self._trackers is not None:
            self._trackers.close()

    def _rewrite(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        self._files[name].replace([_as_text(line) for line in lines])

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        self._files[name].append(_as_text(line))
        for file in self._files.values():
            file.flush(every=_FLUSH_SECONDS)


def _identity(folder: Path) -> dict[str, str]:
    """What `state.json` holds of it. A folder that was moved keeps its id; a copy beside its original gets its own."""
    state = known_state(folder)
    place = str(folder) if in_bucket(folder) else os.path.realpath(folder)
    run_id, former = state.get("run_id"), state.get("folder")
    if isinstance(former, str) and former != place:
        with suppress(OSError, UserError), bucket_errors(as_path(former)):  # what cannot be read is not the original
            original = as_path(former)
            same = not in_bucket(former) and not in_bucket(folder) and original.samefile(folder)
            if not same and read_state(original).get("run_id") == run_id:
                run_id = None
    return {"run_id": run_id or uuid.uuid4().hex[:12], "folder": place}


def _as_text(line: Mapping[str, Any]) -> str:
    """JSON has no NaN and no infinity, which Python would write all the same: they are null."""
    try:
        return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError:  # seldom, so that most lines are written once
        finite = json.loads(json.dumps(line), parse_constant=lambda _: None)
        return json.dumps(finite, ensure_ascii=False) + "\n"


@contextmanager
def open_run(
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    logging: LoggingSection,
    contents: Contents | None = None,
    accepted: Collection[str] = (),
) -> Iterator[Run]:
    """Start the run `folder`, or resume it if it holds a run of the same config, trained on the same.

    What `config.EXECUTION_SETTINGS` names may differ from before; the config on disk is then the new one.

    Whatever ends the block is written into `state.json`.

    Args:
      folder: the run's.
      kind: what it is: sft, grpo.
      config: its config, plain values.
      logging: where metrics go.
      contents: hashes of what it is trained on.
      accepted: what may have changed, of `run_changes.CHANGES`; what has is written into `state.json`.

    Raises:
      UserError: the folder holds something else, or a run of another config (each difference is named).
    """
    # Refused before anything is written: a folder that holds something else.
    with bucket_errors(folder):
        found = check_place(folder, config, contents, accepted)
        hosts.wait_for_all("checked the run's folder")
        if not in_bucket(folder):
            make_folder(folder, "run.dir")
    with _alone(folder) as lock:
        with bucket_errors(folder):
            if hosts.is_first():  # again: another run may have begun and ended here just now
                found = check_place(folder, config, contents, accepted)
            old = _rebuilt_state(folder)
            hosts.wait_for_all("read the run's state")  # which the first process writes from here on
            if hosts.is_first():
                write_text(folder / "config.yaml", dump_yaml(config))
        # What the run had reached, and what it was trained on so far.
        run = Run(folder, kind, logging, lock)
        run.saved = old.get("step")
        run.best = old.get("best")
        run.current = run.saved or 0
        if not run.saved and (lost := old.get("current_step")):
            hosts.say(f"{folder}: stopped at step {lost} without a checkpoint; starts again from step 0")
        if isinstance(last := old.get("compile_seconds"), int | float):
            run.compile_seconds = last
        run.accepted = frozenset(accepted)
        extra: dict[str, Any] = {"environment": environment()}
        if contents:
            extra["contents"] = dict(contents)
            if "status" in old and "contents" not in old:
                hosts.say(f"{folder}: this run had no record of what it was trained on; it has one from now on")
        # Changes that were accepted are recorded for good: a report, and a later start, can tell.
        if found:
            lines = [line for lines in found.values() for line in lines]
            hosts.say(f"{folder}: resuming with accepted changes: {'; '.join(lines)}")
            entry = {"step": run.saved or 0, "kinds": sorted(found), "changes": lines, "time": time.time()}
            extra["accepted"] = [*old.get("accepted", []), entry]
        entries = extra.get("accepted", old.get("accepted", []))
        if EVALUATED & found.keys():
            run.best = None  # it was the best by another measure
        run.evaluated_otherwise = max((e["step"] for e in entries if EVALUATED & set(e["kinds"])), default=-1)
        # A checkpoint from before what was accepted earlier may be the last one still.
        run.accepted |= {kind for entry in entries if entry["step"] >= (run.saved or 0) for kind in entry["kinds"]}
        # Whatever ends the run is its state; an error in saying so does not hide the first.
        run.write_state("running", **extra)
        try:
            yield run
        except BaseException as error:
            status: Status = "preempted" if isinstance(error, PreemptedError | KeyboardInterrupt) else "failed"
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            with suppress(UserError, OSError):  # where nothing can be written any more, that is not what went wrong
                if run.writes:
                    run.write_state(status, reason)
            with suppress(UserError, OSError):
                run.close()
            raise
        run.close()


def _rebuilt_state(folder: Path) -> dict[str, Any]:
    """The state of a run that is opened; said if there should be one and it cannot be read."""
    try:
        return read_state(folder) or ({} if (folder / "config.yaml").is_file() else {"step": 0})
    except UserError as error:
        hosts.say(f"{error}; rebuilding it from the run's checkpoints")
        return {}


@contextmanager
def _alone(folder: Path) -> Iterator[Lock | None]:
    """Within the block no other run writes to the folder: the first process holds its lock for all of them."""
    with ExitStack() as stack:
        lock: Lock | None = None
        error: UserError | None = None
        try:
            if hosts.is_first():
                lock = stack.enter_context(locked(folder))
        except UserError as refused:
            error = refused
        if hosts.on_any(error is not None):
            raise error or UserError(f"{folder}: another run is writing there; see what the first process says")
        yield lock


def environment() -> dict[str, Any]:
    """Versions of what computed a run, how precise products of float32 were, and where."""
    versions = {"psyche_jax": psyche_jax.__version__, "python": platform.python_version()}
    for name in _VERSIONS_OF:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    precision = FLOAT32_PRECISION.name.lower()
    return {
        "versions": versions,
        "float32_products": precision,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }
