"""What training data shares with a benchmark: exact twins, near ones, and questions on the same case.

Texts are compared without prefixes, blanks and punctuation, with real characters for radicals (`text.comparable`).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from psyche_jax.data.dataset import is_dataset, load_records, open_dataset, write_dataset
from psyche_jax.data.records import BaseRecord, Dialogue, Question, RlPrompt, SftExample
from psyche_jax.data.text import comparable, shingles
from psyche_jax.errors import UserError

NEAR = 0.3  # of the shingles of both; docs/data.md says what was seen above and below
SHARED_CASE = 0.5  # of a case's shingles

Reason = Literal["exact", "near", "case"]


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
    """`clean` are the records that share nothing; `leaks` name one reason for each of the others."""

    clean: tuple[BaseRecord, ...]
    leaks: tuple[Leak, ...]

    def summary(self) -> dict[str, Any]:
        """Counts by reason, how many of the benchmark's records leak, and the first examples of each reason."""
        reasons = Counter(leak.reason for leak in self.leaks)
        examples = {reason: [asdict(leak) for leak in self.leaks if leak.reason == reason][:5] for reason in reasons}
        leaked = len({leak.evaluation_id for leak in self.leaks})
        return {"clean": len(self.clean), "leaks": dict(reasons), "evaluation_records": leaked, "examples": examples}


def decontaminate(
    train: Iterable[BaseRecord], evaluation: Sequence[Question], near: float = NEAR, shared_case: float = SHARED_CASE
) -> Decontaminated:
    """Take out of `train` what `evaluation` asks.

    A record leaks if its text is a question's stem and options, in whatever order; if the Jaccard similarity of their
    five-character shingles is at least `near`; or if it holds at least `shared_case` of the shingles of a case that a
    question of the benchmark is about (`meta["case"]`).
    """
    index = _Index(evaluation)
    clean, leaks = [], []
    for record in train:
        found = index.leak(record, near, shared_case)
        if found is None:
            clean.append(record)
        else:
            leaks.append(found)
    return Decontaminated(tuple(clean), tuple(leaks))


def decontaminate_places(train: str, evaluation: str, out: str, near: float = NEAR) -> Decontaminated:
    """Read both, write the clean records as a data set to `out`.

    Raises:
      UserError: one cannot be read, nothing is clean, or `out` is taken.
    """
    records = load_records(_kind_at(train), train)
    questions = load_records(Question, evaluation)
    result = decontaminate(records.good, questions.good, near)
    if not result.clean:
        raise UserError(f"{train}: every record leaks into {evaluation}; nothing is left to write")
    write_dataset(out, result.clean, {"decontaminated": {"train": train, "evaluation": evaluation, "near": near}})
    return result


class _Index:
    """The benchmark's questions and cases, by their shingles."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self._questions = questions
        self._exact: dict[Any, int] = {}
        self._sizes: list[int] = []
        self._of_shingle: defaultdict[str, list[int]] = defaultdict(list)
        self._cases: dict[str, int] = {}
        self._case_sizes: list[int] = []
        self._case_question: list[int] = []
        self._case_of_shingle: defaultdict[str, list[int]] = defaultdict(list)
        for number, question in enumerate(questions):
            stem = str(question.meta.get("question", question.stem))
            case = comparable(str(question.meta.get("case", "")))
            # A question on a case says little by itself ("the main symptom is"): it leaks with its case or not at all.
            if not case:
                self._exact.setdefault(_key(stem, question.options.values()), number)
            found = shingles(_joined(stem, question.options.values()))
            self._sizes.append(len(found))
            if not case:
                for shingle in found:
                    self._of_shingle[shingle].append(number)
            elif case not in self._cases:
                self._cases[case] = len(self._cases)
                found = shingles(case)
                self._case_sizes.append(len(found))
                self._case_question.append(number)
                for shingle in found:
                    self._case_of_shingle[shingle].append(self._cases[case])

    def leak(self, record: BaseRecord, near: float, shared_case: float) -> Leak | None:
        text, options = _text(record)
        number = self._exact.get(_key(text, options))
        if number is not None:
            return self._leak("exact", 1.0, record, text, number)
        found = shingles(_joined(text, options))
        cases = Counter(
            case for shingle in shingles(comparable(text)) for case in self._case_of_shingle.get(shingle, ())
        )
        if cases:
            case, common = cases.most_common(1)[0]
            if (share := common / self._case_sizes[case]) >= shared_case:
                return self._leak("case", share, record, text, self._case_question[case])
        shared = Counter(number for shingle in found for number in self._of_shingle.get(shingle, ()))
        best, similarity = max(
            ((number, common / (len(found) + self._sizes[number] - common)) for number, common in shared.items()),
            key=lambda pair: pair[1],
            default=(0, 0.0),
        )
        return self._leak("near", similarity, record, text, best) if similarity >= near else None

    def _leak(self, reason: Reason, similarity: float, record: BaseRecord, text: str, number: int) -> Leak:
        question = self._questions[number]
        return Leak(reason, similarity, record.id, text[:200], question.id, question.stem[:200])  # type: ignore[attr-defined]


def _key(stem: str, options: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    return comparable(stem), tuple(sorted(comparable(option) for option in options))


def _joined(stem: str, options: Iterable[str]) -> str:
    return "".join([comparable(stem), *sorted(comparable(option) for option in options)])


def _text(record: BaseRecord) -> tuple[str, tuple[str, ...]]:
    """What a record asks or says, and its options; of conversations the user's turns, their options found by lines."""
    if isinstance(record, Question):
        return record.stem, tuple(record.options.values())
    turns = record.turns if isinstance(record, Dialogue) else record.messages  # type: ignore[attr-defined]
    lines = [line for turn in turns if turn.role == "user" for line in turn.content.split("\n")]
    options = tuple(line[2:] for line in lines if line[:1].isascii() and line[:1].isupper() and line[1:2] in ".．、")
    stem = "\n".join(line for line in lines if line[2:] not in options)
    return stem, options


def _kind_at(train: str) -> type[BaseRecord]:
    kinds: dict[str, type[BaseRecord]] = {kind.__name__: kind for kind in (Question, SftExample, RlPrompt, Dialogue)}
    if not is_dataset(train):
        raise UserError(f"{train}: must be a data set; make one with `psyche data import`")
    name = open_dataset(train).manifest.kind
    if name not in kinds:
        raise UserError(f"{train}: holds records of {name}, which cannot be compared as text")
    return kinds[name]
