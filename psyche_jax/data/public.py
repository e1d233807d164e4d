"""Public psychology data: CPsyExam, PCEB and SMILE, as published, read into records.

Each record comes out clean or is skipped, and every fault is counted: these files hold merged options, keys that
point nowhere, questions about cases that are not there, and duplicates with conflicting keys. Each is read from a file
(an array, or a value a line), a folder of files, or a zip of one.
"""

import itertools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import pydantic

from psyche_jax.data.imports import Imported, Notes, write_import
from psyche_jax.data.json_stream import PublishedValue, published_values
from psyche_jax.data.records import BaseRecord, Dialogue, Kind, Message, Question, Records, first_of, from_json
from psyche_jax.data.text import clean_text, comparable, without_prefix
from psyche_jax.errors import RowError
from psyche_jax.storage.files import NO_TEXT

_REFERS_TO_CASE = re.compile("案例|该求助者|该咨询师|上题|本案")
_CASE_LENGTH = 150  # characters: a stem as long brings its case with it
_TOLD = 16  # comparable characters before the last reference: so does a shorter one, unless it is cut out of a talk
_INTRODUCES = re.compile(r"\d\s*岁|[男女](?:性|生|孩|，|,)|某")  # or this much less, where it introduces someone
_CUT_OUT = re.compile(r"^\W*案例[^：:]{0,8}[：:]\s*(?:心理咨询师|咨询师|求助者)[：:]|上一段|上题")
_MARKER = re.compile(r"([A-Z])\s*[.．、]\s*(?=\S)")
_PART_OF_NAME = re.compile(
    r"(?:[·(（]|(?<![A-Za-z])[A-Za-z][.．]?|[A-Za-z])$"
)  # before an initial: F．王某, R.E.弗洛姆
_MARKS = re.compile(r"（\s*[\d.]+\s*分\s*）")
_ROLES: Mapping[str, Literal["user", "assistant"]] = {"client": "user", "counselor": "assistant"}
_NO_KEY = "empty answer"
_PARTS_OF_CPSYEXAM = {"CA": "analyse", "KG": "knowledge"}  # as its files' names begin
_LAST_USUAL_OPTION = "D"


@dataclass(frozen=True)
class Essay:
    """An essay question of PCEB with its reference answer, whose marks are taken out."""

    case: str
    question: str
    reference: str


def _real_text(text: str) -> str:
    if NO_TEXT.search(text):
        raise ValueError("is not UTF-8 text")
    return text


Text: TypeAlias = Annotated[str, pydantic.AfterValidator(_real_text)]


@dataclass(frozen=True)
class _Row:
    """A question as CPsyExam and PCEB publish it. Other keys are passed over, here and below."""

    question: Text
    options: dict[str, Text | None]
    answer: Text | None = None
    question_type: Text = ""
    kind: Text | None = None
    explanation: Text | None = None  # in CPsyExam
    analysis: Text | None = None  # in PCEB


@dataclass(frozen=True)
class _Case:
    """A case of PCEB with the questions on it."""

    general_info: Text
    case_introduction: Text
    questions_and_answers: tuple[Any, ...]

    @property
    def text(self) -> str:
        return clean_text(f"{self.general_info}\n{self.case_introduction}")

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError("general_info and case_introduction are empty")


@dataclass(frozen=True)
class _Pair:
    """An essay question of PCEB."""

    question: Text
    answer: Text

    def __post_init__(self) -> None:
        if not self.question.strip() or not self.answer.strip():
            raise ValueError("question or answer is empty")


@dataclass(frozen=True)
class _Turn:
    role: Literal["client", "counselor"]
    content: Text


@dataclass(frozen=True)
class _Talk:
    """A dialogue of SMILE."""

    turns: tuple[_Turn, ...]
    id: pydantic.StrictInt | Text | None = None


@dataclass(frozen=True)
class _Item:
    """What both publish of a choice question."""

    stem: str
    options: Mapping[str, str]
    answer: str
    kind: str
    rationale: str | None = None
    case: str = ""
    part: str = ""


