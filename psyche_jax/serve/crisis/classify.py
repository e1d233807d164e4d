"""The class of a message: what its writer says about suicide, self-harm or violence, by the rules in rules.yaml."""

import re
import unicodedata
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

_BLANK = "□"
_TRADITIONAL = str.maketrans(
    "殺輕遺書結束離開這個們樓藥農煩氣嚇壞麼為會時後說覺說沒還讓媽爺難過給跟對應該從來無夠許東單車擔燒絕對傷殘劃臉頭發體驚慌憂鬱願點兒歲將動",
    "杀轻遗书结束离开这个们楼药农烦气吓坏么为会时后说觉说没还让妈爷难过给跟对应该从来无够许东单车担烧绝对伤残划脸头发体惊慌忧郁愿点儿岁将动",
)
_PUNCTUATION = str.maketrans({"，": ",", "。": ".", "、": ",", "…": ".", "～": ",", "~": ",", "·": ","})


class Risk(StrEnum):
    """Classes of a message, from none to the most urgent."""

    NONE = "none"
    EXPLORATION = "exploration"
    HARM_TO_OTHERS = "harm_to_others"
    SELF_HARM = "self_harm"
    PASSIVE_IDEATION = "passive_ideation"
    ACTIVE_IDEATION = "active_ideation"
    PLAN_OR_PREPARATION = "plan_or_preparation"
    ATTEMPT = "attempt"

    @property
    def severity(self) -> int:
        """0 for none, then upwards."""
        return list(Risk).index(self)


@dataclass(frozen=True)
class Rule:
    """One named pattern of the data file and sentences that it is held to."""

    name: str
    pattern: re.Pattern[str]
    examples: tuple[str, ...]
    counterexamples: tuple[str, ...]


@dataclass(frozen=True)
class RuleBook:
    """rules.yaml, read: see there for what each part does."""

    spellings: tuple[tuple[str, re.Pattern[str]], ...]
    set_aside: tuple[Rule, ...]
    check_in: tuple[Rule, ...]
    crisis: dict[Risk, tuple[Rule, ...]]


@dataclass(frozen=True)
class Assessment:
    """The class of a message and the names of the rules that say so (empty for none)."""

    risk: Risk
    rules: tuple[str, ...] = ()


def classify(text: str) -> Assessment:
    """The class of what somebody wrote. Local, without a model; costs well under a millisecond a sentence."""
    book = rule_book()
    text = normalize(text)
    for rule in book.set_aside:
        text = rule.pattern.sub(_BLANK, text)
    subjects = []
    for rule in book.check_in:
        text, count = rule.pattern.subn(_BLANK, text)
        if count:
            subjects.append(rule.name)
    for risk in sorted(book.crisis, key=lambda risk: -risk.severity):
        if found := tuple(rule.name for rule in book.crisis[risk] if rule.pattern.search(text)):
            return Assessment(risk, found)
    return Assessment(Risk.EXPLORATION, tuple(subjects)) if subjects else Assessment(Risk.NONE)


def normalize(text: str) -> str:
    """One way of writing: NFKC, simplified characters, no invisible ones, known spellings put right."""
    text = unicodedata.normalize("NFKC", text).lower().translate(_TRADITIONAL)
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Mn") or c == "\n")
    text = text.replace("’", "'").translate(_PUNCTUATION)
    text = re.sub(r"(?<=[^\x00-\x7f])\s+(?=[^\x00-\x7f])", ",", text)  # a space is a pause in Chinese
    for word, pattern in rule_book().spellings:
        text = pattern.sub(word, text)
    return text


@cache
def rule_book() -> RuleBook:
    """rules.yaml, compiled once."""
    data = yaml.safe_load((files("psyche_jax.serve.crisis") / "rules.yaml").read_text(encoding="utf-8"))
    terms: dict[str, str] = {}
    for name, term in data["terms"].items():
        terms[name] = _join(term, terms)
    return RuleBook(
        tuple((word, re.compile(_join(pattern, terms))) for word, pattern in data["spellings"].items()),
        _rules(data["set_aside"], terms),
        _rules(data["check_in"], terms),
        {Risk(name): _rules(rules, terms) for name, rules in data["crisis"].items()},
    )


def _rules(entries: list[dict[str, Any]], terms: dict[str, str]) -> tuple[Rule, ...]:
    return tuple(
        Rule(
            entry["name"],
            re.compile(_join(entry["pattern"], terms)),
            tuple(entry["examples"]),
            tuple(entry.get("counterexamples", ())),
        )
        for entry in entries
    )


def _join(pattern: str, terms: dict[str, str]) -> str:
    """A pattern of several lines as one, its <terms> filled in."""
    pattern = "".join(line.strip() for line in pattern.splitlines())
    return re.sub(r"<(\w+)>", lambda term: terms[term[1]], pattern)
