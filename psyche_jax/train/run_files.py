"""The folder of a run as it is read, without JAX: its state, its lines, and whether a run may start there."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from psyche_jax.config_files import parse_yaml_mapping
from psyche_jax.errors import RowError, UserError
from psyche_jax.storage.files import LOCK_FILE, read_json, read_jsonl
from psyche_jax.train.run_changes import CHANGES, Change, Contents, changes, how_to_accept, is_grpo, refused

STATE = "state.json"
_MOST_STEPS = 2**53  # which a float counts


def check_run(folder: Path) -> None:
    """Raise UserError unless the folder, not in a bucket or within `bucket_errors`, is a run's."""
    for needed in ("config.yaml", STATE):
        if not (folder / needed).is_file():
            raise UserError(
                f"{folder}: is not a run (it has no {needed}); give a folder made by `psyche sft` or `psyche grpo`"
            )


def check_place(
    folder: Path, config: Mapping[str, Any], contents: Contents | None, accepted: Collection[str], early: bool = False
) -> dict[Change, list[str]]:
    """See that the folder is absent, empty, or holds this run; returns the changes that were accepted.

    `early`: before `contents` can be known, which are taken to be as they were.

    Raises:
      UserError: it holds something else, or a run of another config (each difference is named).
    """
    config_file = folder / "config.yaml"
    if config_file.is_file():
        state = known_state(folder)  # where it is lost, the checkpoints know what the run was trained on
        if early and not state:
            return {}
        known = state.get("contents") if state else contents
        old = parse_yaml_mapping(config_file)
        if old and is_grpo(old) != is_grpo(config):
            kind = "a GRPO" if is_grpo(old) else "an SFT"
            raise UserError(f"{folder}: holds {kind} run; choose another run.dir, or remove this one")
        found = changes(old, config, known, known if early else contents)
        if lines := refused(found, accepted):
            raise UserError(
                f"{folder}: holds another run ({lines[0]}); choose another run.dir, remove this one, or accept "
                f"the change with {how_to_accept(found, accepted)}",
                lines[1:],
            )
        return found
    if folder.exists() and (not folder.is_dir() or any(child.name != LOCK_FILE for child in folder.iterdir())):
        raise UserError(f"{folder}: exists and is not a run; choose another run.dir")
    return {}


def known_state(folder: Path) -> dict[str, Any]:
    """What can be read of the state."""
    try:
        return read_state(folder)
    except UserError:
        return {}


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
            ("current_step", _is_step(state.get("current_step", 0))),
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
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_STEPS


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
