"""Records from rows of any shape, by a config that says which column is what (`psyche data import --config`)."""

import difflib
import itertools
import json
import re
import string
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

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
from psyche_jax.data.text import lettered_options
from psyche_jax.errors import RowError, UsageError
from psyche_jax.rewards.reference import with_thought
from psyche_jax.storage.files import named_once

Form: TypeAlias = Literal["question", "user", "messages"]
FORMS: tuple[Form, ...] = get_args(Form)

HEAD = 1000  # rows in which a column must appear
_LETTERS = string.ascii_uppercase
_NO_TEXT = (bool, list, Mapping)
_WORDS: Mapping[Kind, str] = {
    "single": "single 单选 单选题 单项选择 单项选择题 判断 判断题 是非题 A1 A2 true/false",
    "multi": "multi multiple 多选 多选题 多项选择 多项选择题 不定项 不定项选择 不定项选择题 X型题",
}
KINDS = {word: kind for kind, words in _WORDS.items() for word in words.split()}
_BEFORE_ANSWER = re.compile(r"^(?:(?:正确|标准|参考)?答案|answer|应选|选)?\s*[是为]?\s*:?\s*", re.IGNORECASE)
_BETWEEN_LETTERS = re.compile(r"(?:[\s,、;/|.。()\[\]【】&+和与及]|以及|\band\b)+", re.IGNORECASE)
_TICKS = {  # of a statement: whether it is right
    True: "正确 对 是 √ ✓ ✔ 真 true t yes y right",
    False: "错误 错 否 × ✗ ✘ 假 false f no n wrong 不正确 不对",
}
_TRUTH = {word: right for right, words in _TICKS.items() for word in words.split()}


@dataclass(frozen=True)
class ColumnsSection(Section):
    """The column that holds each part of a record. Exactly one of question, user and messages must be set."""

    question: str | None = None  # the stem of an exam question
    options: str | tuple[str, ...] | None = None  # a column for each, or one with a list, {letter: text} or "A. … B. …"
    answer: str | None = None  # the key; `answer_is` says how it is written
    case: str | None = None  # the case that several questions share; put before the stem
    kind: str | None = None  # single or multi, in the words of `kinds`; if empty or not given, by the number of letters
    rationale: str | None = None  # the reasoning
    user: str | tuple[str, ...] | None = None  # in one-turn dialogues: the request; several columns are joined by lines
    assistant: str | None = None  # in one-turn dialogues: the reply
    system: str | None = None  # the row's own system prompt
    messages: str | None = None  # dialogues as a list of turns; `turns` says what they look like
    meta: tuple[str, ...] = ()  # columns kept unchanged with the record


@dataclass(frozen=True)
class TurnsSection(Section):
    """What one turn of `columns.messages` looks like."""

    role: str = "role"  # the key of the speaker; ShareGPT: from
    content: str = "content"  # the key of the text; ShareGPT: value
    # The column's names for the three roles.
    roles: dict[str, Literal["system", "user", "assistant"]] = field(
        default_factory=lambda: {"system": "system", "user": "user", "assistant": "assistant"}
    )


USES: dict[tuple[str, Form], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("Question", "question"): (("options", "answer"), ("kind", "rationale", "case")),
    ("RlPrompt", "question"): (("options", "answer"), ("kind", "rationale", "case")),  # without reading the rationale
    ("RlPrompt", "user"): (("answer",), ("kind", "system")),
    ("RlPrompt", "messages"): (("answer",), ("kind",)),
    ("SftExample", "question"): (("options", "answer", "rationale"), ("kind", "case")),
    ("SftExample", "user"): (("assistant",), ("system", "rationale")),
    ("SftExample", "messages"): ((), ()),
    ("Dialogue", "user"): (("assistant",), ("system", "rationale")),
    ("Dialogue", "messages"): ((), ()),
}


