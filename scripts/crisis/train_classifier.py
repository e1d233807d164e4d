"""Train the crisis gate's classifier on labelled posts and written sentences, and say how it does on posts held out.

    python scripts/crisis/train_classifier.py psyguard_valid.jsonl    # rewrites the package's classifier.npz
    python scripts/crisis/train_classifier.py posts.jsonl --out new.npz --false-alarms 0.03

The posts are people's own: JSON lines as `psyche safety --posts` takes them, read and not kept. The sentences were
written: those in training/, the part `before` of the package's sentences.yaml, and the examples of the rules.

Whoever wrote the rules had read the posts, so rules match these better than posts to come. So that the classifier does
not lean on them for that, it sees every text that a rule matches a second time without what the rules say.
"""

import argparse
import hashlib
import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import yaml
from scipy import optimize, sparse

from psyche_jax.serve.crisis import Risk
from psyche_jax.serve.crisis.classify import (
    EXPLICIT,
    SEPARATOR,
    WEIGHTS,
    Classifier,
    assess,
    ngrams,
    normalize,
    parts,
    rule_book,
    rule_hits,
)
from psyche_jax.serve.crisis.measure import own_sentences, read_posts

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "psyche_jax" / "serve" / "crisis"
POSTS = "posts"  # the source of those that people wrote
CLASSES = tuple(Risk)[1:]
LEAST = 3  # texts that an n-gram must stand in
POST = 3.0  # what a post counts for, a sentence being 1
UNRULED = 0.5  # what a text counts for when seen without the rules' word
STRENGTH = 2.0  # inverse of the penalty on squared weights
FOLDS = 10  # of the posts that are held out to measure
INNER_FOLDS = 5  # of those that are left, to choose by
ALIKE = 0.5  # share of the shorter one's runs of three characters: such posts stay in one fold


@dataclass(frozen=True)
class Text:
    """A normalized text and its class; `source`: who wrote it."""

    source: str
    text: str
    label: Risk


class Corpus:
    """Texts as a classifier sees them: rows of which n-grams they have and of which classes' rules match."""

    def __init__(self, texts: Sequence[Text]) -> None:
        self.texts = texts
        self.grams: dict[str, int] = {}
        seen = [rule_hits(one.text) for one in texts]
        found = [[self.grams.setdefault(gram, len(self.grams)) for gram in sorted(ngrams(said))] for said, _ in seen]
        self.counts = _rows(found, len(self.grams))
        self.hits = _rows([[CLASSES.index(risk) for risk in hits] for _, hits in seen], len(CLASSES))
        self.labels = np.array([one.label.severity for one in texts])
        self.posts = np.array([one.source == POSTS for one in texts])
        self.explicit = self.hits[:, EXPLICIT.severity - 1 :].sum(axis=1) > 0


def main() -> None:
    """Train, write, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("posts", type=Path, help="JSONL of labelled posts")
    parser.add_argument("--out", type=Path, default=PACKAGE / WEIGHTS)
    parser.add_argument("--false-alarms", type=float, default=0.045, help="share of unrelated posts that are answered")
    parser.add_argument("--seed", type=int, default=0, help="of the folds")
    arguments = parser.parse_args()
    texts = [*read(arguments.posts), *written()]
    corpus = Corpus(texts)
    posts = np.flatnonzero(corpus.posts)
    print(f"{len(posts)} posts, {len(texts) - len(posts)} sentences")
    threshold = choose(corpus, posts, arguments.false_alarms, arguments.seed)
    trained = train(corpus, np.arange(len(texts)), threshold)
    write(trained, arguments.out)
    size = arguments.out.stat().st_size
    print(f"{arguments.out}: threshold {threshold:.4f}, {len(trained.vocabulary)} n-grams, {size} bytes")
    folds = deal(corpus, posts, FOLDS, arguments.seed)
    measure(corpus, posts, folds, arguments.false_alarms, arguments.seed)


def read(path: Path) -> list[Text]:
    """Posts whose writer's own risk is labelled."""
    posts, bad = read_posts(path)
    for line in bad:
        print(f"skipped: {line}")
    return [Text(POSTS, normalize(post.text), Risk(post.label)) for post in posts if post.label in list(Risk)]


