"""Rows of JSONL, CSV and Parquet files, local or in a bucket, and of data sets on the hub, in order, with their places.

Files are read by `json`, `csv` and `pyarrow`: the loaders of `datasets` give up on a file for one bad row.

What a row holds is not judged here; what cannot be read as a row at all is a `RowError` in its place.
"""

import csv
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from psyche_jax.config import Section
from psyche_jax.errors import NotTextError, RowError, UsageError, UserError, first_reason
from psyche_jax.storage import hub
from psyche_jax.storage.files import NO_TEXT, in_bucket, read_jsonl, text_lines
from psyche_jax.storage.store import open_store

Row: TypeAlias = tuple[str, dict[str, Any] | RowError]
"""Its place (file and line, file and row, data set and row), and its columns."""


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
    """The rows of a file, of all files in a folder (by name), either in a bucket too, or of `hub:NAME[@REVISION]`,
    which is streamed.

    Parquet files in which flipped bits cannot be seen are named on stderr.

    Args:
      source: what is read.
      reading: what its bytes do not say.

    Raises:
      UserError: the source cannot be read, or ends in the middle.
      UsageError: it is of no known format.
    """
    if source.startswith(hub.PREFIX):
        for number, row in enumerate(hub.stream_rows(source, reading.subset, reading.split), start=1):
            yield f"{source} {reading.split}: row {number}", row
        return
    unchecked = []
    for name, path in _files(source):
        yield from _READERS[path.suffix](name, path, reading.encoding)
        if path.suffix == ".parquet" and not _has_page_checksums(path):
            unchecked.append(name)
    if unchecked:
        which = unchecked[0] if len(unchecked) == 1 else f"{unchecked[0]} and {len(unchecked) - 1} more"
        print(f"{which}: has no page checksums, so damage can look like data (pyarrow: write_page_checksum=True)",
              file=sys.stderr)  # fmt: skip


def _files(source: str) -> Iterator[tuple[str, Path]]:
    """The names of a source's files, with a local file that has the content; one copy is there at a time."""
    if "://" in source and not in_bucket(source):
        raise UsageError(f"{source}: must be a file or a folder of them, local or gs://…, or {hub.PREFIX}NAME")
    known = ", ".join(_READERS)
    if Path(source).is_dir() or (in_bucket(source) and Path(source).suffix not in _READERS):
        folder = source
        there = [stored.name for stored in open_store(folder).objects() if "/" not in stored.name]
        names = [name for name in there if Path(name).suffix in _READERS]
        if not names:
            raise UserError(f"{source}: holds no files that end with {known}")
    else:
        name = source.rpartition("/")[2]
        folder, names = source.removesuffix(name), [name]
        if Path(name).suffix not in _READERS:
            raise UsageError(f"{source}: is read by the end of its name, which must be one of {known}")
    store = open_store(folder)
    for name in names:
        with store.local(name) as path:
            yield store.path(name), path


def _jsonl(name: str, path: Path, encoding: str) -> Iterator[Row]:
    for where, value in read_jsonl(path, encoding, name):
        if isinstance(value, NotTextError):
            value = RowError(value.reason, "set reading.encoding")
        yield where, value if isinstance(value, dict | RowError) else RowError("not a JSON object")


def _csv(name: str, path: Path, encoding: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(text_lines(path, encoding, newline="", name=name), strict=True)
    try:
        header = [column.strip() for column in next(reader, [])]
    except csv.Error as error:
        raise UserError(f"{name}:1: the header is no CSV ({error})") from None
    if NO_TEXT.search("".join(header)):
        raise UserError(f"{name}:1: the header is not {encoding} text; set reading.encoding (gb18030, say)")
    if twice := [column for column in header if header.count(column) > 1]:
        raise UserError(f"{name}:1: two columns have the name {twice[0]!r}")
    while True:
        where = f"{name}:{reader.line_num + 1}"
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
        elif NO_TEXT.search("".join(values)):
            yield where, RowError(f"not {encoding} text", "set reading.encoding")
        else:
            yield where, dict(zip(header, values, strict=True))


def _parquet(name: str, path: Path, _: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        after = f" after row {number}" if number else ""
        raise UserError(f"{name}: is broken{after}, or no Parquet file ({first_reason(error)})") from None


def _has_page_checksums(path: Path) -> bool:
    """Return whether the first page has one; pyarrow compares those that are there, and does not say whether any is.

    A page begins with a Thrift struct, whose numbers 1 to 3 (type, sizes) are there always, and 4 is the checksum.
    """
    from pyarrow import parquet

    groups = parquet.read_metadata(path)
    if not groups.num_row_groups or not groups.num_columns:
        return True
    column = groups.row_group(0).column(0)
    with path.open("rb") as file:
        file.seek(column.dictionary_page_offset or column.data_page_offset)
        header = file.read(32)
    int32 = rb"\x15[\x80-\xff]*[\x00-\x7f]"  # the field's number is one more than the last one's
    return re.match(int32 * 4, header) is not None


_READERS: dict[str, Callable[[str, Path, str], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
