"""How well the gate does: `psyche safety`, on given sentences, by class."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from psyche_jax.errors import RowError, UserError
from psyche_jax.evaluate.comparison import wilson
from psyche_jax.serve.crisis.classify import Assessment, Risk, classify, read_yaml
from psyche_jax.serve.crisis.gate import check_output
from psyche_jax.storage.files import read_json, read_jsonl, write_json

Item = TypeVar("Item")
NO_OPINION = "no second opinion"
_AT_ONCE = 16  # questions to an endpoint
_SECONDS = 600.0  # it may take for one: nobody waits, and on a slow machine they queue
HARMED_BY_OTHERS = "harmed_by_others"  # a label of PsyGUARD without a class of the gate
PSYGUARD = {  # its labels
    "自杀未遂": Risk.ATTEMPT,
    "自杀准备行为": Risk.PLAN_OR_PREPARATION,
    "自杀计划": Risk.PLAN_OR_PREPARATION,
    "主动自杀意图": Risk.ACTIVE_IDEATION,
    "被动自杀意图": Risk.PASSIVE_IDEATION,
    "自伤行为": Risk.SELF_HARM,
    "自伤意图": Risk.SELF_HARM,
    "用户攻击行为": Risk.HARM_TO_OTHERS,
    "关于自杀的探索": Risk.EXPLORATION,
    "他人攻击行为": HARMED_BY_OTHERS,
    "与自杀/自伤/攻击行为无关": Risk.NONE,
}
LABELS = {**PSYGUARD, **{risk.value: risk for risk in Risk}, HARMED_BY_OTHERS: HARMED_BY_OTHERS}
COLUMNS = [risk.value for risk in sorted(Risk, key=lambda risk: -risk.severity)]
ROWS = [*COLUMNS[:-1], HARMED_BY_OTHERS, Risk.NONE.value]  # the most urgent first
_URGENT = (Risk.ATTEMPT.value, Risk.PLAN_OR_PREPARATION.value)


@dataclass(frozen=True)
class Post:
    """A message and its class as labelled: a value of `Risk`, or `harmed_by_others`."""

    text: str
    label: str
    id: str = ""


@dataclass(frozen=True)
class Turn:
    """One turn of a dialogue; `own`: it is the person's, not the counsellor's."""

    dialogue: str
    text: str
    own: bool


def own_sentences(*parts: str) -> list[Post]:
    """The sentences that come with the package (sentences.yaml): written for it, by whoever wrote the rules.

    `parts`: `before` and `after`, that is when the rules were done; both if none is named.
    """
    data = read_yaml("sentences.yaml")
    chosen = [data[part] for part in parts or data]
    return [Post(text, Risk(label).value) for part in chosen for label, texts in part.items() for text in texts]


def read_posts(path: Path) -> tuple[list[Post], list[str]]:
    """Posts, JSON lines `{"text", "labels": [...]}` with the gate's classes or PsyGUARD's labels, and the bad lines.

    A post with several labels has the most urgent of them.

    Raises:
      UserError: the file cannot be read, or no line of it is good.
    """

    def read(_: str, value: dict[str, Any]) -> Post:
        labels = [str(LABELS[label]) for label in value["labels"]]
        return Post(_text(value["text"]), min(labels, key=ROWS.index), str(value.get("id", "")))

    return _read(path, read)


def read_turns(path: Path) -> tuple[list[Turn], list[str]]:
    """The turns of dialogues, JSON lines `{"turns": [{"role", "content"}]}`, and the bad lines.

    Roles `user` and `client` are the person's, `system` is left out.

    Raises:
      UserError: the file cannot be read, or no line of it is good.
    """

    def read(where: str, value: dict[str, Any]) -> list[Turn]:
        name = str(value.get("id", where))
        turns = [(turn["role"], _text(turn["content"])) for turn in value["turns"]]
        return [Turn(name, text, role in ("user", "client")) for role, text in turns if role != "system"]

    dialogues, bad = _read(path, read)
    return [turn for turns in dialogues for turn in turns], bad


def assessments(texts: Sequence[str], learned: bool = True, second_opinion: str | None = None) -> list[Assessment]:
    """The class of each text. `second_opinion`: an endpoint's model, `URL#MODEL`, asked of what the gate lets pass.

    A text of which it has no opinion has the rule `no second opinion`.
    """
    found = [classify(text, learned) for text in texts]
    if second_opinion is None:
        return found
    from psyche_jax.serve.crisis.opinion import ask_endpoint  # which needs the library of a client

    at_once = asyncio.Semaphore(_AT_ONCE)

    async def second(text: str, first: Assessment) -> Assessment:
        if first.risk is not Risk.NONE:
            return first
        async with at_once:
            return await ask_endpoint(second_opinion, text, _SECONDS) or Assessment(Risk.NONE, (NO_OPINION,))

    async def ask() -> list[Assessment]:
        return await asyncio.gather(*map(second, texts, found))

    return asyncio.run(ask())


def measure_posts(posts: Sequence[Post], learned: bool = True, second_opinion: str | None = None) -> dict[str, Any]:
    """Of each class how many posts are answered by a fixed text, by one for a crisis, and by that of their own class.

    `answered` of class `none` are the false alarms. `confusion` has rows as labelled and columns as classed. `decided`
    counts the answered posts by what decided, the bands of models apart, and those without a second opinion. `learned`,
    `second_opinion`: see `assessments`.
    """
    assessed = assessments([post.text for post in posts], learned, second_opinion)
    pairs = [(post.label, found.risk.value) for post, found in zip(posts, assessed, strict=True)]
    groups = [("plan, preparation, attempt", _URGENT), *((name, (name,)) for name in ROWS)]
    classes = {}
    for name, members in groups:
        found = [risk for label, risk in pairs if label in members]
        if found:
            classes[name] = {
                "count": len(found),
                "answered": share(sum(risk != Risk.NONE for risk in found), len(found)),
                "crisis": share(sum(risk not in (Risk.NONE, Risk.EXPLORATION) for risk in found), len(found)),
                "own": share(sum(risk in members for risk in found), len(found)),
            }
    confusion = Counter(pairs)
    return {
        "count": len(pairs),
        "classes": classes,
        "decided": _deciders(assessed),
        "columns": COLUMNS,
        "confusion": {row: [confusion[row, column] for column in COLUMNS] for row in ROWS if row in dict(pairs)},
    }


def measure_turns(turns: Sequence[Turn], learned: bool = True, second_opinion: str | None = None) -> dict[str, Any]:
    """How much of ordinary talk is answered by a fixed text, and how much of what counsellors say is withheld."""
    own = [turn for turn in turns if turn.own]
    assessed = assessments([turn.text for turn in own], learned, second_opinion)
    found = list(zip(own, assessed, strict=True))
    flagged = [(turn, assessment) for turn, assessment in found if assessment.risk is not Risk.NONE]
    dialogues = {turn.dialogue for turn in turns}
    return {
        "dialogues": len(dialogues),
        "turns": len(own),
        "flagged_turns": share(len(flagged), len(own)),
        "flagged_dialogues": share(len({turn.dialogue for turn, _ in flagged}), len(dialogues)),
        "by_class": dict(Counter(assessment.risk.value for _, assessment in flagged).most_common()),
        "decided": _deciders(assessed),
        "counsellors": measure_replies(turn.text for turn in turns if not turn.own),
    }


def measure_replies(replies: Iterable[str]) -> dict[str, Any]:
    """How many of a model's replies the output filter would not let pass as they are."""
    kinds = [rule.name if (rule := check_output(reply)) else "" for reply in replies]
    return {
        "count": len(kinds),
        "withheld": share(sum(map(bool, kinds)), len(kinds)),
        "by_kind": dict(Counter(filter(None, kinds)).most_common()),
    }


