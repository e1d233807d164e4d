"""Multiple-choice questions: asked, answered, letters extracted, scored beside chance."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from psyche_jax.data.records import Question, question_text
from psyche_jax.evaluate.completions import Completion
from psyche_jax.rewards import extract_letters


@dataclass(frozen=True)
class Item:
    """One question with what the model made of it. `predicted`: letters in order, None if it gave none."""

    id: str
    kind: str
    question: str
    gold: str
    predicted: str | None
    response: str
    strict: int
    elastic: float


@dataclass(frozen=True)
class Scores:
    """Means over `count` questions, from 0 to 1; `chance` and `chance_elastic`: those of a guesser.

    The guesser picks one letter of a single-answer question, and any non-empty set of letters of a
    multiple-answer one, all equally likely. `unanswered`: no letters could be extracted.
    """

    strict: float
    elastic: float
    chance: float
    chance_elastic: float
    count: int
    unanswered: int


def score_item(question: Question, completion: Completion) -> Item:
    """Extract the letters by the rewards' rule and score them.

    Strict: all letters and no other. Elastic: |predicted| / |gold| if every predicted letter is right, else 0.
    """
    letters = extract_letters(completion.text)
    predicted = None if not letters else "".join(sorted(letters))
    right = predicted is not None and set(predicted) <= set(question.answer)
    elastic = len(predicted) / len(question.answer) if right and predicted is not None else 0.0
    strict = int(predicted == question.answer)
    return Item(
        question.id,
        question.kind,
        question_text(question),
        question.answer,
        predicted,
        completion.text,
        strict,
        elastic,
    )


def summarize(questions: Sequence[Question], items: Sequence[Item]) -> dict[str, Any]:
    """Scores over all items, and by kind under `by_kind`."""
    result = dataclasses.asdict(_scores(questions, items))
    kinds = sorted({question.kind for question in questions}, reverse=True)
    result["by_kind"] = {
        kind: dataclasses.asdict(
            _scores(
                [question for question in questions if question.kind == kind],
                [item for item in items if item.kind == kind],
            )
        )
        for kind in kinds
    }
    return result


def chance(question: Question) -> tuple[float, float]:
    """Expected strict and elastic score of the guesser described in `Scores`."""
    options, gold = len(question.options), len(question.answer)
    if question.kind == "single":
        return 1 / options, 1 / options
    subsets = 2**options - 1
    # The mean of |s| / |gold| over subsets s of gold, times their share: gold · 2^(gold-1) / gold / subsets.
    return 1 / subsets, 2 ** (gold - 1) / subsets


def _scores(questions: Sequence[Question], items: Sequence[Item]) -> Scores:
    count = len(items)
    chances = [chance(question) for question in questions]
    return Scores(
        strict=sum(item.strict for item in items) / count,
        elastic=sum(item.elastic for item in items) / count,
        chance=sum(strict for strict, _ in chances) / count,
        chance_elastic=sum(elastic for _, elastic in chances) / count,
        count=count,
        unanswered=sum(item.predicted is None for item in items),
    )
