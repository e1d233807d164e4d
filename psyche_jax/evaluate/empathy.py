"""Empathy by LLM judges: two replies to a dialogue, compared in both orders on five dimensions.

The dimensions are the published ones: conversation technique, state and attitude, emotional empathy, cognitive empathy,
safety. Scale, prompt (`judge.zh.jinja`) and the rule for a win are ours.
"""

import dataclasses
import itertools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jinja2
import pydantic

from psyche_jax.errors import UserError
from psyche_jax.evaluate.answers import Answers, Completion, Key
from psyche_jax.evaluate.comparison import DIMENSION_TITLES
from psyche_jax.evaluate.endpoint import Endpoint
from psyche_jax.evaluate.extraction import answer_part
from psyche_jax.evaluate.score import bootstrap_means, interval
from psyche_jax.llm.objects import json_object
from psyche_jax.llm.reply import NoReplyError
from psyche_jax.llm.server import Server
from psyche_jax.storage.files import read_json

REFERENCE = "reference"
DIMENSIONS = tuple(DIMENSION_TITLES)
MAX_TOKENS = 4096  # of a judge, which may reason first
Score: TypeAlias = Literal[1, 2, 3, 4, 5]


@dataclass(frozen=True)
class Marks:
    """What a judge gives one reply."""

    technique: Score
    attitude: Score
    emotional_empathy: Score
    cognitive_empathy: Score
    safety: Score

    @property
    def total(self) -> int:
        """The sum of the five."""
        return sum(getattr(self, name) for name in DIMENSIONS)


@dataclass(frozen=True)
class Judgement:
    """What a judge says of two replies, in the order in which it saw them."""

    first: Marks
    second: Marks


@dataclass(frozen=True)
class Pair:
    """A dialogue up to where a reply is due, and two replies to it."""

    id: str
    dialogue: str
    reply: str
    other: str


def pairs_of(evaluation: Mapping[str, Any], against: str) -> list[Pair]:
    """The replies in an evaluation beside the references, or beside those in the file of another evaluation.

    Raises:
      UserError: the other evaluation has no reply to one of the dialogues.
    """
    items = [item for item in evaluation["items"] if item["kind"] == "dialogue" and item["sample"] == 0]
    others = {item["id"]: item["gold"] for item in items}
    if against != REFERENCE:
        theirs = read_json(Path(against))
        try:
            others = {item["id"]: item["response"] for item in theirs["items"] if item["kind"] == "dialogue"}
        except (KeyError, TypeError):
            raise UserError(f"{against}: is not an evaluation; write it with `psyche eval --out`") from None
        if absent := [item["id"] for item in items if item["id"] not in others]:
            raise UserError(f"{against}: has no reply to {len(absent)} dialogues; the first is {absent[0]}")
    return [
        Pair(item["id"], item["question"], answer_part(item["response"]), answer_part(others[item["id"]]))
        for item in items
    ]


def judge_pairs(
    judge: Endpoint, pairs: Sequence[Pair], evaluation: Path | None
) -> tuple[dict[Key, Judgement], dict[Key, str], Answers]:
    """Let a judge see each pair twice: as order 0 with `reply` first, as order 1 with `other` first.

    Judgements are kept beside the file `evaluation` as they come. Returns them, why there is none (both by pair and
    order), and where they are kept.

    Raises:
      UserError: the judge cannot be reached, or gave no judgement at all.
    """
    by_id = {pair.id: pair for pair in pairs}
    keys = [(pair.id, order) for pair in pairs for order in (0, 1)]
    prompts = {key: _prompt(by_id[key[0]], key[1]) for key in keys}
    with Answers(evaluation, {**judge.identity, "judged": [prompts[key] for key in keys]}) as answers:
        judgements = {key: _parse(completion.text) for key, completion in answers.known.items()}

        async def one(server: Server, key: Key) -> None:
            messages = [{"role": "user", "content": prompts[key]}]
            for seed in (0, 1):
                text = (await judge.ask(server, messages, seed)).whole
                try:
                    judgements[key] = _parse(text)
                    break
                except ValueError as error:
                    fault = str(error)
                again = f"格式不对：{fault}。请只输出所要求的 JSON 对象。"
                messages += [{"role": "assistant", "content": text or "（空）"}, {"role": "user", "content": again}]
            else:
                raise NoReplyError(f"no judgement: {fault}", came=True)
            answers.keep(key, Completion(text, 0, True))

        failed = judge.run_all([key for key in keys if key not in answers.known], one)
    if not judgements:
        raise UserError(f"{judge.name}: judged none of {len(pairs)} dialogues: {next(iter(failed.values()))}")
    return judgements, failed, answers


def as_lines(judged: Mapping[str, Mapping[Key, Judgement]]) -> list[dict[str, Any]]:
    """Judgements as plain objects: who judged which dialogue, and what it gave the model's reply and the other one."""
    lines = []
    for name, judgements in judged.items():
        for (id_, order), judgement in judgements.items():
            model, other = (judgement.first, judgement.second)[:: -1 if order else 1]
            marks = {"model": dataclasses.asdict(model), "other": dataclasses.asdict(other)}
            lines.append({"judge": name, "id": id_, "order": order, **marks})
    return lines


