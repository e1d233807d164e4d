"""Multiple-choice questions: letters extracted and scored, beside chance, by cell and with intervals."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psyche_jax.evaluate.answers import Completion
from psyche_jax.evaluate.extraction import read_letters
from psyche_jax.evaluate.resampling import bootstrap_shares, interval
from psyche_jax.evaluate.tasks import Task


@dataclass(frozen=True)
class Item:
    """One answer of a model to one question, of which it may give several (`sample` 0, 1, …).

    `predicted`: letters in order by the strict rule, `lenient`: with the fallback; None where there are none.
    `strict` and `elastic`: scores of `predicted`, `lenient_strict` and `lenient_elastic` those of `lenient`.
    `failure`: why the strict rule found no letters.
    """

    id: str
    cell: str
    kind: str
    sample: int
    question: str
    gold: str
    predicted: str | None
    lenient: str | None
    failure: str
    response: str
    strict: int
    elastic: float
    lenient_strict: int
    lenient_elastic: float


def score_answer(task: Task, completion: Completion, sample: int = 0) -> Item:
    """Extract the letters of one answer and score them."""
    reading = read_letters(completion.text, task.options, completion.finished)
    return Item(
        task.id,
        task.cell,
        task.kind,
        sample,
        task.text,
        task.gold,
        reading.strict,
        reading.lenient,
        reading.failure,
        completion.text,
        strict_score(reading.strict, task.gold),
        elastic_score(reading.strict, task.gold),
        strict_score(reading.lenient, task.gold),
        elastic_score(reading.lenient, task.gold),
    )


def strict_score(predicted: str | None, gold: str) -> int:
    """1 for all letters and no other."""
    return int(predicted == gold)


def elastic_score(predicted: str | None, gold: str) -> float:
    """|predicted| / |gold| if every predicted letter is right, else 0."""
    return len(predicted) / len(gold) if predicted and set(predicted) <= set(gold) else 0.0


def chance(task: Task) -> tuple[float, float]:
    """Expected strict and elastic score of a guesser.

    It picks one letter of a single-answer question, and any non-empty set of letters of a multiple-answer one, all
    equally likely.
    """
    options, gold = len(task.options), len(task.gold)
    if task.kind == "single":
        return 1 / options, 1 / options
    subsets = 2**options - 1
    # The mean of |s| / |gold| over subsets s of gold, times their share: gold · 2^(gold-1) / gold / subsets.
    return 1 / subsets, 2 ** (gold - 1) / subsets


def summarize(tasks: Sequence[Task], items: Mapping[str, Sequence[Item]]) -> dict[str, Any]:
    """Scores from 0 to 1 over all choice questions, and of each kind under `by_kind`, of each cell under `cells`.

    Args:
      tasks: the questions.
      items: the answers to each by its id, as many for each.

    Returns:
      For each group `count` (questions), `strict, elastic` (means), `interval, interval_elastic` (95 %, bootstrap),
      `chance, chance_elastic`, `unanswered` (answers without letters), `failures` (these by reason), `fallback`
      (`strict, elastic` with the lenient reading and `read`, the answers that only it could read), and of several
      samples `deviation, deviation_elastic`: standard deviation of the samples' scores. `average`: the mean of the
      cells, in which single-answer cells count alike in both, if there are several.
    """
    result = _scores("all", tasks, items)
    for name, key in (("by_kind", "kind"), ("cells", "cell")):
        keys = list(dict.fromkeys(getattr(task, key) for task in tasks))
        keys = sorted(keys, reverse=True) if key == "kind" else keys
        result[name] = {
            value: _scores(value, [task for task in tasks if getattr(task, key) == value], items) for value in keys
        }
    if len(result["cells"]) > 1:
        result["average"] = _average(tasks, items)
    return result


def _scores(name: str, tasks: Sequence[Task], items: Mapping[str, Sequence[Item]]) -> dict[str, Any]:
    if not tasks:
        return {"count": 0, "strict": None, "elastic": None, "unanswered": 0}
    answers = [item for task in tasks for item in items[task.id]]
    chances = [chance(task) for task in tasks]
    strict, elastic = (_mean([getattr(item, key) for item in answers]) for key in ("strict", "elastic"))
    result = {
        "count": len(tasks),
        "strict": strict,
        "elastic": elastic,
        "interval": interval(_resampled(name, "strict", tasks, items), strict),
        "interval_elastic": interval(_resampled(name, "elastic", tasks, items), elastic),
        "chance": _mean([strict for strict, _ in chances]),
        "chance_elastic": _mean([elastic for _, elastic in chances]),
        "unanswered": sum(item.predicted is None for item in answers),
        "failures": dict(Counter(item.failure for item in answers if item.failure)),
        "fallback": {
            "strict": _mean([item.lenient_strict for item in answers]),
            "elastic": _mean([item.lenient_elastic for item in answers]),
            "read": sum(item.predicted is None and item.lenient is not None for item in answers),
        },
    }
    samples = len(items[tasks[0].id])
    if samples > 1:
        for key, deviation in (("strict", "deviation"), ("elastic", "deviation_elastic")):
            by_sample = [_mean([getattr(items[task.id][n], key) for task in tasks]) for n in range(samples)]
            result[deviation] = statistics.stdev(by_sample)
    return result


def _average(tasks: Sequence[Task], items: Mapping[str, Sequence[Item]]) -> dict[str, Any]:
    cells = list(dict.fromkeys(task.cell for task in tasks))
    result: dict[str, Any] = {"cells": cells}
    for key, name in (("strict", "interval"), ("elastic", "interval_elastic")):
        means, resampled = [], []
        for cell in cells:
            chosen = [task for task in tasks if task.cell == cell]
            means.append(_mean([getattr(item, key) for task in chosen for item in items[task.id]]))
            resampled.append(_resampled(cell, key, chosen, items))
        result[key] = _mean(means)
        result[name] = interval(np.mean(resampled, axis=0), result[key])
    return result


def _resampled(name: str, key: str, tasks: Sequence[Task], items: Mapping[str, Sequence[Item]]) -> np.ndarray:
    values = [_mean([getattr(item, key) for item in items[task.id]]) for task in tasks]
    return bootstrap_shares(values, [task.group for task in tasks], name)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
