"""Control of questions: duplicates out, LLMs vote on what is left, people see what the votes leave open."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Annotated, Any, TypeAlias

from pydantic import Field

from psyche_jax.data.records import Question, question_text
from psyche_jax.synth.asking import Asker, SetAsideError, read_json
from psyche_jax.synth.config import ControlSection
from psyche_jax.synth.duplicates import Duplicates, Twin
from psyche_jax.synth.stages import Outcome

Score: TypeAlias = Annotated[int, Field(ge=1, le=5, strict=True)]
CRITERIA = ("correct", "clear", "options", "worth")


@dataclass(frozen=True)
class Vote:
    """What one LLM says of a question, once."""

    correct: Score
    clear: Score
    options: Score
    worth: Score
    reason: str = ""


@dataclass(frozen=True)
class Compared:
    """What an LLM says of two questions."""

    same: Annotated[bool, Field(strict=True)]
    reason: str = ""


def with_twins(questions: Iterable[Question], section: ControlSection) -> Iterator[tuple[Question, Twin | None]]:
    """Each question with the earlier one that it repeats."""
    with contextlib.closing(Duplicates(section)) as duplicates:
        for question in questions:
            yield question, duplicates.find(question)


async def control(item: tuple[Question, Twin | None], asker: Asker, section: ControlSection) -> Outcome:
    """Set duplicates aside; let the LLMs vote; keep, drop, or leave to a person."""
    question, twin = item
    outcome = Outcome()
    if twin is not None and twin.doubtful is not None:
        same = await _same(question, twin.doubtful, asker, section)
        outcome.counts["twins/asked about"] += 1
        outcome.counts[f"twins/{'no usable reply' if same is None else 'the same' if same else 'not the same'}"] += 1
        twin = Twin(twin.id) if same else None
    if twin is not None and not twin.conflict:
        outcome.drop(f"{'exact' if twin.exact else 'near'} duplicate: of {twin.id}", question)
        return outcome
    flags = [f"another key than {twin.id}, which reads the same"] if twin is not None else []
    votes = [
        (llm, await asker.ask(llm, "filter", _values(question), read_json(Vote), sample))
        for llm in section.llms
        for sample in range(section.votes)
    ]
    if votes:
        meta = dict(question.meta)
        meta["scores"] = {name: round(fmean(getattr(vote, name) for _, vote in votes), 3) for name in CRITERIA}
        meta["llms"] = {**meta.get("llms", {}), "filter": list(section.llms)}
        meta["prompts"] = {**meta.get("prompts", {}), "filter": asker.prompts["filter"].id}
        question = replace(question, meta=meta)
        ayes = sum(min(getattr(vote, name) for name in CRITERIA) >= section.least_score for _, vote in votes)
        against = next((vote.reason for _, vote in votes if min(_scores(vote)) < section.least_score), "")
        if 2 * ayes <= len(votes):
            outcome.drop(f"filter: {ayes} of {len(votes)} votes for it; {against}", question)
            return outcome
        if ayes < len(votes):
            flags.append(f"{ayes} of {len(votes)} votes for it; {against}")
    if section.review == "all" or (flags and section.review == "flagged"):
        outcome.keep("review", replace(question, meta={**question.meta, "flags": flags}))
    elif twin is not None:
        outcome.drop(f"conflicting key: {flags[0]}", question)
    else:
        outcome.keep("questions", question)
    return outcome


async def _same(question: Question, other: Question, asker: Asker, section: ControlSection) -> bool | None:
    """Whether an LLM takes both for the same question; None if it does not say."""
    assert section.twins is not None
    values = {f"{key}_{place}": value for place, one in enumerate((other, question), start=1)
              for key, value in _values(one).items()}  # fmt: skip
    try:
        return (await asker.ask(section.twins, "twins", values, read_json(Compared))).same
    except SetAsideError:
        return None


def _scores(vote: Vote) -> list[int]:
    return [getattr(vote, name) for name in CRITERIA]


def _values(question: Question) -> dict[str, Any]:
    return {"question": question_text(question), "answer": question.answer}
