"""De-duplication: planted near duplicates are found, look-alikes are let through."""

import dataclasses
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import make_question, measure, near_duplicate, with_options

from psyche_jax.data.records import Question, read_records
from psyche_jax.errors import UserError
from psyche_jax.synth.config import ControlSection
from psyche_jax.synth.duplicates import Duplicates, fold

SAMPLES = Path(__file__).parents[2] / "psyche_jax" / "data" / "samples"


def test_recall_and_precision_on_planted_duplicates():
    result = measure(150)
    assert result["recall"] >= 0.9 and result["precision"] >= 0.98, result


def test_the_samples_are_all_different():
    duplicates = Duplicates(ControlSection())
    questions = read_records(Question, SAMPLES / "questions.jsonl").good
    assert [question.stem for question in questions if duplicates.find(question)] == []


@given(st.integers(0, 400), st.integers(0, 4), st.randoms(use_true_random=False))
def test_a_duplicate_has_the_id_of_the_first(number, kind, random_):
    question = make_question(random.Random(number), number)
    duplicates = Duplicates(ControlSection())
    assert duplicates.find(question) is None
    twin = duplicates.find(near_duplicate(question, random_, kind))
    assert twin is not None and twin.id == question.id and not twin.conflict
    twin = duplicates.find(question)
    assert twin is not None and twin.exact


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
