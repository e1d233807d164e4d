"""Scores: multiple choice, essays (ROUGE, BLEU), and their confidence intervals by bootstrap."""

import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics.bleu import BLEU

from psyche_jax.evaluate.answers import Completion
from psyche_jax.evaluate.extraction import answer_part, read_letters
from psyche_jax.evaluate.tasks import Task

RESAMPLES = 1000
ByTask: TypeAlias = Mapping[str, Sequence[Mapping[str, Any]]]  # records of answers by the id of their task
_SEED = 0


def bootstrap_means(values: Sequence[float], groups: Sequence[str], name: str = "") -> np.ndarray:
    """float64 [RESAMPLES]: means of `values` over groups drawn with replacement, as many as there are.

    Values of one group (the questions on one case) are drawn together, since they are not independent. The draws
    depend on `name` and the number of groups alone, so the same scores have the same interval everywhere.
    """
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    index = np.array([places[group] for group in groups])
    sums = np.bincount(index, np.asarray(values, float))
    counts = np.bincount(index).astype(float)
    random = np.random.default_rng([_SEED, *name.encode()])
    drawn = random.multinomial(len(places), np.full(len(places), 1 / len(places)), RESAMPLES)
    return (drawn @ sums) / (drawn @ counts)


def bootstrap_shares(
    values: Sequence[float], groups: Sequence[str], name: str = "", bounds: tuple[float, float] = (0.0, 1.0)
) -> np.ndarray:
    """`bootstrap_means` of scores within `bounds`.

    Where every resample is alike (all scores are the same, or all questions are on one case), the interval would say
    that the score is certain: there the draws are from Jeffreys' posterior of a share, Beta(n·score + 1/2,
    n·(1 - score) + 1/2) of n groups, where the bounds are 0 and 1.
    """
    means = bootstrap_means(values, groups, name)
    if np.ptp(means) > 1e-9:
        return means
    low, high = bounds
    score, count = (statistics.fmean(values) - low) / (high - low), len(set(groups))
    random = np.random.default_rng([_SEED, *name.encode()])
    return low + (high - low) * random.beta(count * score + 0.5, count * (1 - score) + 0.5, RESAMPLES)


def interval(means: np.ndarray, estimate: float) -> tuple[float, float]:
    """The 95 % percentile interval of resampled means, which holds the estimate that it is given for.

    The posterior's percentiles leave out a score of exactly 0 or 1; resamples of few groups may leave out others.
    """
    low, high = map(float, np.percentile(means, [2.5, 97.5]))
    return min(low, estimate), max(high, estimate)


def answer_record(task: Task, completion: Completion, sample: int = 0) -> dict[str, Any]:
    """What an evaluation holds of every answer; a task may have several (`sample` 0, 1, …)."""
    return {
        "id": task.id,
        "cell": task.cell,
        "kind": task.kind,
        "sample": sample,
        "question": task.text,
        "gold": task.gold,
        "response": completion.text,
    }


def score_answer(task: Task, completion: Completion, sample: int = 0) -> dict[str, Any]:
    """Read the letters of an answer to a choice question and score them.

    Returns:
      The answer's record, and `predicted` (letters in order by the strict rule) and `lenient` (with the fallback), None
      where there are none; `strict, elastic` (scores of `predicted`), `lenient_strict, lenient_elastic`; `failure`: why
      the strict rule found no letters.
    """
    reading = read_letters(completion.text, task.options, completion.finished)
    return {
        **answer_record(task, completion, sample),
        "predicted": reading.strict,
        "lenient": reading.lenient,
        "failure": reading.failure,
        "strict": strict_score(reading.strict, task.gold),
        "elastic": elastic_score(reading.strict, task.gold),
        "lenient_strict": strict_score(reading.lenient, task.gold),
        "lenient_elastic": elastic_score(reading.lenient, task.gold),
    }


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


def summarize(tasks: Sequence[Task], items: ByTask) -> dict[str, Any]:
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


