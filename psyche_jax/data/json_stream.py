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
from psyche_jax.storage.files import NO_TEXT

_ENDINGS = (".json", ".jsonl")
_CHARACTERS = 2**16  # read at once, and more for a longer value
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
                if isinstance(value, _CutShortError) and path == place:
                    raise UserError(f"{where}: the file {value.reason}; get it again")
                yield PublishedValue(where, path, whole, value)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{place}: cannot be read as a zip ({first_reason(error)}); get it again") from None
    except OSError as error:
        name = error.filename or place
        raise UserError(f"{name}: the data cannot be read ({error.strerror or first_reason(error)})") from None


class _CutShortError(RowError):
    """The file ends within a value."""


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
    while first := text.peek():
        where = whole = f"{name}:{text.line}"
        try:
            if first == "[":
                number = 0
                text.step()
                while text.peek() not in ("]", ""):
                    number += 1
                    where = f"{name}: {number}"
                    yield where, whole, text.value()
                    text.pass_comma()
                text.pass_end_of_array()
            elif first in ",]":  # behind a fault within an array
                text.step()
            else:
                yield where, whole, text.value()
        except (ValueError, RecursionError) as error:
            if isinstance(error, RowError):
                yield where, whole, error
            else:
                yield where, whole, RowError("not JSON", first_reason(error))
            text.skip_to_value()


class _Text:
    """Text of which only what is being parsed is in memory."""

    def __init__(self, file: TextIOWrapper) -> None:
        self._file = file
        self._text, self._at = "", 0
        self._decoder = json.JSONDecoder(strict=False)
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
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                number_may_go_on = isinstance(value, int | float) and end + len("e+") >= len(self._text)
                length = end - self._at
                if not number_may_go_on or not self._more(size):
                    self._pass_to(self._at + length)
                    return value
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

    def skip_to_value(self) -> None:
        """Go to the next line that begins with an object or an array."""
        while self._at < len(self._text) or self._more(_CHARACTERS):
            end = self._text.find("\n", self._at)
            self._pass_to(end + 1 if end >= 0 else len(self._text))
            if self._at == len(self._text):
                self._more(_CHARACTERS)
            if end >= 0 and self._text.startswith(("{", "["), self._at):
                return

    def _fault(self, error: json.JSONDecodeError) -> ValueError:
        if NO_TEXT.search(self._text, self._at, error.pos + 1):
            return RowError("not UTF-8 text")
        if error.msg.startswith("Unterminated") or re.fullmatch(r"[\w\\.+-]*\s*", self._text[error.pos :]):
            return _CutShortError("ends in the middle of a value")
        return ValueError(error.msg)

    def _pass_to(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _more(self, size: int) -> bool:
        more = self._file.read(size)
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)
