"""Evaluations of several models on one benchmark, put side by side: scores, and what changed question by question."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from psyche_jax.errors import UserError
from psyche_jax.storage.files import read_json

SHOWN_ITEMS = 6
SHOWN_MODELS = 4
DIMENSION_TITLES = {  # of what judges mark, see `empathy`
    "technique": "Conversation technique",
    "attitude": "State and attitude",
    "emotional_empathy": "Emotional empathy",
    "cognitive_empathy": "Cognitive empathy",
    "safety": "Safety",
}
_OPTIONAL = ("elastic", "chance", "chance_elastic", "unanswered")
_KINDS = {"all": "All questions", "single": "One right answer", "multi": "Several right answers"}


@dataclass(frozen=True)
class Evaluation:
    """One file of `evaluations/`."""

    run: str
    label: str
    bench: str
    model: str
    step: int
    scores: dict[str, Any]
    items: dict[str, dict[str, Any]]  # choice questions, the first sample of each
    parameters: int | None = None
    samples: int = 1
    set_aside: tuple[str, ...] = ()
    empathy: dict[str, Any] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> str:
        """How the model was asked, without the prompt."""
        asked = {"samples": self.samples, **self.sampling}
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in asked.items() if name != "prompt")

    @property
    def prompt(self) -> dict[str, str]:
        """System prompt and instruction that were added, those that are not empty."""
        prompt = self.sampling.get("prompt")
        return {name: str(text) for name, text in prompt.items() if text} if isinstance(prompt, dict) else {}

    @classmethod
    def read(cls, path: Path, run: str) -> "Evaluation":
        """Read the file of an evaluation.

        Raises:
          UserError: it holds something else.
        """
        content = read_json(path)
        try:
            scores = content["scores"]
            groups = [scores, *scores.get("by_kind", {}).values(), *scores.get("cells", {}).values()]
            for part in groups:
                strict = part["strict"] if part["count"] else 0
                values = [strict, part["count"], *(part.get(name) or 0 for name in _OPTIONAL)]
                if not all(isinstance(value, int | float) for value in values):
                    raise ValueError("a score is not a number")
            items = {
                str(item["id"]): {**item, "strict": int(item["strict"])}
                for item in content.get("items", [])
                if not item.get("sample") and item.get("kind") not in ("essay", "dialogue")
            }
            parameters = content.get("parameters")
            return cls(
                run,
                str(content["label"]),
                str(content["bench"]),
                str(content.get("model", "")),
                int(content.get("step") or 0),
                scores,
                items,
                int(parameters) if parameters else None,
                int(content.get("samples") or 1),
                tuple(map(str, content.get("set_aside", []))),
                content.get("empathy"),
                dict(content.get("sampling") or {}),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{path}: is not an evaluation ({what}); write it again with `psyche eval`") from None


@dataclass(frozen=True)
class Transition:
    """How the outcomes of the same questions changed from one model to another."""

    before: str
    after: str
    gained: int
    lost: int
    stayed_right: int
    stayed_wrong: int

    @property
    def p_value(self) -> float:
        """Of the exact sign test: how likely so uneven a change is if gaining and losing are equally likely."""
        changed = self.gained + self.lost
        tail = sum(math.comb(changed, k) for k in range(min(self.gained, self.lost) + 1)) / 2**changed
        return min(1.0, 2 * tail)


@dataclass(frozen=True)
class Bench:
    """All evaluations on one benchmark, in the order in which the models were made.

    `groups`: of each kind of question its `name` and `rows`, the models' scores from 0 to 1 (see `_rows`).
    `comparisons`: a few questions, and what each of the models `shown_names` made of them (see `_comparisons`).
    """

    name: str
    evaluations: list[Evaluation]
    names: list[str]
    groups: list[dict[str, Any]]
    transitions: list[Transition]
    shown_names: list[str]
    comparisons: list[dict[str, Any]]

    @property
    def overall(self) -> list[dict[str, Any]]:
        """Scores on all questions; none where there are only essays or dialogues."""
        return self.groups[0]["rows"] if self.groups else []

    @property
    def named(self) -> list[tuple[str, Evaluation]]:
        """Evaluations with their names."""
        return list(zip(self.names, self.evaluations, strict=True))


def read_benches(evaluations: Sequence[Evaluation]) -> list[Bench]:
    """Put evaluations (in order) together by benchmark; one that two runs hold alike counts once."""
    unique: list[Evaluation] = []
    for evaluation in evaluations:
        if not any(_same(evaluation, other) for other in unique):
            unique.append(evaluation)
    return [
        _bench(name, [evaluation for evaluation in unique if evaluation.bench == name])
        for name in dict.fromkeys(evaluation.bench for evaluation in unique)
    ]


def cell_name(cell: str) -> str:
    """The name of a cell in words: `case_smcq` is Case, one right answer."""
    part, _, kind = cell.rpartition("_")
    kinds = {"smcq": _KINDS["single"].lower(), "mmcq": _KINDS["multi"].lower()}
    return f"{part.capitalize()}, {kinds[kind]}" if part and kind in kinds else cell


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share seen in `count` independent questions, of which there are some."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def _bench(name: str, evaluations: list[Evaluation]) -> Bench:
    labels = [evaluation.label for evaluation in evaluations]
    names = [
        evaluation.label if labels.count(evaluation.label) == 1 else f"{evaluation.label} ({evaluation.run})"
        for evaluation in evaluations
    ]
    if len(set(names)) < len(names):
        names = [f"{name}, step {one.step}" for name, one in zip(names, evaluations, strict=True)]

    # A group for all questions; for kinds and cells only where there are several; without what was leaked.
    def parts(key: str) -> list[str]:
        return list(dict.fromkeys(part for one in evaluations for part in one.scores.get(key, {})))

    kinds, cells = parts("by_kind"), parts("cells")
    chosen: list[tuple[str, list[Any], dict[str, Any]]] = [(_KINDS["all"], [one.scores for one in evaluations], {})]
    for kind in kinds if len(kinds) > 1 else ():
        of_kind = [one.scores.get("by_kind", {}).get(kind) for one in evaluations]
        chosen.append((_KINDS.get(kind, kind), of_kind, {"kind": kind}))
    for cell in cells if len(cells) > 2 else ():  # two are the kinds
        chosen.append((cell_name(cell), [one.scores.get("cells", {}).get(cell) for one in evaluations], {"cell": cell}))
    clean = [one.scores.get("decontaminated") for one in evaluations]
    chosen.append(("Without questions that are in the training data", clean, {"leaked": ""}))
    groups = [
        {"name": title, "rows": rows} for title, scores, of in chosen if (rows := _rows(evaluations, names, scores, of))
    ]

    # Answers are set side by side for the first model and the last few.
    answered = [index for index, evaluation in enumerate(evaluations) if evaluation.items]
    shown = answered if len(answered) <= SHOWN_MODELS else [answered[0], *answered[-(SHOWN_MODELS - 1) :]]
    transitions = [
        _transition(names[shown[0]], names[index], evaluations[shown[0]], evaluations[index]) for index in shown[1:]
    ]
    comparisons = _comparisons([evaluations[index] for index in shown]) if shown else []
    return Bench(name, evaluations, names, groups, transitions, [names[index] for index in shown], comparisons)


def _rows(
    evaluations: Sequence[Evaluation],
    names: Sequence[str],
    scores: Sequence[Mapping[str, Any] | None],
    of: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """A row for each evaluation that has scores on these questions: those with the fields `of`.

    `change`: of `strict` against the first row, if both were asked the same.
    """
    rows: list[dict[str, Any]] = []
    first = evaluations[0]  # that has a row
    for evaluation, name, part in zip(evaluations, names, scores, strict=True):
        if not part or not part["count"]:
            continue
        strict, count = float(part["strict"]), int(part["count"])
        low, high = part.get("interval") or wilson(strict, count)
        comparable = bool(rows) and rows[0]["count"] == count and _share(first, evaluation, count, of)
        row = {
            "name": name,
            "step": evaluation.step,
            "count": count,
            "strict": strict,
            "low": min(low, strict),  # older evaluations may leave the score out of its interval
            "high": max(high, strict),
            "change": strict - rows[0]["strict"] if comparable else None,
        }
        row |= {key: part.get(key) for key in (*_OPTIONAL, "deviation")}
        rows.append(row | {"verdict": _verdict(row)})
        first = first if len(rows) > 1 else evaluation
    return rows


def _share(one: Evaluation, other: Evaluation, count: int, of: Mapping[str, Any]) -> bool:
    """Whether both may have been asked the same `count` questions; also where one does not say which it was asked."""
    asked = [{id_ for id_, item in each.items.items() if of.items() <= item.items()} for each in (one, other)]
    return not one.items or not other.items or len(asked[0] & asked[1]) >= count


def _verdict(row: Mapping[str, Any]) -> str:
    """What the interval of a score says of it beside chance; nothing where chance is not known."""
    if row["chance"] is None:
        return ""
    if row["low"] > row["chance"]:
        return "better than guessing"
    return "worse than guessing" if row["high"] < row["chance"] else "not distinguishable from guessing"


def _transition(before_name: str, after_name: str, before: Evaluation, after: Evaluation) -> Transition:
    pairs = [(item["strict"], after.items[id_]["strict"]) for id_, item in before.items.items() if id_ in after.items]
    counts = [pairs.count(pair) for pair in ((0, 1), (1, 0), (1, 1), (0, 0))]
    return Transition(before_name, after_name, *counts)


def _comparisons(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """A few questions that first and last share: what was gained, lost and neither, in turns."""
    first, last = evaluations[0], evaluations[-1]
    queues: dict[str, list[str]] = {"became right": [], "became wrong": [], "changed in part": [], "unchanged": []}
    for id_, before in first.items.items():
        if (after := last.items.get(id_)) is None:
            continue
        if after["strict"] != before["strict"]:
            outcome = "became right" if after["strict"] > before["strict"] else "became wrong"
        else:
            parts = [item.get("elastic", item["strict"]) for item in (before, after)]
            outcome = "changed in part" if parts[0] != parts[1] else "unchanged"
        queues[outcome].append(id_)
    chosen: list[tuple[str, str]] = []
    unchanged = queues.pop("unchanged")
    while len(chosen) < SHOWN_ITEMS and any(queues.values()):
        chosen += [(outcome, queue.pop(0)) for outcome, queue in queues.items() if queue]
    chosen += [("unchanged", id_) for id_ in unchanged]
    return [
        {
            **{key: str(first.items[id_].get(key, "")) for key in ("kind", "question", "gold")},
            "outcome": outcome if len(evaluations) > 1 else "",
            "answers": [evaluation.items.get(id_) for evaluation in evaluations],  # None: it was not asked
        }
        for outcome, id_ in chosen[:SHOWN_ITEMS]
    ]


def _same(one: Evaluation, other: Evaluation) -> bool:
    same_model = (one.label, one.bench, one.model, one.step) == (other.label, other.bench, other.model, other.step)
    return same_model and one.scores == other.scores
