"""Passages, questions, dialogues, SFT examples and RL prompts, read from JSONL with the bad ones named and skipped.

A record checks itself: `__post_init__` holds what types cannot say, for records that code makes too.
"""

import hashlib
import json
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

import pydantic

from psyche_jax.errors import NotTextError, RowError, UserError
from psyche_jax.rewards.reference import with_thought
from psyche_jax.storage.files import write_text

Kind: TypeAlias = Literal["single", "multi"]
Record = TypeVar("Record", bound="BaseRecord")
Class = TypeVar("Class")


class Strict:
    """Base of what is read from JSON: unknown keys are errors."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Message(Strict):
    """One turn: who speaks, and what."""

    role: Literal["system", "user", "assistant"]
    content: str

    def __post_init__(self) -> None:
        if not self.content.strip():
            raise ValueError(f"a message of the {self.role} is empty")


class BaseRecord(Strict):
    """Base of all records. The `id`, if none is given, is a hash of the content."""

    source: str
    meta: dict[str, Any]
    id: str


@dataclass(frozen=True)
class Passage(BaseRecord):
    """A text that questions are made from."""

    text: str
    source: str = ""
    licence: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    id: str = ""

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("the text is empty")
        _set_id(self, self.text)


@dataclass(frozen=True)
class Question(BaseRecord):
    """An exam question. `answer` holds its letters in order ("ACD"); `id` is a hash of stem and options."""

    stem: str
    options: dict[str, str]
    answer: str
    kind: Kind
    rationale: str | None = None
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    id: str = ""

    def __post_init__(self) -> None:
        if not self.stem.strip():
            raise ValueError("the stem is empty")
        letters = "".join(self.options)
        if len(letters) < 2 or list(self.options) != list(string.ascii_uppercase[: len(self.options)]):
            raise ValueError(f"options must be lettered A, B, … without a gap, not {', '.join(self.options)}")
        if empty := [letter for letter, text in self.options.items() if not text.strip()]:
            raise ValueError(f"option {empty[0]} is empty")
        _check_answer(self.answer, self.kind, letters)
        _set_id(self, self.stem, self.options)


@dataclass(frozen=True)
class Dialogue(BaseRecord):
    """A conversation between a user and a supportive assistant."""

    turns: tuple[Message, ...]
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    id: str = ""

    def __post_init__(self) -> None:
        _check_turns(self.turns, last="assistant")
        _set_id(self, [(turn.role, turn.content) for turn in self.turns])


@dataclass(frozen=True)
class SftExample(BaseRecord):
    """What SFT reads: bare turns, ending with the assistant's."""

    messages: tuple[Message, ...]
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    id: str = ""

    def __post_init__(self) -> None:
        _check_turns(self.messages, last="assistant")
        _set_id(self, [(message.role, message.content) for message in self.messages])


@dataclass(frozen=True)
class RlPrompt(BaseRecord):
    """What GRPO reads: bare turns, ending with the user's, and the letters that are right."""

    messages: tuple[Message, ...]
    answer: str
    kind: Kind
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    id: str = ""

    def __post_init__(self) -> None:
        _check_turns(self.messages, last="user")
        _check_answer(self.answer, self.kind, string.ascii_uppercase)
        _set_id(self, [(message.role, message.content) for message in self.messages])


@dataclass(frozen=True)
class Records(Generic[Record]):
    """The good records of a file and a line for each bad one: file, line number, what is wrong.

    `faults`: in public data how often each was seen, mended or not.
    """

    good: tuple[Record, ...]
    set_aside: tuple[str, ...]
    faults: Counter[str] = field(default_factory=Counter)


def collected(kind: type[Record], location: str, values: Iterable[tuple[str, Any]]) -> Records[Record]:
    """All records of a location, from (place, value) pairs.

    Raises:
      UserError: it holds no good record, or bytes that are no text.
    """
    good: list[Record] = []
    set_aside = []
    for where, found in checked(kind, values):
        if isinstance(found, NotTextError):
            how = "; import a table first: psyche data import" if location.endswith((".csv", ".tsv", ".xlsx")) else ""
            raise UserError(f"{location}: is not UTF-8 text (first at {where}){how}")
        if isinstance(found, ValueError):
            set_aside.append(f"{where}: {fault_of(found)}")
        else:
            good.append(found)
    if not good:
        raise UserError(f"{location}: holds no usable record of {kind.__name__}{first_of(set_aside)}")
    return Records(tuple(good), tuple(set_aside))


