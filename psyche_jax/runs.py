"""The folder of a run: its config, metrics, samples and state. Reports read only this."""

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import psyche_jax
from psyche_jax import hosts
from psyche_jax.config import LoggingSection, dump_yaml, parse_yaml_mapping
from psyche_jax.errors import UsageError, UserError
from psyche_jax.files import bucket_errors, in_bucket, read_json, write_json, write_text

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

    def __init__(self, folder: Path, kind: str, logging: LoggingSection) -> None:
        self.folder = folder
        self._texts: dict[str, list[str]] = {}  # of files in a bucket
        self._unsent: set[str] = set()
        self._sent = time.monotonic()
        self.writes = hosts.is_first()
        self._kind = kind
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
        for name in ("metrics.jsonl", "samples.jsonl"):
            if self.writes and (self.folder / name).is_file():  # always written anew: its last line may be cut short
                kept = [line for line in read_lines(self.folder / name) if line["step"] <= step]
                texts = [json.dumps(line, ensure_ascii=False) + "\n" for line in kept]
                write_text(self.folder / name, "".join(texts))
                self._texts[name] = texts

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, which every process may read."""
        return read_lines(self.folder / "metrics.jsonl")

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to `metrics.jsonl` and send it to TensorBoard or W&B if they are on."""
        self._append("metrics.jsonl", {"step": step, **metrics})
        for sink in self._sinks:
            sink.write(step, metrics)

    def log_sample(self, step: int, sample: Mapping[str, Any]) -> None:
        """Append one line to `samples.jsonl`."""
        self._append("samples.jsonl", {"step": step, **sample})

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
        for name in sorted(self._unsent):
            write_text(self.folder / name, "".join(self._texts[name]))
        self._unsent.clear()
        self._sent = time.monotonic()

    def close(self) -> None:
        """Flush everything."""
        self.flush()
        for sink in self._sinks:
            sink.close()

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        text = json.dumps(line, ensure_ascii=False) + "\n"
        if not in_bucket(self.folder):
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(text)
            return
        self._texts.setdefault(name, []).append(text)
        self._unsent.add(name)
        if time.monotonic() - self._sent > _FLUSH_SECONDS:
            self.flush()


@contextmanager
def open_run(folder: Path, kind: str, config: Mapping[str, Any], logging: LoggingSection) -> Iterator[Run]:
    """Start the run `folder`, or go on with it if it holds a run of the same config.

    Mesh, hosts, checkpoints and logging may differ from before; the config on disk is then the new one.

    Whatever ends the block is written into `state.json`.

    Raises:
      UserError: the folder holds something else, or a run of another config (the first difference is named).
    """
    with bucket_errors(folder):
        _claim(folder, config)
    run = Run(folder, kind, logging)
    step = read_json(folder / "state.json").get("step", 0) if (folder / "state.json").is_file() else 0
    run.write_state("running", step, environment=environment())
    try:
        yield run
    except BaseException as error:
        status: Status = "preempted" if isinstance(error, PreemptedError | KeyboardInterrupt) else "failed"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if run.writes:
            run.write_state(status, read_json(folder / "state.json")["step"], reason)
        raise
    finally:
        run.close()


def _claim(folder: Path, config: Mapping[str, Any]) -> None:
    """Make the folder, or see that it is this run's, and put the config into it."""
    config_file = folder / "config.yaml"
    if config_file.is_file():
        difference = _first_difference(_lasting(parse_yaml_mapping(config_file)), _lasting(config))
        if difference:
            raise UserError(f"{folder}: holds another run ({difference}); choose another run.dir, or remove this one")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not a run; choose another run.dir")
    hosts.wait_for_all("checked the run's folder")
    if not in_bucket(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if hosts.is_first():
        write_text(config_file, dump_yaml(config))


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


def _lasting(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _MAY_CHANGE}


def _first_difference(old: Any, new: Any, name: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        # A config on disk is complete: a key that it lacks is newer than the run, which had what is now the default.
        for key in old:
            if difference := _first_difference(old.get(key), new.get(key), f"{name}.{key}" if name else str(key)):
                return difference
        return ""
    return "" if old == new else f"its {name} is {old!r}, not {new!r}"


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
