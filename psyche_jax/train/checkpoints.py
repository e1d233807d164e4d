"""The Orbax checkpoints of a run: parameters, optimizer state and what it takes to resume."""

import contextlib
import dataclasses
import datetime
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from psyche_jax.config import PromptSection
from psyche_jax.config_files import config_to_dict
from psyche_jax.errors import UserError, first_reason
from psyche_jax.model.config import ModelConfig
from psyche_jax.storage import buckets
from psyche_jax.storage.files import absolute
from psyche_jax.train.run_changes import changes, differences, refused
from psyche_jax.train.state import TrainState
from psyche_jax.train.step_folders import (
    FORMAT,
    read_step_metadata,
    write_checksums,
)
from psyche_jax.train.streaming import save_args


def metadata_differences(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], accepted: Collection[str] = ()
) -> list[str]:
    """A line for each field of the model's and of the run's config that is not the same in a checkpoint's metadata, and
    for each thing it was trained on that is another, but for what is `accepted` (of `run_changes.CHANGES`)."""
    wanted = json.loads(json.dumps(wanted))  # tuples become lists, as in the checkpoint
    lines = [] if "base" in accepted else differences(stored.get("model"), wanted.get("model"), "model")
    pairs = [values.get("config", {}) for values in (stored, wanted)]
    contents = [values.get("contents") for values in (stored, wanted)]
    return lines + refused(changes(*pairs, *contents), accepted)


def array_differences(folder: Path, wanted: Any, name: str) -> list[str]:
    """A line for each array with another shape or dtype, for each that is missing and for each that is too many.

    Args:
      folder: where Orbax stored one item of a checkpoint.
      wanted: a tree of arrays, or of their shapes and dtypes.
      name: of the item.
    """
    stored = ocp.StandardCheckpointHandler().metadata(epath.Path(absolute(folder))).tree
    there = {path: _describe(leaf) for path, leaf in ocp.tree.to_flat_dict(stored, sep="/").items()}
    here = {path: _describe(leaf) for path, leaf in ocp.tree.to_flat_dict(wanted, sep="/").items()}
    lines = []
    for path in sorted(there | here):
        old, new = there.get(path), here.get(path)
        if old == new:
            continue
        if old is None:
            lines.append(f"{name}/{path}: {new} in this run, missing in the checkpoint")
        elif new is None:
            lines.append(f"{name}/{path}: {old} in the checkpoint, missing in this run")
        else:
            lines.append(f"{name}/{path}: {old} in the checkpoint, {new} in this run")
    return lines


