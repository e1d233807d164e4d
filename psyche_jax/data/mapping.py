"""Records from rows of any shape, by a config that says which column is what (`psyche data import --config`)."""

import difflib
import itertools
import json
import re
import string
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

from psyche_jax.config import Section
from psyche_jax.config_files import config_to_dict
from psyche_jax.data.imports import Imported, Notes, write_import
from psyche_jax.data.records import (
    BaseRecord,
    Dialogue,
    Kind,
    Message,
    Question,
    RlPrompt,
    SftExample,
    first_of,
    question_to_rl,
    question_to_sft,
)
from psyche_jax.data.sources import ReadingSection, Row, read_rows
from psyche_jax.errors import RowError, UsageError
from psyche_jax.rewards.reference import with_thought

Form: TypeAlias = Literal["question", "user", "messages"]

_HEAD = 1000  # rows in which a column must appear
_LETTERS = string.ascii_uppercase
_NO_TEXT = (bool, list, Mapping)


@dataclass(frozen=True)
class ColumnsSection(Section):
    """The column that holds each part of a record. Exactly one of question, user and messages must be named."""

    question: str | None = None  # the stem of an exam question
    options: str | tuple[str, ...] | None = None  # one column with a list or {letter: text}; or a column for each
    answer: str | None = None  # the key; `answer_is` says how it is written
    kind: str | None = None  # single or multi, in the words of `kinds`; without it the number of letters decides
    rationale: str | None = None  # the reasoning
    user: str | None = None  # of dialogues of one turn: what is asked
    assistant: str | None = None  # and the reply
    system: str | None = None  # a system prompt of the row's own
    messages: str | None = None  # of dialogues: a list of turns; `turns` says what they look like
    meta: tuple[str, ...] = ()  # kept with the record as they are


@dataclass(frozen=True)
class TurnsSection(Section):
    """What one turn of `columns.messages` looks like."""

    role: str = "role"  # the key of who speaks; ShareGPT: from
    content: str = "content"  # the key of what is said; ShareGPT: value
    # How the column calls the three who speak.
    roles: dict[str, Literal["system", "user", "assistant"]] = field(
        default_factory=lambda: {"system": "system", "user": "user", "assistant": "assistant"}
    )


# Which columns each record must have in each form of rows, and which it may have.
_USES: dict[tuple[str, Form], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("Question", "question"): (("options", "answer"), ("kind", "rationale")),
    ("RlPrompt", "question"): (("options", "answer"), ("kind",)),
    ("RlPrompt", "user"): (("answer",), ("kind", "system")),
    ("RlPrompt", "messages"): (("answer",), ("kind",)),
    ("SftExample", "question"): (("options", "answer", "rationale"), ("kind",)),
    ("SftExample", "user"): (("assistant",), ("system", "rationale")),
    ("SftExample", "messages"): ((), ()),
    ("Dialogue", "user"): (("assistant",), ("system", "rationale")),
    ("Dialogue", "messages"): ((), ()),
}


@dataclass(frozen=True)
class ImportConfig(Section):
    """How the rows of a source become records."""

    record: Literal["Question", "Dialogue", "SftExample", "RlPrompt"]  # what the rows become
    columns: ColumnsSection
    turns: TurnsSection = field(default_factory=TurnsSection)
    answer_is: Literal["letters", "index", "text"] = "letters"  # "A,C"; 0 for A; the text of the option
    # How the column of `columns.kind` calls the two kinds.
    kinds: dict[str, Kind] = field(default_factory=lambda: {"single": "single", "multi": "multi"})
    reading: ReadingSection = field(default_factory=ReadingSection)

    def __post_init__(self) -> None:
        named = [name for name in ("question", "user", "messages") if getattr(self.columns, name) is not None]
        if len(named) != 1:
            found = " and ".join(named) or "none"
            raise ValueError(f"columns must name one of question, user and messages, not {found}")
        if (self.record, self.form) not in _USES:
            raise ValueError(f"record: {self.record} cannot be made of columns.{self.form}")
        must, may = _USES[self.record, self.form]
        given = dict(self._columns())
        for name, column in given.items():
            if name not in (self.form, "meta", *must, *may):
                raise ValueError(f"columns.{name}: {column!r} has no place in {self.record} with columns.{self.form}")
        if absent := [name for name in must if name not in given]:
            raise ValueError(f"columns.{absent[0]} must be named for {self.record} with columns.{self.form}")
        if self.answer_is == "text" and self.columns.options is None:
            raise ValueError("answer_is: text needs columns.options to find it in")

    @property
    def form(self) -> Form:
        """Which of the three shapes the rows have."""
        if self.columns.question is not None:
            return "question"
        return "user" if self.columns.user is not None else "messages"

    def _columns(self) -> Iterator[tuple[str, str]]:
        """The parts that are named, with their columns."""
        for entry in fields(self.columns):
            value = getattr(self.columns, entry.name)
            for column in () if value is None else (value,) if isinstance(value, str) else value:
                yield entry.name, column

    def check_columns(self, source: str, there: list[str]) -> None:
        """Raises UsageError for a column that the source does not have, with the nearest one."""
        for name, column in self._columns():
            if column not in there:
                nearest = difflib.get_close_matches(column, there, 1, 0.5)
                hint = f"did you mean {nearest[0]!r}?" if nearest else f"columns there: {', '.join(there)}"
                raise UsageError(f"{source}: columns.{name}: there is no column {column!r}; {hint}")


