"""Planted duplicates of kinds that the rule of `synth/duplicates.py` was not written for: other forms of questions, and
edits that none of its lists knows. Only counted, never tuned on (`planted.py --held-out`)."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import yaml
from support.planted import count, with_options

from psyche_jax.data.records import Question

_WORDS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
PEOPLE: list[str] = _WORDS["people"]
TROUBLES: list[str] = _WORDS["troubles"]
EVENTS: list[str] = _WORDS["events"]
FINDINGS: list[str] = _WORDS["findings"]
CHOICES: list[str] = _WORDS["choices"]
LAWS: list[str] = _WORDS["laws"]
# Words that mean the same here; none is in the lists of the rule.
OTHER_WORDS: dict[str, str] = _WORDS["other_words"]
OPPOSITES: dict[str, str] = _WORDS["opposites"]
DUPLICATES = ("other words", "unlisted name", "merged sentences", "swapped clauses", "lead-in", "typing error")
LOOK_ALIKES = ("opposite", "other trouble", "other event", "other unit", "other ask", "other options")


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a question is put together from."""

    form: int
    who: str
    age: int
    first: str
    second: str
    event: str
    unit: str
    ask: str
    options: tuple[str, ...]
    right: int

    def question(self, merged: bool = False, swapped: bool = False) -> Question:
        """The question, with its sentences as one or its clauses the other way round."""
        first, second = (self.second, self.first) if swapped else (self.first, self.second)
        stop = "，" if merged else "。"
        if self.form == 0:
            stem = (
                f"{self.who}今年{self.age}岁，{self.event}以后开始{first}，时常{second}{stop}"
                f"{'在' if not merged else ''}{self.unit}过去了仍未好转。咨询师{self.ask}应该做的是"
            )
        else:
            stem = f"研究者请{self.age}名志愿者完成任务，发现{first}、{second}{stop}这一结果最能支持{self.ask}哪种理论"
        return Question(stem, dict(zip("ABCD", self.options, strict=True)), "ABCD"[self.right], "single")


def make_parts(random_: random.Random, number: int) -> Parts:
    """Parts of one of two forms."""
    form = number % 2
    first, second = random_.sample(FINDINGS if form else TROUBLES, 2)
    options = random_.sample(LAWS if form else CHOICES, 4)
    ask = random_.choice(["以上", "其中", "当今"] if form else ["首先", "随后", "最后"])
    unit = random_.choice(["三周", "三个月", "半年", "两年"])
    who, event = random_.choice(PEOPLE), random_.choice(EVENTS)
    return Parts(
        form, who, random_.randint(12, 80), first, second, event, unit, ask, tuple(options), random_.randrange(4)
    )


def duplicate(parts: Parts, random_: random.Random, kind: str) -> Question:
    """The same question, edited."""
    order = random_.sample(range(4), 4)
    if kind == "unlisted name":
        parts = dataclasses.replace(parts, who=random_.choice([name for name in PEOPLE if name != parts.who]))
    question = parts.question(merged=kind == "merged sentences", swapped=kind == "swapped clauses")
    stem = question.stem
    if kind == "other words":
        for word, other in OTHER_WORDS.items():
            stem = stem.replace(word, other)
    elif kind == "lead-in":
        stem = f"根据所给材料作答：{stem}什么？"
    elif kind == "typing error":
        place = random_.randrange(len(stem) - 2)
        stem = stem[:place] + stem[place + 1] + stem[place] + stem[place + 2 :]
    elif kind == "unlisted name" and parts.form:
        stem = stem.replace("志愿者", "被试")
    return dataclasses.replace(with_options(question, order), stem=stem, id="")


def look_alike(parts: Parts, random_: random.Random, kind: str) -> Question:
    """Another question in nearly the same words."""
    pool = FINDINGS if parts.form else TROUBLES
    if kind == "opposite" and parts.form:
        word = next((word for word in OPPOSITES if parts.first.endswith(word)), None)
        first = parts.first.removesuffix(word) + OPPOSITES[word] if word else f"没有{parts.first}"
        parts = dataclasses.replace(parts, first=first)
    elif kind in ("opposite", "other trouble"):
        others = [one for one in pool if one not in (parts.first, parts.second)]
        parts = dataclasses.replace(parts, second=random_.choice(others))
    elif kind == "other event" and not parts.form:
        parts = dataclasses.replace(parts, event=random_.choice([one for one in EVENTS if one != parts.event]))
    elif kind in ("other unit", "other event"):
        units = [one for one in ("三周", "三个月", "半年", "两年") if one != parts.unit]
        parts = dataclasses.replace(parts, unit=random_.choice(units), age=parts.age + 3)
    elif kind == "other ask" and not parts.form:
        parts = dataclasses.replace(
            parts, ask=random_.choice([one for one in ("首先", "随后", "最后") if one != parts.ask])
        )
    else:
        left = [one for one in (LAWS if parts.form else CHOICES) if one not in parts.options]
        parts = dataclasses.replace(parts, options=tuple(random_.sample(left, 4)))
    return parts.question()


def measure_held_out(pairs: int, seed: int = 20261124, twins: str | None = None) -> dict[str, Any]:
    """Recall and precision, as `planted.measure`."""
    random_ = random.Random(seed)
    made: dict[str, Parts] = {}
    for number in range(20 * pairs):
        parts = make_parts(random_, number)
        made.setdefault(parts.question().stem, parts)
        if len(made) == 2 * pairs:
            break
    bases = list(made.values())
    planted = []
    for index in range(pairs):
        kind, other = DUPLICATES[index // 2 % len(DUPLICATES)], LOOK_ALIKES[index // 2 % len(LOOK_ALIKES)]
        planted.append((duplicate(bases[index], random_, kind), bases[index].question().id, kind))
        planted.append((look_alike(bases[pairs + index], random_, other), None, other))
    random_.shuffle(planted)
    return count([parts.question() for parts in bases], planted, twins)
