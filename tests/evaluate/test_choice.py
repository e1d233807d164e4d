"""Scores and chance against independent brute force."""

import itertools
import string
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_jax.data.records import Question, question_text
from psyche_jax.evaluate.answers import Completion
from psyche_jax.evaluate.score import chance as chance_of_task
from psyche_jax.evaluate.score import score_answer, summarize
from psyche_jax.evaluate.tasks import choice_task


def question(options: int, answer: str, kind: str = "multi", name: str = "问") -> Question:
    return Question(name, {letter: f"选项{letter}" for letter in string.ascii_uppercase[:options]}, answer, kind)


def score_item(question: Question, completion: Completion) -> dict:
    return score_answer(choice_task(question), completion)


def chance(question: Question) -> tuple[float, float]:
    return chance_of_task(choice_task(question))


def scores_of(questions: list[Question], items: list[dict]) -> dict:
    """The summary of one answer to each question."""
    return summarize([choice_task(one) for one in questions], {item["id"]: [item] for item in items})


def asked(text: str, gold: str = "AC", kind: str = "multi") -> dict:
    return score_item(question(4, gold, kind), Completion(text, 5, True))


def subsets(letters: str) -> list[str]:
    """All non-empty sets of letters."""
    return ["".join(set_) for size in range(1, len(letters) + 1) for set_ in itertools.combinations(letters, size)]


def strict(predicted: str, gold: str) -> int:
    """Every letter right, and none missing."""
    return int(all((letter in predicted) == (letter in gold) for letter in string.ascii_uppercase))


def elastic(predicted: str, gold: str) -> Fraction:
    """The paper's: |predicted| / |gold| if nothing wrong was picked."""
    hits = [letter for letter in predicted if letter in gold]
    return Fraction(len(hits), len(gold)) if len(hits) == len(predicted) else Fraction(0)


@pytest.mark.parametrize("options", [2, 4, 5])
def test_every_prediction_for_every_gold(options):
    letters = string.ascii_uppercase[:options]
    for gold in subsets(letters):
        for predicted in subsets(letters):
            item = score_item(question(options, gold), Completion(f"<think>x</think>\n答案：{predicted}", 9, True))
            assert item["predicted"] == predicted
            assert item["strict"] == strict(predicted, gold)
            assert item["elastic"] == pytest.approx(float(elastic(predicted, gold)))


@pytest.mark.parametrize("options", [2, 3, 4, 6])
def test_chance_is_the_mean_over_all_guesses(options):
    letters = string.ascii_uppercase[:options]
    for gold in subsets(letters):
        guesses = subsets(letters)
        expected = [sum(rule(guess, gold) for guess in guesses) / Fraction(len(guesses)) for rule in (strict, elastic)]
        assert chance(question(options, gold)) == pytest.approx([float(value) for value in expected])
    for gold in letters:
        assert chance(question(options, gold, "single")) == (1 / options, 1 / options)


@pytest.mark.parametrize(
    ("text", "predicted"),
    [
        ("<think>…</think>\n**答案：Ｃ、A**", "AC"),
        ("答案：ACC", "AC"),
        ("答案：A\n因为C不对", "A"),
        ("答案：BANANA", "ABN"),
        ("选A和C", None),
        ("<think>答案：AC</think>", None),
    ],
)
def test_what_is_read_is_scored(text, predicted):
    item = asked(text)
    assert item["predicted"] == predicted
    assert item["strict"] == (predicted == "AC")
    assert item["elastic"] == {"AC": 1.0, "A": 0.5}.get(predicted or "", 0.0)
    assert item["response"] == text


def test_an_item_tells_what_was_asked_and_said():
    item = asked("答案：A")
    assert (item["id"], item["kind"], item["gold"]) == (question(4, "AC").id, "multi", "AC")
    assert item["question"] == "多项选择题：问\nA. 选项A\nB. 选项B\nC. 选项C\nD. 选项D"


