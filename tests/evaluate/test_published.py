"""The paper's table and figure, with ours among them, in HTML and in Markdown."""

import itertools
import json
import re
from pathlib import Path

import pytest
from support.answerers import Answerer, six_cells
from support.made_up_runs import add_empathy, add_evaluation, make_run
from test_report import plain, report

from psyche_jax.errors import UserError
from psyche_jax.evaluate.evaluation import evaluate, evaluation_file
from psyche_jax.evaluate.report import CELLS, COLUMNS, PaperRow, draw_sizes, our_rows, published, write_report
from psyche_jax.evaluate.tasks import Benchmark

SHARED = Path(__file__).parents[2].parent / "shared" / "paper" / "pceb_published.json"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with an evaluation on the cells of PCEB, some of whose questions leaked; right on single answers alone."""
    run = make_run(tmp_path / "run", steps=3)
    tasks = six_cells(120).tasks
    benchmark = Benchmark("pceb", tasks, ("14.json: item 3: its answer is empty",), {tasks[0].id: "same stem"})
    mine = Answerer(
        lambda task, _: f"{'答案：' if task.kind == 'single' else '选'}{task.gold}", parameters=7_600_000_000
    )
    evaluate(mine, benchmark, label="mine|<b>", samples=2, files=[evaluation_file(run, "pceb", "mine")])
    return run


@pytest.mark.skipif(not SHARED.is_file(), reason=f"{SHARED} is absent")
def test_the_published_figures_are_carried_over_whole() -> None:
    rows = {row.model: row for row in published()[1]}
    theirs = json.loads(SHARED.read_text(encoding="utf-8"))["rows"]
    assert len(theirs) == len(rows)
    for row in theirs:
        assert {key: row[key] for key, _ in COLUMNS} == rows[row["model"]].values
        assert row["parameters_billion"] == rows[row["model"]].parameters_billion


def test_published_averages_are_the_means_of_their_cells() -> None:
    """But for rounding: so ours, computed in this way, may stand beside them."""
    source, rows = published()
    assert "Psyche-R1" in source
    for row in rows:
        strict = sum(row.values[cell] for cell in CELLS) / 6
        singles, multiples = CELLS[::2], [f"{cell}_elastic" for cell in CELLS[1::2]]
        elastic = sum(row.values[key] for key in (*singles, *multiples)) / 6
        assert row.values["average_strict"] == pytest.approx(strict, abs=0.011), row.model
        assert row.values["average_elastic"] == pytest.approx(elastic, abs=0.011), row.model


def test_ours_stands_among_the_published_rows(run: Path, tmp_path: Path) -> None:
    page = report(tmp_path, run)
    table = re.search(r'<table class="published stack">(.*?)</table>', page, re.DOTALL)
    assert table
    rows = [
        [plain(cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL)]
        for row in re.findall(r"<tr.*?</tr>", table[1], re.DOTALL)
    ]
    ours = [row for row in rows if "measured here" in row[0]]
    assert {row[0] for row in ours} == {"mine|<b> measured here", "mine|<b>, decontaminated measured here"}
    assert ours[0][1:] == ["100.00", "0.00", "0.00"] * 3 + ["50.00", "50.00", "–", "–", "–"]
    averages = [float(row[10]) for row in rows[1:]]
    assert averages == sorted(averages, reverse=True) and len(averages) == 13
    text = plain(page)
    assert "mine|<b> : 120 questions." in text and "mine|<b>, decontaminated : 119 questions." in text
    assert 'aria-label="Average strict accuracy on PCEB against parameters: ' in page
    assert "mine|&lt;b&gt; 7.6B → 50.0 %" in page
    assert "the lenient fallback reads 120 of them, and with it strict is 100.0 %" in text
    assert "1 of the questions asked are in the training data too; without them strict is" in text
    assert "14.json: item 3: its answer is empty" in text
    assert "100.0 % ± 0.0" in text and "Case, several right answers" in text


def test_without_pceb_the_published_figures_are_folded(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1)
    add_evaluation(run, "sft", {"s1": "B"})
    text = plain(report(tmp_path, run))
    assert "No evaluation here has all six cells of PCEB" in text
    assert "The published figures" in text and "measured here</span>" not in text


def test_a_part_of_pceb_makes_no_row() -> None:
    scores = {"cells": {cell: {"count": 3, "strict": 1.0, "elastic": 1.0} for cell in CELLS[:5]}}
    assert our_rows("x", scores, None) == []


def test_the_figure_names_every_model_of_known_size_in_the_colours_of_the_page() -> None:
    rows = published()[1]
    svg = draw_sizes(rows)
    for row in rows:
        assert (row.model in svg) == (row.parameters_billion is not None)
    assert not re.search(r"#[0-9a-f]{6}\b|font-family", svg)
    assert "var(--series-1)" in svg


def test_how_each_evaluation_was_made_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1)
    sampling = {"max_new_tokens": 512, "temperature": 0.7, "top_p": 0.9, "seed": 3}
    prompt = {"system": "你是<b>专家</b>。", "instruction": ""}
    add_evaluation(run, "mine", {"s1": "B"}, 7, samples=4, sampling={**sampling, "prompt": prompt})
    page, card = report(tmp_path, run), tmp_path / "card.md"
    said = "step 7; samples 4, max new tokens 512, temperature 0.7, top p 0.9, seed 3."
    assert f"mine on samples : runs/mine , {said}" in plain(page)
    assert "<b>专家" not in page and "你是&lt;b&gt;专家&lt;/b&gt;。" in page and "instruction</p>" not in page
    write_report([run], card)
    assert said in card.read_text(encoding="utf-8")


def test_names_of_models_that_score_alike_do_not_overlap() -> None:
    """Ours far below the published ones, with and without what leaked: a line of text is some 10 units high."""
    ours = [
        PaperRow(f"ours {number}", {"average_strict": 13.0 + 0.3 * number}, 7.6, True, "60 questions")
        for number in range(4)
    ]
    svg = draw_sizes([*published()[1], *ours])
    places = re.findall(r'<text[^>]* y="([\d.]+)"[^>]*>ours \d</text>', svg)
    heights = sorted(map(float, places))
    assert len(heights) == 4
    assert min(right - left for left, right in itertools.pairwise(heights)) > 10


def test_markdown_for_a_model_card(run: Path, tmp_path: Path) -> None:
    add_evaluation(run, "base", {"s1": "B", "m1": None})
    write_report([run], tmp_path / "card.md")
    text = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert "| All questions | base | 2 | 50.0 % [9.5–90.5] | 19.0 % |" in text
    assert r"| **mine\|\<b\>** (measured here) | 100.00 | 0.00 |" in text
    assert "| Psyche-R1 | 63.31 | 56.26 |" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    for line in tables:
        assert len(re.findall(r"(?<!\\)\|", line)) in (9, 16), line
    assert "psyche sft --config" in text


def test_the_data_card_of_what_a_run_was_trained_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1)
    config = (run / "config.yaml").read_text(encoding="utf-8")
    (tmp_path / "made" / "sft").mkdir(parents=True)
    card = {"records": {"sft": 12}, "sources": {"a book": 12}, "licences": {"CC0": 12}, "stages": [{"stage": "clean"}]}
    (tmp_path / "made" / "card.json").write_text(json.dumps(card), encoding="utf-8")
    (run / "config.yaml").write_text(config.replace("data/sft.jsonl", str(tmp_path / "made" / "sft")), encoding="utf-8")
    text = plain(report(tmp_path, run))
    assert "Data card of its training data records: sft 12 sources: a book 12 licences: CC0 12" in text
    assert "stage: clean" in text


def test_an_evaluation_that_was_changed_by_hand_is_named(run: Path, tmp_path: Path) -> None:
    (path,) = (run / "evaluations").iterdir()
    evaluation = json.loads(path.read_text(encoding="utf-8"))
    del evaluation["scores"]["fallback"]
    path.write_text(json.dumps(evaluation), encoding="utf-8")
    with pytest.raises(UserError, match=r"evaluations or safety\.json were changed") as error:
        report(tmp_path, run)
    assert "\n" not in str(error.value)


def test_empathy_is_shown_with_how_far_judges_agree(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1)
    add_empathy(run)
    text = plain(report(tmp_path, run))
    assert "kind against the dialogues’ own replies on dialogues , 8 dialogues" in text
    assert "Cognitive empathy 4.25 4.50 −0.25 −0.50 … +0.12" in text and "Safety 4.25" in text
    assert "a judge : 3 won, 4 tied, 1 lost of 8; same preference in both orders 75.0 %" in text
    assert "a judge and another agree on 87.5 % of 8, Cohen’s κ 0.71." in text
    assert "1 judgement is missing, d1, order 0: no judgement: <b> first" in text
    write_report([run], tmp_path / "card.md")
    card = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert "| Safety | 4.25 | 4.50 | -0.25 [-0.50, +0.12] |" in card