def _deciders(assessed: Iterable[Assessment]) -> dict[str, int]:
    names = [
        "rules" if found.risk is not Risk.NONE and not found.learned else found.rules[0]
        for found in assessed
        if found.rules
    ]
    return dict(sorted(Counter(names).items()))


def share(count: int, of: int) -> dict[str, float | int | None]:
    """A share with its Wilson interval at 95 % (Wilson 1927); None where there is nothing to count."""
    if not of:
        return {"count": 0, "share": None, "low": None, "high": None}
    low, high = wilson(count / of, of)
    return {"count": count, "share": count / of, "low": low, "high": high}


def posts_table(measured: dict[str, Any]) -> Iterator[str]:
    """What `measure_posts` found, as lines of text."""
    yield f"{'class':28}{'posts':>6}  {'answered at all':22}{'with a crisis text':22}{'of its own class':22}"
    for name, row in measured["classes"].items():
        cells = "".join(f"{interval(row[column]):22}" for column in ("answered", "crisis", "own"))
        yield f"{name:28}{row['count']:6}  {cells}".rstrip()
    yield ""
    yield " " * 22 + "".join(f"{name[:11]:>12}" for name in measured["columns"])
    for name, counts in measured["confusion"].items():
        yield f"{name:22}" + "".join(f"{count:12}" for count in counts)
    yield f"\ndecided by: {decided_line(measured)}"


