"""The report says what the run folders hold, and says so where they hold nothing."""

import html
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.made_up_runs import (
    PROMPT,
    add_evaluation,
    add_safety,
    add_samples,
    make_chain,
    make_run,
    write_json,
    write_lines,
)

from psyche_jax import cli
from psyche_jax.errors import UserError
from psyche_jax.evaluate.comparison import Evaluation, read_benches, wilson
from psyche_jax.evaluate.curves import SFT_METRICS, _Ticks, charts, grpo_metrics, moving_mean, number
from psyche_jax.evaluate.formatting import duration, spoken
from psyche_jax.evaluate.report import write_report
from psyche_jax.storage import locks


def report(tmp_path: Path, *runs: Path) -> str:
    """The report on `runs` as text."""
    out = tmp_path / "out" / "report.html"
    write_report(runs, out, "A title & more")
    return out.read_text(encoding="utf-8")


def plain(page: str) -> str:
    """What a reader sees, with single spaces."""
    visible = re.sub(r"<(style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", visible)).split())


def rows(page: str) -> list[list[str]]:
    """The cells of the table of scores."""
    table = re.search(r'<table class="scores stack">(.*?)</table>', page, re.DOTALL)
    assert table
    return [
        [plain(cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL)]
        for row in re.findall(r"<tr.*?</tr>", table[1], re.DOTALL)
    ]


def test_the_story_of_a_chain(tmp_path: Path) -> None:
    page = report(tmp_path, *make_chain(tmp_path))
    text = plain(page)
    assert "<title>A title &amp; more</title>" in page
    assert (
        "Supervised fine-tuning of models/qwen on data/sft.jsonl , 16 examples a step, 2 epochs. Done after 40 st"
        in text
    )
    assert "GRPO of models/qwen on data/grpo.jsonl , 8 prompts × 4 responses a step" in text
    assert "Loss 2.45 → 0.5 Evaluation loss 2.02 → 0.9 Time spent in steps 1 min 20 s" in text
    assert "Tokens per second, median 2,250 Tokens 180,000" in text
    assert f"psyche sft --config {tmp_path}/sft/config.yaml --set run.dir={tmp_path}/sft-again" in text
    assert "jax 0.10.2" in text


def test_a_verdict_stands_beside_the_headline_and_the_way_is_shown(tmp_path: Path) -> None:
    sft, grpo = make_chain(tmp_path)
    config = (grpo / "config.yaml").read_text(encoding="utf-8")
    (grpo / "config.yaml").write_text(config.replace("models/qwen", str(sft)), encoding="utf-8")
    add_evaluation(grpo, "sure", {f"s{number}": "B" for number in range(12)}, bench="other")
    add_evaluation(grpo, "wrong", {f"s{number}": "A" for number in range(30)}, bench="another")
    text = plain(report(tmp_path, sft, grpo))
    assert "50.0 % grpo not distinguishable from guessing (18.8–81.2 %)" in text
    assert "100.0 % sure better than guessing" in text and "0.0 % wrong worse than guessing" in text
    assert "From base to grpo : 3 became right, 1 became wrong. The change may be chance." in text
    assert "models/qwen → sft Supervised fine-tuning, 40 steps → grpo GRPO, 60 steps" in text
    write_report([sft, grpo], tmp_path / "card.md")
    assert "- grpo: not distinguishable from guessing." in (tmp_path / "card.md").read_text(encoding="utf-8")


def test_scores_stand_beside_chance_in_the_order_of_training(tmp_path: Path) -> None:
    head, *body = rows(report(tmp_path, *make_chain(tmp_path)))
    assert head[:3] == ["Model", "Strict", "Chance"]
    by_group = {row[0]: body[index + 1 : index + 4] for index, row in enumerate(body) if len(row) == 1}
    assert list(by_group) == ["All questions", "One right answer", "Several right answers"]
    assert by_group["All questions"] == [
        ["base", "16.7 %", "19.0 %", "3.0–56.4", "–", "25.0 %", "21.0 %", "1", "6"],
        ["sft step 40", "16.7 %", "19.0 %", "3.0–56.4", "+0.0", "25.0 %", "21.0 %", "1", "6"],
        ["grpo step 60", "50.0 %", "19.0 %", "18.8–81.2", "+33.3", "50.0 %", "21.0 %", "0", "6"],
    ]
    assert by_group["Several right answers"][0][1:3] == ["0.0 %", "6.7 %"]
    assert by_group["Several right answers"][2][1] == "50.0 %"


