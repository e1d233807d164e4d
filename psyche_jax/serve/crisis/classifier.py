"""A linear model over character n-grams, for what no rule was written for (scripts/train_crisis_classifier.py)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np

WEIGHTS = "classifier.npz"
_LONGEST = 5  # characters of an n-gram
_APART = 4  # places between the two characters of a pair, at most
_PIECE = 150  # characters of a long text that are looked at together: what it was trained on is seldom longer
_STEP = 100
_SEPARATOR = "\n"  # between n-grams in the file: no n-gram holds it
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

    def save(self, path: Path) -> None:
        """Write the file that `load` reads; the same model gives the same bytes."""
        np.savez_compressed(
            path,
            classes=np.array(self.classes),
            harmless=np.array(self.harmless),
            vocabulary=np.frombuffer(_SEPARATOR.join(self.vocabulary).encode(), np.uint8),
            rarity=self.rarity.astype(np.float16),
            weights=self.weights.astype(np.float16),
            bias=self.bias.astype(np.float32),
            threshold=np.array(self.threshold),
            data=np.array(self.data),
        )


def ngrams(text: str) -> set[str]:
    """All runs of up to five characters, and pairs with up to three others between; the ends count as characters."""
    text = f"^{text.replace(_SEPARATOR, ' ')}$"
    runs = {text[start : start + size] for size in range(1, _LONGEST + 1) for start in range(len(text) - size + 1)}
    pairs = (zip(text, text[apart:], strict=False) for apart in range(2, _APART + 1))
    return runs.union(*({f"{first}{_GAP}{second}" for first, second in pair} for pair in pairs))


def pieces(text: str) -> Iterator[str]:
    """Overlapping parts of a text that are no longer than what the classifier knows."""
    for start in range(0, max(len(text) - (_PIECE - _STEP), 1), _STEP):
        yield text[start : start + _PIECE]


def load(path: Path) -> Classifier:
    """A model that `save` wrote. No code is run from the file."""
    with np.load(path, allow_pickle=False) as file:
        grams = file["vocabulary"].tobytes().decode().split(_SEPARATOR)
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