@dataclass(frozen=True)
class ImportConfig(Section):
    """How the rows of a source become records."""

    columns: ColumnsSection
    record: Literal["Question", "Dialogue", "SftExample", "RlPrompt"] | None = None  # null: all that the rows yield
    turns: TurnsSection = field(default_factory=TurnsSection)
    answer_is: Literal["letters", "index", "number", "text"] = "letters"  # "A,C"; 0 for A; 1 for A; the option's text
    kinds: dict[str, Kind] = field(default_factory=KINDS.copy)  # the words used in `columns.kind`
    reading: ReadingSection = field(default_factory=ReadingSection)

    def __post_init__(self) -> None:
        named = [form for form in FORMS if getattr(self.columns, form) is not None]
        if len(named) != 1:
            found = " and ".join(named) or "none"
            raise ValueError(f"columns must name one of question, user and messages, not {found}")
        if (self.base, self.form) not in USES:
            raise ValueError(f"record: {self.record} cannot be made of columns.{self.form}")
        must, may = USES[self.base, self.form]
        given = dict(self.named_columns())
        for name, column in given.items():
            if name not in (self.form, "meta", *must, *may):
                raise ValueError(f"columns.{name}: {column!r} is not part of a {self.base} with columns.{self.form}")
        if absent := [name for name in must if name not in given]:
            raise ValueError(f"columns.{absent[0]} must be set for {self.base} with columns.{self.form}")
        if self.answer_is == "text" and self.columns.options is None:
            raise ValueError("answer_is: text needs columns.options to find it in")

    @property
    def base(self) -> Literal["Question", "Dialogue", "SftExample", "RlPrompt"]:
        """The record that a row becomes, from which, if `record` is null, the others are made."""
        if self.record is not None or self.form == "question":
            return self.record or "Question"
        return "Dialogue" if self.columns.answer is None else "RlPrompt"

    @property
    def form(self) -> Form:
        """Which of the three shapes the rows have."""
        return next(form for form in FORMS if getattr(self.columns, form) is not None)

    def named_columns(self) -> Iterator[tuple[str, str]]:
        """The parts that are named, with their columns."""
        for entry in fields(self.columns):
            value = getattr(self.columns, entry.name)
            for column in () if value is None else (value,) if isinstance(value, str) else value:
                yield entry.name, column

    def check_columns(self, source: str, there: list[str]) -> None:
        """Raises UsageError for a column that the source does not have, with the nearest one."""
        for name, column in self.named_columns():
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
    records = (record for _, record in records_of(source, config, notes))
    origin = {"source": source, "import": config_to_dict(config)}
    return write_import(target, records, origin, notes, lambda: no_record(source, config, notes))


def no_record(source: str, config: ImportConfig, notes: Notes) -> str:
    """What is said where no row gives one."""
    return f"{source}: no row yields a {config.base}{first_of(notes.set_aside) or ': it holds no rows'}"


def records_of(source: str, config: ImportConfig, notes: Notes) -> Iterator[tuple[str, BaseRecord]]:
    """The places and records of a source's rows, as they come; what is skipped goes into `notes`.

    Raises:
      UserError: the source cannot be read.
      UsageError: the config names a column that is in none of the first 1,000 rows.
    """
    seen: dict[str, tuple[str, Any]] = {}
    for where, row in _checked(source, config):
        try:
            if isinstance(row, RowError):
                raise row
            record = record_of(row, config)
            identity, key = record.id, getattr(record, "answer", None)
            earlier, its_key = seen.setdefault(identity, (where, key))
            if earlier != where:
                other = "" if key == its_key else " with a different answer"
                raise RowError(f"repeats an earlier row{other}", earlier)
        except ValueError as error:
            notes.leave_out(where, error)
            continue
        yield where, record


def _checked(source: str, config: ImportConfig) -> Iterator[Row]:
    rows = read_rows(source, config.reading)
    head = list(itertools.islice(rows, HEAD))
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
        raise RowError("holds characters that are not valid text") from None
    meta = {name: _plain(row.get(name)) for name in config.columns.meta}
    if config.form == "question":
        question = _question(row, config, meta)
        if config.base == "Question":
            return question
        return question_to_rl(question) if config.base == "RlPrompt" else question_to_sft(question)
    turns = _turns(row, config)
    if config.base == "RlPrompt":
        asked = next(turn.content for turn in reversed(turns) if turn.role == "user")
        options = dict(zip(_LETTERS, lettered_options(asked)[1], strict=False))
        answer = _answer(row, config, options)
        if options:
            _check_among(answer, options)
        return RlPrompt(turns, answer, _kind(row, config, answer), meta=meta)
    return SftExample(turns, meta=meta) if config.base == "SftExample" else Dialogue(turns, meta=meta)


def _question(row: Mapping[str, Any], config: ImportConfig, meta: dict[str, Any]) -> Question:
    columns = config.columns
    stem = _text(row, columns.question)
    _kind(row, config, "")  # an essay question is told as one, before it lacks options
    options = _options(row, config)
    if columns.options == columns.question:
        stem = lettered_options(stem)[0].strip()
    answer = _answer(row, config, options)
    _check_among(answer, options)
    rationale = None
    if columns.rationale is not None and config.base != "RlPrompt":
        read = _text if config.base == "SftExample" else _optional_text
        rationale = read(row, columns.rationale)
    if case := _optional_text(row, columns.case):
        stem, meta = f"{case}\n{stem}", {**meta, "case": case, "question": stem}
    return Question(stem, options, answer, _kind(row, config, answer), rationale, meta=meta)