def _describe(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"


class Checkpoints:
    """The checkpoints of one run, written in the background.

    Kept are the latest ones, those of the steps `bests`, and one of every so many hours; see `CheckpointSection`.
    `saved` is the last step that is known to be on disk whole: not the one being written.
    """

    def __init__(self, folder: Path, keep: int | None = None, keep_every_hours: float | None = None) -> None:
        self.bests: Collection[int] = ()
        self._folder = folder
        policies: list[Any] = [checkpoint_managers.LatestN(keep), _ThoseSteps(lambda: self.bests)]
        if keep_every_hours is not None:
            policies.append(EverySoOften(datetime.timedelta(hours=keep_every_hours)))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(timeout_secs=buckets.SAVE_SECONDS, post_finalization_callback=self._seal),
        )
        self._saving: int | None = None
        try:
            self._manager = ocp.CheckpointManager(absolute(folder), options=options)
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:
            raise UserError(f"{folder}: the checkpoints there cannot be read: {first_reason(error)}") from None
        self.saved = self.latest or 0

    @property
    def latest(self) -> int | None:
        """The last step that was saved whole."""
        return self._manager.latest_step()

    @property
    def writing(self) -> bool:
        """Whether one is being written."""
        return self._manager.is_saving_in_progress()

    def save(self, state: TrainState, step: int, metadata: dict[str, Any]) -> None:
        """Save after `step` steps. Returns when `state` may be changed; writing continues in the background.

        Raises:
          UserError: this one, or the one before, cannot be written.
        """
        items = {
            "parameters": ocp.args.StandardSave(state.parameters, save_args(state.parameters)),
            "optimizer": ocp.args.StandardSave(state.optimizer_state, save_args(state.optimizer_state)),
            "metadata": ocp.args.JsonSave({**metadata, "format": FORMAT, "step": step}),
        }
        self.wait()
        self._saving = step
        with self._write_errors():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def check(self, metadata: Mapping[str, Any], accepted: Collection[str] = ()) -> None:
        """See that the latest one has all its files and is of the run that `metadata` describes, reading no arrays.

        Raises:
          UserError: it has not, or is not.
        """
        folder = self._folder / str(self.latest)
        stored = read_step_metadata(folder, ("parameters", "optimizer"), content=False)
        if found := metadata_differences(stored, metadata, accepted):
            raise _of_another_run(folder, found)

    def restore(self, abstract: TrainState, metadata: Mapping[str, Any], accepted: Collection[str] = ()) -> TrainState:
        """The latest state, placed as `abstract` (of ShapeDtypeStructs with shardings) says.

        `accepted` names what may be another than `metadata` say, of `run_changes.CHANGES`.

        Raises:
          UserError: it is broken, or of another run than `metadata` and `abstract` describe: each difference is named.
        """
        step = self._manager.latest_step()
        folder = self._folder / str(step)
        wanted = {"parameters": abstract.parameters, "optimizer": abstract.optimizer_state}
        items = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        try:
            stored = read_step_metadata(folder, tuple(wanted))
            found = metadata_differences(stored, metadata, accepted)
            for name, tree in wanted.items():
                found += array_differences(folder / name, tree, name)
            if found:
                raise _of_another_run(folder, found)
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except jax.errors.JaxRuntimeError:
            raise  # of the device, not of the files
        except UserError as error:
            if error.details:
                raise
            raise UserError(f"{error}; remove this folder to resume from the one before it") from None
        except Exception as error:  # Orbax raises bare Exceptions on broken files
            raise UserError(
                f"{folder}: the checkpoint is broken: {first_reason(error)}; "
                "remove this folder to resume from the one before it"
            ) from None
        place = abstract.step.sharding
        return TrainState(jax.device_put(jnp.int32(step), place), restored["parameters"], restored["optimizer"])

    def close(self) -> None:
        """Wait until all is written, and end.

        Raises:
          UserError: it cannot be.
        """
        self.wait()
        self._manager.close()

    def wait(self) -> None:
        """Wait until all is written.

        Raises:
          UserError: it cannot be.
        """
        with self._write_errors():
            self._manager.wait_until_finished()
        if self._saving is not None:
            self.saved = self._saving

    def _seal(self) -> None:
        """Write the checksums of what was just written, on the first process, before it counts as whole."""
        partial = self._folder / f"{self._saving}{ocp.path.step.TMP_DIR_SUFFIX}"
        # Where nothing can be renamed Orbax writes under the final name, and last a file that says that it is whole.
        write_checksums(partial if partial.is_dir() else self._folder / str(self._saving))

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except (UserError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # of TensorStore, gcsfs, or a deadline
            raise UserError(
                f"{self._folder / str(self._saving)}: the checkpoint cannot be written: {first_reason(error)}"
            ) from None


def _of_another_run(folder: Path, found: Sequence[str]) -> UserError:
    return UserError(f"{folder}: the checkpoint does not belong to this run; {len(found)} differences:", found)


@dataclass(frozen=True)
class _ThoseSteps:
    """Orbax's policy to preserve the steps that a function gives: its BestN wants the metrics with every save, and ours
    may be measured in some steps alone, or anew when a run resumes."""

    steps: Callable[[], Collection[int]]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [checkpoint.step in self.steps() for checkpoint in checkpoints]


@dataclass(frozen=True)
class EverySoOften:
    """Orbax's EveryNSeconds for clocks that may be set: a jump, also one back, counts as time gone by.

    So a jump makes one checkpoint more stay, or the next stay later by less than twice `interval`; none else is lost.
    """

    interval: datetime.timedelta

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        kept: list[bool] = []
        last: datetime.datetime | None = None
        for checkpoint in checkpoints:
            kept.append(last is None or abs(checkpoint.time - last) >= self.interval)
            last = checkpoint.time if kept[-1] else last
        return kept


def checkpoint_metadata(model: ModelConfig, prompt: PromptSection | None, **more: Any) -> dict[str, Any]:
    """What a checkpoint holds beside arrays."""
    prompt_values = None if prompt is None else config_to_dict(prompt)
    return {"model": dataclasses.asdict(model), "prompt": prompt_values, **more}


def abstract_like(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs of `tree` with `shardings`."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings)
