"""The page of `psyche watch` in a real browser: it follows a run without being loaded again."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.made_up_runs import add_samples, make_run

EVIL = "<img src=x onerror=\"document.title='owned'\">"


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[str, Path, subprocess.Popen[str]]]:
    """The command on a run with samples and one of another rate; its address, the first run, the process."""
    run, other = make_run(tmp_path / "run", "grpo", 5), make_run(tmp_path / "other", "grpo", 5, learning_rate=3e-6)
    add_samples(run, 2, 5, f"<think>想</think>{EVIL}")
    command = [sys.executable, "-m", "psyche_jax.cli", "watch", str(run), str(other)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        match = re.search(r"http://\S+", process.stdout.readline())
        assert match
        yield match[0], run, process
        process.terminate()


@pytest.mark.slow
def test_a_run_is_followed(browser: Any, watched: tuple[str, Path, "subprocess.Popen[str]"]) -> None:
    url, run, process = watched
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.set_default_timeout(120_000)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text))
    page.goto(url)
    page.get_by_text("Step 5, written").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.get_by_text("optimizer.learning_rate").first.is_visible()
    assert page.title() == "run, other – psyche watch" and faults == []

    # What is open stays open when another step is there.
    page.locator("#curves details summary").first.click()
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 6, "reward": 0.875, "step_time": 2.0}) + "\n")
    page.get_by_text("Step 6, written").wait_for()
    page.locator("#curves figure", has_text="→ 0.875").first.wait_for()
    assert page.locator("#curves details").first.evaluate("details => details.open")

    # By time, and samples of an earlier step.
    page.get_by_label("by time").check()
    page.locator("#curves figure", has_text="10.0 s").first.wait_for(state="attached")
    page.locator("#samples button", has_text="Earlier").click()
    page.locator("#samples h4", has_text="Step 2").wait_for()
    assert page.get_by_text(EVIL).first.is_visible()

    # Its end is said, and what was shown stays.
    assert page.title() == "run, other – psyche watch" and faults == []
    process.terminate()
    page.get_by_role("alert").filter(has_text="no longer answers").wait_for()
    assert page.locator("#samples h4", has_text="Step 2").is_visible()
    page.close()
