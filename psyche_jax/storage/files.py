"""Files and folders that are either whole or absent, on disks and in buckets; JSON and JSONL."""

import contextlib
import fcntl
import glob
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, cast

from psyche_jax.errors import NotTextError, RowError, UserError, first_reason

_BUCKETS = "gs://"
LOCK_FILE = "lock.json"  # in the folder of a run, see `locks.py`


def as_path(path: str | Path) -> Path:
    """What a path or a `gs://` address stands for; the latter has the methods of a path that are used here."""
    if not in_bucket(path):
        return Path(path)
    bucket_and_prefix(path)
    from etils import epath

    from psyche_jax.storage import buckets  # half a second, which `psyche --help` need not take

    buckets.prepare()
    return cast(Path, epath.Path(path))


def in_bucket(path: str | Path) -> bool:
    """Return whether `path` is an address in a bucket."""
    return str(path).startswith(_BUCKETS)


def bucket_and_prefix(address: str | Path) -> tuple[str, str]:
    """The bucket of a `gs://` address, and the prefix within it, without slashes around.

    Raises:
      UserError: it names no bucket.
    """
    bucket, _, prefix = str(address).removeprefix(_BUCKETS).partition("/")
    if not bucket:
        raise UserError(f"{address}: names no bucket")
    return bucket, prefix.strip("/")


def absolute(path: Path) -> Path:
    """`path` as Orbax wants it."""
    return path if in_bucket(path) else path.absolute()


@contextlib.contextmanager
def bucket_errors(path: Path) -> Iterator[None]:
    """Within the block, what goes wrong with the bucket of `path`, if it is in one, is shown as one line.

    Raises:
      UserError: naming `path` and the reason.
    """
    if not in_bucket(path):
        yield
        return
    from psyche_jax.storage import buckets

    try:
        yield
    except buckets.FILE_ERRORS as error:
        raise UserError(
            f"{path}: the bucket cannot be used ({buckets.reason(error)}); see `gcloud auth list`"
        ) from None


