"""`psyche watch` shows runs as they are now: not begun, half a line written, resumed, broken; and to nobody else."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from support.made_up_runs import add_samples, make_run, write_lines

from psyche_jax.cli import main
from psyche_jax.watch.server import watch_app

TOKEN = {"authorization": "Bearer secret"}


def client_of(*folders: Path, **options: Any) -> TestClient:
    """Who asks for the page of `folders`, on this machine."""
    return TestClient(watch_app(folders, "secret", ("127.0.0.1",), **options), base_url="http://127.0.0.1")


def view(client: TestClient, **query: str) -> dict[str, str]:
    """The fragments."""
    answer = client.get("/view", params=query, headers=TOKEN)
    assert answer.status_code == 200
    return answer.json()["fragments"]


def test_a_run_is_followed_from_before_it_begins_until_it_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    client = client_of(folder)
    assert "No run has started here yet" in view(client)["runs"]
    make_run(folder, steps=3)
    assert "Step 3" in view(client)["runs"]

    # Half a line, then the whole of it.
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_text(encoding="utf-8")
    line = json.dumps({"step": 4, "loss": 0.125, "step_time": 2.0}) + "\n"
    metrics.write_text(whole + line[:20], encoding="utf-8")
    assert "Step 3" in view(client)["runs"]
    metrics.write_text(whole + line, encoding="utf-8")
    fragments = view(client)
    assert "Step 4" in fragments["runs"] and "→ 0.125" in fragments["curves"]

    # It resumes after step 2.
    metrics.write_text("".join(whole.splitlines(keepends=True)[:2]), encoding="utf-8")
    assert "Step 2" in view(client)["runs"]
    metrics.write_text("no JSON\n" + whole, encoding="utf-8")
    assert "metrics.jsonl:1: is not JSON" in view(client)["runs"]


def test_what_has_not_changed_is_not_sent_again(tmp_path: Path) -> None:
    client = client_of(make_run(tmp_path / "run", steps=2))
    version = client.get("/view", headers=TOKEN).json()["version"]
    assert client.get("/view", params={"since": version}, headers=TOKEN).status_code == 204
    assert client.get("/view", params={"since": version, "by": "time"}, headers=TOKEN).status_code == 200


def test_runs_over_each_other_by_step_and_by_time(tmp_path: Path) -> None:
    fast, slow = make_run(tmp_path / "fast", steps=4, learning_rate=3e-5), make_run(tmp_path / "slow", steps=4)
    lines = [json.loads(line) for line in (slow / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    write_lines(slow / "metrics.jsonl", [{**line, "step_time": 20.0} for line in lines])
    client = client_of(fast, slow)
    by_step = view(client)
    assert (
        'aria-label="Loss, training over steps 1 to 4, first → last: fast 2 → 0.5; slow 2 → 0.5"' in by_step["curves"]
    )
    assert '<tr><th scope="row">step 2</th><td>1.5</td><td>1.5</td></tr>' in by_step["curves"]
    assert "optimizer.learning_rate" in by_step["settings"] and "batch_size" not in by_step["settings"]
    by_time = view(client, by="time")["curves"]
    # After 4 s of steps the fast run has done two, the slow one none; after 20 s the fast one has ended.
    assert '<tr><th scope="row">4.0 s</th><td>1.5</td><td>–</td></tr>' in by_time
    assert '<tr><th scope="row">20.0 s</th><td>–</td><td>2</td></tr>' in by_time


def test_samples_are_paged_through_and_shown_as_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "grpo", 9)
    add_samples(run, 3, 9, "<think>想</think><img src=x onerror=alert(1)>")
    client = client_of(run)
    newest, earlier = view(client)["samples"], view(client, at0="3")["samples"]
    assert "2 of 2 recorded steps" in newest and "Step 9" in newest
    assert "1 of 2 recorded steps" in earlier and "Step 3" in earlier
    assert newest.count("reward 1.5 · think_format 1 · answer_set 1 · advantage +0.50 · 20 tokens") == 2
    assert "<img" not in newest and "&lt;img" in newest


def test_a_step_that_is_none_shows_the_newest_samples(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "grpo", 9)
    half = {"prompt": "p", "completion": "\ud83d"}  # of a surrogate pair
    (run / "samples.jsonl").write_text("".join(json.dumps({"step": step, **half}) + "\n" for step in (3, 9)))
    client = client_of(run)
    for asked in ("9" * 4301, "4", "-1", "٣", "²"):
        assert "2 of 2 recorded steps" in view(client, at0=asked)["samples"]


@pytest.mark.parametrize("kind", ["sft", "grpo"])
@pytest.mark.parametrize("value", [10**300, -(10**300), 1e308, 10**25], ids="{:.0e}".format)
def test_numbers_beyond_float32_are_shown(kind: str, value: float, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", kind, 4, status="running")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = {key: value for key in lines[-1] if key != "step"}
    write_lines(run / "metrics.jsonl", [*lines[:-1], {**lines[-1], **last}])
    write_lines(run / "samples.jsonl", [{"step": 4, "prompt": "p", **dict.fromkeys(("reward", "advantage"), value)}])
    state = json.loads((run / "state.json").read_text(encoding="utf-8"))
    (run / "state.json").write_text(json.dumps({**state, "total_steps": value, "seconds": {"a": value}}))
    client = client_of(run)
    assert "Step 4" in view(client)["runs"] and "<svg" in view(client, by="time")["curves"]
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0


@pytest.mark.parametrize("step", [10**300, -1, "4", True], ids=["large", "negative", "text", "true"])
def test_a_step_that_cannot_be_is_named(step: object, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=4)
    state = json.loads((run / "state.json").read_text(encoding="utf-8"))
    (run / "state.json").write_text(json.dumps({**state, "status": "running", "current_step": step}))
    assert "its current_step cannot be used" in view(client_of(run))["runs"]
    (run / "state.json").write_text(json.dumps(state))
    write_lines(run / "metrics.jsonl", [{"step": step, "loss": 1.0}])
    assert "metrics.jsonl:1: has no step" in view(client_of(run))["runs"]


def test_only_who_has_the_token_is_shown_anything(tmp_path: Path) -> None:
    client = client_of(make_run(tmp_path / "run", steps=1))
    assert client.get("/view").status_code == 401
    assert client.get("/view", headers={"authorization": "Bearer else"}).status_code == 401
    assert client.get("/", headers={"host": "evil.example"}).status_code == 421
    assert "models/qwen" not in client.get("/").text


def test_watching_starts_no_jax() -> None:
    code = "import sys, psyche_jax.watch.server, psyche_jax.evaluate.report; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("place", "said"), [("run/state.json", "is not a run; give"), (".", "but contains runs: psyche")]
)
def test_what_is_no_run_is_named(tmp_path: Path, place: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", steps=1)
    assert main(["watch", str(tmp_path / place)]) == 1
    assert said in capsys.readouterr().err
