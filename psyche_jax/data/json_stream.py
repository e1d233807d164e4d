"""JSON as people publish it: arrays, a value a line or a file, in a file, a folder or a zip; read as a stream.

What cannot be read is a `RowError` in its place, and reading continues behind it where that is possible.
"""

import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any

from psyche_jax.errors import RowError, UserError, first_reason
from psyche_jax.storage.files import NO_TEXT, named_once

_ENDINGS = (".json", ".jsonl")
_CHARACTERS = 2**16  # read at once, and more for a longer value
_NEXT_ITEM = re.compile(r"[}\]]\s*,\s*[{\[]")
_TOKEN = 16  # characters: an error as near to the end of what was read may go away with what follows


@dataclass(frozen=True)
class PublishedValue:
    """An item of an array, or a value in the file outside of one.

    `path` is that of its file, or of the zip and the file in it; `whole` names the outermost value that it is part of.
    """

    where: str
    path: Path
    whole: str
    value: Any


def published_values(place: Path) -> Iterator[PublishedValue]:
    """All values of a file, of the `.json` and `.jsonl` files anywhere in a folder, a zip or a folder within a zip.

    Files come by name. Only the value that is being read is in memory.

    Raises:
      UserError: there are no such files, one cannot be read, or the only one ends in the middle.
    """
    try:
        for path, file in _opened(place):
            for where, whole, value in _values(str(path), TextIOWrapper(file, "utf-8-sig", "surrogateescape")):
                if isinstance(value, _CutShortError | _RestLostError) and path == place:
                    raise UserError(f"{where}: the file {value.reason}; get it again")
                yield PublishedValue(where, path, whole, value)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{place}: cannot be read as a zip ({first_reason(error)}); get it again") from None
    except OSError as error:
        name = error.filename or place
        raise UserError(f"{name}: the data cannot be read ({error.strerror or first_reason(error)})") from None


class _CutShortError(RowError):
    """The file ends within a value."""


class _RestLostError(RowError):
    """Behind a fault stand more items on the line, of which it cannot be told where they begin."""


