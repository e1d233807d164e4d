"""Find benchmark questions, cases and conversations in training data, by what two texts share.

Texts are compared without prefixes, blanks and punctuation, with real characters for radicals (`comparable`).
"""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from psyche_jax.data.dataset import load_any_records, write_dataset
from psyche_jax.data.records import BaseRecord, Question, turns_of
from psyche_jax.data.text import comparable, lettered_options
from psyche_jax.errors import UserError

SHINGLE = 5  # characters
NEAR = 0.3  # of the shingles of both; docs/data.md says what was seen above and below
SHARED_CASE = 0.5  # of a case's shingles
HELD = 0.8  # of the shingles of one, where the other one is longer
_LEAST = 12  # shingles: "the main symptom is" with two options is asked about every case and says nothing by itself

Reason = Literal["exact", "near", "case"]
_REASONS: tuple[Reason, ...] = ("exact", "case", "near")


@dataclass(frozen=True)
class Leak:
    """A training record that shares something with a benchmark's; `similarity` is the share of common shingles."""

    reason: Reason
    similarity: float
    train_id: str
    train_text: str
    evaluation_id: str
    evaluation_text: str


@dataclass(frozen=True)
class Decontaminated:
    """`clean` are the records that share nothing; `leaks` name one reason for each of the others.

    `leaked`: all benchmark records that some training record shares something with, by id, with the reason.
    `set_aside`: a line for each training record that could not be read.
    """

    clean: tuple[BaseRecord, ...]
    leaks: tuple[Leak, ...]
    leaked: dict[str, Reason]
    set_aside: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Counts by reason, how many of the benchmark's records leak, and the first examples of each reason."""
        reasons = Counter(leak.reason for leak in self.leaks)
        examples = {reason: [asdict(leak) for leak in self.leaks if leak.reason == reason][:5] for reason in reasons}
        counts = {"clean": len(self.clean), "leaks": dict(reasons), "evaluation_records": len(self.leaked)}
        return {**counts, "examples": examples}


def decontaminate(train: Iterable[BaseRecord], evaluation: Sequence[BaseRecord], near: float = NEAR) -> Decontaminated:
    """Take out of `train` what `evaluation` asks.

    Each record is compared with each question. It leaks if its text is the question's stem and options, in whatever
    order ("exact"); if the Jaccard similarity of their five-character shingles is at least `near`, or one of them holds
    at least `HELD` of the other's, which may be a question with its case ("near"); or if it holds at least
    `SHARED_CASE` of the shingles of a case that the question is about (`meta["case"]`). A question on a case is also
    compared without it, unless it is too short to be one. Of a conversation all that the user says is compared; where
    that is as short, only exact copies count.
    """
    index = _Index(evaluation)
    clean, leaks = [], []
    leaked: dict[str, Reason] = {}
    for record in train:
        found = index.leaks(record, near)
        for leak in found:
            known = leaked.get(leak.evaluation_id, leak.reason)
            leaked[leak.evaluation_id] = min(known, leak.reason, key=_REASONS.index)
        if found:
            leaks.append(found[0])
        else:
            clean.append(record)
    return Decontaminated(tuple(clean), tuple(leaks), leaked)


def decontaminate_places(train: str, evaluation: str, out: str, near: float = NEAR) -> Decontaminated:
    """Read both, data sets or JSONL files, and write the clean records as a data set to `out`.

    Raises:
      UserError: one cannot be read, nothing is clean, or `out` is taken.
    """
    records = load_any_records(train)
    result = replace(decontaminate(records.good, load_any_records(evaluation).good, near), set_aside=records.set_aside)
    if not result.clean:
        raise UserError(f"{train}: every record leaks into {evaluation}; nothing is left to write")
    write_dataset(out, result.clean, {"decontaminated": {"train": train, "evaluation": evaluation, "near": near}})
    return result


