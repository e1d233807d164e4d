"""The scorer against answerers whose scores are known, an independent script, and shuffled options."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.answerers import Answerer, questions, six_cells

from psyche_jax.data.records import Question
from psyche_jax.evaluate.evaluation import evaluate, scores_table
from psyche_jax.evaluate.score import bootstrap_means, bootstrap_shares, interval
from psyche_jax.evaluate.tasks import Benchmark, Task, choice_task

LETTERS = "ABCD"


def scores(say: Callable[[Task, int], str], benchmark: Benchmark, samples: int = 1) -> dict[str, Any]:
    return evaluate(Answerer(say), benchmark, label="x", samples=samples)["scores"]


@pytest.mark.parametrize("answer", ["A", "B", "AC", "ABCD"])
def test_a_constant_answerer(answer: str) -> None:
    """It is right where the key is its answer, and in part where the key holds more."""
    benchmark = six_cells(264)
    found = scores(lambda *_: f"答案：{answer}", benchmark)
    keys = [task.gold for task in benchmark.tasks]
    assert found["strict"] == sum(key == answer for key in keys) / len(keys)
    parts = [len(answer) / len(key) for key in keys if set(answer) <= set(key)]
    assert found["elastic"] == pytest.approx(sum(parts) / len(keys), abs=1e-15)


def test_a_random_answerer_gets_what_chance_says() -> None:
    """One letter of four, or any non-empty subset of them: within four standard errors of the analytic value."""
    draw = random.Random(0)
    benchmark = Benchmark("b", tuple(choice_task(question) for question in questions(440)))

    def guess(task: Task, sample: int) -> str:
        if task.kind == "single":
            return f"答案：{draw.choice(LETTERS)}"
        mask = draw.randrange(1, 16)
        return "答案：" + "".join(letter for bit, letter in enumerate(LETTERS) if mask >> bit & 1)

    found = scores(guess, benchmark, samples=20)
    for group in (found, *found["by_kind"].values()):
        error = 4 * (0.25 / (group["count"] * 20)) ** 0.5
        assert group["strict"] == pytest.approx(group["chance"], abs=error)
        assert group["elastic"] == pytest.approx(group["chance_elastic"], abs=error)
    # Keys of two, three and four letters, in the shares in which `questions` has them.
    gold = [len(task.gold) for task in benchmark.tasks if task.kind == "multi"]
    expected = sum(2 ** (size - 1) / 15 for size in gold) / len(gold)
    assert found["by_kind"]["multi"]["chance_elastic"] == pytest.approx(expected)
    assert found["by_kind"]["multi"]["chance"] == pytest.approx(1 / 15)


def test_who_says_nothing_gets_nothing_and_is_counted() -> None:
    found = scores(lambda task, _: "我不知道", six_cells(24))
    assert (found["strict"], found["elastic"], found["unanswered"], found["fallback"]["read"]) == (0, 0, 24, 0)
    assert found["failures"] == {"no letters after the marker": 24}


def test_what_only_the_fallback_reads_counts_apart() -> None:
    found = scores(lambda task, _: f"综上，选{'和'.join(task.gold)}。", six_cells(24))
    assert (found["strict"], found["unanswered"]) == (0.0, 24)
    assert found["fallback"] == {"strict": 1.0, "elastic": 1.0, "read": 24}


def test_an_independent_script_agrees_to_the_last_digit(tmp_path: Path) -> None:
    draw = random.Random(1)
    forms = (
        "答案：{}",
        "<think>答案：D</think>答案：{}。",
        "**答案：{}**",
        "答案：{}或A",
        "选{}",
        "答案：B\n更正：答案：{}",
    )

    def say(task: Task, sample: int) -> str:
        letters = "".join(draw.sample(LETTERS, draw.randrange(1, 5)))
        letters = task.gold if draw.random() < 0.4 else letters
        if draw.random() < 0.3:
            letters = "、".join(chr(ord(letter) + 0xFEE0) for letter in letters)
        return draw.choice(forms).format(letters)

    file = tmp_path / "e.json"
    evaluate(Answerer(say), six_cells(300), label="x", samples=3, files=[file])
    script = Path(__file__).parents[1] / "support" / "plain_scores.py"
    said = subprocess.run([sys.executable, "-I", script, file], capture_output=True, text=True, check=True).stdout
    plain, ours = json.loads(said), json.loads(file.read_text())["scores"]
    assert 0.1 < ours["strict"] < 0.9 and ours["unanswered"] > 50
    names = ("strict", "elastic", "unanswered")
    assert [ours[name] for name in names] == [plain[name] for name in names]
    assert list(ours["cells"]) == list(plain["cells"]) and len(plain["cells"]) == 6
    for cell, expected in plain["cells"].items():
        assert {name: ours["cells"][cell][name] for name in names} == expected
    assert (ours["average"]["strict"], ours["average"]["elastic"]) == (
        plain["average_strict"],
        plain["average_elastic"],
    )


@settings(max_examples=25)
@given(st.randoms(use_true_random=False))
def test_shuffled_options_change_nothing_but_letters(draw: random.Random) -> None:
    """Whoever goes by what the options say gets the same scores, chance and intervals."""
    liked = {f"{index}之{letter}" for index in range(24) for letter in LETTERS if draw.random() < 0.5}
    before = questions(24)
    after = []
    for question in before:
        order = draw.sample(LETTERS, 4)
        moved = dict(zip(order, LETTERS, strict=True))
        options = {letter: question.options[order[place]] for place, letter in enumerate(LETTERS)}
        key = "".join(sorted(moved[letter] for letter in question.answer))
        after.append(Question(question.stem, options, key, question.kind))

    def say(task: Task, _: int) -> str:
        lines = [line.split(". ", 1) for line in task.text.splitlines()[1:]]
        return f"答案：{''.join(letter for letter, text in lines if text in liked)}"

    one, other = (
        scores(say, Benchmark("b", tuple(choice_task(question) for question in some))) for some in (before, after)
    )
    assert one == other


def test_several_samples_have_a_mean_and_a_deviation() -> None:
    benchmark = six_cells(24)
    found = scores(lambda task, sample: f"答案：{task.gold}" if sample < 2 else "", benchmark, samples=4)
    assert (found["strict"], found["count"], found["unanswered"]) == (0.5, 24, 48)
    assert found["deviation"] == pytest.approx(np.std([1, 1, 0, 0], ddof=1))
    assert "standard deviation over samples: strict 0.577" in scores_table({**found, "set_aside": 0})


def test_the_average_is_the_mean_of_the_cells_and_single_cells_count_in_both() -> None:
    benchmark = six_cells(24)
    said = {task.id: task.gold[:1] for task in benchmark.tasks}
    found = scores(lambda task, _: f"答案：{said[task.id]}", benchmark)
    cells = found["cells"]
    assert list(cells) == [f"{part}_{kind}" for part in ("case", "moral", "theory") for kind in ("smcq", "mmcq")]
    assert found["average"]["strict"] == 0.5
    assert found["average"]["elastic"] == pytest.approx(np.mean([cell["elastic"] for cell in cells.values()]))
    assert [cells[f"{part}_smcq"]["elastic"] for part in ("case", "moral", "theory")] == [1.0] * 3


def test_leaked_questions_are_scored_and_shown_apart() -> None:
    benchmark = six_cells(24)
    leaked = {task.id: "same stem" for task in benchmark.tasks[:6]}
    known = Benchmark("b", benchmark.tasks, leaked=leaked)
    evaluation = evaluate(
        Answerer(lambda task, _: f"答案：{task.gold if task.id in leaked else 'A'}"), known, label="x"
    )
    found = evaluation["scores"]
    assert (found["count"], found["leaked"], found["decontaminated"]["count"]) == (24, 6, 18)
    assert found["strict"] > found["decontaminated"]["strict"]
    assert [item["leaked"] for item in evaluation["items"]] == ["same stem"] * 6 + [""] * 18
    table = scores_table({**found, "set_aside": 0})
    assert "6 are in the training data; without them 18 questions: strict" in table


def test_a_bootstrap_interval_is_the_analytic_one_and_widens_where_questions_hang_together() -> None:
    values = [1.0] * 300 + [0.0] * 100
    alone = bootstrap_means(values, [str(index) for index in range(400)])
    assert np.std(alone) == pytest.approx((0.75 * 0.25 / 400) ** 0.5, rel=0.1)
    low, high = interval(alone, 0.75)
    assert (low, high) == pytest.approx((0.7075, 0.7925), abs=0.006)
    together = bootstrap_means(values, [str(index // 10) for index in range(400)])
    assert np.std(together) == pytest.approx((0.75 * 0.25 / 40) ** 0.5, rel=0.1)
    assert interval(bootstrap_means([1.0] * 5, list("abcde")), 1.0) == (1.0, 1.0)


@pytest.mark.parametrize(("score", "bounds"), [(0.0, (0.0, 0.0987)), (1.0, (0.9013, 1.0))])
def test_a_score_that_all_answers_share_is_not_called_certain(score: float, bounds: tuple[float, float]) -> None:
    """Jeffreys' interval of 0, or all, of 24 (Brown, Cai and DasGupta 2001); by groups, of as many groups."""
    low, high = interval(bootstrap_shares([score] * 24, [str(index) for index in range(24)]), score)
    assert low <= score <= high and (low, high) == pytest.approx(bounds, abs=0.015)
    together = interval(bootstrap_shares([score] * 24, [str(index // 4) for index in range(24)]), score)
    assert together[1] - together[0] > 2 * (high - low)
    # Nor is any other score where every resample is alike: the same half for all, or all questions on one case.
    for values, groups in (([0.5] * 3, "abc"), ([0.5], "a"), ([1.0, 0.0, 1.0], "aaa"), ([0.0, 1.0, 0.5, 0.5], "aabb")):
        low, high = interval(bootstrap_shares(values, list(groups)), float(np.mean(values)))
        assert 0 <= low < 0.2 and 0.8 < high <= 1
    some = [0.0, 1.0, 0.5]
    assert (bootstrap_shares(some, list("abc"), "x") == bootstrap_means(some, list("abc"), "x")).all()


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from(["", "A", "B", "AB", "ABCD", "D"]), min_size=1, max_size=6), st.sampled_from([6, 12, 24])
)
def test_an_interval_holds_its_estimate(said: list[str], count: int) -> None:
    """Of the whole, each kind, each cell and their mean, strict and elastic: also where all answers are wrong."""
    found = scores(lambda task, _: f"答案：{said[len(task.text) % len(said)]}", six_cells(count))
    for group in (found, found["average"], *found["by_kind"].values(), *found["cells"].values()):
        for name, bounds in (("strict", "interval"), ("elastic", "interval_elastic")):
            low, high = group[bounds]
            assert 0 <= low <= group[name] <= high <= 1
