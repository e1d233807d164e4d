"""Endpoints over real HTTP: good ones, slow to be whole, and those that lie or break off."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from chat_server import chat_server

from psyche_jax import cli
from psyche_jax.config import PromptSection
from psyche_jax.data.chat import render_prompt
from psyche_jax.errors import UserError
from psyche_jax.evaluate import evaluation
from psyche_jax.evaluate.benchmarks import read_benchmark
from psyche_jax.evaluate.endpoint import Endpoint, same_model
from psyche_jax.evaluate.tasks import Benchmark

TASKS = read_benchmark("samples").tasks[:12]
KEY = {task.text: task.gold for task in TASKS}


def gold(request: dict[str, Any]) -> str:
    """The right letters of the question that was asked."""
    asked = request["messages"][-1]["content"]
    return next(letters for text, letters in KEY.items() if asked.endswith(text))


def right(request: dict[str, Any], again: int) -> str:
    return f"<think>想</think>\n答案：{gold(request)}"


def evaluate(url: str, files: tuple[Path, ...] = (), samples: int = 1, **changes: Any) -> dict[str, Any]:
    endpoint = Endpoint(url, **{"max_new_tokens": 64, "temperature": 0.5, "top_p": 0.9, "concurrency": 4, **changes})
    return evaluation.evaluate(endpoint, Benchmark("b", TASKS), label="x", samples=samples, files=files)


@pytest.mark.parametrize("streams", [True, False])
def test_what_is_asked_and_what_is_made_of_it(streams: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")

    def slow(request: dict[str, Any], again: int) -> str:
        time.sleep(0.05)
        return right(request, again)

    with chat_server(slow, streams=streams) as server:
        found = evaluate(f"{server.url}#tiny", samples=2)
    assert found["scores"]["strict"] == 1.0 and found["scores"]["unanswered"] == 0
    assert found["items"][0]["response"] == f"<think>想</think>\n答案：{TASKS[0].gold}"
    assert server.most_at_once == 4
    assert {request["seed"] for request in server.requests} == {0, 1}
    assert len(server.requests) == 2 * len(TASKS)
    first = server.requests[0]
    assert (first["model"], first["max_tokens"], first["temperature"], first["top_p"]) == ("tiny", 64, 0.5, 0.9)
    assert first["messages"] in [render_prompt(task.turns, PromptSection()) for task in TASKS]
    assert server.headers[0]["authorization"] == "Bearer secret-key"
    assert "secret-key" not in json.dumps(found)


def test_reasoning_in_a_field_of_its_own_is_no_answer() -> None:
    for streams in (True, False):
        with chat_server(lambda *_: {"reasoning": "答案：A", "text": ""}, streams=streams) as server:
            found = evaluate(server.url)
        assert found["items"][0]["response"] == "<think>答案：A</think>"
        assert found["scores"]["failures"] == {"reasoning only": len(TASKS)}


def test_an_answer_cut_at_the_limit_is_counted_as_that() -> None:
    with chat_server(lambda *_: {"text": "<think>我想", "reason": "length"}) as server:
        assert evaluate(server.url)["scores"]["failures"] == {"cut at the limit": len(TASKS)}


def test_an_empty_answer_is_an_answer() -> None:
    with chat_server(lambda *_: "") as server:
        scores = evaluate(server.url)["scores"]
    assert (scores["count"], scores["strict"], scores["failures"]) == (len(TASKS), 0.0, {"empty": len(TASKS)})


@pytest.mark.parametrize("fault", [{"cut": True}, {"broken": True}, {"nothing": True}, {"raw": '{"choices": []}'}])
def test_what_breaks_off_is_asked_again(fault: dict[str, Any]) -> None:
    def once(request: dict[str, Any], again: int) -> Any:
        return {"text": right(request, again), **fault} if again == 0 else right(request, again)

    with chat_server(once) as server:
        found = evaluate(server.url)
    assert found["scores"]["strict"] == 1.0
    assert len(server.requests) == 2 * len(TASKS)


def test_what_never_comes_whole_is_set_aside_with_its_reason_and_asked_again_later(tmp_path: Path) -> None:
    bad = {TASKS[0].gold: {"cut": True, "text": "一半一半"}}
    file = tmp_path / "e.json"
    broken = [True]

    def answer(request: dict[str, Any], again: int) -> Any:
        first = request["messages"][-1]["content"].endswith(TASKS[0].text)
        return bad[TASKS[0].gold] if first and broken[0] else right(request, again)

    with chat_server(answer) as server:
        found = evaluate(server.url, (file,))
        assert found["scores"]["count"] == len(TASKS) - 1
        assert found["set_aside"] == [f"{TASKS[0].id}: no answer: the stream ended early, 3 times"]
        assert TASKS[0].id not in {item["id"] for item in found["items"]}
        broken[0], before = False, len(server.requests)
        found = evaluate(server.url, (file,))
        assert len(server.requests) == before + 1
    assert (found["scores"]["count"], found["set_aside"]) == (len(TASKS), [])
    assert list(tmp_path.iterdir()) == [file]


def test_one_question_that_is_refused_does_not_stop_the_others() -> None:
    def filtered(request: dict[str, Any], again: int) -> Any:
        return {"status": 400} if TASKS[3].text in request["messages"][-1]["content"] else right(request, again)

    with chat_server(filtered) as server:
        found = evaluate(server.url)
    assert found["set_aside"] == [f"{TASKS[3].id}: no answer: HTTP 400: refused"]
    assert found["scores"]["strict"] == 1.0


def test_another_models_name() -> None:
    expected = "answered none of 12 questions: another model answered: 'cheaper' for 'm'"
    lies = {"text": "答案：A", "model": "cheaper"}
    with chat_server(lambda *_: lies) as server, pytest.raises(UserError, match=expected):
        evaluate(f"{server.url}#m")
    for asked, served, same in (
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b-instruct", True),
        ("tiny", "/models/tiny/", True),
        ("m", "m-latest", True),
        ("gpt-4", "gpt-4o", False),
        ("gpt-4o", "gpt-4o-mini", False),
        ("m", "", False),
    ):
        assert same_model(asked, served) == same, (asked, served)


@pytest.mark.parametrize(
    ("status", "expected"), [(401, "HTTP 401: .* see OPENAI_API_KEY"), (404, "HTTP 404: .* the URL and the model")]
)
def test_a_wrong_key_or_model_ends_it_at_once(status: int, expected: str) -> None:
    with chat_server(lambda *_: {"status": status}) as server, pytest.raises(UserError, match=expected):
        evaluate(server.url)
    assert len(server.requests) <= 4


def test_the_rest_is_asked_when_a_dead_server_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from psyche_jax.evaluate import endpoint

    monkeypatch.setattr(endpoint, "RETRIES", 0)
    dead = [False]

    def dies(request: dict[str, Any], again: int) -> Any:
        if len(server.requests) > 5:
            dead[0] = True
        return {"status": 500} if dead[0] else right(request, again)

    with chat_server(dies) as server:
        with pytest.raises(UserError, match=r"does not answer any more \(HTTP 500: .*\); run the command again"):
            evaluate(f"{server.url}#tiny", (tmp_path / "e.json",))
        assert not (tmp_path / "e.json").exists()
        server.requests.clear()
        server.answer = right
        assert evaluate(f"{server.url}#tiny", (tmp_path / "e.json",))["scores"]["count"] == len(TASKS)
        assert 0 < len(server.requests) < len(TASKS)


def test_killed_without_warning_it_asks_only_for_the_rest(tmp_path: Path) -> None:
    """SIGKILL in the middle: no answer that was received is asked for again, but for those in flight."""

    def slow(request: dict[str, Any], again: int) -> str:
        time.sleep(0.1)
        return "答案：A"

    command = [sys.executable, "-m", "psyche_jax.cli", "eval", "URL", "--bench", "samples", "--batch-size", "2"]
    command += ["--limit", "40", "--out", "e.json", "--json"]
    with chat_server(slow) as server:
        command[4] = server.url
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        while len(server.requests) < 12:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        killed = len(server.requests)
        assert killed < 40 and not (tmp_path / "e.json").exists()
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["count"] == 40
    assert 40 <= len(server.requests) <= 42, "two were in flight"
    assert "of 40 answers are there already" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]


def test_which_model_is_meant() -> None:
    with chat_server(right, models=("a", "b")) as server, pytest.raises(UserError, match=r"has 2 models \(a, b\)"):
        evaluate(server.url)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/v1: names no model"):
        evaluate("http://127.0.0.1:9/v1")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    every = read_benchmark("samples").tasks

    def answer(request: dict[str, Any], again: int) -> str:
        asked = request["messages"]
        assert len(asked) == 1, "--bare: no system prompt"
        return f"答案：{next(task.gold for task in every if task.text == asked[0]['content'])}"

    with chat_server(answer) as server:
        arguments = ["eval", server.url, "--bench", "samples", "--bare", "--limit", "9", "--out", "e.json", "--json"]
        assert cli.main([*arguments, "--samples", "2", "--temperature", "0.7", "--cells", "mmcq"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["count"], summary["strict"], summary["deviation"]) == (9, 1.0, 0.0)
    assert list(summary["cells"]) == ["mmcq"]
    evaluation = json.loads(Path("e.json").read_text(encoding="utf-8"))
    assert (evaluation["label"], evaluation["model"]) == ("tiny", f"{server.url}#tiny")
    assert cli.main(["eval", server.url, "--bench", "samples", "--cells", "no"]) == 2
    assert "--cells no: samples has smcq, mmcq" in capsys.readouterr().err
