"""Train the crisis gate's classifier on written sentences, and choose its threshold on authors that it did not see.

    python scripts/crisis/train_classifier.py            # rewrites psyche_jax/serve/crisis/classifier.npz
    python scripts/crisis/train_classifier.py --out new.npz --false-alarms 0.02

The sentences are those in training/ and the part `before` of the package's sentences.yaml. Multinomial logistic
regression on character n-grams. For the threshold the authors are dealt into folds; the sentences of each fold, alone
and joined to longer messages, are classed by a model that saw none of its authors.
"""

import argparse
import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import yaml
from scipy import optimize, sparse

from psyche_jax.serve.crisis import Risk, classify
from psyche_jax.serve.crisis.classify import SEPARATOR, WEIGHTS, Classifier, ngrams, normalize, pieces
from psyche_jax.serve.crisis.measure import own_sentences

HERE = Path(__file__).parent
DATA = HERE / "training"
PACKAGE = HERE.parents[1] / "psyche_jax" / "serve" / "crisis"
CLASSES = tuple(risk.value for risk in Risk)
HARMLESS = Risk.EXPLORATION.severity + 1
LEAST = 2  # sentences that an n-gram must stand in
STRENGTH = 10.0  # inverse of the penalty on squared weights
FOLDS = 5


@dataclass(frozen=True)
class Sentence:
    """What an author wrote, and the index of its class."""

    author: str
    text: str
    label: int


def main() -> None:
    """Train, choose, write, and say how it did on authors it had not seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PACKAGE / WEIGHTS)
    parser.add_argument("--false-alarms", type=float, default=0.005, help="share of unseen authors' harmless messages")
    parser.add_argument("--seed", type=int, default=0, help="of the folds and of what is joined")
    arguments = parser.parse_args()
    sentences = read()
    print(f"{len(sentences)} sentences of {len({one.author for one in sentences})} authors:", counts(sentences))
    threshold = choose(sentences, arguments.false_alarms, arguments.seed)
    trained = train(sentences, threshold, fingerprint(sentences))
    write(trained, arguments.out)
    print(f"{arguments.out}: {len(trained.vocabulary)} n-grams, {arguments.out.stat().st_size} bytes")


def write(model: Classifier, path: Path) -> None:
    """Write the file that `classify.load` reads; the same model gives the same bytes."""
    np.savez_compressed(
        path,
        classes=np.array(model.classes),
        harmless=np.array(model.harmless),
        vocabulary=np.frombuffer(SEPARATOR.join(model.vocabulary).encode(), np.uint8),
        rarity=model.rarity.astype(np.float16),
        weights=model.weights.astype(np.float16),
        bias=model.bias.astype(np.float32),
        threshold=np.array(model.threshold),
        data=np.array(model.data),
    )


def read() -> list[Sentence]:
    """All sentences, in order."""
    authors = {}
    for path in sorted(DATA.glob("*.yaml")):
        authors |= yaml.safe_load(path.read_text(encoding="utf-8"))
    written = [
        Sentence(author, normalize(text), CLASSES.index(label))
        for author, said in authors.items()
        for label, texts in said.items()
        if label != "who"
        for text in texts
    ]
    return written + [
        Sentence("sentences.yaml", normalize(post.text), CLASSES.index(post.label)) for post in own_sentences("before")
    ]


def fingerprint(sentences: Sequence[Sentence]) -> str:
    """A hash of the data, by which weights of other data are recognized."""
    return hashlib.sha256(repr([astuple(one) for one in sentences]).encode()).hexdigest()


def counts(sentences: Sequence[Sentence]) -> dict[str, int]:
    """How many there are of each class."""
    found = Counter(one.label for one in sentences)
    return {name: found[label] for label, name in enumerate(CLASSES)}


def train(sentences: Sequence[Sentence], threshold: float, data: str) -> Classifier:
    """The model that fits the sentences best under the penalty."""
    grams = [ngrams(one.text) for one in sentences]
    frequency = Counter(gram for one in grams for gram in one)
    vocabulary = {gram: row for row, gram in enumerate(sorted(g for g, count in frequency.items() if count >= LEAST))}
    rarity = np.array([np.log((1 + len(grams)) / (1 + frequency[gram])) + 1 for gram in vocabulary])
    columns = [sorted(vocabulary[gram] for gram in one if gram in vocabulary) for one in grams]
    values = [rarity[one] / np.linalg.norm(rarity[one]) for one in columns]
    starts = np.cumsum([0, *map(len, columns)])
    features = sparse.csr_matrix(
        (np.concatenate(values), np.concatenate(columns), starts), shape=(len(grams), len(vocabulary))
    )
    weights, bias = fit(features, np.array([one.label for one in sentences]))
    return Classifier(CLASSES, HARMLESS, vocabulary, rarity, weights, bias, threshold, data)


def fit(features: sparse.csr_matrix, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights and bias of least cross entropy and squared weights."""
    rows, size = features.shape
    targets = np.eye(len(CLASSES))[labels]

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = np.split(parameters.reshape(size + 1, -1), [size])
        scores = features @ weights + bias
        scores -= scores.max(axis=1, keepdims=True)
        logarithms = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        errors = np.exp(logarithms) - targets
        value = -logarithms[np.arange(rows), labels].sum() + (weights**2).sum() / (2 * STRENGTH)
        slope = np.concatenate([features.T @ errors + weights / STRENGTH, errors.sum(axis=0, keepdims=True)])
        return value, slope.ravel()

    start = np.zeros((size + 1) * len(CLASSES))
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 100}).x
    weights, bias = np.split(found.reshape(size + 1, -1), [size])
    return weights, bias[0]


def choose(sentences: Sequence[Sentence], false_alarms: float, seed: int) -> float:
    """The threshold that lets through so many harmless messages of authors that the model did not see."""
    authors = sorted({one.author for one in sentences})
    random.Random(seed).shuffle(authors)
    fold = {author: place % FOLDS for place, author in enumerate(authors)}
    messages, found = [], []
    for number in range(FOLDS):
        model = train([one for one in sentences if fold[one.author] != number], 0.0, "")
        unseen = joined([one for one in sentences if fold[one.author] == number], seed)
        messages += unseen
        found += [max(model.crisis(model.probabilities(piece)) for piece in pieces(one.text)) for one in unseen]
    labels, scores = np.array([one.label for one in messages]), np.array(found)
    rules = np.array([classify(one.text, learned=False).risk.severity for one in messages])
    threshold = float(np.round(np.quantile(scores[labels == 0], 1 - false_alarms), 3))
    print(f"threshold {threshold}; of the messages of unseen authors are answered:")
    print(f"{'class':22}{'messages':>10}{'rules':>14}{'classifier':>14}{'either':>14}")
    learned = scores >= threshold
    for label, name in enumerate(CLASSES):
        own = labels == label
        shares = [one[own].mean() for one in (rules > 0, learned, learned | (rules > 0))]
        print(f"{name:22}{own.sum():10}" + "".join(f"{share:14.3f}" for share in shares))
    return threshold


def joined(sentences: Sequence[Sentence], seed: int) -> list[Sentence]:
    """The sentences, and as many messages of two to four by one author, of the most urgent class within."""
    draw = random.Random(seed)
    messages = list(sentences)
    for one in sentences:
        others = [other for other in sentences if other.author == one.author and other.label == 0]
        parts = [one, *draw.sample(others, min(draw.randint(1, 3), len(others)))]
        draw.shuffle(parts)
        messages.append(Sentence(one.author, "。".join(part.text for part in parts), one.label))
    return messages


if __name__ == "__main__":
    main()