def import_rows(source: str, target: str, config: ImportConfig) -> Imported:
    """Write the records of a source as a new data set; rows stream through, only ids stay in memory.

    A row with the content of an earlier one is skipped.

    Args:
      source: see `sources.read_rows`.
      target: a new local folder or gs://bucket/prefix.
      config: how rows become records.

    Raises:
      NoRecordsError: the source has no usable row.
      UserError: it cannot be read, or the target cannot be written.
      UsageError: the config names a column that is in none of the first 1,000 rows.
    """
    notes = Notes()

    def records() -> Iterator[BaseRecord]:
        seen: dict[str, tuple[str, Any]] = {}
        for where, row in _checked(source, config):
            try:
                if isinstance(row, RowError):
                    raise row
                record = record_of(row, config)
                identity, key = record.id, getattr(record, "answer", None)  # type: ignore[attr-defined]
                earlier, its_key = seen.setdefault(identity, (where, key))
                if earlier != where:
                    other = "" if key == its_key else " with another answer"
                    raise RowError(f"a duplicate{other}", f"of {earlier}")
            except ValueError as error:
                notes.leave_out(where, error)
                continue
            yield record

    def none() -> str:
        return f"{source}: no row gives a {config.record}{first_of(notes.set_aside) or ': it holds no rows'}"

    return write_import(target, records(), {"source": source, "import": config_to_dict(config)}, notes, none)


def _checked(source: str, config: ImportConfig) -> Iterator[Row]:
    rows = read_rows(source, config.reading)
    head = list(itertools.islice(rows, _HEAD))
    there = dict.fromkeys(name for _, row in head if not isinstance(row, RowError) for name in row)
    if there:
        config.check_columns(source, list(there))
    yield from head
    yield from rows


def record_of(row: Mapping[str, Any], config: ImportConfig) -> BaseRecord:
    """The record that a row holds.

    Raises:
      ValueError: it holds none.
    """
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except (ValueError, RecursionError):  # half of a surrogate pair ("\ud800") is not text
        raise RowError("holds characters that are no text") from None
    columns = config.columns
    meta = {name: _plain(row.get(name)) for name in columns.meta}
    if config.form == "question":
        question = _question(row, config, meta)
        if config.record == "Question":
            return question
        return question_to_rl(question) if config.record == "RlPrompt" else question_to_sft(question)
    turns = _turns(row, config)
    if config.record == "RlPrompt":
        answer = _answer(row, config, {})
        return RlPrompt(turns, answer, _kind(row, config, answer), meta=meta)
    return SftExample(turns, meta=meta) if config.record == "SftExample" else Dialogue(turns, meta=meta)


def _question(row: Mapping[str, Any], config: ImportConfig, meta: dict[str, Any]) -> Question:
    options = _options(row, config)
    answer = _answer(row, config, options)
    if beyond := [letter for letter in answer if letter not in options]:
        raise RowError("the answer names no option", f"{beyond[0]}, options {''.join(options)}")
    rationale = None
    if (column := config.columns.rationale) is not None:
        rationale = _text(row, column) if config.record == "SftExample" else _optional_text(row, column)
    stem = _text(row, config.columns.question)
    return Question(stem, options, answer, _kind(row, config, answer), rationale, meta=meta)


def _options(row: Mapping[str, Any], config: ImportConfig) -> dict[str, str]:
    """Texts by letter. Empty ones at the end are none: tables have as many columns as their longest question."""
    columns = config.columns.options
    value = row.get(columns) if isinstance(columns, str) else [row.get(column) for column in columns or ()]
    if isinstance(value, str):
        value = _json(value, columns)
    if isinstance(value, Mapping):
        letters = sorted(
            name for name, text in value.items() if _is_filled(text) or isinstance(text, bool | list | dict)
        )
        if letters != list(_LETTERS[: len(letters)]):
            raise RowError("options are not lettered A, B, …", ", ".join(map(str, letters)))
        value = [value[letter] for letter in letters]
    if not isinstance(value, list):
        raise RowError("options are no list and no mapping of letters", repr(value)[:80])
    texts = list(value)
    while texts and not _is_filled(texts[-1]):
        texts.pop()
    if not 2 <= len(texts) <= len(_LETTERS):
        raise RowError("fewer than two options, or more than 26", str(len(texts)))
    if any(isinstance(text, _NO_TEXT) for text in texts):
        raise RowError("an option is neither text nor a number")
    if not all(map(_is_filled, texts)):
        raise RowError("an option is empty")
    return {letter: str(text).strip() for letter, text in zip(_LETTERS, texts, strict=False)}