def _options(row: Mapping[str, Any], config: ImportConfig) -> dict[str, str]:
    """Texts by letter. Empty ones at the end are none: tables have as many columns as their longest question.

    A statement to be ticked, without options, has those of which its answer is one.
    """
    columns = config.columns.options
    value = row.get(columns) if isinstance(columns, str) else [row.get(column) for column in columns or ()]
    if isinstance(value, str) and value.strip():
        value = [*lettered_options(value)[1]] or _json(value, columns)
    if isinstance(value, Mapping):
        letters = sorted(name for name, text in value.items() if _is_filled(text) or isinstance(text, _NO_TEXT))
        if letters != list(_LETTERS[: len(letters)]):
            raise RowError("options are not lettered A, B, …", ", ".join(map(str, letters)))
        value = [value[letter] for letter in letters]
    if not _is_filled(value) and not isinstance(value, list):
        value = []
    if not isinstance(value, list):
        raise RowError("options are neither a list nor a mapping of letters", repr(value)[:80])
    texts = list(value)
    while texts and not _is_filled(texts[-1]):
        texts.pop()
    if len(texts) == 1:  # of several columns some rows use the first alone, for all of their options
        texts = [*lettered_options(str(texts[0]))[1]] or texts
    if not texts and _truth(row.get(config.columns.answer or "")) is not None:
        chinese = re.search("[\u4e00-\u9fff]", str(row.get(config.columns.question or "")))
        return {"A": "正确", "B": "错误"} if chinese else {"A": "True", "B": "False"}
    if not 2 <= len(texts) <= len(_LETTERS):
        raise RowError("fewer than two options, or more than 26", str(len(texts)))
    if any(isinstance(text, _NO_TEXT) for text in texts):
        raise RowError("an option is neither text nor a number")
    if empty := [letter for letter, text in zip(_LETTERS, texts, strict=False) if not _is_filled(text)]:
        raise RowError(f"option {empty[0]} is empty and a later one is not")
    options = {letter: str(text).strip() for letter, text in zip(_LETTERS, texts, strict=False)}
    bare = {letter: re.sub(rf"^{letter}\s*[.．、:：)）]\s*(?=\S)", "", text) for letter, text in options.items()}
    return bare if all(bare[letter] != options[letter] for letter in options) else options  # `A. 甲` under A


def _answer(row: Mapping[str, Any], config: ImportConfig, options: Mapping[str, str]) -> str:
    """Letters in order, as the column's value says them in the way of `answer_is`."""
    column = config.columns.answer
    value = row.get(column or "")
    parts: list[Any] = value if isinstance(value, list) else [value]
    if not parts or (not isinstance(value, list | bool) and not _is_filled(value)):
        raise RowError(f"no text in {column!r}")
    letters: set[str] = set()
    for part in parts:
        if not _is_filled(part) and not isinstance(part, bool):
            raise RowError("a part of the answer is empty, or neither text nor a number", repr(part)[:80])
        if config.answer_is == "text":
            named = [letter for letter, text in options.items() if text == str(part).strip()]
            if len(named) != 1:
                raise RowError("the answer is not the text of one option", repr(part)[:80])
            letters |= {*named}
        elif config.answer_is in ("index", "number"):
            first = int(config.answer_is == "number")
            if not re.fullmatch("[0-9]{1,2}", str(part)) or not first <= int(part) < len(_LETTERS) + first:
                raise RowError(f"the answer is not the {config.answer_is} of an option", repr(part)[:80])
            letters.add(_LETTERS[int(part) - first])
        else:
            letters |= _letters(part, options)
    return "".join(sorted(letters))


def _check_among(answer: str, options: Mapping[str, str]) -> None:
    if beyond := [letter for letter in answer if letter not in options]:
        raise RowError(f"the answer is not {min(options)} to {max(options)}", beyond[0])


