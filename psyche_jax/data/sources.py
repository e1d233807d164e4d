"""Rows of JSONL, JSON, CSV, Excel and Parquet files, local or in a bucket, and of data sets on the hub, in order, with
their places.

Files are read by `json`, `csv`, `openpyxl` and `pyarrow`: the loaders of `datasets` give up on a file for one bad row.

What a row holds is not judged here; what cannot be read as a row at all is a `RowError` in its place.
"""

import codecs
import csv
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

from psyche_jax.config import Section
from psyche_jax.data.json_stream import published_values
from psyche_jax.errors import NotTextError, RowError, UsageError, UserError, first_reason
from psyche_jax.storage import hub
from psyche_jax.storage.files import NO_TEXT, in_bucket, read_jsonl, text_lines
from psyche_jax.storage.store import open_store

Row: TypeAlias = tuple[str, dict[str, Any] | RowError]
"""Its place (file and line, file and row, data set and row), and its columns."""
_Cells: TypeAlias = tuple[str, Sequence[str] | RowError]

_ABOVE = 5  # rows in which the header of a table is looked for
_SAMPLE = 2**20  # bytes from which an encoding is guessed


@dataclass(frozen=True)
class ReadingSection(Section):
    """What the bytes of a source do not say themselves."""

    encoding: str = "utf-8"  # of JSONL, CSV, TSV (a byte order mark is skipped); gb18030: Chinese Windows
    subset: str | None = None  # of a data set on the hub that has several
    split: str = "train"  # of a data set on the hub

    def __post_init__(self) -> None:
        try:
            "".encode(self.encoding)
        except LookupError:
            raise ValueError(f"encoding: Python does not know {self.encoding!r}") from None


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
        yield from _READERS[_ending(name)](name, path, reading.encoding)
        if _ending(name) == ".parquet" and not _has_page_checksums(path):
            unchecked.append(name)
    if unchecked:
        which = unchecked[0] if len(unchecked) == 1 else f"{unchecked[0]} and {len(unchecked) - 1} more"
        print(f"{which}: has no page checksums, so damage may go unnoticed (pyarrow: write_page_checksum=True)",
              file=sys.stderr)  # fmt: skip


def _files(source: str) -> Iterator[tuple[str, Path]]:
    """The names of a source's files, with a local file that has the content; one copy is there at a time."""
    if "://" in source and not in_bucket(source):
        raise UsageError(f"{source}: must be a file or a folder of them, local or gs://…, or {hub.PREFIX}NAME")
    known = ", ".join(_READERS)
    if Path(source).is_dir() or (in_bucket(source) and _ending(source) not in _READERS):
        folder = source
        there = [stored.name for stored in open_store(folder).objects() if "/" not in stored.name]
        names = [name for name in there if _ending(name) in _READERS and not name.startswith((".", "~$"))]
        if not names:
            raise UserError(f"{source}: holds no files that end with {known}")
    else:
        name = source.rpartition("/")[2]
        folder, names = source.removesuffix(name), [name]
        if _ending(name) not in _READERS:
            raise UsageError(f"{source}: its name must end with one of {known}")
    store = open_store(folder)
    for name in names:
        with store.local(name) as path:
            yield store.path(name), path


def _ending(name: str) -> str:
    return Path(name).suffix.lower()