def cpsyexam_questions(place: Path, notes: Notes) -> Iterator[Question]:
    """The questions of CPsyExam, whose files are arrays by subject; what is wrong goes into `notes`.

    `meta["part"]` is what a question tests: `knowledge` or `analyse`.
    """
    yield from _questions(published_values(place), _cpsyexam_item, "CPsyExam", notes)


def pceb_questions(place: Path, notes: Notes) -> Iterator[Question]:
    """The choice questions of PCEB: `cases/mix`, `moral` and `theory`, of any exam; a question on a case brings it."""
    yield from _questions(_pceb_values(place), _pceb_item, "PCEB", notes)


def pceb_essays(place: Path, notes: Notes) -> Iterator[Essay]:
    """The essay questions of PCEB; what is no essay goes into `notes`."""
    for found in published_values(place):
        if _folder_of(found.path) != "essay":
            continue
        try:
            case = from_json(_Case, found.value)
        except ValueError as error:
            notes.leave_out(found.where, error, "no essay")
            continue
        for number, pair in enumerate(case.questions_and_answers, start=1):
            try:
                essay = from_json(_Pair, pair)
            except ValueError as error:
                notes.leave_out(f"{found.where}.{number}", error, "no essay")
                continue
            notes.faults["reference embeds marks"] += bool(_MARKS.search(essay.answer))
            asked = without_prefix(clean_text(_MARKS.sub("", essay.question)))
            yield Essay(case.text, asked, clean_text(_MARKS.sub("", essay.answer)))


def smile_dialogues(place: Path, notes: Notes) -> Iterator[Dialogue]:
    """Dialogues of `client` and `counselor`: each a list of turns (in SMILE a file of its own) or one under `turns`.

    Turns of one speaker in a row become one; what comes before the client's first turn, or after the counsellor's
    last, is left out. The dialogues are streamed, and what is wrong goes into `notes`.
    """
    for where, row in _dialogues(place):
        try:
            talk = from_json(_Talk, row)
            turns: list[Message] = []
            for turn in talk.turns:
                role, content = _ROLES[turn.role], clean_text(turn.content)
                if turns and turns[-1].role == role:
                    notes.faults["turns in a row"] += 1
                    turns[-1] = Message(role, f"{turns[-1].content}\n{content}")
                else:
                    turns.append(Message(role, content))
            if turns and turns[0].role == "assistant":
                notes.faults["the counsellor begins"] += 1
                turns = turns[1:]
            if turns and turns[-1].role == "user":
                notes.faults["the client ends"] += 1
                turns = turns[:-1]
            yield Dialogue(tuple(turns), "SMILE", {} if talk.id is None else {"id": talk.id})
        except ValueError as error:
            notes.leave_out(where, error, "no dialogue")


READERS: Mapping[str, Callable[[Path, Notes], Iterator[BaseRecord]]] = {
    "cpsyexam": cpsyexam_questions,
    "pceb": pceb_questions,
    "smile": smile_dialogues,
}


def load_public(name: str, place: Path) -> Records[Any]:
    """All records of public data (one of `READERS`), without writing them."""
    notes = Notes()
    good = tuple(READERS[name](place, notes))
    return Records(good, tuple(notes.set_aside), +notes.faults)


load_cpsyexam, load_pceb, load_smile = (partial(load_public, name) for name in READERS)


def import_public(name: str, place: Path, target: str) -> Imported:
    """Write the records of public data as a new data set.

    Args:
      name: one of `READERS`.
      place: a file, a folder or a zip.
      target: a new local folder or gs://bucket/prefix.

    Raises:
      NoRecordsError: nothing usable is there.
      UserError: the data cannot be read, or the target cannot be written.
    """
    notes = Notes()
    records = READERS[name](place, notes)
    return write_import(target, records, {"source": str(place)}, notes, lambda: _none_usable(name, place, notes))


