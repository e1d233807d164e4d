"""Crisis classes of a message: written rules, and a small classifier over characters and what the rules say."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import yaml

WEIGHTS = "classifier.npz"
_LONGEST = 4  # characters of an n-gram
_APART = 4  # places between the two characters of a pair, at most
SEPARATOR = "\n"  # between n-grams in the file: no n-gram holds it
_GAP = "\0"  # between the characters of a pair


_BLANK = "□"
_PART = 400  # characters of a long text that are read at once
_OVERLAP = 60
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


EXPLICIT = Risk.ACTIVE_IDEATION  # from here on what a rule says stands


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
    """The class of a message and what says so: names of rules, or a model and a band of probability; empty: none."""

    risk: Risk
    rules: tuple[str, ...] = ()
    learned: bool = False  # a model says so, and no rule


@dataclass(frozen=True)
class Classifier:
    """Logistic regressions over runs of characters and the classes whose rules match.

    The first column of `weights` [n-grams and classes, 1 + classes] says whether a message is answered by a fixed text,
    the others by which: that of the highest score. `classes` are all but none.
    """

    classes: tuple[Risk, ...]
    vocabulary: dict[str, int]
    rarity: np.ndarray  # of each n-gram: its inverse document frequency
    weights: np.ndarray
    bias: np.ndarray
    threshold: float  # least probability that a message is to be answered
    data: tuple[str, str]  # hashes of the written sentences and of the posts that it was trained on

    def scores(self, text: str, hits: Iterable[Risk]) -> np.ndarray:
        """Float [1 + classes], for a text as `rule_hits` leaves it and the classes whose rules match it."""
        rows = [row for gram in ngrams(text) if (row := self.vocabulary.get(gram)) is not None]
        rules = [len(self.vocabulary) + self.classes.index(risk) for risk in hits]
        values = self.rarity[rows]
        norm = np.sqrt(values @ values) or 1.0
        return self.bias + values @ self.weights[rows] / norm + self.weights[rules].sum(axis=0)

    def decide(self, text: str, hits: Iterable[Risk]) -> tuple[Risk, float]:
        """The likeliest class (none below the threshold), and the probability that the message is to be answered."""
        scores = self.scores(text, hits)
        probability = float(1 / (1 + np.exp(-scores[0])))
        likeliest = self.classes[int(scores[1:].argmax())]
        return likeliest if probability >= self.threshold else Risk.NONE, probability


def ngrams(text: str) -> set[str]:
    """All runs of up to four characters, and pairs with up to three others between; the ends count as characters."""
    text = f"^{text.replace(SEPARATOR, ' ')}$"
    runs = {text[start : start + size] for size in range(1, _LONGEST + 1) for start in range(len(text) - size + 1)}
    pairs = (zip(text, text[apart:], strict=False) for apart in range(2, _APART + 1))
    return runs.union(*({f"{first}{_GAP}{second}" for first, second in pair} for pair in pairs))


def load(path: Path) -> Classifier:
    """A model that `scripts/crisis/train_classifier.py` wrote. No code is run from the file."""
    with np.load(path, allow_pickle=False) as file:
        grams = file["vocabulary"].tobytes().decode().split(SEPARATOR)
        sentences, posts = file["data"].tolist()
        return Classifier(
            tuple(map(Risk, file["classes"].tolist())),
            {gram: row for row, gram in enumerate(grams)},
            file["rarity"].astype(np.float32),
            file["weights"].astype(np.float32),
            file["bias"],
            float(file["threshold"]),
            (sentences, posts),
        )


@cache
def classifier() -> Classifier:
    """The one in the package, read once."""
    with as_file(files("psyche_jax.serve.crisis") / WEIGHTS) as path:
        return load(path)


def classify(text: str, learned: bool = True) -> Assessment:
    """The class of what somebody wrote. Local, and quick enough for every message.

    What rules say of attempts, plans and a wish to kill oneself stands. Of anything else the classifier decides, which
    knows what rules said (without `learned`: they alone).
    A long text is read in overlapping parts, so that its cost grows with its length only, and has the class of its most
    urgent part.
    """
    model = classifier() if learned else None
    return max((assess(part, model) for part in parts(normalize(text))), key=lambda one: one.risk.severity)


def parts(text: str) -> Iterator[str]:
    """What of a text is looked at together."""
    for start in range(0, max(len(text) - _OVERLAP, 1), _PART - _OVERLAP):
        yield text[start : start + _PART]


def assess(text: str, model: Classifier | None) -> Assessment:
    """The class of a normalized text that is not cut; None: by the rules alone."""
    said, hits = rule_hits(text)
    risk = max(hits, key=lambda risk: risk.severity, default=Risk.NONE)
    by_rules = Assessment(risk, hits.get(risk, ()))
    if model is None or risk.severity >= EXPLICIT.severity:
        return by_rules
    likeliest, probability = model.decide(said, hits)
    if likeliest is Risk.NONE:
        return Assessment(Risk.NONE)
    if likeliest is risk or risk.severity > Risk.EXPLORATION.severity:
        return by_rules
    return Assessment(likeliest, (f"classifier, {band(probability)}",), learned=True)


def band(probability: float) -> str:
    """The tenth in which a probability lies, for the log."""
    low = min(int(probability * 10), 9) / 10
    return f"{low:.1f} to {low + 0.1:.1f}"


def rule_hits(text: str) -> tuple[str, dict[Risk, tuple[str, ...]]]:
    """A normalized text without what is set aside, and the classes whose rules match it, with their names."""
    book = rule_book()
    for rule in book.set_aside:
        text = rule.pattern.sub(_BLANK, text)
    kept, subjects = text, []
    for rule in book.check_in:
        text, count = rule.pattern.subn(_BLANK, text)
        if count:
            subjects.append(rule.name)
    hits = {Risk.EXPLORATION: tuple(subjects)}
    for risk, rules in book.crisis.items():
        said = text
        if risk is Risk.PASSIVE_IDEATION:  # what is wished on others is not wished for oneself
            for rule in book.crisis[Risk.HARM_TO_OTHERS]:
                said = rule.pattern.sub(_BLANK, said)
        hits[risk] = tuple(rule.name for rule in rules if rule.pattern.search(said))
    return kept, {risk: names for risk, names in hits.items() if names}


def normalize(text: str) -> str:
    """One way of writing: NFKC, simplified characters, no invisible ones, known spellings put right."""
    text = unicodedata.normalize("NFKC", text).lower().translate(_TRADITIONAL)
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Mn") or c == "\n")
    text = text.replace("’", "'").translate(_PUNCTUATION)
    text = re.sub(r"(?<=[^\x00-\x7f])\s+(?=[^\x00-\x7f])", ",", text)  # a space is a pause in Chinese
    text = re.sub(r"(.)\1{5,}", lambda run: run[1] * 5, text)
    for word, pattern in rule_book().spellings:
        text = pattern.sub(word, text)
    return text


@cache
def rule_book() -> RuleBook:
    """rules.yaml, compiled once."""
    data = yaml.safe_load((files("psyche_jax.serve.crisis") / "rules.yaml").read_text(encoding="utf-8"))
    terms = {name: join_lines(term) for name, term in data["terms"].items()}

    def rules(entries: list[dict[str, Any]]) -> tuple[Rule, ...]:
        return tuple(read_rule(entry, terms) for entry in entries)

    return RuleBook(
        tuple((word, re.compile(pattern)) for word, pattern in data["spellings"].items()),
        rules(data["set_aside"]),
        rules(data["check_in"]),
        {Risk(name): rules(entries) for name, entries in data["crisis"].items()},
    )


def read_rule(entry: dict[str, Any], terms: dict[str, str]) -> Rule:
    """One entry of a data file of rules, its pattern compiled with the <terms> filled in."""
    pattern = re.sub(r"<(\w+)>", lambda term: terms[term[1]], join_lines(entry["pattern"]))
    examples, counterexamples = entry["examples"], entry.get("counterexamples", ())
    return Rule(entry["name"], re.compile(pattern), tuple(examples), tuple(counterexamples))


def join_lines(pattern: str) -> str:
    """A pattern that is written on several lines, as one."""
    return "".join(line.strip() for line in pattern.splitlines())
