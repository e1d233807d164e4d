"""Where metrics go beside a run's `metrics.jsonl`: TensorBoard and W&B. What fails there does not end a run."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from psyche_jax.config import LoggingSection
from psyche_jax.errors import UsageError, UserError, first_reason
from psyche_jax.files import in_bucket

Metrics = Mapping[str, float | None]


class Trackers:
    """All that `logging` names. One that fails is named in one line and left out from then on.

    Args:
      logging: the section of the config.
      folder: the run's.
      run_id: what W&B knows the run by: another for every run, the same when it goes on.

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
                    "logging.wandb_project is set and wandb is absent; pip install 'psyche_jax[wandb]'"
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
                f"{name}: {first_reason(error)}; the run goes on without it (all is in metrics.jsonl)",
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
