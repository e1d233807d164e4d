"""What the folder of a run holds, read: without JAX, also while the run is written."""

from pathlib import Path
from typing import Any

from psyche_jax.errors import RowError, UserError
from psyche_jax.storage.files import read_json, read_jsonl
from psyche_jax.train.run_changes import CHANGES

STATE = "state.json"


def read_state(folder: Path) -> dict[str, Any]:
    """The `state.json` of a run; empty if there is none.

    Raises:
      UserError: it is damaged.
    """
    path = folder / STATE
    if not path.is_file():
        return {}
    state = read_json(path)
    if not isinstance(state, dict):
        raise UserError(f"{path}: is damaged: it must hold an object")
    wrong = [
        name
        for name, right in (
            ("status", isinstance(state.get("status"), str)),
            ("step", _is_step(state.get("step"))),
            ("best", state.get("best") is None or _is_best(state["best"])),
            ("contents", isinstance(state.get("contents", {}), dict)),
            ("accepted", _are_entries(state.get("accepted", []))),
        )
        if not right
    ]
    if wrong:
        raise UserError(f"{path}: is damaged: its {' and '.join(wrong)} cannot be used")
    return state


def _is_best(value: Any) -> bool:
    return isinstance(value, dict) and _is_step(value.get("step"))


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_entries(accepted: Any) -> bool:
    return isinstance(accepted, list) and all(
        isinstance(entry, dict)
        and _is_step(entry.get("step"))
        and isinstance(entry.get("kinds"), list)
        and all(kind in CHANGES for kind in entry["kinds"])
        for entry in accepted
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none if it is absent. A last line cut short by a crash is left out.

    Raises:
      UserError: another line holds no object.
    """
    if not path.is_file():
        return []
    lines = list(read_jsonl(path))
    if lines and isinstance(lines[-1][1], RowError):
        lines.pop()
    for where, value in lines:
        if not isinstance(value, dict):
            what = "JSON" if isinstance(value, RowError) else "a JSON object"
            raise UserError(f"{where}: is not {what}; the file was changed by hand; remove that line")
    return [value for _, value in lines]


def read_steps(path: Path) -> list[dict[str, Any]]:
    """As `read_lines`, of a file whose lines are of steps.

    Raises:
      UserError: a line has no step.
    """
    lines = read_lines(path)
    for number, line in enumerate(lines, start=1):
        if not _is_step(line.get("step")):
            raise UserError(f"{path}:{number}: has no step; the file was changed by hand; remove that line")
    return lines
