"""Crisis classes of a message: written rules, then a small classifier over characters."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import yaml

WEIGHTS = "classifier.npz"
_LONGEST = 5  # characters of an n-gram
_APART = 4  # places between the two characters of a pair, at most
_PIECE = 150  # characters of a long text that are looked at together: what it was trained on is seldom longer
_STEP = 100
SEPARATOR = "\n"  # between n-grams in the file: no n-gram holds it
_GAP = "\0"  # between the characters of a pair


@dataclass(frozen=True)
class Classifier:
    """Multinomial logistic regression: `classes` from the least to the most urgent, the first `harmless` no crisis."""

    classes: tuple[str, ...]
    harmless: int
    vocabulary: dict[str, int]
    rarity: np.ndarray  # of each n-gram: its inverse document frequency
    weights: np.ndarray  # n-grams x classes
    bias: np.ndarray
    threshold: float  # least probability of all crisis classes together that counts
    data: str  # hash of what it was trained on

    def decide(self, text: str) -> tuple[str, float] | None:
        """The likeliest crisis class and the probability that it is any, if that reaches the threshold.

        `text` is normalized as rules read it. A long one is looked at in overlapping pieces; the likeliest counts.
        """
        found = max((self.probabilities(piece) for piece in pieces(text)), key=self.crisis)
        probability = self.crisis(found)
        if probability < self.threshold:
            return None
        return self.classes[self.harmless + int(found[self.harmless :].argmax())], probability

    def crisis(self, probabilities: np.ndarray) -> float:
        """The probability of all crisis classes together."""
        return float(probabilities[self.harmless :].sum())

    def probabilities(self, text: str) -> np.ndarray:
        """Of each class, for a text that is not cut."""
        rows = [row for gram in ngrams(text) if (row := self.vocabulary.get(gram)) is not None]
        scores = self.bias.copy()
        if rows:
            values = self.rarity[rows]
            scores += values @ self.weights[rows] / np.sqrt(values @ values)
        exponentials = np.exp(scores - scores.max())
        return exponentials / exponentials.sum()


def ngrams(text: str) -> set[str]:
    """All runs of up to five characters, and pairs with up to three others between; the ends count as characters."""
    text = f"^{text.replace(SEPARATOR, ' ')}$"
    runs = {text[start : start + size] for size in range(1, _LONGEST + 1) for start in range(len(text) - size + 1)}
    pairs = (zip(text, text[apart:], strict=False) for apart in range(2, _APART + 1))
    return runs.union(*({f"{first}{_GAP}{second}" for first, second in pair} for pair in pairs))


def pieces(text: str) -> Iterator[str]:
    """Overlapping parts of a text that are no longer than what the classifier knows."""
    for start in range(0, max(len(text) - (_PIECE - _STEP), 1), _STEP):
        yield text[start : start + _PIECE]


def load(path: Path) -> Classifier:
    """A model that `scripts/crisis/train_classifier.py` wrote. No code is run from the file."""
    with np.load(path, allow_pickle=False) as file:
        grams = file["vocabulary"].tobytes().decode().split(SEPARATOR)
        return Classifier(
            tuple(file["classes"].tolist()),
            int(file["harmless"]),
            {gram: row for row, gram in enumerate(grams)},
            file["rarity"].astype(np.float32),
            file["weights"].astype(np.float32),
            file["bias"],
            float(file["threshold"]),
            str(file["data"]),
        )


@cache
def classifier() -> Classifier:
    """The one in the package, read once."""
    with as_file(files("psyche_jax.serve.crisis") / WEIGHTS) as path:
        return load(path)


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
    """The class of a message and what says so: names of rules, or `classifier` with a band; empty for none."""

    risk: Risk
    rules: tuple[str, ...] = ()
    learned: bool = False  # the classifier says so


def classify(text: str, learned: bool = True) -> Assessment:
    """The class of what somebody wrote. Local, and quick enough for every message.

    Rules come first. Where they find no crisis, the classifier may (`learned`); it never takes one back.
    A long text is read in overlapping parts, so that its cost grows with its length only, and has the class of its most
    urgent part.
    """
    text = normalize(text)
    parts = (text[start : start + _PART] for start in range(0, max(len(text) - _OVERLAP, 1), _PART - _OVERLAP))
    found = max(map(_classify_part, parts), key=lambda assessment: assessment.risk.severity)
    if learned and found.risk.severity <= Risk.EXPLORATION.severity and (decided := classifier().decide(text)):
        name, probability = decided
        band = min(int(probability * 10), 9) / 10
        return Assessment(Risk(name), (f"classifier, {band:.1f} to {band + 0.1:.1f}",), learned=True)
    return found


def _classify_part(text: str) -> Assessment:
    book = rule_book()
    for rule in book.set_aside:
        text = rule.pattern.sub(_BLANK, text)
    subjects = []
    for rule in book.check_in:
        text, count = rule.pattern.subn(_BLANK, text)
        if count:
            subjects.append(rule.name)
    for risk in sorted(book.crisis, key=lambda risk: -risk.severity):
        said = text
        if risk is Risk.PASSIVE_IDEATION:  # what is wished on others is not wished for oneself
            for rule in book.crisis[Risk.HARM_TO_OTHERS]:
                said = rule.pattern.sub(_BLANK, said)
        if found := tuple(rule.name for rule in book.crisis[risk] if rule.pattern.search(said)):
            return Assessment(risk, found)
    return Assessment(Risk.EXPLORATION, tuple(subjects)) if subjects else Assessment(Risk.NONE)


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