def _opened(place: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    archive = next((path for path in (place, *place.parents) if path.is_file()), None)
    if archive is not None and (archive.suffix == ".zip" or zipfile.is_zipfile(archive)):
        inside = place.relative_to(archive)
        with zipfile.ZipFile(archive) as opened:
            members = {_name_of(member): member for member in opened.infolist() if not member.is_dir()}
            for name in _data_files((name for name in members if Path(name).is_relative_to(inside)), place):
                with opened.open(members[name]) as file:
                    yield archive / name, file
    elif place.is_dir():
        inner = (os.path.join(folder, name) for folder, _, names in os.walk(place) for name in names)  # noqa: PTH118
        for name in _data_files((os.path.relpath(path, place) for path in inner), place):
            with (place / name).open("rb") as file:
                yield place / name, file
    else:
        with place.open("rb") as file:
            yield place, file


def _data_files(names: Iterable[str], place: Path) -> list[str]:
    """By name, without what Macs and editors leave beside them."""
    shown = (name for name in names if not re.search(r"(^|/)(\.|__MACOSX)", name))
    files = sorted(name for name in shown if name.lower().endswith(_ENDINGS))
    if not files:
        raise UserError(f"{place}: holds no files that end with {' or '.join(_ENDINGS)}")
    return files


def _name_of(member: zipfile.ZipInfo) -> str:
    """Zips of Chinese Windows hold names in GBK and do not say so; zipfile takes them for code page 437."""
    if not member.flag_bits & 0x800:
        try:
            return member.filename.encode("cp437").decode("gb18030")
        except UnicodeError:
            pass
    return member.filename


def _values(name: str, file: TextIOWrapper) -> Iterator[tuple[str, str, Any]]:
    """Where, in which outermost value, and what: of a file's arrays the items, else the values."""
    text = _Text(file)
    margin = 0  # of the items of the last array
    while first := text.peek():
        where = whole = f"{name}:{text.line}"
        try:
            if first == "[":
                number = 0
                text.step()
                while text.peek() not in ("]", ""):
                    number += 1
                    margin = text.margin if number == 1 else margin
                    where = f"{name}: {number}"
                    yield where, whole, text.value()
                    where = f"{name}: {number + 1}"
                    text.pass_comma()
                text.pass_end_of_array()
            elif first in ",]":  # behind a fault within an array
                text.step()
            else:
                yield where, whole, text.value()
        except (ValueError, RecursionError) as error:
            fault = error if isinstance(error, RowError) else RowError("not JSON", first_reason(error))
            one_a_line = text.begins_line
            if text.skip_to_value(max(margin, text.margin)) and not isinstance(fault, _CutShortError):
                said = f"{first_reason(error)}; what follows on that line cannot be read"
                fault = RowError("not JSON", said) if one_a_line else _RestLostError(f"is not JSON there ({said})")
            yield where, whole, fault


class _Text:
    """Text of which only what is being parsed is in memory."""

    def __init__(self, file: TextIOWrapper) -> None:
        self._file = file
        self._text, self._at = "", 0
        self._decoder = json.JSONDecoder(strict=False, object_pairs_hook=self._object)
        self._named_twice = ""
        self._before: str | None = ""  # us on the line, if only blanks and the brackets of arrays, else None
        self.line = 1

    def peek(self) -> str:
        """The next character that is not white space; '' at the end."""
        while self._at < len(self._text) or self._more(_CHARACTERS):
            if not (character := self._text[self._at]).isspace():
                return character
            self.step()
        return ""

    def step(self) -> None:
        """Pass over a character."""
        self._pass_to(self._at + 1)

    def value(self) -> Any:
        """The JSON value that begins here.

        Raises:
          ValueError, RecursionError: there is none.
        """
        size = _CHARACTERS
        while True:
            self._named_twice = ""
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                number_may_go_on = isinstance(value, int | float) and end + len("e+") >= len(self._text)
                length = end - self._at
                if not number_may_go_on or not self._more(size):
                    self._pass_to(self._at + length)
                    return RowError("not JSON", self._named_twice) if self._named_twice else value
            except json.JSONDecodeError as error:
                fault = self._fault(error)
                open_ended = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _TOKEN
                if not open_ended or not self._more(size):
                    raise fault from None
            size *= 2  # a long value is not read in many steps, each from its beginning

    def pass_comma(self) -> None:
        """Pass over the comma between two items, if this is not the end of the array."""
        following = self.peek()
        if following == ",":
            self.step()
        elif following not in ("]", ""):
            raise ValueError("there is no comma after the item")

    def pass_end_of_array(self) -> None:
        """Pass over the bracket."""
        if not self.peek():
            raise _CutShortError("ends in the middle of an array")
        self.step()

    @property
    def begins_line(self) -> bool:
        """Whether only blanks stand before us on the line."""
        return self._before is not None and not self._before.strip()

    @property
    def margin(self) -> int:
        """How far within the line we are, if only blanks and the brackets of arrays stand before us, else 0."""
        return len(self._before or "")

    def skip_to_value(self, margin: int) -> bool:
        """Go to the next line that begins with an object or an array, indented by no more than `margin`.

        Returns whether more items of an array may have been skipped on the line that this one begins on.
        """
        several, first = False, self._before != ""
        while self._at < len(self._text) or self._more(_CHARACTERS):
            end = self._text.find("\n", self._at)
            rest = self._text[self._at : end if end >= 0 else None]
            several |= first and _NEXT_ITEM.search(rest) is not None
            self._pass_to(end + 1 if end >= 0 else len(self._text))
            if end < 0:
                continue
            first = False
            if len(self._text) - self._at <= margin:
                self._more(_CHARACTERS)
            start = re.compile(r"[ \t]*").match(self._text, self._at)
            assert start is not None
            if len(start[0]) <= margin and self._text.startswith(("{", "["), start.end()):
                return several
        return several

    def _fault(self, error: json.JSONDecodeError) -> ValueError:
        if NO_TEXT.search(self._text, self._at, error.pos + 1):
            return RowError("not UTF-8 text")
        if error.msg.startswith("Unterminated") or re.fullmatch(r"[\w\\.+-]*\s*", self._text[error.pos :]):
            return _CutShortError("ends in the middle of a value")
        return ValueError(error.msg)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        try:
            return named_once(pairs)
        except ValueError as error:  # the value is whole, and reading continues behind it
            self._named_twice = str(error)
            return {}

    def _pass_to(self, end: int) -> None:
        lines = self._text.count("\n", self._at, end)
        begin = self._text.rfind("\n", self._at, end) + 1 if lines else self._at
        before = "" if lines else self._before
        blank = before is not None and not self._text[begin:end].strip(" \t[")
        self._before = f"{before}{self._text[begin:end]}" if blank else None
        self.line += lines
        self._at = end

    def _more(self, size: int) -> bool:
        more = self._file.read(size)
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)
