"""One checkpoint's folder: whether it is whole, which one is meant, and the checksums of its files."""

import json
import sys
import uuid
from collections.abc import Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from psyche_jax.errors import UserError
from psyche_jax.storage.files import bucket_errors, in_bucket, read_json, write_text
from psyche_jax.storage.hub import PREFIX
from psyche_jax.storage.store import StoredObject, crc32c_of, open_store, seal
from psyche_jax.train.run_files import read_state

CHECKSUMS = "checksums.json"
# Orbax still writes the first when the checksums are made, and the second after all else.
_NOT_COVERED = (CHECKSUMS, "_CHECKPOINT_METADATA", "commit_success.txt")
_READ_AT_ONCE = 4
PEFT_CONFIG = "adapter_config.json"  # of `peft`, whose folders hold adapters alone
_NAMED = 3  # so many damaged files are named, the others counted


def write_checksums(folder: Path) -> None:
    """Write `checksums.json` for all files in `folder`, a folder on a disk or in a bucket, whole.

    Raises:
      UserError: the bucket cannot be used.
    """
    files = checksums_of(folder)
    sealed = {"crc32c": seal(files), "files": files}
    write_text(folder / CHECKSUMS, json.dumps(sealed, ensure_ascii=False, indent=1) + "\n")


def checksums_of(folder: Path, ending: str = "") -> dict[str, dict[str, int]]:
    """Size and CRC32C of every file in a folder whose name has that ending, read in threads; in a bucket nothing is.

    Raises:
      UserError: the bucket cannot be used.
    """
    files = [stored for stored in _files(folder) if stored.name.endswith(ending)]
    with ThreadPool(_READ_AT_ONCE) as threads:
        numbers = threads.map(partial(_crc32c, folder), files)
    return {
        stored.name: {"bytes": stored.bytes, "crc32c": number} for stored, number in zip(files, numbers, strict=True)
    }


def check_files(folder: Path, within: Sequence[str] | None = None, content: bool = True) -> None:
    """Raise UserError unless the files in `folder`, or in its subfolders `within`, are as `write_checksums` saw them.

    Raises:
      UserError: one is missing, has another size or (with `content`) another CRC32C; or the checksums are themselves
        missing or changed.
    """
    known = _known(folder)
    wanted = {name: entry for name, entry in known.items() if within is None or name.split("/")[0] in within}
    found = {stored.name: stored for stored in _files(folder)}
    faults = []
    for name, entry in wanted.items():
        stored = found.get(name)
        if stored is None:
            faults.append(f"{name} is missing")
        elif stored.bytes != entry["bytes"]:
            faults.append(f"{name} has {stored.bytes} bytes, and had {entry['bytes']} when it was written")
        elif content and _crc32c(folder, stored) != entry["crc32c"]:
            faults.append(f"{name} has changed: its CRC32C differs from when it was written")
    if faults:
        more = f", and {len(faults) - _NAMED} more files are damaged" if len(faults) > _NAMED else ""
        raise UserError(f"{folder}: the checkpoint is broken: {'; '.join(faults[:_NAMED])}{more}")


def _known(folder: Path) -> dict[str, dict[str, int]]:
    content = open_store(str(folder)).read(CHECKSUMS)
    if content is None:
        raise UserError(f"{folder}: the checkpoint is broken: {CHECKSUMS} is missing")
    try:
        sealed = json.loads(content)
        if sealed["crc32c"] == seal(sealed["files"]):
            return sealed["files"]
    except (ValueError, KeyError, TypeError):  # ValueError: no JSON, or no UTF-8
        pass
    raise UserError(f"{folder}: the checkpoint is broken: {CHECKSUMS} has changed")


def _files(folder: Path) -> list[StoredObject]:
    objects = open_store(str(folder)).objects()
    return [stored for stored in objects if stored.name not in _NOT_COVERED and not stored.name.endswith("/")]


def _crc32c(folder: Path, stored: StoredObject) -> int:
    return crc32c_of(Path(str(folder)) / stored.name) if stored.crc32c is None else stored.crc32c


FORMAT = 2  # 1 had no checksums
_MARK = "commit_success.txt"  # of Orbax, where nothing can be renamed: written last


def check_model(path: str) -> None:
    """Look, without JAX, whether `path` may be a model; in a bucket, and at a URL, only who opens it does.

    Raises:
      UserError: it holds neither a Hugging Face model, nor adapters, nor a whole checkpoint.
    """
    folder = Path(path)
    if "://" not in path and not any((folder / name).is_file() for name in ("config.json", PEFT_CONFIG)):
        find_checkpoint(folder, say=False)


