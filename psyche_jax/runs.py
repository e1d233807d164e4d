"""The folder of a run: its config, metrics, samples and state. Reports read only this."""

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import psyche_jax
from psyche_jax import hosts
from psyche_jax.config import LoggingSection
from psyche_jax.config_files import dump_yaml, parse_yaml_mapping
from psyche_jax.errors import UsageError, UserError
from psyche_jax.files import GrowingFile, bucket_errors, in_bucket, read_json, write_json, write_text
from psyche_jax.run_lock import FILE as LOCK_FILE
from psyche_jax.run_lock import Lock, LostLockError, locked

Status: TypeAlias = Literal["running", "preempted", "done", "failed"]
_MAY_CHANGE = ("mesh", "distributed", "checkpoints", "logging")  # sections that a resumed run may set otherwise
_VERSIONS_OF = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


_FLUSH_SECONDS = 30.0


class PreemptedError(UserError):
    """The run was told to stop, has saved where it was, and goes on when started again."""


class Run:
    """A run's folder, open for writing. Made by `open_run`. Of several processes only the first writes.

    Objects in a bucket cannot be appended to: there metrics and samples are kept in memory and written whole, twice a
    minute, before each checkpoint and at the end.
    """

    def __init__(self, folder: Path, kind: str, logging: LoggingSection, lock: Lock | None = None) -> None:
        self.folder = folder
        self._files = {name: GrowingFile(folder / name) for name in ("metrics.jsonl", "samples.jsonl")}
        self.writes = hosts.is_first()
        self._kind = kind
        self._lock = lock
        self._sinks: list[Any] = []
        if not self.writes:
            return
        if logging.tensorboard:
            if in_bucket(folder):
                raise UsageError("logging.tensorboard needs a run.dir on a disk, not in a bucket")
            from tensorboardX import SummaryWriter

            self._sinks.append(_TensorBoard(SummaryWriter(str(folder / "tensorboard"))))
        if logging.wandb_project:
            self._sinks.append(_WeightsAndBiases(logging.wandb_project, folder))

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints lie."""
        return self.folder / "checkpoints"

    def continue_from(self, step: int) -> None:
        """Drop the metrics and samples of steps after `step`: they are done again."""
        for name, file in self._files.items():
            if self.writes and file.path.is_file():  # always written anew: its last line may be cut short
                self._rewrite(name, [line for line in read_lines(file.path) if line["step"] <= step])

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, which every process may read."""
        return read_lines(self.folder / "metrics.jsonl")

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to `metrics.jsonl` and send it to TensorBoard or W&B if they are on."""
        self._append("metrics.jsonl", {"step": step, **metrics})
        for sink in self._sinks:
            sink.write(step, metrics)

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add what is measured late to the line of `step`, the last one that there is; or begin with it."""
        if not self.writes:
            return
        *lines, last = self.metrics() or [{}]
        self._rewrite("metrics.jsonl", [*lines, {**last, "step": step, **metrics}])
        for sink in self._sinks:
            sink.write(step, metrics)

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
            raise error or LostLockError(f"{self.folder}: another process has taken this run over; this one ends")

    def write_state(self, status: Status, step: int, reason: str = "", **extra: Any) -> None:
        """Replace `state.json`; what an earlier call stored in `extra` stays."""
        if not self.writes:
            return
        path = self.folder / "state.json"
        old = read_json(path) if path.is_file() else {}
        new = {"status": status, "step": step, "reason": reason, "kind": self._kind, "time": time.time()}
        write_json(path, {**old, **new, **extra})

    def flush(self) -> None:
        """Put what was logged where a crash cannot reach it."""
        if not self.writes:
            return
        for file in self._files.values():
            file.flush()

    def close(self) -> None:
        """Flush everything."""
        self.flush()
        for sink in self._sinks:
            sink.close()

    def _rewrite(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        self._files[name].replace([_as_text(line) for line in lines])

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        self._files[name].append(_as_text(line))
        for file in self._files.values():
            file.flush(every=_FLUSH_SECONDS)


def _as_text(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


@contextmanager
def open_run(folder: Path, kind: str, config: Mapping[str, Any], logging: LoggingSection) -> Iterator[Run]:
    """Start the run `folder`, or go on with it if it holds a run of the same config.

    Mesh, hosts, checkpoints and logging may differ from before; the config on disk is then the new one.

    Whatever ends the block is written into `state.json`.

    Raises:
      UserError: the folder holds something else, or a run of another config (each difference is named).
    """
    with bucket_errors(folder):
        _check(folder, config)
        hosts.wait_for_all("checked the run's folder")
        if not in_bucket(folder):
            folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder) as lock:
        with bucket_errors(folder):
            if hosts.is_first():
                _check(folder, config)  # again: another run may have begun and ended here just now
                write_text(folder / "config.yaml", dump_yaml(config))
        run = Run(folder, kind, logging, lock)
        step = read_json(folder / "state.json").get("step", 0) if (folder / "state.json").is_file() else 0
        run.write_state("running", step, environment=environment())
        try:
            yield run
        except BaseException as error:
            status: Status = "preempted" if isinstance(error, PreemptedError | KeyboardInterrupt) else "failed"
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            with suppress(UserError, OSError):  # where nothing can be written any more, that is not what went wrong
                if run.writes:
                    run.write_state(status, read_json(folder / "state.json")["step"], reason)
            with suppress(UserError, OSError):
                run.close()
            raise
        run.close()


def _check(folder: Path, config: Mapping[str, Any]) -> None:
    """See that the folder is absent, empty, or holds this run."""
    config_file = folder / "config.yaml"
    if config_file.is_file():
        found = differences(lasting(parse_yaml_mapping(config_file)), lasting(config))
        if found:
            raise UserError(
                f"{folder}: holds another run ({found[0]}); choose another run.dir, or remove this one", found[1:]
            )
    elif folder.exists() and (not folder.is_dir() or any(child.name != LOCK_FILE for child in folder.iterdir())):
        raise UserError(f"{folder}: exists and is not a run; choose another run.dir")


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
    """Versions of what computed a run, and where."""
    versions = {"psyche_jax": psyche_jax.__version__, "python": platform.python_version()}
    for name in _VERSIONS_OF:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return {"versions": versions, "machine": platform.machine(), "cpus": os.cpu_count()}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none if it is absent. A last line cut short by a crash is left out."""
    if not path.is_file():
        return []
    *lines, rest = path.read_bytes().split(b"\n")  # not `splitlines`: U+2028 may stand within a string
    lines += [rest] if rest else []
    objects = []
    for number, line in enumerate(lines, start=1):
        try:
            objects.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}:{number}: is not JSON; the file was changed by hand") from None
    return objects


def lasting(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a run's config that may not change while it lasts."""
    return {key: value for key, value in config.items() if key not in _MAY_CHANGE}


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """A line for each value in `old` that `new` has otherwise.

    A config on disk is complete: a key that it lacks is newer than the run, which had what is now the default.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in old
            for line in differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if old == new else [f"its {name} is {old!r}, not {new!r}"]


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, project: str, folder: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "logging.wandb_project is set and wandb is absent; pip install 'psyche_jax[wandb]'"
            ) from None
        self._run = wandb.init(
            project=project, dir=None if in_bucket(folder) else str(folder), id=folder.name, resume="allow"
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()