def test_an_evaluation_that_two_runs_hold_counts_once(tmp_path: Path) -> None:
    sft, grpo = make_chain(tmp_path)
    (grpo / "evaluations" / "again.json").write_bytes((sft / "evaluations" / "samples-sft.json").read_bytes())
    assert [row[0] for row in rows(report(tmp_path, sft, grpo))[2:5]] == ["base", "sft step 40", "grpo step 60"]


def test_two_evaluations_of_one_label_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, "grpo", 5) for name in ("one", "two")]
    for run, answer in zip(runs, "BA", strict=True):
        add_evaluation(run, "grpo", {"s1": answer}, step=5)
    assert [row[0] for row in rows(report(tmp_path, *runs))[2:]] == ["grpo (one) step 5", "grpo (two) step 5"]


def test_answers_side_by_side_with_what_changed_first(tmp_path: Path) -> None:
    text = plain(report(tmp_path, *make_chain(tmp_path)))
    assert (
        "base → grpo : 3 became right, 1 became wrong, 0 stayed right, 2 stayed wrong. Exact sign test: p = 0.62."
        in text
    )
    shown = re.findall(r"(Became right|Became wrong|Unchanged) · [a-z ]+ · right: BC? (\w\d):", text)
    assert shown == [
        ("Became right", "s1"),
        ("Became wrong", "s2"),
        ("Became right", "s3"),
        ("Became right", "m1"),
        ("Unchanged", "s4"),
        ("Unchanged", "m2"),
    ]
    for verdict in ("✓ Right", "✗ Wrong said A", "○ No answer found", "◐ Right in part (50 %) said B"):
        assert verdict in text
    assert "Reasoning 12 characters base 想了想 s1。 答案：A" in text
    assert "<|im_end|>" not in text.split("Completions in training")[1].split("Configuration")[1]


def test_completions_of_the_first_and_the_last_step(tmp_path: Path) -> None:
    text = plain(report(tmp_path, *make_chain(tmp_path)))
    assert "Step 1 4 responses, mean reward 0.875" in text and "Step 60 4 responses" in text
    assert "Highest · reward 1.5 · think_format 1 · answer_set 1 · advantage +0.50 · 20 tokens" in text
    assert "No answer after the reasoning." in text


def test_steps_without_a_common_prompt_say_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "grpo", 9)
    add_samples(run, 1, 9)
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line["prompt"] = PROMPT if line["step"] == 1 else PROMPT.replace("我烦透了", "我睡不着")
    write_lines(run / "samples.jsonl", lines)
    text = plain(report(tmp_path, run))
    assert "share no prompt" in text and "我烦透了" in text and "我睡不着" in text


def test_what_models_say_is_shown_and_not_run(tmp_path: Path) -> None:
    bad = "</div><script>alert(1)</script><img src=https://example.org/x onerror=alert(1)> \ud800"
    sft, grpo = make_chain(tmp_path)
    sample = {"step": 1, "prompt": bad, "completion": f"<think>{bad}</think>{bad}"}
    (grpo / "samples.jsonl").write_text(json.dumps(sample) + "\n", encoding="utf-8")
    path = add_evaluation(sft, "evil<b>", {"s1": "B"}, bench=f"bench{bad[:-1]}")
    path.write_text(path.read_text(encoding="utf-8").replace("想了想", "<script>alert(2)</script>"), encoding="utf-8")
    page = report(tmp_path, sft, grpo)
    assert "<script" not in page and "<img" not in page and "evil<b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "&lt;script&gt;alert(2)&lt;/script&gt;" in page