def files_under(folder: Path) -> list[Path]:
    """All files in a folder and in those in it, by name; in a bucket `rglob` does not work."""
    if not in_bucket(folder):
        return sorted(path for path in folder.rglob("*") if path.is_file())
    inner = [files_under(path) if path.is_dir() else [path] for path in folder.iterdir()]
    return sorted(path for paths in inner for path in paths)


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` by `text` in one step: a reader, or a crash, sees the old or the new whole."""
    if in_bucket(path):  # where objects are replaced whole
        with bucket_errors(path):
            path.write_text(text, encoding="utf-8")
        return
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


class GrowingFile:
    """A text file that is appended to, a line at a time.

    Objects in a bucket cannot be appended to: there the lines are kept in memory, and written whole by `flush`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: list[str] = []  # of a file in a bucket
        self._written, self._time = 0, time.monotonic()

    def replace(self, lines: Sequence[str]) -> None:
        """Write these lines in place of what there is, in one step."""
        write_text(self.path, "".join(lines))
        if in_bucket(self.path):
            self._lines = [*lines]
            self._written, self._time = len(lines), time.monotonic()

    def append(self, line: str) -> None:
        """Put a line at the end."""
        if in_bucket(self.path):
            self._lines.append(line)
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def flush(self, every: float = 0.0) -> None:
        """Write what a bucket does not hold yet, if the last time was `every` seconds ago or more.

        With `every` at 0, a local file is put on its disk, where it survives the machine.
        """
        if in_bucket(self.path):
            if len(self._lines) > self._written and time.monotonic() - self._time >= every:
                self.replace(self._lines)
        elif not every and self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, in one step."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
      UserError: it is missing, unreadable or no JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text, parse_int=_reader_of_integers(text))
    except (OSError, ValueError, RecursionError) as error:  # numbers of 400 digits, objects within objects
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None


_LONG_NUMBER = re.compile("[0-9]{309}")  # or a part of a string that looks like one
NO_TEXT = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, or a byte that `text_lines` could not read


def text_lines(path: Path, encoding: str = "utf-8", newline: str = "\n", name: str | None = None) -> Iterator[str]:
    """Read the lines of a file; a byte order mark is left out, bytes that are no text match `NO_TEXT`.

    Args:
      path: of the file.
      encoding: as Python calls it.
      newline: "\n": lines end there alone, since U+2028 and the like may be within a string; "": CSV's.
      name: of the file in errors, where it is not `path`.

    Raises:
      UserError: the file cannot be read.
    """
    known = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    try:
        with bucket_errors(path), path.open("rb") as file:
            yield from TextIOWrapper(file, known, "surrogateescape", newline)
    except OSError as error:
        why = error.strerror or first_reason(error)
        raise UserError(f"{name or path}: the data cannot be read ({why})") from None
    except UnicodeError as error:  # UTF-16 without its mark
        raise UserError(f"{name or path}: is not {encoding} text ({first_reason(error)})") from None


def read_jsonl(path: Path, encoding: str = "utf-8", name: str | None = None) -> Iterator[tuple[str, Any]]:
    """Read the values of a JSONL file, each with its place, file and line; blank lines are left out.

    All JSONL is read here but that of data sets as published (`data/json_stream.py`). A line that cannot be read is a
    `RowError` in its place: bytes that are not text (`NotTextError`), not JSON, numbers that no float holds, nesting
    beyond Python's limits, a last line cut short by a crash.

    Raises:
      UserError: the file cannot be read.
    """
    for number, line in enumerate(text_lines(path, encoding, name=name), start=1):
        if line.strip():
            yield f"{name or path}:{number}", parsed_json(line, encoding)


def parsed_json(text: str, encoding: str = "utf-8") -> Any:
    """The value of a JSON text or what is wrong with it, a `RowError`."""
    if NO_TEXT.search(text):
        return NotTextError(f"not {encoding} text")
    try:
        return json.loads(text, object_pairs_hook=named_once, parse_int=_reader_of_integers(text))
    except (ValueError, RecursionError) as error:
        return RowError("not JSON", str(error))


def _reader_of_integers(text: str) -> Callable[[str], int] | None:
    """Python's own (None), which is several times as fast, where no number of a JSON text can be too long."""
    return _whole_number if _LONG_NUMBER.search(text) else None


def _whole_number(digits: str) -> int:
    """The number, where a float holds one as large: Python compares and draws no other beside floats.

    Raises:
      ValueError: it is larger.
    """
    if math.isinf(float(digits)):
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def named_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these names and values, of which JSON readers keep the last where a name has several.

    Raises:
      ValueError: a name has two values that differ, so that it cannot be told which is meant.
    """
    found = dict(pairs)
    if len(found) < len(pairs) and (twice := [name for name, value in pairs if found[name] != value]):
        raise ValueError(f"the name {twice[0]!r} has two values")
    return found


def make_folder(folder: Path, setting: str) -> None:
    """Make a folder, and those above it, where there is none.

    Raises:
      UserError: it cannot be made; another one can be chosen with `setting`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another {setting}") from None


def check_new_folder(path: Path) -> None:
    """Raise UserError if there is something at `path` but an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: already exists; choose another name or remove it first")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a new folder: yields a partial one beside `path`, which takes that name only if nothing was raised.

    What a process that was killed has left of the same folder is removed first: the kernel's lock tells.

    In a bucket, where nothing can be renamed, it yields `path` itself and empties it again if something was raised;
    what makes such a folder whole must be written last.

    Raises:
      UserError: `path` exists and is not an empty folder, cannot be made, or its bucket cannot be used.
    """
    with bucket_errors(path):
        check_new_folder(path)
        if in_bucket(path):
            try:
                yield path
            except BaseException:
                with contextlib.suppress(Exception):
                    path.rmtree()  # type: ignore[attr-defined]
                raise
            return
    path = path.resolve()  # "." has no name
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(OSError), _locked(left):
            _remove(left)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None
    try:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a disk without locks, where nothing is removed either
                stack.enter_context(_locked(partial))
            yield partial
            partial.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:  # as of a full disk
            error.filename = str(path)
        _remove(partial)
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the kernel's lock of a folder within the block.

    Raises:
      OSError: another process holds it, the disk has none, or it is no folder.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    """Remove a folder into which threads of what failed may still be writing their last files."""
    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)
        if not folder.exists():
            return