def written() -> list[Text]:
    """All sentences, in order."""
    authors = {}
    for path in sorted((HERE / "training").glob("*.yaml")):
        authors |= yaml.safe_load(path.read_text(encoding="utf-8"))
    book = rule_book()
    rules = [(Risk.NONE, book.set_aside), (Risk.EXPLORATION, book.check_in), *book.crisis.items()]
    return [
        *(
            Text(author, normalize(text), Risk(label))
            for author, said in authors.items()
            for label, texts in said.items()
            if label != "who"
            for text in texts
        ),
        *(Text("sentences.yaml", normalize(post.text), Risk(post.label)) for post in own_sentences("before")),
        *(Text("rules.yaml", normalize(text), risk) for risk, own in rules for rule in own for text in rule.examples),
    ]


def fingerprint(texts: Sequence[Text]) -> str:
    """A hash of the data, by which weights of other data are recognized."""
    return hashlib.sha256(repr([astuple(one) for one in texts]).encode()).hexdigest()


def deal(corpus: Corpus, rows: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold of each of these posts; those that are alike have the same."""
    threes = [column for gram, column in corpus.grams.items() if len(gram) == 3 and "\0" not in gram]
    runs = corpus.counts[rows][:, threes]
    sizes = np.maximum(np.asarray(runs.sum(axis=1)).ravel(), 1)
    shared = (runs @ runs.T).tocoo()
    near = shared.data >= ALIKE * np.minimum(sizes[shared.row], sizes[shared.col])
    graph = sparse.coo_array((shared.data[near], (shared.row[near], shared.col[near])), shape=shared.shape)
    _, group = sparse.csgraph.connected_components(graph, directed=False)
    order = list(range(group.max() + 1))
    random.Random(seed).shuffle(order)
    return np.array(order)[group] % folds


def choose(corpus: Corpus, posts: np.ndarray, false_alarms: float, seed: int) -> float:
    """The threshold with which so many unrelated posts are answered by models that did not see them."""
    fold = deal(corpus, posts, INNER_FOLDS, seed)
    scores = np.zeros(len(posts))
    for number in range(INNER_FOLDS):
        known = np.concatenate([posts[fold != number], np.flatnonzero(~corpus.posts)])
        features = Features(corpus, known)
        ((weights, bias),) = features.fit(known, [corpus.labels[known] > 0])
        scores[fold == number] = features.rows(posts[fold == number]) @ weights + bias
    scores[corpus.explicit[posts]] = np.inf
    alarms = np.sort(scores[corpus.labels[posts] == Risk.NONE.severity])[::-1]
    allowed = int(false_alarms * len(alarms))
    between = (alarms[allowed - 1] + alarms[allowed]) / 2
    return float(1 / (1 + np.exp(-between)))


class Features:
    """Texts as rows of numbers, with the n-grams of some of them."""

    def __init__(self, corpus: Corpus, known: np.ndarray) -> None:
        self.corpus = corpus
        frequency = np.asarray(corpus.counts[known].sum(axis=0)).ravel()
        self.kept = np.flatnonzero(frequency >= LEAST)
        self.rarity = np.log((1 + len(known)) / (1 + frequency[self.kept])) + 1

    def rows(self, which: np.ndarray) -> sparse.csr_array:
        """Float [texts, n-grams + classes]."""
        counts = self.corpus.counts[which][:, self.kept] * self.rarity
        norms = np.sqrt(np.asarray((counts * counts).sum(axis=1)).ravel())
        scaled = sparse.diags_array(1 / np.where(norms > 0, norms, 1)) @ counts
        return sparse.hstack([scaled, self.corpus.hits[which]]).tocsr()

    def fit(self, which: np.ndarray, targets: Sequence[np.ndarray]) -> list[tuple[np.ndarray, float]]:
        """Weights and bias of least cross entropy and squared weights, for each of several targets of the same texts.

        Sentences have a bias of their own, which is forgotten: crises are commoner in them than in posts.
        """
        seen = self.rows(which)
        ruled = np.flatnonzero(self.corpus.hits[which].sum(axis=1))
        unruled = seen[ruled]
        unruled.data[unruled.indices >= len(self.kept)] = 0
        features = sparse.vstack([seen, unruled]).tocsr()
        transposed = features.T.tocsr()
        again = np.concatenate([np.arange(len(which)), ruled])  # the text of each row
        counts = np.where(self.corpus.posts[which], POST, 1.0)[again]
        counts[len(which) :] *= UNRULED
        sentence = (~self.corpus.posts[which])[again].astype(float)

        def fitted(target: np.ndarray) -> tuple[np.ndarray, float]:
            signs = np.where(target, 1.0, -1.0)[again]

            def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
                weights, (bias, written_bias) = parameters[:-2], parameters[-2:]
                margins = signs * (features @ weights + bias + written_bias * sentence)
                slopes = -counts * signs / (1 + np.exp(margins))
                value = counts @ np.logaddexp(0, -margins) + (weights @ weights + written_bias**2) / (2 * STRENGTH)
                ends = [slopes.sum(), slopes @ sentence + written_bias / STRENGTH]
                return value, np.concatenate([transposed @ slopes + weights / STRENGTH, ends])

            start = np.zeros(features.shape[1] + 2)
            found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 60}).x
            return found[:-2], found[-2]

        return [fitted(target) for target in targets]


def train(corpus: Corpus, known: np.ndarray, threshold: float) -> Classifier:
    """The model of these texts: whether to answer, from all; by which text, from those that are answered."""
    features = Features(corpus, known)
    answered = known[corpus.labels[known] > 0]
    columns = features.fit(known, [corpus.labels[known] > 0])
    columns += features.fit(answered, [corpus.labels[answered] == risk.severity for risk in CLASSES])
    grams = np.array(list(corpus.grams), dtype=object)[features.kept]
    return Classifier(
        CLASSES,
        {gram: row for row, gram in enumerate(grams)},
        features.rarity,
        np.stack([weights for weights, _ in columns], axis=1),
        np.array([bias for _, bias in columns]),
        threshold,
        (
            fingerprint([one for one in corpus.texts if one.source != POSTS]),
            fingerprint([one for one in corpus.texts if one.source == POSTS]),
        ),
    )


def measure(corpus: Corpus, posts: np.ndarray, fold: np.ndarray, false_alarms: float, seed: int) -> None:
    """Print how posts are answered by models that saw neither them nor what is like them, and chose nothing by them."""
    found = np.zeros((2, len(posts)), int)  # severities, by the rules alone and by the gate
    for number in range(FOLDS):
        known, unseen = posts[fold != number], posts[fold == number]
        threshold = choose(corpus, known, false_alarms, seed)
        model = train(corpus, np.concatenate([known, np.flatnonzero(~corpus.posts)]), threshold)
        for column, by in enumerate((None, model)):
            found[column, fold == number] = [
                max(assess(part, by).risk.severity for part in parts(corpus.texts[row].text)) for row in unseen
            ]
        print(f"fold {number}: threshold {threshold:.4f}", flush=True)
    labels = corpus.labels[posts]
    print(f"{'posts held out':28}{'posts':>6}{'rules':>14}{'gate':>14}{'of it a crisis text':>22}")
    for name, least, most in [
        ("plan, preparation, attempt", Risk.PLAN_OR_PREPARATION, Risk.ATTEMPT),
        *((risk.value, risk, risk) for risk in reversed(Risk)),
    ]:
        own = (least.severity <= labels) & (labels <= most.severity)
        shares = [found[0, own] > 0, found[1, own] > 0, found[1, own] > Risk.EXPLORATION.severity]
        print(f"{name:28}{own.sum():6}" + "".join(f"{one.sum():7} {one.mean():6.3f}" for one in shares))


def write(model: Classifier, path: Path) -> None:
    """Write the file that `classify.load` reads; the same model gives the same bytes."""
    np.savez_compressed(
        path,
        classes=np.array(model.classes),
        vocabulary=np.frombuffer(SEPARATOR.join(model.vocabulary).encode(), np.uint8),
        rarity=model.rarity.astype(np.float16),
        weights=model.weights.astype(np.float16),
        bias=model.bias.astype(np.float32),
        threshold=np.array(model.threshold),
        data=np.array(model.data),
    )


def _rows(columns: Sequence[Sequence[int]], width: int) -> sparse.csr_array:
    """Ones in these columns of each row."""
    starts = np.cumsum([0, *map(len, columns)])
    ones = np.ones(starts[-1])
    return sparse.csr_array((ones, np.array([c for row in columns for c in row], int), starts), (len(columns), width))


if __name__ == "__main__":
    main()