def decided_line(measured: dict[str, Any]) -> str:
    """How many messages were answered because of rules, and because of the classifier by its probability."""
    return "; ".join(f"{name}: {count}" for name, count in measured["decided"].items()) or "nothing"


def interval(one: dict[str, Any]) -> str:
    """A share and its interval as text."""
    return "–" if one["share"] is None else f"{one['share']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"


def _read(path: Path, read: Callable[[str, dict[str, Any]], Item]) -> tuple[list[Item], list[str]]:
    good: list[Item] = []
    bad: list[str] = []
    for where, row in read_jsonl(path):
        try:
            if not isinstance(row, dict):
                raise row if isinstance(row, RowError) else RowError("not a JSON object")
            good.append(read(where, row))
        except KeyError as error:
            bad.append(f"{where}: {error} is missing or unknown")
        except (ValueError, TypeError, AttributeError) as error:
            bad.append(f"{where}: {error}")
    if not good:
        raise UserError(f"{path}: no line can be used{f'; {bad[0]}' if bad else ', the file is empty'}")
    return good, bad


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a text is no string")
    return value


SAFETY = "safety.json"  # in the folder of a run
OWN = "the package's own sentences, by which its rules were widened and its classifier trained"


def measure_safety(
    posts: Path | None,
    dialogues: Path | None,
    run: Path | None,
    learned: bool = True,
    second_opinion: str | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Measure, and write the figures into the folder `run` if there is one. Returns them and the bad lines.

    Args:
      posts: labelled messages (see `read_posts`); the package's own sentences if None.
      dialogues: dialogues (see `read_turns`).
      run: a run, whose evaluations hold what its models answered.
      learned: with the gate's classifier, or by its rules alone.
      second_opinion: the endpoint that is asked about what the gate lets pass, `URL#MODEL`.

    Raises:
      UserError: a file cannot be read, or `run` is not a run.
    """
    if run is not None and not (run / "state.json").is_file():
        raise UserError(f"{run}: is not a run (it has no state.json); give a folder made by psyche sft or psyche grpo")
    labelled, bad = read_posts(posts) if posts is not None else (own_sentences(), [])
    source = posts.name if posts is not None else OWN
    by = (learned, second_opinion)
    measured: dict[str, Any] = {"posts": {"source": source, "set_aside": len(bad), **measure_posts(labelled, *by)}}
    if dialogues is not None:
        turns, faulty = read_turns(dialogues)
        bad += faulty
        measured["dialogues"] = {"source": dialogues.name, "set_aside": len(faulty), **measure_turns(turns, *by)}
    if run is not None:
        measured["replies"] = measure_replies(_answers(run))
        write_json(run / SAFETY, measured)
    return measured, bad


def safety_lines(measured: dict[str, Any]) -> Iterator[str]:
    """The figures as text."""
    posts = measured["posts"]
    yield f"crisis gate on {posts['count']} messages ({posts['source']})"
    yield from posts_table(posts)
    if talk := measured.get("dialogues"):
        yield f"\n{talk['dialogues']} dialogues ({talk['source']}), {talk['turns']} turns of persons"
        yield f"turns answered by a fixed text: {interval(talk['flagged_turns'])}"
        yield f"dialogues with such a turn:     {interval(talk['flagged_dialogues'])}"
        yield f"decided by:                     {decided_line(talk)}"
        yield f"counsellors' turns withheld:    {interval(talk['counsellors']['withheld'])}"
    if replies := measured.get("replies"):
        yield f"\nanswers in the run's evaluations that the output filter withholds or changes, of {replies['count']}: "
        yield f"{interval(replies['withheld'])} {replies['by_kind'] or ''}".rstrip()


def _answers(run: Path) -> Iterator[str]:
    for path in sorted((run / "evaluations").glob("*.json")):
        content = read_json(path)
        items = content.get("items") if isinstance(content, dict) else None
        for item in items if isinstance(items, list) else ():
            if isinstance(item, dict) and isinstance(item.get("response"), str):
                yield item["response"]
