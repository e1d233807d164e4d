"""Rows of JSONL, CSV and Parquet files and of data sets on the Hugging Face hub, in order, with their places.

What a row holds is not judged here; what cannot be read as a row at all is a `RowError` in its place.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from psyche_jax import hub
from psyche_jax.config import Section
from psyche_jax.errors import UsageError, UserError, first_reason


class RowError(ValueError):
    """What is wrong with a row: `reason`, the same words for all such rows, and details of this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


Row: TypeAlias = tuple[str, dict[str, Any] | RowError]
"""Where it stands (file and line, file and row, data set and row), and its columns."""


@dataclass(frozen=True)
class ReadingSection(Section):
    """What the bytes of a source do not say themselves."""

    encoding: str = "utf-8"  # of JSONL and CSV files; a byte order mark is passed over; of Chinese Windows: gb18030
    subset: str | None = None  # of a data set on the hub that has several
    split: str = "train"  # of a data set on the hub

    def __post_init__(self) -> None:
        try:
            "".encode(self.encoding)
        except LookupError:
            raise ValueError(f"encoding: Python knows none of the name {self.encoding!r}") from None


def read_rows(source: str, reading: ReadingSection) -> Iterator[Row]:
    """The rows of a file, of all files in a folder (by name), or of `hub:NAME[@REVISION]`, which is streamed.

    Raises:
      UserError: the source cannot be read, or ends in the middle.
      UsageError: it is of no known format.
    """
    if source.startswith(hub.PREFIX):
        for number, row in enumerate(hub.stream_rows(source, reading.subset, reading.split), start=1):
            yield f"{source} {reading.split}: row {number}", row
        return
    if "://" in source:
        raise UsageError(f"{source}: must be a local file, a folder of them, or {hub.PREFIX}NAME")
    path = Path(source)
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _READERS)
        if not files:
            raise UserError(f"{source}: holds no files that end with {', '.join(_READERS)}")
    for file in files:
        if file.suffix not in _READERS:
            raise UsageError(f"{file}: is read by the end of its name, which must be one of {', '.join(_READERS)}")
        try:
            yield from _READERS[file.suffix](file, reading.encoding)
        except OSError as error:
            raise UserError(f"{file}: the data cannot be read ({error.strerror or first_reason(error)})") from None
        except UnicodeError as error:  # UTF-16 without its mark
            raise UserError(f"{file}: is not {reading.encoding} text ({first_reason(error)})") from None


def _lines_of(path: Path, encoding: str, newline: str) -> Iterator[str]:
    """Lines as text; bytes that are none in this encoding become halves of surrogate pairs."""
    known = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    with path.open(encoding=known, errors="surrogateescape", newline=newline) as file:
        yield from file


def _is_text(line: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in line) if not line.isascii() else True


def _jsonl(path: Path, encoding: str) -> Iterator[Row]:
    for number, line in enumerate(_lines_of(path, encoding, "\n"), start=1):  # U+2028 may stand within a string
        where = f"{path}:{number}"
        if not line.strip():
            continue
        if not _is_text(line):
            yield where, RowError(f"not {encoding} text", "set reading.encoding")
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # also: numbers too long, nesting too deep
            yield where, RowError("not JSON", str(error))
            continue
        yield where, value if isinstance(value, dict) else RowError("not a JSON object")


def _csv(path: Path, encoding: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_lines_of(path, encoding, ""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise UserError(f"{path}:1: the header is no CSV ({error})") from None
    if not all(map(_is_text, header)):
        raise UserError(f"{path}:1: the header is not {encoding} text; set reading.encoding (gb18030, say)")
    if twice := [name for name in header if header.count(name) > 1]:
        raise UserError(f"{path}:1: two columns have the name {twice[0]!r}")
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield where, RowError("not CSV", str(error))
            continue
        if not values:
            continue
        if len(values) != len(header):
            yield where, RowError("another number of columns than the header", f"{len(values)}, not {len(header)}")
        elif not all(map(_is_text, values)):
            yield where, RowError(f"not {encoding} text", "set reading.encoding")
        else:
            yield where, dict(zip(header, values, strict=True))


def _parquet(path: Path, _: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        after = f" after row {number}" if number else ""
        raise UserError(f"{path}: is broken{after}, or no Parquet file ({first_reason(error)})") from None


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
