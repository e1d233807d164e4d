"""Which questions go to SFT and which to RL: several LLMs answer each; one right answer decides."""

from collections import Counter
from dataclasses import replace
from typing import Any

from psyche_jax.data.records import Question, question_text
from psyche_jax.rewards.reference import extract_letters
from psyche_jax.synth.asking import Asked, Asker
from psyche_jax.synth.config import SelectionSection
from psyche_jax.synth.stages import Outcome


async def select(question: Question, asker: Asker, section: SelectionSection) -> Outcome:
    """At least one sample of one LLM right: SFT; all wrong: RL; all LLMs agree on another answer: a person looks.

    `meta.selection` says of each LLM how many of its samples were right and which letters each gave (the rewards'
    strict rule; "" for none), and how difficult the question is: the share of wrong samples.
    """
    template = asker.prompts["answer"]
    messages = template.messages(question=question_text(question))
    answers = {
        llm: [await _letters(asker, Asked(llm, template.id, messages, sample)) for sample in range(section.samples)]
        for llm in section.llms
    }
    right = {llm: sum(answer == question.answer for answer in given) for llm, given in answers.items()}
    total = len(section.llms) * section.samples
    selection: dict[str, Any] = {
        "right": right,
        "answers": answers,
        "samples": section.samples,
        "difficulty": round(1 - sum(right.values()) / total, 4),
    }
    track = "sft" if any(right.values()) else "rl"
    other = agreed_answer(answers)
    if track == "rl" and other is not None and "review" not in question.meta:
        track = "review"
        selection["agreed"] = other
    meta = {
        **question.meta,
        "selection": selection,
        "prompts": {**question.meta.get("prompts", {}), "answer": template.id},
    }
    if track == "review":
        meta["flags"] = [f"all LLMs answer {other}, the key is {question.answer}"]
    outcome = Outcome()
    outcome.counts.update({f"right/{llm}": count for llm, count in right.items()})
    outcome.counts["samples without letters"] += sum(not answer for given in answers.values() for answer in given)
    outcome.counts[f"difficulty/{selection['difficulty']:.1f}"] += 1
    outcome.keep(track, replace(question, meta=meta))
    return outcome


async def _letters(asker: Asker, asked: Asked) -> str:
    """What an LLM answers; what does not come to an answer at all sets the question aside, since it is not wrong."""
    reply = await asker.reply(asked)
    letters = "".join(sorted(extract_letters(reply.text) or ()))
    if letters:
        asker.count(asked, reply)
    else:
        await asker.count_unusable(asked, reply, "no letters after the marker")
    return letters


def agreed_answer(answers: dict[str, list[str]]) -> str | None:
    """The answer that most samples of each of several LLMs give, if it is the same for all."""
    favourites = set()
    for given in answers.values():
        (favourite, count), *_ = Counter(given).most_common(1)
        if not favourite or 2 * count <= len(given):
            return None
        favourites.add(favourite)
    return favourites.pop() if len(answers) > 1 and len(favourites) == 1 else None