def first_of(faults: Sequence[str]) -> str:
    """The end of a message on a source without a good row."""
    if not faults:
        return ""
    return f"; the first of {len(faults)} faults: {faults[0]}" if len(faults) > 1 else f"; {faults[0]}"


def checked(
    kind: type[Record], values: Iterable[tuple[str, Any]]
) -> Iterator[tuple[str, Record] | tuple[str, ValueError]]:
    """The records of (place, value) pairs, as `read_jsonl` gives them; a `ValueError` where a value is not a record."""
    for where, value in values:
        try:
            record = from_json(kind, value)
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair ("\ud800") is not text
            yield where, RowError("not JSON", str(error))
        except ValueError as error:
            yield where, error
        else:
            yield where, record


def write_records(path: Path, records: Iterable[BaseRecord]) -> None:
    """Write records as JSONL, in one step."""
    lines = [json.dumps(record_to_json(record), ensure_ascii=False) for record in records]
    write_text(path, "".join(f"{line}\n" for line in lines))


def record_to_json(record: Any) -> dict[str, Any]:
    """The plain values of a record, or of another dataclass that pydantic knows."""
    return _adapter(type(record)).dump_python(record, mode="json")


def from_json(kind: type[Class], value: Any) -> Class:
    """What a JSON value holds, as a dataclass whose annotations pydantic checks.

    Raises:
      ValueError: it is something else, or a `RowError` already; `fault_of` says why.
    """
    if isinstance(value, RowError):
        raise value
    return _adapter(kind).validate_python(value)


_adapter: Callable[[Any], pydantic.TypeAdapter[Any]] = cache(pydantic.TypeAdapter)  # to make one takes a millisecond


def fault_of(error: Exception) -> str:
    """What is wrong with a record, in one line."""
    if not isinstance(error, pydantic.ValidationError):
        return str(error)
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "dataclass_type":  # pydantic would name a class of ours
        said = "must be a JSON object"
    return " ".join(f"{name + ': ' if name else ''}{said}".split())


def turns_of(record: BaseRecord) -> tuple[Message, ...]:
    """The turns of a conversation of any kind."""
    return record.turns if isinstance(record, Dialogue) else record.messages  # type: ignore[attr-defined]


def question_text(question: Question) -> str:
    """The question as a user asks it: kind, stem and lettered options."""
    kind = "单项选择题" if question.kind == "single" else "多项选择题"
    options = "\n".join(f"{letter}. {text}" for letter, text in question.options.items())
    return f"{kind}：{question.stem}\n{options}"


def question_to_sft(question: Question) -> SftExample:
    """A question with its rationale as reasoning and its letters as answer, in the response format.

    Raises:
      UserError: the question has no rationale.
    """
    if not question.rationale:
        raise UserError(f"question {question.id}: has no rationale to train on")
    response = with_thought(question.rationale, f"答案：{question.answer}")
    turns = (Message("user", question_text(question)), Message("assistant", response))
    return SftExample(turns, question.source, question.meta)


def question_to_rl(question: Question) -> RlPrompt:
    """A question to be answered, with its key."""
    turns = (Message("user", question_text(question)),)
    return RlPrompt(turns, question.answer, question.kind, question.source, question.meta)


def answer_mask(answer: str) -> int:
    """Letters as a bit mask, bit 0 for A: how programs hold a key."""
    return sum(1 << string.ascii_uppercase.index(letter) for letter in answer)


def _check_answer(answer: str, kind: str, letters: str) -> None:
    if not answer:
        raise ValueError("the answer is empty")
    if outside := [letter for letter in answer if letter not in letters]:
        raise ValueError(f"the answer {answer!r} names {outside[0]!r}, which is not among the options {letters}")
    if list(answer) != sorted(set(answer)):
        raise ValueError(f"the answer {answer!r} must name each letter once, in order")
    if kind == "single" and len(answer) != 1:
        raise ValueError(f"the question has one answer, but its key {answer!r} names {len(answer)}")


def _check_turns(turns: Sequence[Message], last: str) -> None:
    rest = turns[1:] if turns and turns[0].role == "system" else turns
    expected = ["user", "assistant"] * len(rest)
    if not rest or [turn.role for turn in rest] != expected[: len(rest)]:
        raise ValueError("turns must go user, assistant, user, … (a system turn may stand before them)")
    if rest[-1].role != last:
        raise ValueError(f"the last turn must be the {last}'s")


def _set_id(record: BaseRecord, *content: Any) -> None:
    """Fill in an absent id: a hash of the content, so that the same content has the same id everywhere."""
    if not record.id:
        digest = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]
        object.__setattr__(record, "id", digest)
