"""The gate's classifier: it only raises, says that it decided, and has the weights of the sentences given for it."""

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
from psyche_jax.serve.crisis.classify import classifier, load, normalize
from psyche_jax.serve.crisis.gate import Gate
from psyche_jax.serve.crisis.measure import measure_posts, own_sentences

OBLIQUE = "每晚闭眼前都盼着别再睁开，我在这个家就是多余的那一个，早点散场对谁都好"
HARD_TO_TELL = [OBLIQUE, "我爸去世三年了，我很想他", "今天好累，想早点睡", "i wish i could sleep and never wake"]


@pytest.fixture(scope="module")
def training():
    return load_script("crisis", "train_classifier")


@pytest.fixture(scope="module")
def small(training):
    """Enough for a model: two authors, who write every class."""
    sentences = training.read()
    return [one for one in sentences if one.author in ("chat_to_a_bot", "urgent_messages", "junior_boarder")]


def test_it_raises_what_the_rules_do_not_know_and_says_so():
    assert classify(OBLIQUE, learned=False).risk is Risk.NONE
    found = classify(OBLIQUE)
    assert found.risk is Risk.PASSIVE_IDEATION and found.learned
    assert found.rules[0].startswith("classifier, 0.")


@given(st.one_of(st.text(max_size=300), st.lists(st.sampled_from(HARD_TO_TELL), max_size=30).map("。".join)))
def test_it_never_lowers(text):
    alone, both = classify(text, learned=False), classify(text)
    if both != alone:
        assert both.learned and alone.risk.severity <= Risk.EXPLORATION.severity < both.risk.severity


@pytest.mark.parametrize("text", ["", "？", "今天天气真好，想出去走走", "请解释一下习得性无助", "我好多了", "🙂"])
def test_ordinary_messages_stay_with_the_model(text):
    assert classify(text).risk is Risk.NONE


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


def test_it_finds_some_of_the_sentences_that_it_was_not_trained_on():
    """Few, for a threshold that lets little through (docs/measurements/crisis.md)."""
    posts = own_sentences("after")
    model = classifier()
    found = {label: [] for label in Risk}
    for post in posts:
        found[Risk(post.label)].append(model.decide(normalize(post.text)) is not None)
    assert np.mean(found[Risk.PASSIVE_IDEATION]) >= 0.1
    assert np.mean(found[Risk.NONE]) <= 0.03
    measured = measure_posts(posts)["classes"]
    assert measured["none"]["answered"]["share"] <= 0.15


def test_the_weights_in_the_package_are_of_the_sentences_in_the_repository(training):
    sentences = training.read()
    assert classifier().data == training.fingerprint(sentences), "run scripts/crisis/train_classifier.py"
    assert classifier().classes == tuple(risk.value for risk in Risk)
    assert len({one.text for one in sentences}) == len(sentences) > 3000
    assert len({one.author for one in sentences}) > 80
    unread = {normalize(post.text) for post in own_sentences("after")}
    assert not unread & {one.text for one in sentences}


def test_the_same_sentences_and_seed_give_the_same_file(training, small, tmp_path, capsys):
    contents = []
    for name in ("one.npz", "two.npz"):
        threshold = training.choose(small, 0.02, seed=3)
        training.write(training.train(small, threshold, training.fingerprint(small)), tmp_path / name)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    assert "of the messages of unseen authors" in capsys.readouterr().out


def test_a_model_knows_what_it_was_trained_on_and_survives_its_file(training, small, tmp_path):
    model = training.train(small, 0.5, "data")
    wrong = [one for one in small if model.probabilities(one.text).argmax() != one.label]
    assert len(wrong) < len(small) / 20
    training.write(model, tmp_path / "model.npz")
    stored = load(tmp_path / "model.npz")
    assert replace(stored, rarity=0, weights=0, bias=0) == replace(model, rarity=0, weights=0, bias=0)
    for one in small[::10]:
        np.testing.assert_allclose(stored.probabilities(one.text), model.probabilities(one.text), atol=0.01)


def test_the_file_is_small_and_holds_no_code(tmp_path):
    path = Path(load.__code__.co_filename).with_name("classifier.npz")
    assert path.stat().st_size < 1_500_000
    np.savez(tmp_path / "evil.npz", vocabulary=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        load(tmp_path / "evil.npz")