def _letters(part: Any, options: Mapping[str, str]) -> set[str]:
    """The letters of an answer as people write it: "AC", "A、C", "A和C", "（B）", "答案：B。", "B. 正强化", "√"."""
    written = _same_width(part)
    ticked = {_truth(text): letter for letter, text in options.items()}
    if (truth := _truth(part)) is not None and {True, False} <= {*ticked}:
        return {ticked[truth]}
    words = [word for word in _BETWEEN_LETTERS.split(_BEFORE_ANSWER.sub("", written)) if word]
    in_order = [word.upper() for word in words if list(word) == sorted({*word}) and {*word.upper()} <= {*options}]
    if not options and any(list(word) != sorted({*word}) for word in words):
        raise RowError("the answer is not letters in order", repr(part)[:80])  # "DNA" is none of options
    if words and all(re.fullmatch("[A-Z]+|[a-z]", word) or word.upper() in in_order for word in words):
        return {*"".join(words).upper()}
    named = [
        letter
        for letter, text in options.items()
        if re.fullmatch(rf"(?:{letter}\s*[.、:)]\s*)?{re.escape(_same_width(text))}", written)
    ]
    if len(named) != 1:
        raise RowError("the answer is neither letters of options nor the text of one", repr(part)[:80])
    return {*named}


def _same_width(text: Any) -> str:
    return unicodedata.normalize("NFKC", str(text)).strip()


def _truth(value: Any) -> bool | None:
    """Whether a tick or a word says that a statement is right; None if it says something else."""
    return _TRUTH.get(_same_width(value).casefold())


def _kind(row: Mapping[str, Any], config: ImportConfig, answer: str) -> Kind:
    column = config.columns.kind
    written = _optional_text(row, column)
    if written is None:
        return "multi" if len(answer) > 1 else "single"
    kind = config.kinds.get(written) or config.kinds.get(written.lower())
    if kind is None:
        raise RowError("the kind is neither single nor multiple choice", repr(written)[:80])
    if kind == "single" and len(answer) > 1:
        raise RowError("several letters answer a single-answer question", answer)
    return kind


def _turns(row: Mapping[str, Any], config: ImportConfig) -> tuple[Message, ...]:
    columns, turns = config.columns, config.turns
    if config.form == "user":
        system = _optional_text(row, columns.system)
        first = [] if system is None else [Message("system", system)]
        if isinstance(columns.user, tuple):
            text = "\n".join(filter(None, (_optional_text(row, column) for column in columns.user)))
        else:
            text = _text(row, columns.user)
        asked = [*first, Message("user", text)]
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
        others = [column for column, other in row.items() if other and isinstance(other, list)]
        detail = f"there is one in {others[0]!r}: import such rows apart" if others and not value else repr(value)[:80]
        raise RowError(f"no list of turns in {columns.messages!r}", detail)
    messages = []
    for turn in value:
        named = turn.get(turns.role)
        role = turns.roles.get(named) if isinstance(named, str) else None
        if role is None:
            raise RowError("a role that `turns.roles` does not name", repr(named)[:80])
        messages.append(Message(role, _as_text(_joined(turn.get(turns.content)), turns.content)))
    return tuple(messages)


def _joined(content: Any) -> Any:
    """What a turn says; where that is a list of parts, as OpenAI writes it, and all are text, these together."""
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    said = [text for text in texts if isinstance(text, str)]
    return "\n".join(said) if parts and len(said) == len(parts) else content


def _text(row: Mapping[str, Any], column: str | None) -> str:
    return _as_text(row.get(column or ""), column)


def _as_text(value: Any, column: str | None) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"no text in {column!r}", repr(value)[:80] if _is_filled(value) else "")
    return value.strip()


def _optional_text(row: Mapping[str, Any], column: str | None) -> str | None:
    """None where the field is empty; what is there must be text."""
    value = row.get(column or "")
    empty = value is None or value != value or (isinstance(value, str) and not value.strip())
    return None if empty else _text(row, column)


def _is_filled(value: Any) -> bool:
    """Return whether a field holds something: text, or a number but NaN, which tables leave where nothing is, and
    infinity, which they leave where a number was too large."""
    if isinstance(value, bool):
        return False
    return value - value == 0 if isinstance(value, int | float) else isinstance(value, str) and bool(value.strip())


def _json(text: str, column: Any) -> Any:
    """Lists in tables are often JSON."""
    try:
        return json.loads(text, object_pairs_hook=named_once)
    except (ValueError, RecursionError):
        raise RowError(f"neither a list nor JSON of one in {column!r}", repr(text)[:80]) from None


def _plain(value: Any) -> Any:
    """What JSON can hold of a value; dates become text, NaN becomes null."""
    return json.loads(json.dumps(value, ensure_ascii=False, default=str), parse_constant=lambda _: None)