def guess_encoding(source: str) -> str:
    """Return "utf-16" where a source's first file has that mark, "gb18030" where its first lines are Chinese in that
    and most are not UTF-8, else "utf-8"."""
    if source.startswith(hub.PREFIX):
        return "utf-8"
    for name, path in _files(source):
        if _ending(name) not in _OF_TEXT:
            continue
        with path.open("rb") as file:
            sample = file.read(_SAMPLE)
        if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-16"
        lines = sample.split(b"\n")[: -1 if len(sample) == _SAMPLE else None]
        telling = [line for line in lines if not line.isascii()]
        as_utf_8 = sum(_decoded(line, "utf-8") is not None for line in telling)
        as_gb18030 = [text for line in telling if (text := _decoded(line, "gb18030")) is not None]
        # Much of what is UTF-8 could be GB18030 too, if gibberish, and next to nothing the other way round. Accents of
        # Latin encodings can be single Chinese characters within words, seldom two in a row, and seldom in every line.
        chinese = [text for text in as_gb18030 if re.search("[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]{2}", text)]
        likely = 2 * len(chinese) >= len(as_gb18030) and 2 * as_utf_8 < len(telling)
        return "gb18030" if likely and len(as_gb18030) > max(as_utf_8, len(telling) // 2) else "utf-8"
    return "utf-8"


def _decoded(line: bytes, encoding: str) -> str | None:
    try:
        return line.decode(encoding)
    except UnicodeError:
        return None


def _jsonl(name: str, path: Path, encoding: str) -> Iterator[Row]:
    for where, value in read_jsonl(path, encoding, name):
        if isinstance(value, NotTextError):
            value = RowError(value.reason, "set reading.encoding")
        yield where, value if isinstance(value, dict | RowError) else RowError("not a JSON object")


def _json(name: str, path: Path, _: str) -> Iterator[Row]:
    """The items of an array, or values one after the other."""
    for found in published_values(path):
        value = found.value if isinstance(found.value, dict | RowError) else RowError("not a JSON object")
        yield found.where.replace(f"{path}: ", f"{name}: item ", 1).replace(str(path), name, 1), value


def _csv(name: str, path: Path, encoding: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    lines = text_lines(path, encoding, newline="", name=name)
    head = list(islice(lines, _ABOVE))
    first = next((line for line in head if any(mark in line for mark in ",\t;")), "")  # a title may stand above it
    delimiter = max(",\t;", key=first.count)  # Excel writes semicolons where commas are decimal points

    def cells() -> Iterator[_Cells]:
        reader = csv.reader(chain(head, lines), strict=True, delimiter=delimiter)
        while True:
            begin = reader.line_num + 1
            where = f"{name}:{begin}"
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield where, RowError("not CSV", str(error))
                for line in range(begin + 1, reader.line_num + 1):  # that a quote which does not end has taken along
                    yield f"{name}:{line}", RowError("not CSV", f"within the row of line {begin}")
                continue
            no_text = NO_TEXT.search("".join(values))
            yield where, NotTextError(f"not {encoding} text", "set reading.encoding") if no_text else values

    yield from _under_header(cells())


def _xlsx(name: str, path: Path, _: str) -> Iterator[Row]:
    """The rows of all sheets, each under a header of its own; as text, as CSV would have them.

    What is merged downwards (a case beside all its questions) stands in each of its rows.
    """
    try:
        import openpyxl
    except ImportError:
        how = "pip install openpyxl, or save it as CSV (UTF-8)"
        raise UserError(f"{name}: reading Excel files needs openpyxl; {how}") from None
    try:
        book = openpyxl.load_workbook(path, data_only=True)  # read_only would not know what is merged
        formulas = openpyxl.load_workbook(path, read_only=True)  # a program that wrote one need not have computed it
        for sheet in book.worksheets:
            computed = (cell for row in formulas[sheet.title].iter_rows() for cell in row if cell.data_type == "f")
            absent = {cell.coordinate for cell in computed if sheet[cell.coordinate].value is None}
            cells = [*sheet.iter_rows(min_row=1, min_col=1)]
            rows = [[_cell(cell.value) for cell in row] for row in cells]
            for block in sheet.merged_cells.ranges:
                for row in rows[block.min_row : block.max_row]:
                    row[block.min_col - 1] = rows[block.min_row - 1][block.min_col - 1]
            faults = [_fault(row, absent) for row in cells]
            yield from _under_header(
                (f"{name} {sheet.title}: row {n}", fault or row)
                for n, (fault, row) in enumerate(zip(faults, rows, strict=True), start=1)
            )
    except UserError:
        raise
    except Exception as error:  # whatever damaged XML makes openpyxl and its parsers raise
        raise UserError(f"{name}: is broken, or not an Excel file ({first_reason(error)})") from None


def _fault(row: Iterable[Any], absent: set[str]) -> RowError | None:
    """Of cells of openpyxl; `absent`: the places of formulas without a value."""
    for cell in row:
        if cell.data_type == "e":
            return RowError("a formula failed", cell.value)
        if cell.coordinate in absent:
            return RowError("a formula has no value: save the file in Excel or LibreOffice", cell.coordinate)
    return None


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).upper()
    return "" if value is None else f"{value:.15g}" if isinstance(value, float) else str(value)


def _under_header(rows: Iterator[_Cells]) -> Iterator[Row]:
    """Rows by the names in the header: the first row with two cells filled, since a title may stand above it.

    Cells without a name and rows without text are left out.
    """
    filled = ((where, row) for where, row in rows if isinstance(row, RowError) or any(map(str.strip, row)))
    head = list(islice(filled, _ABOVE))
    if not head:
        return
    if isinstance(first := head[0][1], RowError):
        how = "; set reading.encoding (for example gb18030)" if isinstance(first, NotTextError) else ""
        raise UserError(f"{head[0][0]}: the header is {first.reason}{how or f' ({first})'}")
    wide = (number for number, (_, row) in enumerate(head) if not isinstance(row, RowError) and len(_filled(row)) > 1)
    start = next(wide, 0)
    where, names = head[start]
    assert not isinstance(names, RowError)
    header = [name.strip() for name in names]
    while len(header) > 1 and not header[-1]:  # Excel's empty columns at the end
        header.pop()
    _check_names(where, [name for name in header if name])
    for where, row in chain(head[start + 1 :], filled):
        if isinstance(row, RowError):
            yield where, row
        elif len(row) < len(header) or _filled(row[len(header) :]):
            yield where, RowError("a different number of columns than the header", f"{len(row)}, not {len(header)}")
        else:
            yield where, {name: value for name, value in zip(header, row, strict=False) if name}


def _check_names(where: str, names: Sequence[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{where}: two columns have the name {twice[0]!r}")


def _filled(row: Sequence[str]) -> list[str]:
    return [value for value in row if value.strip()]


def _parquet(name: str, path: Path, _: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            _check_names(name, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        after = f" after row {number}" if number else ""
        raise UserError(f"{name}: is broken{after}, or not a Parquet file ({first_reason(error)})") from None


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
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".xlsx": _xlsx,
    ".parquet": _parquet,
}
_OF_TEXT = (".jsonl", ".csv", ".tsv")