def _answer(row: Mapping[str, Any], config: ImportConfig, options: Mapping[str, str]) -> str:
    """Letters in order, as the column's value says them in the way of `answer_is`."""
    column = config.columns.answer
    value = row.get(column or "")
    if not _is_filled(value) and not isinstance(value, list):
        raise RowError(f"no text in {column!r}")
    parts: list[Any] = value if isinstance(value, list) else [value]
    letters: set[str] = set()
    for part in parts:
        if not _is_filled(part):
            raise RowError("a part of the answer is empty, or neither text nor a number", repr(part)[:80])
        if config.answer_is == "text":
            named = [letter for letter, text in options.items() if text == str(part).strip()]
            if len(named) != 1:
                raise RowError("the answer is not the text of one option", repr(part)[:80])
            letters |= {*named}
        elif config.answer_is == "index":
            if not re.fullmatch("[0-9]{1,2}", str(part)) or int(part) >= len(_LETTERS):
                raise RowError("the answer is no index of an option", repr(part)[:80])
            letters.add(_LETTERS[int(part)])
        else:
            written = unicodedata.normalize("NFKC", str(part)).strip()
            words = re.split(r"[\s,、;/|]+", written)
            if not all(re.fullmatch("[A-Z]+|[a-z]", word) for word in words):
                raise RowError("the answer is no option letters", repr(part)[:80])
            letters |= {*"".join(words).upper()}
    if not letters:
        raise RowError(f"no text in {column!r}")
    return "".join(sorted(letters))


def _kind(row: Mapping[str, Any], config: ImportConfig, answer: str) -> Kind:
    column = config.columns.kind
    if column is None:
        return "multi" if len(answer) > 1 else "single"
    kind = config.kinds.get(_text(row, column))
    if kind is None:
        raise RowError(f"a kind that `kinds` does not name in {column!r}", repr(row[column])[:80])
    if kind == "single" and len(answer) > 1:
        raise RowError("several letters answer a question of one answer", answer)
    return kind


def _turns(row: Mapping[str, Any], config: ImportConfig) -> tuple[Message, ...]:
    columns, turns = config.columns, config.turns
    if config.form == "user":
        system = _optional_text(row, columns.system)
        first = [] if system is None else [Message("system", system)]
        asked = [*first, Message("user", _text(row, columns.user))]
        if columns.assistant is None:
            return tuple(asked)
        reply = _text(row, columns.assistant)
        if columns.rationale is not None:
            reply = with_thought(_text(row, columns.rationale), reply)
        return (*asked, Message("assistant", reply))
    value = row.get(columns.messages or "")
    if isinstance(value, str):
        value = _json(value, columns.messages)
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise RowError(f"no list of turns in {columns.messages!r}", repr(value)[:80])
    messages = []
    for turn in value:
        named = turn.get(turns.role)
        role = turns.roles.get(named) if isinstance(named, str) else None
        if role is None:
            raise RowError("a role that `turns.roles` does not name", repr(named)[:80])
        messages.append(Message(role, _text(turn, turns.content)))
    return tuple(messages)


def _text(row: Mapping[str, Any], column: str | None) -> str:
    value = row.get(column or "")
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"no text in {column!r}", repr(value)[:80] if _is_filled(value) else "")
    return value.strip()


def _optional_text(row: Mapping[str, Any], column: str | None) -> str | None:
    """None where the field is empty; what is there must be text."""
    value = row.get(column or "")
    empty = value is None or value != value or (isinstance(value, str) and not value.strip())
    return None if empty else _text(row, column)


def _is_filled(value: Any) -> bool:
    """Return whether a field holds something: text, or a number but NaN, which tables leave where nothing is."""
    if isinstance(value, bool):
        return False
    return value == value if isinstance(value, int | float) else isinstance(value, str) and bool(value.strip())


def _json(text: str, column: Any) -> Any:
    """Lists in tables are often JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowError(f"no list and no JSON of one in {column!r}", repr(text)[:80]) from None


def _plain(value: Any) -> Any:
    """What JSON can hold of a value; dates become text, NaN becomes null."""
    return json.loads(json.dumps(value, ensure_ascii=False, default=str), parse_constant=lambda _: None)
