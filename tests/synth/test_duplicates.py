"""De-duplication: planted near duplicates are found, look-alikes are let through."""

import dataclasses
import random
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.held_out import measure_held_out
from support.planted import make_question, measure, near_duplicate, with_options

from psyche_jax.data.dataset import load_records
from psyche_jax.data.records import Question
from psyche_jax.errors import UserError
from psyche_jax.synth.config import ControlSection
from psyche_jax.synth.duplicates import Duplicates, fold
from psyche_jax.synth.steps import with_twins

SAMPLES = Path(__file__).parents[2] / "psyche_jax" / "data" / "samples"


def test_recall_and_precision_on_planted_duplicates():
    result = measure(150)
    assert result["recall"] >= 0.9 and result["precision"] >= 0.98, result


def test_other_kinds_of_duplicates_are_found_less_often_and_look_alikes_let_through():
    """Nothing was tuned on these: docs/measurements/synthesis.md has the figures of 1,000."""
    result = measure_held_out(120)
    assert result["planted"] == result["look_alikes"] == 120 and result["precision"] >= 0.95, result


def test_the_samples_are_all_different():
    duplicates = Duplicates(ControlSection())
    questions = load_records(Question, SAMPLES / "questions.jsonl").good
    assert [question.stem for question in questions if duplicates.find(question)] == []


@settings(max_examples=40)
@given(st.integers(0, 400), st.integers(0, 4), st.randoms(use_true_random=False))
def test_a_duplicate_has_the_id_of_the_first(number, kind, random_):
    question = make_question(random.Random(number), number)
    duplicates = Duplicates(ControlSection())
    assert duplicates.find(question) is None
    twin = duplicates.find(near_duplicate(question, random_, kind))
    assert twin is not None and twin.id == question.id and not twin.conflict
    twin = duplicates.find(question)
    assert twin is not None and twin.exact


@settings(max_examples=30)
@given(st.integers(0, 400), st.permutations(range(4)))
def test_the_order_of_options_does_not_matter(number, order):
    question = make_question(random.Random(number), number)
    duplicates = Duplicates(ControlSection())
    duplicates.find(question)
    twin = duplicates.find(with_options(question, order))
    assert twin is not None and twin.exact


def test_another_key_is_a_conflict():
    question = Question(
        "强化物撤除后反应减弱，称为什么？", {"A": "消退", "B": "泛化", "C": "分化", "D": "惩罚"}, "A", "single"
    )
    duplicates = Duplicates(ControlSection())
    duplicates.find(question)
    twin = duplicates.find(dataclasses.replace(question, answer="B", id=""))
    assert twin is not None and twin.conflict
    twin = duplicates.find(dataclasses.replace(question, answer="B", id="again"))
    assert twin is not None and twin.exact and not twin.conflict, "with either key it was there before"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("下列属于正强化的是", "下列属于负强化的是"),
        ("下列关于依恋的说法，正确的是", "下列关于依恋的说法，不正确的是"),
        ("小王，25岁，失眠3个月，首先考虑", "小王，25岁，失眠6个月，首先考虑"),
    ],
)
def test_small_differences_that_matter(one, other):
    options = {"A": "给予奖励", "B": "撤除电击", "C": "给予电击", "D": "撤除奖励"}
    duplicates = Duplicates(ControlSection())
    duplicates.find(Question(one, options, "A", "single"))
    assert duplicates.find(Question(other, options, "A", "single")) is None


def test_names_and_spelling_do_not_matter():
    assert fold("小王，（求助者）ＡＢ 心理。") == fold("小李,(来访者)ab心理") != fold("小王，心里")


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:x"])
def test_redis_that_is_not_there_is_one_line(address):
    with pytest.raises(UserError, match=r"control\.redis"):
        Duplicates(ControlSection(redis=address))


@pytest.fixture
def redis_server(tmp_path):
    """The address of a Redis server of our own."""
    pytest.importorskip("redis", reason="the redis package is absent")
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is absent (Debian: apt-get install redis-server)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(tmp_path)]
    with subprocess.Popen([program, *settings], stdout=subprocess.DEVNULL) as process:
        try:
            for _ in range(500):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.01)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


def test_tables_in_redis_find_the_same_and_leave_nothing_behind(redis_server):
    import redis

    random_ = random.Random(5)
    bases = [make_question(random_, number) for number in range(60)]
    asked = bases + [near_duplicate(base, random_, index % 5) for index, base in enumerate(bases)]

    def twins(section):
        return [twin for _, twin in with_twins(asked, section)]

    in_memory = twins(ControlSection())
    assert sum(twin is not None for twin in in_memory) >= 55
    host, port = redis_server.split(":")
    with redis.Redis(host, int(port)) as server:
        half = with_twins(asked, ControlSection(redis=redis_server))
        assert [next(half)[1] for _ in range(70)] == in_memory[:70]
        assert server.dbsize() > 0, "the tables do lie there"
        assert twins(ControlSection(redis=redis_server)) == in_memory, "two runs do not see each other"
        half.close()
        assert server.dbsize() == 0