def test_the_page_asks_for_nothing(tmp_path: Path) -> None:
    page = report(tmp_path, *make_chain(tmp_path))
    assert "default-src 'none'" in page
    addresses = re.findall(r"""(?:src|href|url|action)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert {address for address in addresses if not address.startswith("#")} == {"data:,"}
    assert "@import" not in page and "javascript:" not in page


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "bare", "grpo", 3, "failed")
    (run / "metrics.jsonl").unlink()
    state = json.loads((run / "state.json").read_text(encoding="utf-8"))
    write_json(run / "state.json", {**state, "reason": "out of memory", "environment": {}})
    text = plain(report(tmp_path, run))
    assert "Failed after 3 steps: out of memory" in text
    assert "This run has no metrics (metrics.jsonl is missing or empty), so no curves and no timings." in text
    assert "This run has no samples (samples.jsonl is missing or empty)" in text
    assert "No evaluation was found in this run." in text
    assert "bare has no metrics, so there is nothing to draw." in text
    assert "nothing to set side by side" in text and "state.json names no versions." in text
    assert f"To resume it where it stopped: psyche grpo --config {run}/config.yaml" in text


def test_one_model_alone_has_no_before_and_after(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1)
    add_evaluation(run, "sft", {"s1": "B"})
    text = plain(report(tmp_path, run))
    assert "Only one model was evaluated on samples , so there is no before and after." in text
    assert "One right answer" not in text  # all questions are of that kind


@pytest.mark.parametrize("value", [math.nan, math.inf, "x"])
def test_a_metric_that_is_no_number_hides_nothing_else(tmp_path: Path, value: Any) -> None:
    run = make_chain(tmp_path)[-1]
    file = run / "metrics.jsonl"
    bad = dict.fromkeys(("step_time", "num_tokens", "loss", "reward", "memory/device_gib"), value)
    lines = [json.loads(line) | bad for line in file.read_text().splitlines()[:4]]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "Gradient norm" in plain(report(tmp_path, run))
    assert charts(grpo_metrics(list(lines[0])), [("run", lines)], "time")


def test_two_runs_of_a_kind_are_compared(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / "slow"), make_run(tmp_path / "fast", steps=20, learning_rate=3e-5))
    text = plain(page)
    assert "Supervised fine-tuning: 2 runs compared" in text
    assert "Loss, training slow 2.45 → 0.5 fast 2.4 → 0.5" in text
    differences = text.split("what differs")[1].split("All settings of 2 runs")[0]
    assert differences.strip() == "Setting slow fast optimizer.learning_rate differs 1.0e-05 3.0e-05"
    assert 'aria-label="Gradient norm over steps 1 to 40, first → last: slow 2.95 → 1; fast 2.9 → 1"' in page


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    text = plain(report(tmp_path, make_run(tmp_path / "a" / "sft", steps=2), make_run(tmp_path / "b" / "sft", steps=2)))
    assert "a/sft done" in text and "b/sft done" in text


def test_a_run_named_twice_is_shown_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    assert "1 run · written" in plain(report(tmp_path, run, run))


def test_remarks_on_what_went_wrong(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "grpo", 4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines[1] |= {"loss": None, "skipped_updates": 1.0}
    lines[0]["evaluation_loss"], lines[2]["evaluation_loss"] = 1.0, 1.5
    lines[-1] |= {"completions/clipped_ratio": 0.75, "frac_reward_zero_std": 0.9, "sampling/logp_difference/mean": 0.2}
    write_lines(run / "metrics.jsonl", lines)
    text = plain(report(tmp_path, run))
    assert "The loss or gradient was not finite at 1 of 4 steps, first at 2." in text
    assert "75.0 % of the completions were cut" in text and "90.0 % of the groups had equal rewards" in text
    assert "The evaluation loss ended at 1.5, above its lowest, 1." in text
    assert "log-probs of sampler and trainer differed" in text


@pytest.mark.parametrize("absent", ["config.yaml", "state.json"])
def test_a_folder_that_is_no_run_is_named(tmp_path: Path, absent: str) -> None:
    run = make_run(tmp_path / "run", steps=1)
    (run / absent).unlink()
    with pytest.raises(UserError, match=f"{run}: is not a run .it has no {absent}") as error:
        report(tmp_path, run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"scores": {"strict": 1.0}}, "'count' is missing"),
        ({"scores": {"strict": "high", "count": 1}}, "a score is not a number"),
        ({"items": [{"strict": 1}]}, "'id' is missing"),
    ],
)
def test_a_broken_evaluation_is_named(tmp_path: Path, broken: dict[str, Any], message: str) -> None:
    run = make_run(tmp_path / "run", steps=1)
    path = add_evaluation(run, "sft", {"s1": "B"}, **broken)
    with pytest.raises(UserError, match=re.escape(f"{path}: is not an evaluation ({message})")):
        report(tmp_path, run)


def test_no_run_and_no_place_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run was named"):
        write_report([], tmp_path / "out.html")
    with pytest.raises(UserError, match="is a folder"):
        write_report([make_run(tmp_path / "run", steps=1)], tmp_path)


def test_a_report_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    before = report(tmp_path, make_run(tmp_path / "run", steps=2))
    with pytest.raises(UserError):
        report(tmp_path, tmp_path / "absent")
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8") == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_charts_of_a_run_and_of_two() -> None:
    lines = [{"step": step, "reward": 1.0, "rewards/a/mean": 0.5, "clip_ratio/low_mean": 0.0} for step in range(1, 5)]
    metrics = grpo_metrics(list(lines[0]))
    assert [[one.name for one in chart.series] for chart in charts(metrics, [("x", lines)])] == [["total", "a"]]
    both = charts(metrics, [("x", lines), ("y", lines)])
    assert [(chart.metric.title, [one.name for one in chart.series]) for chart in both] == [
        ("Reward", ["x", "y"]),
        ("Reward, a", ["x", "y"]),
    ]
    assert [one.color for one in both[1].series] == [1, 2]


def test_a_drawing_has_no_colour_font_or_size_of_its_own() -> None:
    lines = [{"step": step, "loss": 1 / step, "evaluation_loss": float("nan")} for step in range(1, 60)]
    chart, *_ = charts(SFT_METRICS, [("x", lines)])
    assert not re.search(
        r"#[0-9a-f]{6}\b|font-family|<style|<metadata|<svg[^>]* width=|http://(?!www\.w3\.org)", chart.svg
    )
    assert "var(--series-1)" in chart.svg and "var(--chart-text)" in chart.svg
    assert chart.summary == "Loss over steps 1 to 59, first → last: training 1 → 0.0169; evaluation never finite"


def test_labels_of_an_axis_differ() -> None:
    assert _Ticks(1).format_ticks([1.805, 1.81, 1.815]) == ["1.805", "1.81", "1.815"]
    assert _Ticks(60).format_ticks([0, 60, 120]) == ["0", "1", "2"]


def test_what_is_exact_is_not_smoothed() -> None:
    """A moving mean would round off a warm-up's corner, and begin above its first value."""
    lines = [{"step": step, "loss": 1.0, "learning_rate": min(step, 20) * 1e-5} for step in range(1, 61)]
    drawn = {chart.metric.title: chart.svg for chart in charts(SFT_METRICS, [("run", lines)])}
    assert drawn["Loss"].count("<path") > drawn["Learning rate"].count("<path")


def test_a_report_is_html_or_markdown(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rep.pdf: a report is HTML or Markdown; give the name of a .html or .md file"):
        write_report([tmp_path], tmp_path / "rep.pdf")


def test_moving_mean() -> None:
    assert np.allclose(moving_mean([1.0, 2.0, 6.0, 1.0], 3), [1.5, 3.0, 3.0, 3.5])
    assert np.allclose(moving_mean([1.0, float("nan"), 3.0], 3), [1.0, 2.0, 3.0])
    assert np.isnan(moving_mean([float("nan")], 1)).all()


def test_wilson_interval_and_sign_test(tmp_path: Path) -> None:
    # Wilson 1927, by R: prop.test(8, 10, correct = FALSE) and binom.test(1, 6).
    assert np.allclose(wilson(0.8, 10), (0.4901625, 0.9433178), atol=1e-4)
    assert wilson(0.0, 5)[0] == 0.0 and wilson(1.0, 5)[1] == 1.0
    run = make_run(tmp_path / "run", steps=1)
    ids = [f"s{index}" for index in range(6)]
    paths = [
        add_evaluation(run, "a", {id_: "B" if id_ == "s0" else "A" for id_ in ids}),
        add_evaluation(run, "b", {id_: "A" if id_ == "s0" else "B" for id_ in ids}),
    ]
    bench, *_ = read_benches([Evaluation.read(path, "run") for path in paths])
    assert bench.transitions[0].p_value == pytest.approx(0.21875)


@pytest.mark.parametrize("stop", ["<|im_end|>", "<｜end▁of▁sentence｜>", ""])
def test_an_answer_is_shown_without_its_stop_token(stop: str) -> None:
    assert spoken(f"<think>因为</think>\n答案：B{stop}") == ("因为", "答案：B")


def test_numbers_for_people() -> None:
    values = (0, 1e-5, -0.012345, 0.5, 12.345, 2250.4, 1.5e8, float("nan"))
    assert [number(value) for value in values] == ["0", "1e−5", "−0.0123", "0.5", "12.3", "2,250", "1.5e8", "nan"]
    spans = (0.25, 42.12, 723, 11520)
    assert [duration(seconds) for seconds in spans] == ["250 ms", "42.1 s", "12 min 3 s", "3 h 12 min"]


def test_what_safety_writes_without_dialogues_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "evaluations").mkdir()
    (run / "evaluations" / "e.json").write_text(json.dumps({"label": "a", "bench": "b", "scores": {}, "items": []}))
    assert cli.main(["safety", str(run)]) == 0
    (run / "evaluations" / "e.json").unlink()
    text = plain(report(tmp_path, run))
    assert "plan or preparation" in text and "turns of persons" not in text
    write_report([run], tmp_path / "card.md")
    assert "| plan or preparation |" in (tmp_path / "card.md").read_text(encoding="utf-8")


def test_a_run_whose_process_is_gone_is_not_called_running(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", status="running")
    state = json.loads((run / "state.json").read_text())
    write_json(run / "state.json", {**state, "step": 0, "current_step": 12})
    lock = "import json; from psyche_jax.storage import locks; print(json.dumps(locks._self()))"
    (run / locks.LOCK_FILE).write_text(json.dumps(locks._self()))
    assert "Running; at step 12." in plain(report(tmp_path, run))
    write_json(run / "state.json", {**state, "step": 0, "current_step": 12, "total_steps": 300})
    seconds = [json.loads(line)["step_time"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    left = duration(288 * statistics.median(seconds))
    assert f"Running; at step 12 of 300, about {left} left." in plain(report(tmp_path, run))
    write_json(run / "state.json", {**state, "step": 0, "current_step": 300, "total_steps": 300})
    assert "Running; at step 300." in plain(report(tmp_path, run))
    write_json(run / "state.json", {**state, "step": 0, "current_step": 12, "total_steps": 300})
    holder = subprocess.run([sys.executable, "-c", lock], capture_output=True, text=True, check=True).stdout
    (run / locks.LOCK_FILE).write_text(holder)
    assert "Killed at step 12; the same command resumes it." in plain(report(tmp_path, run))


def test_safety_results_are_shown_with_intervals_and_confusion(tmp_path: Path) -> None:
    runs = make_chain(tmp_path)
    assert "were not measured for these runs" in plain(report(tmp_path, *runs))
    add_safety(runs[1])
    text = plain(report(tmp_path, *runs))
    assert "56 labelled messages: posts.jsonl" in text
    assert "plan or preparation 28 90.0 [45.0–95.0] 87.5 [43.8–93.8] 50.0 [25.0–75.0]" in text
    assert "unrelated (false alarms) 28 3.0 [1.5–51.5] 87.5 [43.8–93.8] –" in text
    assert "plan or preparation 0 25 0 0 0 0 0 3" in text
    assert "Of 40 answers of the models in this run's evaluations" in text and "diagnosis 4" in text
    assert "1 bad line in no figure" in text
    write_report(runs, tmp_path / "card.md")
    card = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert "| plan or preparation | 28 | 90.0 [45.0–95.0] | 87.5 [43.8–93.8] | 50.0 [25.0–75.0] |" in card
    assert "| none | 0 | 1 | 0 | 0 | 0 | 0 | 0 | 27 |" in card
    (runs[1] / "safety.json").write_text('{"posts": {}}')
    with pytest.raises(UserError, match="write them again with"):
        report(tmp_path, *runs)


def test_scores_on_other_questions_are_no_change():
    def asked(label, cell):
        items = {f"{cell}{n}": {"id": f"{cell}{n}", "strict": 1} for n in range(3)}
        return Evaluation("run", label, "b", label, 0, {"count": 3, "strict": 1.0, "chance": None}, items)

    (bench,) = read_benches([asked("one", "x"), asked("other", "y"), asked("third", "x")])
    assert [row["change"] for row in bench.overall] == [None, None, 0.0]


def test_scores_of_a_part_are_compared_if_the_part_is_the_same():
    """Though the others share more questions than the part has."""
    part = {"count": 2, "strict": 0.5, "chance": None}

    def asked(label, questions):
        items = {id_: {"id": id_, "strict": 0, **fields} for id_, fields in questions.items()}
        names = ("single", "multi")
        scores = {"count": 4, "strict": 0.5, "chance": None, "by_kind": dict.fromkeys(names, part)}
        return Evaluation("run", label, "b", label, 0, scores | {"decontaminated": part}, items)

    single, multi = {"kind": "single", "leaked": ""}, {"kind": "multi", "leaked": "x"}
    first = {"a": single, "b": single, "c": multi, "d": multi}
    other = {"e": {**single, "leaked": "x"}, "b": single, "c": {**multi, "leaked": ""}, "d": multi}
    (bench,) = read_benches([asked("one", first), asked("other", other), asked("third", first)])
    changes = [[row["change"] for row in group["rows"]] for group in bench.groups]
    assert changes == [[None, None, 0.0], [None, None, 0.0], [None, 0.0, 0.0], [None, None, 0.0]]
