"""Warmer replies to what people wrote; what shows signs of a crisis goes its own way and no LLM answers it."""

import re
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from psyche_jax.data.records import Dialogue, Message
from psyche_jax.serve.crisis.classify import Risk, classify
from psyche_jax.serve.crisis.outputs import check_output
from psyche_jax.synth.asking import Asker, FaultyReplyError, SetAsideError, read_json
from psyche_jax.synth.config import DialoguesSection
from psyche_jax.synth.stages import Outcome

_REFUSAL = re.compile(r"作为(?:一个|一名)?(?:AI|人工智能|语言模型)|我无法(?:协助|帮助|回答|提供)|抱歉，我不能")


@dataclass(frozen=True)
class Rewritten:
    """A reply, rewritten."""

    reply: Annotated[str, Field(min_length=40, max_length=1000)]


@dataclass(frozen=True)
class Checked:
    """What the checker says of a rewritten reply."""

    advice_kept: bool
    safe: bool
    warmer: bool
    fault: str = ""


async def rewrite(dialogue: Dialogue, asker: Asker, section: DialoguesSection) -> Outcome:
    """The dialogue with a warmer reply, or the post on the track of crises, or set aside with the checker's reason."""
    outcome = Outcome()
    post, reply = (turn.content for turn in dialogue.turns)
    found = classify(post)
    if found.risk is not Risk.NONE:
        outcome.counts[f"risk/{found.risk}"] += 1
        outcome.keep(
            "crisis", replace(dialogue, meta={**dialogue.meta, "risk": found.risk, "rules": list(found.rules)})
        )
        return outcome
    values = {"post": post, "reply": reply}
    warmer = await asker.ask(section.llm, "dialogue", values, _read_reply)
    verdict = await asker.ask(section.checker, "check", {**values, "rewritten": warmer}, read_json(Checked))
    for name, what in (("safe", "unsafe"), ("advice_kept", "advice lost"), ("warmer", "not warmer")):
        if not getattr(verdict, name):
            raise SetAsideError(f"{what}: {verdict.fault}")
    meta = {
        **dialogue.meta,
        "llms": {"dialogue": section.llm, "check": section.checker},
        "prompts": {name: asker.prompts[name].id for name in ("dialogue", "check")},
        "rewritten_from": dialogue.id,
    }
    turns = (dialogue.turns[0], Message("assistant", warmer))
    outcome.keep("dialogues", Dialogue(turns, dialogue.source, meta))
    return outcome


def _read_reply(text: str) -> str:
    reply = read_json(Rewritten)(text).reply.strip()
    if _REFUSAL.search(reply):
        raise FaultyReplyError("这是拒绝，不是改写后的回复")
    if (broken := check_output(reply)) is not None:
        raise FaultyReplyError(f"改写里有不安全的内容（{broken.kind}）")
    return reply