def _none_usable(name: str, place: Path, notes: Notes) -> str:
    without_key = notes.faults[_NO_KEY]
    if without_key and without_key == len(notes.set_aside):
        why = f"none of its {without_key} questions has a key (as in CPsyExam's test split): there is nothing to import"
        return f"{place}: {why}"
    return f"{place}: holds nothing of {name}{first_of(notes.set_aside)}"


def _dialogues(place: Path) -> Iterator[tuple[str, Any]]:
    """Where, and a row with `turns`: what an array of turns is, and each item of any other one."""
    for whole, values in itertools.groupby(published_values(place), lambda found: found.whole):
        head = list(itertools.islice(values, 2))
        if any(isinstance(found.value, Mapping) and "role" in found.value for found in head):
            turns = [found.value for found in [*head, *values]]
            broken = next((turn for turn in turns if isinstance(turn, RowError)), None)
            yield whole, broken or {"turns": turns}
            continue
        for found in itertools.chain(head, values):
            yield found.where, {"turns": found.value} if isinstance(found.value, list) else found.value


def _cpsyexam_item(found: PublishedValue) -> _Item:
    value = found.value
    if isinstance(value, Mapping) and "options" not in value:  # as columns, as the hub shows them
        value = {**value, "options": {letter: value[letter] for letter in string.ascii_uppercase if letter in value}}
    row = from_json(_Row, value)
    return _Item(
        clean_text(row.question),
        _options(row),
        row.answer or "",
        "multi" if re.search("multi|多", row.question_type or found.path.stem) else "single",
        clean_text(row.explanation or "") or None,
        part=row.kind or _PARTS_OF_CPSYEXAM.get(found.path.name.partition("-")[0], ""),
    )


def _questions(
    values: Iterable[PublishedValue], make: Callable[[PublishedValue], _Item], source: str, notes: Notes
) -> Iterator[Question]:
    groups: dict[Any, list[tuple[str, Question]]] = {}
    seen: Counter[Any] = Counter()
    for found in values:
        # What is not of the format at all, and what is wrong with a question as published.
        try:
            item = make(found)
            seen[_content(item)] += 1
        except ValueError as error:
            notes.leave_out(found.where, error, "not of this format")
            continue
        letters = re.sub(r"[,，\s]", "", unicodedata.normalize("NFKC", item.answer)).upper()
        faults = list(_faults(item, letters))
        notes.faults.update(faults)
        if fatal := [fault for fault in faults if fault not in _MENDED]:
            notes.set_aside.append(f"{found.where}: {fatal[0]}")
            continue

        # The rest is mended: the key decides the kind, and the case comes before the question on it.
        kind: Kind = "multi" if item.kind == "multi" or len(letters) > 1 else "single"
        key = "".join(sorted(set(letters)))
        stem = f"{item.case}\n{item.stem}" if item.case else item.stem
        meta = {"case": item.case, "question": item.stem} if item.case else {}
        meta |= {"part": item.part} if item.part else {}
        try:
            question = Question(stem, dict(item.options), key, kind, item.rationale, source, meta)
        except ValueError as error:
            notes.leave_out(found.where, error, "no question")
            continue
        groups.setdefault((_content(item), comparable(item.case)), []).append((found.where, question))

    # Of questions that ask the same the first is kept, and none where their keys differ.
    notes.faults["duplicate"] += sum(count - 1 for count in seen.values())
    for group in groups.values():
        keys = {frozenset(comparable(question.options[letter]) for letter in question.answer) for _, question in group}
        if len(keys) > 1:
            notes.faults["duplicates with conflicting keys"] += 1
            notes.set_aside += [f"{where}: duplicates with conflicting keys" for where, _ in group]
            continue
        notes.set_aside += [f"{where}: duplicate of {group[0][0]}" for where, _ in group[1:]]
        yield group[0][1]


_MENDED = ("separators in the answer", "multiple-answer question with one letter", "kind contradicts the key")


