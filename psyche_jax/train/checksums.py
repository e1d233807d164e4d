"""The CRC32C of every file of a checkpoint: written before the checkpoint counts as whole, compared before it is read.

Orbax and TensorStore find some damage by themselves, and not what lies in the middle of an array. The checksums are of
the files as they were when they had just been written; those of objects in a bucket are the bucket's own, so nothing is
read there to make or compare them, and TensorStore's reading of them is as safe as the bucket's answers are.
"""

import json
from collections.abc import Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import google_crc32c

from psyche_jax.buckets import DEADLINE_SECONDS
from psyche_jax.data.store import StoredObject, crc32c_of, open_store
from psyche_jax.errors import UserError
from psyche_jax.files import write_text

FILE = "checksums.json"
# Orbax still writes the first when the checksums are made, and the second after all else.
_NOT_COVERED = (FILE, "_CHECKPOINT_METADATA", "commit_success.txt")
_READ_AT_ONCE = 4
_NAMED = 3  # so many damaged files are named, the others counted


def write_checksums(folder: Path) -> None:
    """Write `checksums.json` for all files in `folder`, a folder on a disk or in a bucket, whole.

    Raises:
      UserError: the bucket cannot be used.
    """
    files = checksums_of(folder)
    sealed = {"crc32c": _seal(files), "files": files}
    write_text(folder / FILE, json.dumps(sealed, ensure_ascii=False, indent=1) + "\n")


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
    """Whether the files in `folder`, or those in its subfolders `within`, are those that `write_checksums` saw.

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
            faults.append(f"{name} is changed: its CRC32C is not that of when it was written")
    if faults:
        more = f", and {len(faults) - _NAMED} more files are damaged" if len(faults) > _NAMED else ""
        raise UserError(f"{folder}: the checkpoint is broken: {'; '.join(faults[:_NAMED])}{more}")


def _known(folder: Path) -> dict[str, dict[str, int]]:
    content = open_store(str(folder), DEADLINE_SECONDS).read(FILE)
    if content is None:
        raise UserError(f"{folder}: the checkpoint is broken: {FILE} is missing")
    try:
        sealed = json.loads(content)
        if sealed["crc32c"] == _seal(sealed["files"]):
            return sealed["files"]
    except (ValueError, KeyError, TypeError):  # ValueError: no JSON, or no UTF-8
        pass
    raise UserError(f"{folder}: the checkpoint is broken: {FILE} is changed")


def _files(folder: Path) -> list[StoredObject]:
    objects = open_store(str(folder), DEADLINE_SECONDS).objects()
    return [stored for stored in objects if stored.name not in _NOT_COVERED and not stored.name.endswith("/")]


def _crc32c(folder: Path, stored: StoredObject) -> int:
    return crc32c_of(Path(str(folder)) / stored.name) if stored.crc32c is None else stored.crc32c


def _seal(files: dict[str, dict[str, int]]) -> int:
    return google_crc32c.value(json.dumps(files, ensure_ascii=False, sort_keys=True).encode())