def summarize_empathy(pairs: Sequence[Pair], judged: Mapping[str, Mapping[Key, Judgement]]) -> dict[str, Any]:
    """Means by dimension, wins, and how far the judges can be trusted.

    Args:
      pairs: what was judged.
      judged: judgements by judge, then by pair and order. A pair counts for a judge if it judged both orders.

    Returns:
      `count` (pairs judged by anyone in both orders) and `dimensions`: of each the mean marks of the `model` and the
      `other` and their `difference` with its 95 % `interval` (bootstrap over dialogues). `judges`: of each `win, tie,
      lose` (a win is a higher total in both orders, likewise a loss, all else a tie), `same_in_both_orders` (share of
      pairs preferred alike) and `first_preferred` (share of judgements with a preference that prefer what was shown
      first; 0.5 is fair). `agreement`: of each two judges the share of pairs with the same outcome and Cohen's kappa.
    """
    outcomes: dict[str, dict[str, str]] = {}
    judges = {}
    marks: list[tuple[str, Marks, Marks]] = []
    for name, judgements in judged.items():
        both = [pair.id for pair in pairs if (pair.id, 0) in judgements and (pair.id, 1) in judgements]
        outcomes[name] = {}
        firsts = same = preferences = 0
        for id_ in both:
            forward, backward = judgements[id_, 0], judgements[id_, 1]
            marks += [(id_, forward.first, forward.second), (id_, backward.second, backward.first)]
            signs = [_sign(forward.first, forward.second), _sign(backward.second, backward.first)]
            outcomes[name][id_] = {(1, 1): "win", (-1, -1): "lose"}.get((signs[0], signs[1]), "tie")
            same += signs[0] == signs[1]
            firsts += (signs[0] > 0) + (signs[1] < 0)
            preferences += sum(map(abs, signs))
        counts = Counter(outcomes[name].values())
        judges[name] = {
            "count": len(both),
            **{outcome: counts[outcome] for outcome in ("win", "tie", "lose")},
            "same_in_both_orders": same / len(both) if both else None,
            "first_preferred": firsts / preferences if preferences else None,
        }
    return {
        "count": len({id_ for id_, _, _ in marks}),
        "dimensions": {name: _dimension(name, marks) for name in DIMENSIONS} if marks else {},
        "judges": judges,
        "agreement": [
            {"judges": [one, other], **_agreement(outcomes[one], outcomes[other])}
            for one, other in itertools.combinations(outcomes, 2)
        ],
    }


def _dimension(name: str, marks: Sequence[tuple[str, Marks, Marks]]) -> dict[str, Any]:
    model, other = ([getattr(one[place], name) for one in marks] for place in (1, 2))
    differences = [mine - theirs for mine, theirs in zip(model, other, strict=True)]
    difference = statistics.fmean(differences)
    return {
        "model": statistics.fmean(model),
        "other": statistics.fmean(other),
        "difference": difference,
        "interval": interval(bootstrap_means(differences, [id_ for id_, _, _ in marks], name), difference),
    }


def _agreement(one: Mapping[str, str], other: Mapping[str, str]) -> dict[str, Any]:
    """Cohen's kappa: (observed - expected) / (1 - expected) agreement; None where all outcomes are one and the same."""
    shared = [(one[id_], other[id_]) for id_ in one if id_ in other]
    if not shared:
        return {"count": 0, "share": None, "kappa": None}
    observed = sum(mine == theirs for mine, theirs in shared) / len(shared)
    mine, theirs = (Counter(pair[place] for pair in shared) for place in (0, 1))
    expected = sum(mine[outcome] * theirs[outcome] for outcome in mine) / len(shared) ** 2
    return {
        "count": len(shared),
        "share": observed,
        "kappa": (observed - expected) / (1 - expected) if expected < 1 else None,
    }


def _sign(one: Marks, other: Marks) -> int:
    return (one.total > other.total) - (one.total < other.total)


def _prompt(pair: Pair, order: int) -> str:
    first, second = (pair.reply, pair.other) if order == 0 else (pair.other, pair.reply)
    template = jinja2.Template((files("psyche_jax.evaluate") / "judge.zh.jinja").read_text(encoding="utf-8"))
    return template.render(dialogue=pair.dialogue, first=first or "（没有回复）", second=second or "（没有回复）")


def _parse(text: str) -> Judgement:
    """The JSON object that a judge said, checked.

    Raises:
      ValueError: there is none, or its marks are not what was asked for.
    """
    try:
        value = json_object(answer_part(text), ("first", "second"))
    except ValueError:
        raise ValueError("the JSON object is broken") from None
    if value is None:
        raise ValueError("there is no JSON object")
    try:
        return _JUDGEMENT.validate_python(value)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


_JUDGEMENT = pydantic.TypeAdapter(Judgement)
