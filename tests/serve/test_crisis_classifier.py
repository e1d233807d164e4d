"""The gate's classifier: what is explicit stands, it says that it decided, and has the weights of its texts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.script_modules import load_script

from psyche_jax import cli
from psyche_jax.serve.crisis import Risk, classify
from psyche_jax.serve.crisis.classify import EXPLICIT, classifier, load, normalize, rule_hits
from psyche_jax.serve.crisis.gate import Gate
from psyche_jax.serve.crisis.measure import measure_posts, own_sentences, read_posts

ROOT = Path(__file__).parents[2]
POSTS = ROOT.parent / "shared" / "data" / "psyguard_valid.jsonl"
OBLIQUE = "上班路上一直想，要是这趟车翻了，我就不用去了，哪儿都不用去了"
HARD_TO_TELL = [OBLIQUE, "我爸去世三年了，我很想他", "今天好累，想早点睡", "i wish i could sleep and never wake"]


@pytest.fixture(scope="module")
def training():
    return load_script("crisis", "train_classifier")


@pytest.fixture(scope="module")
def small(training):
    """Enough for a model: two authors, who write every class, and a third in the place of those who wrote posts."""
    authors = {"chat_to_a_bot": training.POSTS, "urgent_messages": "a", "junior_boarder": "b"}
    return training.Corpus(
        [replace(one, source=authors[one.source]) for one in training.written() if one.source in authors]
    )


def test_it_raises_what_the_rules_do_not_know_and_says_so():
    assert classify(OBLIQUE, learned=False).risk is Risk.NONE
    found = classify(OBLIQUE)
    assert found.risk is Risk.PASSIVE_IDEATION and found.learned
    assert found.rules[0].startswith("classifier, 0.")


@given(st.one_of(st.text(max_size=300), st.lists(st.sampled_from(HARD_TO_TELL), max_size=30).map("。".join)))
def test_what_is_explicit_stands_and_a_crisis_becomes_no_other(text):
    alone, both = classify(text, learned=False), classify(text)
    if alone.risk.severity >= EXPLICIT.severity:
        assert both == alone
    elif both.risk is not Risk.NONE and both != alone:
        assert both.learned and both.risk is not alone.risk


def test_it_decides_of_what_a_rule_says_that_is_not_explicit():
    doubtful = "这门选修课讨论的是人活着有什么意义"
    assert classify(doubtful, learned=False).risk is Risk.EXPLORATION
    assert classify(doubtful).risk is Risk.NONE
    for denied in ("我没有自杀的想法", "我不会去自杀的", "累死我了"):
        assert classify(denied).risk is Risk.NONE, denied


def test_a_long_message_is_read_in_pieces():
    """One sentence may drown in a piece; a passage does not in a message."""
    for before, after in ((0, 40), (17, 23), (40, 0)):
        text = "今天去公园散步，天气很好，看见很多花。" * before + OBLIQUE * 5 + "晚饭吃了面条，味道不错。" * after
        assert classify(text).risk is Risk.PASSIVE_IDEATION


def test_the_gate_asks_it_unless_it_is_switched_off(tmp_path):
    log = tmp_path / "log"
    reply = Gate(log=log).reply([OBLIQUE])
    assert reply and "12356" in reply.text
    event = json.loads(log.read_text())
    assert event["risk"] == "passive_ideation" and event["rules"][0].startswith("classifier, 0.")
    assert Gate(learned=False).reply([OBLIQUE]) is None


def test_the_measure_names_it_and_can_leave_it_out(tmp_path, capsys):
    posts = tmp_path / "posts.jsonl"
    posts.write_text(json.dumps({"text": OBLIQUE, "labels": ["passive_ideation"]}), encoding="utf-8")
    for flags, share, decided in (([], 1, "classifier, 0."), (["--rules-alone"], 0, "nothing")):
        assert cli.main(["safety", "--posts", str(posts), *flags]) == 0
        assert f"decided by: {decided}" in capsys.readouterr().out
        assert cli.main(["safety", "--posts", str(posts), *flags, "--json"]) == 0
        measured = json.loads(capsys.readouterr().out)["posts"]
        assert measured["classes"]["passive_ideation"]["answered"]["share"] == share
        assert sum(measured["decided"].values()) == share


def test_it_finds_more_of_the_sentences_that_it_was_not_trained_on():
    """Of another author than rules and training sentences (docs/measurements/crisis.md)."""
    posts, _ = read_posts(ROOT / "scripts" / "crisis" / "unread.jsonl")
    by_rules, found = (measure_posts(posts, learned)["classes"] for learned in (False, True))
    for name in ("active_ideation", "harm_to_others", "plan, preparation, attempt"):
        assert found[name]["crisis"]["count"] > by_rules[name]["crisis"]["count"]
    assert found["none"]["answered"]["share"] <= 0.03


def test_the_weights_in_the_package_are_of_the_texts_that_they_name(training):
    sentences = training.written()
    assert classifier().data[0] == training.fingerprint(sentences), "run scripts/crisis/train_classifier.py"
    assert classifier().classes == tuple(Risk)[1:]
    assert len(sentences) > 4000 and len({one.source for one in sentences}) > 80
    unread = {normalize(post.text) for post in own_sentences("after")}
    assert not unread & {one.text for one in sentences if one.source != "rules.yaml"}
    if POSTS.is_file():
        assert classifier().data[1] == training.fingerprint(training.read(POSTS))


def test_a_rule_that_matches_never_speaks_against_an_answer():
    model = classifier()
    assert (model.weights[len(model.vocabulary) :, 0] > 0).all()


def test_the_same_texts_and_seed_give_the_same_file(training, small, tmp_path):
    contents = []
    for name in ("one.npz", "two.npz"):
        threshold = training.choose(small, np.flatnonzero(small.posts), 0.1, seed=3)
        training.write(training.train(small, np.arange(len(small.texts)), threshold), tmp_path / name)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]


def test_posts_that_are_alike_stay_in_one_fold(training):
    texts = ["我今天真的很难过不知道该怎么办", "今天真的很难过不知道该怎么办了", "周末去爬山吗", "我想换一份新的工作"]
    corpus = training.Corpus([training.Text(training.POSTS, text, Risk.NONE) for text in texts])
    folds = training.deal(corpus, np.arange(4), 3, seed=0)
    assert folds[0] == folds[1] and len(set(folds)) == 3


def test_a_model_knows_what_it_was_trained_on_and_survives_its_file(training, small, tmp_path):
    model = training.train(small, np.arange(len(small.texts)), 0.5)
    seen = [rule_hits(one.text) for one in small.texts]
    wrong = [
        one.text
        for one, (said, hits) in zip(small.texts, seen, strict=True)
        if (model.decide(said, hits)[0] is Risk.NONE) != (one.label is Risk.NONE)
    ]
    assert len(wrong) < len(small.texts) / 6
    training.write(model, tmp_path / "model.npz")
    stored = load(tmp_path / "model.npz")
    assert replace(stored, rarity=0, weights=0, bias=0) == replace(model, rarity=0, weights=0, bias=0)
    for said, hits in seen[::10]:
        np.testing.assert_allclose(stored.scores(said, hits), model.scores(said, hits), atol=0.02)


def test_the_file_is_small_and_holds_no_code(tmp_path):
    path = Path(load.__code__.co_filename).with_name("classifier.npz")
    assert path.stat().st_size < 1_500_000
    np.savez(tmp_path / "evil.npz", vocabulary=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        load(tmp_path / "evil.npz")
