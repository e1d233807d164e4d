"""ROUGE and BLEU of Chinese essays against what they are by hand."""

import collections
import math
from dataclasses import replace

import pytest
from support.answerers import Answerer

from psyche_jax.data.records import Message
from psyche_jax.evaluate.evaluation import evaluate, scores_table
from psyche_jax.evaluate.score import CharacterTokenizer
from psyche_jax.evaluate.tasks import Benchmark, Task

REFERENCE = "求助者的主要症状是抑郁情绪，持续两周，SCL90抑郁分高。"


def essay(id_: str = "e1", reference: str = REFERENCE) -> Task:
    return Task(id_, "essay", "essay", (Message("user", "症状是什么？"),), "症状是什么？", reference)


def scores(*said: str) -> dict:
    tasks = tuple(essay(f"e{index}") for index in range(len(said)))
    answers = {task.id: text for task, text in zip(tasks, said, strict=True)}
    return evaluate(Answerer(lambda task, _: answers[task.id]), Benchmark("b", tasks), label="x")["scores"]["essays"]


def test_the_reference_itself_gets_all_and_nothing_gets_nothing() -> None:
    whole = scores(f"<think>想</think>{REFERENCE}")
    assert (whole["rouge1"], whole["rougeL"], whole["count"]) == (100.0, 100.0, 1)
    assert whole["bleu4"] == pytest.approx(100.0)
    for nothing in ("", f"<think>{REFERENCE}</think>"):
        found = scores(nothing)
        assert (found["rouge1"], found["rougeL"], found["bleu4"]) == (0.0, 0.0, 0.0)


def test_by_hand() -> None:
    said = "症状：抑郁，SCL90分高。"
    tokens, gold = (CharacterTokenizer().tokenize(text) for text in (said, REFERENCE))
    assert tokens == ["症", "状", "抑", "郁", "scl90", "分", "高"]
    shared = sum((collections.Counter(tokens) & collections.Counter(gold)).values())
    precision, recall = shared / len(tokens), shared / len(gold)
    found = scores(said)
    assert found["rouge1"] == pytest.approx(200 * precision * recall / (precision + recall))
    assert found["rougeL"] == pytest.approx(found["rouge1"]), "all in the order of the reference"
    reordered = scores("SCL90分高，症状：抑郁。")
    assert reordered["rouge1"] == pytest.approx(found["rouge1"]) and reordered["rougeL"] < found["rougeL"]


def test_bleu_by_hand() -> None:
    """Characters and punctuation are tokens; brevity counts."""
    said, reference = list("主要症状是抑郁情绪，"), list("求助者的主要症状是抑郁情绪，持续两周。")
    precisions = []
    for n in range(1, 5):
        grams, gold = (
            collections.Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1)) for text in (said, reference)
        )
        precisions.append(sum((grams & gold).values()) / sum(grams.values()))
    expected = 100 * math.exp(1 - len(reference) / len(said)) * math.prod(precisions) ** 0.25
    tasks = (essay("e", "".join(reference)),)
    evaluation = evaluate(Answerer(lambda *_: "".join(said)), Benchmark("b", tasks), label="x")
    assert evaluation["scores"]["essays"]["bleu4"] == pytest.approx(expected)
    assert "tok:zh" in evaluation["scores"]["essays"]["measured_by"]["bleu4"]
    assert evaluation["scores"]["count"] == 0
    assert scores_table({**evaluation["scores"], "set_aside": 2}).splitlines()[-1] == "2 records skipped"
    assert "1 essays: ROUGE-1 " in scores_table({**evaluation["scores"], "set_aside": 0})


def test_the_mean_and_its_interval() -> None:
    found = scores(REFERENCE, REFERENCE, "", "")
    assert found["rouge1"] == 50.0
    low, high = found["interval_rouge1"]
    assert 0 <= low < 50 < high <= 100


def test_essays_on_one_case_are_drawn_together() -> None:
    """The interval of as many essays on few cases is wider; that of one essay, or one case, is not of zero width."""
    said = [REFERENCE if number % 4 < 2 else "无" for number in range(24)]

    def width(cases: int) -> float:
        tasks = tuple(replace(essay(f"e{n}"), group=f"case {n * cases // len(said)}") for n in range(len(said)))
        answers = {task.id: text for task, text in zip(tasks, sorted(said), strict=True)}
        found = evaluate(Answerer(lambda task, _: answers[task.id]), Benchmark("b", tasks), label="x")["scores"]
        low, high = found["essays"]["interval_rouge1"]
        assert 0 <= low <= found["essays"]["rouge1"] <= high <= 100
        return high - low

    assert width(4) > 1.5 * width(24)
    assert width(1) > 50
    low, high = scores(REFERENCE)["interval_rouge1"]
    assert high == 100 and low < 50
