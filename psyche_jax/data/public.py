"""Public psychology data: CPsyExam, PCEB and SMILE, as published, read into records.

Each record comes out clean or is set aside, and every fault is counted: these files hold merged options, keys that
point nowhere, questions about cases that are not there, and duplicates with conflicting keys.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from psyche_jax.data.records import BaseRecord, Dialogue, Kind, Message, Question, fault_of
from psyche_jax.data.text import clean_text, comparable, without_prefix
from psyche_jax.errors import UserError

_REFERS_TO_CASE = re.compile("案例|该求助者|该咨询师|上题|本案")
_CASE_LENGTH = 150  # characters: a stem as long brings its case with it
_NEXT_OPTION = re.compile(r"(?<![A-Za-z])([B-H])\s*[.．、]\s*\S")
_MARKS = re.compile(r"（\s*[\d.]+\s*分\s*）")
_ROLES = {"client": "user", "counselor": "assistant"}


@dataclass(frozen=True)
class Loaded:
    """`good` records; a line for each record set aside; how often each fault was seen, mended or not."""

    good: tuple[BaseRecord, ...]
    set_aside: tuple[str, ...]
    faults: Counter[str]


@dataclass(frozen=True)
class Essay:
    """An essay question of PCEB with its reference answer, whose marks are taken out."""

    case: str
    question: str
    reference: str


@dataclass(frozen=True)
class _Item:
    where: str
    stem: str
    options: Mapping[str, str]
    answer: str
    kind: str
    rationale: str | None = None
    case: str = ""
    part: str = ""


def load_cpsyexam(path: Path) -> Loaded:
    """CPsyExam, one JSON object a line. `meta["part"]` is what it tests: `knowledge` or `analyse`."""
    return _questions(((where, partial(_cpsyexam_item, where, row)) for where, row in _lines(path)), "CPsyExam")


def load_pceb(folder: Path) -> Loaded:
    """The choice questions of PCEB: `cases/mix`, `moral` and `theory`, of any exam; a question on a case brings it."""
    return _questions(_pceb_items(folder), "PCEB")


def load_pceb_essays(folder: Path) -> tuple[tuple[Essay, ...], Counter[str]]:
    """The essay questions of PCEB, and how many references embed marks."""
    essays, faults = [], Counter[str]()
    for path in _json_files(folder):
        if "essay" not in path.parts:
            continue
        for case in _json(path):
            text = _case(case)
            for pair in case["questions_and_answers"]:
                faults["reference embeds marks"] += bool(_MARKS.search(pair["answer"]))
                reference = _MARKS.sub("", pair["answer"])
                question = without_prefix(clean_text(_MARKS.sub("", pair["question"])))
                essays.append(Essay(text, question, clean_text(reference)))
    return tuple(essays), +faults


def load_smile(path: Path) -> Loaded:
    """SMILE-style dialogues of `client` and `counselor`, one JSON object a line.

    Turns of one speaker in a row become one; what stands before the client's first turn, or after the counsellor's
    last, is left out.
    """
    good, set_aside, faults = [], [], Counter[str]()
    for where, row in _lines(path):
        try:
            turns: list[Message] = []
            for turn in row["turns"]:
                role, content = _ROLES[turn["role"]], clean_text(turn["content"])
                if turns and turns[-1].role == role:
                    faults["turns in a row"] += 1
                    turns[-1] = Message(role, f"{turns[-1].content}\n{content}")
                else:
                    turns.append(Message(role, content))  # type: ignore[arg-type]
            if turns and turns[0].role == "assistant":
                faults["the counsellor begins"] += 1
                turns = turns[1:]
            if turns and turns[-1].role == "user":
                faults["the client ends"] += 1
                turns = turns[:-1]
            good.append(Dialogue(tuple(turns), "SMILE", {"id": row.get("id")}))
        except (KeyError, TypeError, ValueError) as error:
            faults["no dialogue"] += 1
            set_aside.append(f"{where}: no dialogue ({_why(error)})")
    return Loaded(tuple(good), tuple(set_aside), +faults)


LOADERS: Mapping[str, Callable[[Path], Loaded]] = {
    "cpsyexam": load_cpsyexam,
    "pceb": load_pceb,
    "smile": load_smile,
}


def _cpsyexam_item(where: str, row: Mapping[str, Any]) -> _Item:
    explanation = clean_text(row.get("explanation") or "") or None
    stem = clean_text(row["question"])
    return _Item(
        where, stem, row["options"], row["answer"], row["question_type"], explanation, part=row.get("kind") or ""
    )


def _questions(items: Iterable[tuple[str, Callable[[], _Item]]], source: str) -> Loaded:
    faults: Counter[str] = Counter()
    set_aside: list[str] = []
    groups: dict[Any, list[tuple[_Item, Question]]] = {}
    seen: Counter[Any] = Counter()
    for where, make in items:
        try:
            item = make()
            seen[_content(item)] += 1
        except (KeyError, TypeError, AttributeError) as error:
            faults["not of this format"] += 1
            set_aside.append(f"{where}: not of this format ({_why(error)})")
            continue
        letters = re.sub(r"[,，\s]", "", item.answer).upper()
        found = list(_faults(item, letters))
        faults.update(found)
        if fatal := [fault for fault in found if fault not in _MENDED]:
            set_aside.append(f"{item.where}: {fatal[0]}")
            continue
        kind: Kind = "multi" if item.kind == "multi" or len(letters) > 1 else "single"
        options = {letter: clean_text(text) for letter, text in item.options.items() if clean_text(text)}
        stem = f"{item.case}\n{item.stem}" if item.case else item.stem
        meta = {"case": item.case, "question": item.stem} if item.case else {}
        meta |= {"part": item.part} if item.part else {}
        try:
            question = Question(stem, options, "".join(sorted(set(letters))), kind, item.rationale, source, meta)
        except ValueError as error:
            faults["other"] += 1
            set_aside.append(f"{item.where}: {fault_of(error).removeprefix('not JSON ')}")
            continue
        groups.setdefault((_content(item), comparable(item.case)), []).append((item, question))
    faults["duplicate"] = sum(count - 1 for count in seen.values())
    good = []
    for group in groups.values():
        keys = {frozenset(comparable(question.options[letter]) for letter in question.answer) for _, question in group}
        if len(keys) > 1:
            faults["duplicates with conflicting keys"] += 1
            set_aside += [f"{item.where}: duplicates with conflicting keys" for item, _ in group]
            continue
        good.append(group[0][1])
        set_aside += [f"{item.where}: duplicate of {group[0][0].where}" for item, _ in group[1:]]
    return Loaded(tuple(good), tuple(set_aside), +faults)


_MENDED = ("separators in the answer", "multiple-answer question with one letter", "kind contradicts the key")


def _faults(item: _Item, letters: str) -> Iterator[str]:
    """Everything that is wrong with a question as published; what is in `_MENDED` is no reason to set it aside."""
    if letters != item.answer:
        yield "separators in the answer"
    if not item.answer.strip():
        yield "empty answer"
    elif not re.fullmatch("[A-Z]+", letters):
        yield "answer holds more than letters"
    else:
        if item.kind == "multi" and len(letters) == 1:
            yield "multiple-answer question with one letter"
        if item.kind == "single" and len(letters) > 1:
            yield "kind contradicts the key"
        if any(not item.options.get(letter, "").strip() for letter in letters):
            yield "key points to no option"
    filled = [letter for letter, text in item.options.items() if text.strip()]
    if len(filled) < 2:
        yield "options are missing"
    for letter, text in item.options.items():
        following = _NEXT_OPTION.search(text)
        if following and following.group(1) > letter and not item.options.get(following.group(1), "").strip():
            yield "options are merged"
            break
    if not item.case and len(item.stem) < _CASE_LENGTH and _REFERS_TO_CASE.search(item.stem):
        yield "its case is missing"


def _content(item: _Item) -> tuple[str, tuple[str, ...]]:
    """What makes two questions the same: stem and options, in whatever order."""
    return comparable(item.stem), tuple(sorted(filter(None, map(comparable, item.options.values()))))


def _pceb_items(folder: Path) -> Iterator[tuple[str, Callable[[], _Item]]]:
    for path in _json_files(folder):
        if "essay" in path.parts:
            continue
        of_folder = "multi" if "multiple" in path.parts else "single"
        for number, row in enumerate(_json(path), start=1):
            where = f"{path}: {number}"
            if "questions_and_answers" not in row:
                yield where, partial(_pceb_item, where, row, of_folder)
                continue
            for inner, question in enumerate(row["questions_and_answers"], start=1):
                name = f"{where}.{inner}"
                yield name, partial(_pceb_item, name, question, None, row)


def _pceb_item(where: str, row: Mapping[str, Any], kind: str | None, around: Mapping[str, Any] | None = None) -> _Item:
    """A question of a file of one kind, or one on a case (`around`), whose kind stands before its stem."""
    case = "" if around is None else _case(around)
    if kind is None:
        kind = "multi" if re.match(r"\s*多", row["question"]) else "single"
    analysis = clean_text(row.get("analysis") or "") or None
    stem = without_prefix(clean_text(row["question"]))
    return _Item(where, stem, row["options"], row["answer"], kind, analysis, case)


def _case(row: Mapping[str, Any]) -> str:
    return clean_text(f"{row['general_info']}\n{row['case_introduction']}")


def _json_files(folder: Path) -> list[Path]:
    files = sorted(folder.rglob("*.json"))
    if not files:
        raise UserError(f"{folder}: holds no JSON files of PCEB")
    return files


def _json(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({_why(error)})") from None


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the data cannot be read ({_why(error)})") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: not JSON ({error})") from None


def _why(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
