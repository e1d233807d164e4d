"""What a checkpoint holds that a run does not want, or lacks: every difference by name."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from psyche_jax.files import absolute
from psyche_jax.run_changes import changes, differences, refused

_MODEL = "model"


def metadata_differences(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], accepted: Collection[str] = ()
) -> list[str]:
    """A line for each field of the model's and of the run's config that is not the same in a checkpoint's metadata, and
    for each thing it was trained on that is another, but for what is `accepted` (of `run_changes.CHANGES`)."""
    wanted = json.loads(json.dumps(wanted))  # tuples become lists, as in the checkpoint
    lines = [] if "base" in accepted else differences(stored.get(_MODEL), wanted.get(_MODEL), _MODEL)
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
            lines.append(f"{name}/{path}: {old} in the checkpoint, and not in this run")
        else:
            lines.append(f"{name}/{path}: {old} in the checkpoint, {new} in this run")
    return lines


def _describe(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"
