"""Rationales by prompt optimization: P, then T rounds of a candidate prompt for each question (DESIGN of the paper).

Prompt P gives a rationale and an answer; the question is kept only if the answer is right. In each round an LLM writes
another instruction for this question; its rationale takes the place of the old one if its answer is right, else the old
instruction stays.
"""

import hashlib
import re
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from psyche_jax.data.records import Question, question_text
from psyche_jax.rewards.reference import CLOSE, OPEN, extract_letters, split_thought
from psyche_jax.synth.asking import Asker, FaultyReplyError, SetAsideError, read_json
from psyche_jax.synth.config import RationalesSection
from psyche_jax.synth.stages import Outcome

_GIVES_AWAY = re.compile(r"答案|正确(?:选项|的?是)|选项?\s*[A-H]|[A-H]\s*(?:项|选项|正确)|\b[A-H]\b", re.ASCII)
_SHORTEST = 15  # characters of a rationale


@dataclass(frozen=True)
class Answered:
    """A rationale and the letters that follow it."""

    rationale: str
    answer: str


@dataclass(frozen=True)
class Instruction:
    """A candidate for the place of P's instruction."""

    instruction: Annotated[str, Field(min_length=5, max_length=400)]


@dataclass(frozen=True)
class Verdict:
    """Which of two rationales is better: 1, 2, or 0 for neither."""

    better: Annotated[int, Field(ge=0, le=2, strict=True)]
    reason: str = ""


async def write_rationale(question: Question, asker: Asker, section: RationalesSection) -> Outcome:
    """The question with the rationale that came last and whose answer was right, or set aside if P's was wrong."""
    outcome = Outcome()
    text = question_text(question)
    instruction = asker.prompts["instruction"].text()
    best = await _answered(asker, section.llm, text, instruction)
    if best.answer != question.answer:
        outcome.drop(f"wrong answer: {best.answer} where the key is {question.answer}", question)
        return outcome
    taken = []
    for number in range(1, section.rounds + 1):
        try:
            values = {"question": text, "instruction": instruction, "rationale": best.rationale}
            candidate = await asker.ask(section.llm, "improve", values, _read_instruction, sample=number)
            found = await _answered(asker, section.llm, text, candidate)
        except SetAsideError:
            outcome.counts["rounds/no usable reply"] += 1
            continue
        if found.answer != question.answer:
            outcome.counts["rounds/reverted"] += 1
            continue
        if section.judge is not None:
            better = await _judged_better(asker, section.judge, text, best.rationale, found.rationale)
            outcome.counts["judge/asked"] += 1
            if not better:  # the paper's rule would have taken it
                outcome.counts["judge/kept the old one"] += 1
                continue
        outcome.counts["rounds/taken"] += 1
        taken.append(number)
        best, instruction = found, candidate
    prompts = {"rationale": asker.prompts["rationale"].id}
    if section.rounds:
        prompts["improve"] = asker.prompts["improve"].id
    meta = {
        **question.meta,
        "llms": {**question.meta.get("llms", {}), "rationale": section.llm},
        "prompts": {**question.meta.get("prompts", {}), **prompts},
        "rounds_taken": taken,
    }
    outcome.keep("questions", replace(question, rationale=best.rationale, meta=meta))
    return outcome


async def _answered(asker: Asker, llm: str, question: str, instruction: str) -> Answered:
    values = {"question": question, "instruction": instruction}
    return await asker.ask(llm, "rationale", values, read_answered)


def read_answered(text: str) -> Answered:
    """The thought and the letters of a reply in the response format.

    A server whose chat template opens the thought may send what follows `<think>` alone.
    """
    rationale, _ = split_thought(text)
    if rationale is None or CLOSE not in text:
        raise FaultyReplyError("没有按格式先写<think>……</think>再写答案")
    if OPEN in rationale or CLOSE in rationale:
        raise FaultyReplyError("<think></think>只能出现一次")
    if len(rationale) < _SHORTEST:
        raise FaultyReplyError(f"推理太短，不足 {_SHORTEST} 字")
    letters = extract_letters(text)
    if not letters:
        raise FaultyReplyError("最后没有单独一行的“答案：”和选项字母")
    return Answered(rationale, "".join(sorted(letters)))


def _read_instruction(text: str) -> str:
    instruction = read_json(Instruction)(text).instruction.strip()
    if _GIVES_AWAY.search(instruction):
        raise FaultyReplyError("指令提到了答案或选项字母")
    return instruction


async def _judged_better(asker: Asker, judge: str, question: str, old: str, new: str) -> bool:
    """Whether the judge prefers `new`. Which of the two comes first is as good as random, and always the same."""
    swapped = hashlib.sha256(f"{question}{old}{new}".encode()).digest()[0] % 2 == 1
    first, second = (new, old) if swapped else (old, new)
    values = {"question": question, "first": first, "second": second}
    try:
        verdict = await asker.ask(judge, "judge", values, read_json(Verdict))
    except SetAsideError:
        return False
    return verdict.better == (1 if swapped else 2)