answers = st.none() | st.sets(st.sampled_from("ABCDE"), min_size=1).map(lambda letters: "".join(sorted(letters)))


@given(st.permutations(range(5)), st.sets(st.sampled_from("ABCDE"), min_size=1), answers)
def test_the_order_of_options_changes_nothing_but_letters(order, gold, predicted):
    """Options move, and key and prediction move with them: same scores, same chance."""
    letters = "ABCDE"
    before = Question(
        "问", dict(zip(letters, ("甲", "乙", "丙", "丁", "戊"), strict=True)), "".join(sorted(gold)), "multi"
    )
    moved = {letters[old]: letters[new] for new, old in enumerate(order)}
    after = Question(
        "问",
        {letters[new]: before.options[letters[old]] for new, old in enumerate(order)},
        "".join(sorted(moved[letter] for letter in gold)),
        "multi",
    )
    said = [
        Completion("没有" if predicted is None else f"答案：{''.join(names)}", 3, True)
        for names in (predicted or "", [moved[letter] for letter in predicted or ""])
    ]
    one, other = score_item(before, said[0]), score_item(after, said[1])
    assert (one["strict"], one["elastic"]) == (other["strict"], other["elastic"])
    assert (one["predicted"] is None) == (other["predicted"] is None)
    assert chance(before) == chance(after)
    assert sorted(line[3:] for line in question_text(before).split("\n")[1:]) == sorted(
        line[3:] for line in question_text(after).split("\n")[1:]
    )


cases = st.lists(
    st.tuples(st.sampled_from(["single", "multi"]), st.integers(4, 6), st.sampled_from("ABCD"), answers),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(cases)
def test_summary(rows):
    questions = [
        question(options, gold if kind == "single" else "".join(sorted({gold, "A"})), kind, f"问{index}")
        for index, (kind, options, gold, _) in enumerate(rows)
    ]
    texts = ["" if predicted is None else f"答案：{predicted}" for *_, predicted in rows]
    items = [score_item(asked, Completion(text, 1, True)) for asked, text in zip(questions, texts, strict=True)]
    summary = scores_of(questions, items)

    def mean(values):
        return sum(values) / Fraction(len(values))

    for kind in {*(asked.kind for asked in questions), None}:
        chosen = [index for index, asked in enumerate(questions) if kind in (None, asked.kind)]
        predicted = ["" if rows[index][-1] is None else rows[index][-1] for index in chosen]
        golds = [questions[index].answer for index in chosen]
        pairs = list(zip(predicted, golds, strict=True))
        guesses = [
            subsets(string.ascii_uppercase[: rows[index][1]])
            if rows[index][0] == "multi"
            else list(string.ascii_uppercase[: rows[index][1]])
            for index in chosen
        ]
        expected = {
            "strict": mean([strict(one, gold) for one, gold in pairs]),
            "elastic": mean([elastic(one, gold) if one else Fraction(0) for one, gold in pairs]),
            "chance": mean(
                [mean([strict(g, gold) for g in tried]) for tried, gold in zip(guesses, golds, strict=True)]
            ),
            "chance_elastic": mean(
                [mean([elastic(g, gold) for g in tried]) for tried, gold in zip(guesses, golds, strict=True)]
            ),
            "count": len(chosen),
            "unanswered": predicted.count(""),
        }
        found = summary if kind is None else summary["by_kind"][kind]
        for name, value in expected.items():
            assert found[name] == pytest.approx(float(value)), name
    assert set(summary["by_kind"]) == {asked.kind for asked in questions}


def test_single_comes_first_in_summaries():
    questions = [question(4, "AB"), question(4, "A", "single", "另一问")]
    items = [score_item(one, Completion("答案：A", 1, True)) for one in questions]
    summary = scores_of(questions, items)
    assert list(summary["by_kind"]) == ["single", "multi"]
    assert (summary["strict"], summary["elastic"]) == (0.5, 0.75)
    assert items[1]["strict"] == 1