def _faults(item: _Item, letters: str) -> Iterator[str]:
    """Everything that is wrong with a question as published; what is in `_MENDED` does not make it skipped."""
    if not item.answer.strip():
        yield _NO_KEY
    else:
        if letters != item.answer:
            yield "separators in the answer"
        if not re.fullmatch("[A-Z]+", letters):
            yield "answer holds more than letters"
        else:
            if item.kind == "multi" and len(letters) == 1:
                yield "multiple-answer question with one letter"
            if item.kind == "single" and len(letters) > 1:
                yield "kind contradicts the key"
            if any(letter not in item.options for letter in letters):
                yield "key points to no option"
    if len(item.options) < 2:
        yield "options are missing"
    if any(_holds_next(letter, item.options) for letter in item.options):
        yield "options are merged"
    if not item.case and len(item.stem) < _CASE_LENGTH and _lacks_case(item.stem):
        yield "its case is missing"


def _lacks_case(stem: str) -> bool:
    """Return whether a stem refers to a case and does not tell one before it does."""
    references = list(_REFERS_TO_CASE.finditer(stem))
    if not references:
        return False
    told = stem[: references[-1].start()]
    enough = _TOLD // 2 if _INTRODUCES.search(told) else _TOLD
    return _CUT_OUT.search(stem) is not None or len(comparable(told)) < enough


def _holds_next(letter: str, options: Mapping[str, str]) -> bool:
    """Return whether an option continues with the next one, which has no text of its own: `丙 D.丁`."""
    following = chr(ord(letter) + 1)
    if following in options:
        return False
    markers = (match for match in _MARKER.finditer(options[letter]) if match[1] == following)
    before = (options[letter][: match.start()].rstrip() for match in markers)
    return any(text and not _PART_OF_NAME.search(text) for text in before)


def _content(item: _Item) -> tuple[str, tuple[str, ...]]:
    """What makes two questions the same: stem and options, in whatever order."""
    return comparable(item.stem), tuple(sorted(filter(None, map(comparable, item.options.values()))))


def _pceb_values(place: Path) -> Iterator[PublishedValue]:
    """PCEB's choice questions; each `value` is a question and, if it is on a case, that case."""
    for found in published_values(place):
        if _folder_of(found.path) == "essay":
            continue
        if not isinstance(found.value, Mapping) or "questions_and_answers" not in found.value:
            yield replace(found, value=(found.value, None))
            continue
        pairs = found.value["questions_and_answers"]
        if not isinstance(pairs, list) or not pairs:
            fault = RowError("not of this format", "questions_and_answers is empty, or not a list")
            yield replace(found, value=(fault, None))
            continue
        for inner, question in enumerate(pairs, start=1):
            yield replace(found, where=f"{found.where}.{inner}", value=(question, found.value))


def _folder_of(path: Path) -> str:
    """Return which of PCEB's folders a file is in: the innermost of these names."""
    return next((part for part in reversed(path.parts) if part in ("essay", "mix", "single", "multiple")), "")


def _pceb_item(found: PublishedValue) -> _Item:
    """A question of a file of one kind, or one on a case, whose kind is written before its stem."""
    question, case = found.value
    row = from_json(_Row, question)
    kind = {"multiple": "multi", "single": "single"}.get("" if case else _folder_of(found.path))
    return _Item(
        without_prefix(clean_text(row.question)),
        _options(row),
        row.answer or "",
        kind or ("multi" if re.match(r"\s*多", row.question) else "single"),
        clean_text(row.analysis or "") or None,
        from_json(_Case, case).text if case else "",
    )


def _options(row: _Row) -> dict[str, str]:
    """Clean texts by letter, in the letters' order; without those that have none."""
    options: dict[str, str] = {}
    for name, text in row.options.items():
        letter = unicodedata.normalize("NFKC", name).strip().upper()
        if len(letter) != 1 or letter not in string.ascii_uppercase or letter in options:
            raise ValueError(f"options: has the letter {name!r}, or has it twice")
        if text is None and letter <= _LAST_USUAL_OPTION:
            raise ValueError(f"options: {letter} is null, not text")
        options[letter] = clean_text(text or "")
    return {letter: options[letter] for letter in sorted(options) if options[letter]}