def find_checkpoint(folder: Path, say: bool = True) -> Path:
    """The step folder that a run (its latest), RUN/best, a checkpoint folder or a step folder stands for.

    Folders that are named as steps and were not saved whole are passed over, each (if `say`) with a line on stderr.

    Raises:
      UserError: there is none.
    """
    if folder.name == "best" and (folder.parent / "state.json").is_file():
        best = read_state(folder.parent).get("best")
        if best is None:
            raise UserError(f"{folder}: no best checkpoint; the run has no data.evaluation, or no evaluation yet")
        step_folder = folder.parent / "checkpoints" / str(best["step"])
        if missing := what_is_missing(step_folder):
            raise UserError(f"{step_folder}: the best checkpoint is incomplete: {missing}; copy it again")
        return step_folder
    if not folder.is_dir():
        name = str(folder)
        if name.startswith(PREFIX):
            target = f"checkpoints/{folder.name.partition('@')[0]}"
            raise UserError(f"{name}: is on the Hugging Face hub; first fetch it: psyche import {name} {target}")
        raise UserError(
            f"{name}: no such model: neither a Hugging Face folder nor a checkpoint nor a run; "
            f"fetch one (psyche import hub:OWNER/{folder.name} {name}) or name another"
        )
    if folder.name.isdecimal() and not what_is_missing(folder):
        return folder
    root = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    whole, others = step_folders(root)
    if not whole:
        itself = {folder: what_is_missing(folder)} if folder.name.isdecimal() else {}
        reasons = [f"{path.name}: {missing}" for path, missing in (others or itself).items()]
        raise UserError(f"{folder}: holds neither a config.json nor a checkpoint {_listed(reasons)}".rstrip())
    for path, missing in others.items() if say else ():
        print(f"{path}: incomplete checkpoint ({missing}), skipped", file=sys.stderr)
    return whole[-1]


def step_folders(root: Path, items: Sequence[str] = ("parameters",)) -> tuple[list[Path], dict[Path, str]]:
    """The whole steps in a checkpoint folder, in order; and what else is named as one, with what is missing in it."""
    named = sorted((child for child in root.iterdir() if child.name.isdecimal()), key=lambda child: int(child.name))
    missing = {child: what_is_missing(child, items) for child in named}
    return [child for child in named if not missing[child]], {path: why for path, why in missing.items() if why}


def what_is_missing(folder: Path, items: Sequence[str] = ("parameters",)) -> str:
    """Why a folder that is named as a step was not saved whole as that step; empty if it was.

    A checkpoint that is whole and was damaged later is not noticed here: what reads it says so.
    """
    for item in items:
        if not (folder / item).is_dir():
            return f"{item} is missing"
    if in_bucket(folder):
        import orbax.checkpoint as ocp  # seconds, and JAX, which a look at a folder on a disk need not take

        if not ocp.path.step.is_path_finalized(folder):
            return f"{_MARK} is missing"
    if not (folder / "metadata" / "metadata").is_file():
        return "metadata is missing"
    try:
        metadata = read_json(folder / "metadata" / "metadata")
    except UserError:
        return ""
    if not isinstance(metadata, dict):
        return ""
    if metadata.get("format") != 1 and "format" in metadata and not (folder / CHECKSUMS).is_file():
        return f"{CHECKSUMS} is missing"
    step = metadata.get("step", int(folder.name))
    return "" if step == int(folder.name) else f"it is a copy of step {step}"


def set_aside_look_alikes(root: Path, saved: int | None) -> None:
    """Leave no folder in a run's checkpoints that Orbax takes for a step and that is none; every process must ask.

    On a disk such a folder gets another name, in a bucket it loses the mark of a whole one.

    Args:
      root: the run's checkpoints.
      saved: how many steps the run has saved, or done; None: it is not known.

    Raises:
      UserError: there are some, and there is no whole checkpoint. Nothing is changed then.
    """
    from psyche_jax.train import hosts  # which starts JAX, and the rest of this module does not

    with bucket_errors(root):
        whole, others = step_folders(root, ("parameters", "optimizer")) if root.is_dir() else ([], {})
        if not whole and (saved or (saved is None and others)):
            what = f"the run reached step {saved}" if saved else "the run was saved before"
            reasons = [f"{path.name}: {missing}" for path, missing in others.items()] or ["no step is there"]
            raise UserError(
                f"{root}: {what}, but no checkpoint is complete {_listed(reasons)}; copy the checkpoints again with "
                "all their files, or, to start over, remove the run's folder or choose another run.dir"
            )
        hosts.wait_for_all("looked for checkpoints")
        for path, missing in others.items() if hosts.is_first() else ():
            if not in_bucket(path):
                target = path.with_name(f"{path.name}.incomplete-{uuid.uuid4().hex[:8]}")
                path.rename(target)
                print(f"{path}: incomplete checkpoint ({missing}); renamed to {target.name}", file=sys.stderr)
            elif (path / _MARK).is_file():
                (path / _MARK).unlink()
                print(f"{path}: incomplete checkpoint ({missing}); its {_MARK} was removed", file=sys.stderr)
        hosts.wait_for_all("renamed what is not a checkpoint")


def read_checkpoint_metadata(step_folder: Path) -> dict[str, Any]:
    """The metadata of one checkpoint.

    Raises:
      UserError: it is missing, or was written by a newer version.
    """
    metadata = read_json(step_folder / "metadata" / "metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("format", 0), int):
        raise UserError(f"{step_folder}: the checkpoint's metadata are broken: not a JSON object with its format")
    if metadata.get("format", 0) > FORMAT:
        raise UserError(f"{step_folder}: was written by a newer version of psyche_jax; upgrade it")
    return metadata


def read_step_metadata(step_folder: Path, items: Sequence[str], content: bool = True) -> dict[str, Any]:
    """The metadata of one checkpoint, whose `items` and metadata are as they were written.

    Raises:
      UserError: they are not (without `content`: by their files' names and sizes), something is missing, or it was
        written by a newer version.
    """
    metadata = read_checkpoint_metadata(step_folder)
    if metadata.get("format", 0) > 1 or (step_folder / CHECKSUMS).is_file():
        check_files(step_folder, (*items, "metadata"), content)
    return metadata


def _listed(reasons: Sequence[str]) -> str:
    return f"({'; '.join(reasons[-3:])})" if reasons else ""