def _scores(name: str, tasks: Sequence[Task], items: ByTask) -> dict[str, Any]:
    if not tasks:
        return {"count": 0, "strict": None, "elastic": None, "unanswered": 0}
    answers = [item for task in tasks for item in items[task.id]]
    chances = [chance(task) for task in tasks]
    strict, elastic = (statistics.fmean([item[key] for item in answers]) for key in ("strict", "elastic"))
    result = {
        "count": len(tasks),
        "strict": strict,
        "elastic": elastic,
        "interval": interval(_resampled(name, "strict", tasks, items), strict),
        "interval_elastic": interval(_resampled(name, "elastic", tasks, items), elastic),
        "chance": statistics.fmean([strict for strict, _ in chances]),
        "chance_elastic": statistics.fmean([elastic for _, elastic in chances]),
        "unanswered": sum(item["predicted"] is None for item in answers),
        "failures": dict(Counter(item["failure"] for item in answers if item["failure"])),
        "fallback": {
            "strict": statistics.fmean([item["lenient_strict"] for item in answers]),
            "elastic": statistics.fmean([item["lenient_elastic"] for item in answers]),
            "read": sum(item["predicted"] is None and item["lenient"] is not None for item in answers),
        },
    }
    samples = len(items[tasks[0].id])
    if samples > 1:
        for key, deviation in (("strict", "deviation"), ("elastic", "deviation_elastic")):
            by_sample = [statistics.fmean([items[task.id][n][key] for task in tasks]) for n in range(samples)]
            result[deviation] = statistics.stdev(by_sample)
    return result


def _average(tasks: Sequence[Task], items: ByTask) -> dict[str, Any]:
    cells = list(dict.fromkeys(task.cell for task in tasks))
    result: dict[str, Any] = {"cells": cells}
    for key, name in (("strict", "interval"), ("elastic", "interval_elastic")):
        means, resampled = [], []
        for cell in cells:
            chosen = [task for task in tasks if task.cell == cell]
            means.append(statistics.fmean([item[key] for task in chosen for item in items[task.id]]))
            resampled.append(_resampled(cell, key, chosen, items))
        result[key] = statistics.fmean(means)
        result[name] = interval(np.mean(resampled, axis=0), result[key])
    return result


def _resampled(name: str, key: str, tasks: Sequence[Task], items: ByTask) -> np.ndarray:
    values = [statistics.fmean([item[key] for item in items[task.id]]) for task in tasks]
    return bootstrap_shares(values, [task.group for task in tasks], name)


# The library's own pattern for words keeps Latin letters and digits alone.
_TOKEN = re.compile(r"[A-Za-z0-9]+|[^\W_]")


class CharacterTokenizer(Tokenizer):
    """Characters as tokens; runs of Latin letters and of digits stay whole, in lower case."""

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text."""
        return _TOKEN.findall(text.lower())


def score_essay(task: Task, completion: Completion, sample: int = 0) -> dict[str, Any]:
    """Compare what follows the reasoning with the reference; `rouge1, rougeL` (percent) join the answer's record."""
    scores = _SCORER.score(task.gold, answer_part(completion.text))
    rouge = {name: float(100 * scores[name].fmeasure) for name in ("rouge1", "rougeL")}
    return {**answer_record(task, completion, sample), **rouge}


def summarize_essays(items: Sequence[Mapping[str, Any]], groups: Sequence[str]) -> dict[str, Any]:
    """`count` (essays), `rouge1, rougeL, bleu4` with their 95 % intervals (bootstrap), and how they are measured.

    `groups`: of each of the answers the case that it is about; those on one case are drawn together.
    """
    result: dict[str, Any] = {"count": len({item["id"] for item in items})}
    for name in ("rouge1", "rougeL"):
        values = [item[name] for item in items]
        result[name] = statistics.fmean(values)
        result[f"interval_{name}"] = interval(bootstrap_shares(values, groups, name, (0.0, 100.0)), result[name])
    bleu = BLEU(tokenize="zh")
    said, references = [answer_part(item["response"]) for item in items], [item["gold"] for item in items]
    result["bleu4"] = float(bleu.corpus_score(said, [references]).score)
    result["measured_by"] = {
        "rouge": f"rouge-score, F-measure over characters, bootstrap of {RESAMPLES}",
        "bleu4": f"sacreBLEU {bleu.get_signature()}",
    }
    return result


_SCORER = RougeScorer(["rouge1", "rougeL"], tokenizer=CharacterTokenizer())