class _Index:
    """The benchmark's questions (or conversations) and cases, by their shingles."""

    def __init__(self, questions: Sequence[BaseRecord]) -> None:
        self._questions = questions
        self._exact: defaultdict[Any, list[int]] = defaultdict(list)
        # Of each shingle the places where it counts: questions, the same again for what their cases do not hold, cases.
        places: defaultdict[str, list[int]] = defaultdict(list)
        sizes = []
        asked = [_asked(question) for question in questions]
        cases = {case: number for number, case in enumerate(dict.fromkeys(["", *(case or "" for *_, case in asked)]))}
        case_shingles = [_shingles(case) if case else frozenset() for case in cases]
        case_of = [cases[case or ""] for *_, case in asked]
        whole = [_shingles(_joined(stem, options)) for stem, options, _ in asked]
        self._common = _held_by_most([one for one, (*_, case) in zip(whole, asked, strict=True) if case is None])
        for number, (stem, options, case) in enumerate(asked):
            own = whole[number] - self._common
            sizes.append(len(own) if case == "" or len(own) >= _LEAST else 0)
            if sizes[-1] or not case:
                self._exact[_key(stem, options)].append(number)
            for shingle in own:
                places[shingle].append(number)
            for shingle in own - case_shingles[case_of[number]]:
                places[shingle].append(len(questions) + number)
        for number, found in enumerate(case_shingles):
            for shingle in found:
                places[shingle].append(2 * len(questions) + number)
        self._places = {shingle: np.array(found, np.int32) for shingle, found in places.items()}
        self._sizes, self._case_of = np.array(sizes, int), np.array(case_of, int)
        self._case_sizes = np.array([len(found) for found in case_shingles])

    def leaks(self, record: BaseRecord, near: float) -> list[Leak]:
        """What is found of each question in a record, exact copies first, then shared cases, the nearest first."""
        text, options = _text(record)
        exact = self._exact.get(_key(text, options), [])
        found: dict[int, tuple[Reason, float]] = dict.fromkeys(exact, ("exact", 1.0))
        parts = _shingles(_joined(text, options)) - self._common
        # A case is looked for in the text alone, without options between its parts.
        whole = _shingles(comparable(text))
        count = len(self._questions)
        shared = self._counts(parts)
        own, beyond_case, in_case = shared[:count], shared[count : 2 * count], shared[2 * count :]
        case_share = (self._counts(whole)[2 * count :] / np.maximum(self._case_sizes, 1))[self._case_of]
        for number in np.flatnonzero(case_share >= SHARED_CASE):
            found.setdefault(int(number), ("case", float(case_share[number])))
        similarity = own / np.maximum(len(parts) + self._sizes - own, 1)
        held = np.where(self._sizes >= _LEAST, own / np.maximum(self._sizes, 1), 0)
        if len(parts) >= _LEAST:
            held = np.maximum(held, (in_case[self._case_of] + beyond_case) / len(parts))
        for number in np.flatnonzero((self._sizes > 0) & (similarity >= near) | (held >= HELD)):
            score = similarity[number] if similarity[number] >= near else held[number]
            found.setdefault(int(number), ("near", float(score)))
        ranked = sorted(found.items(), key=lambda pair: (_REASONS.index(pair[1][0]), -pair[1][1]))
        return [self._leak(reason, score, record, text, number) for number, (reason, score) in ranked]

    def _counts(self, found: frozenset[str]) -> np.ndarray:
        """int [places]: how many of the shingles each of them holds."""
        places = [self._places[shingle] for shingle in found if shingle in self._places]
        together = np.concatenate(places) if places else np.zeros(0, np.int32)
        return np.bincount(together, minlength=2 * len(self._questions) + len(self._case_sizes))

    def _leak(self, reason: Reason, similarity: float, record: BaseRecord, text: str, number: int) -> Leak:
        question = self._questions[number]
        asked, _ = _text(question)
        return Leak(reason, similarity, record.id, text[:200], question.id, asked[:200])


def _shingles(text: str) -> frozenset[str]:
    """All runs of five characters of a comparable text; a shorter text is its only one."""
    return frozenset(text[start : start + SHINGLE] for start in range(max(1, len(text) - SHINGLE + 1)))


def _held_by_most(conversations: Sequence[frozenset[str]]) -> frozenset[str]:
    """Shingles that most of several conversations hold, as of an instruction that stands in each: they say nothing."""
    counts = Counter(shingle for found in conversations for shingle in found)
    return frozenset(shingle for shingle, count in counts.items() if count > max(2, len(conversations) / 2))


def _asked(record: BaseRecord) -> tuple[str, tuple[str, ...], str | None]:
    """As `_text`, of a question without its case, and that case as it is compared; None: a conversation."""
    text, options = _text(record)
    if not isinstance(record, Question):
        return text, options, None
    return str(record.meta.get("question", text)), options, comparable(str(record.meta.get("case", "")))


def _key(stem: str, options: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    return comparable(stem), tuple(sorted(comparable(option) for option in options))


def _joined(stem: str, options: Iterable[str]) -> str:
    return "".join([comparable(stem), *sorted(comparable(option) for option in options)])


def _text(record: BaseRecord) -> tuple[str, tuple[str, ...]]:
    """What a record asks or says, and its options; of conversations the user's turns, options found by letters."""
    if isinstance(record, Question):
        return record.stem, tuple(record.options.values())
    text = "\n".join(turn.content for turn in turns_of(record) if turn.role == "user")
    return lettered_options(unicodedata.normalize("NFKC", text))
