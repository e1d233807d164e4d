"""Endpoints over real HTTP: good ones, slow to be whole, and those that lie or break off."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.chat_server import chat_server

from psyche_jax import cli
from psyche_jax.config import PromptSection
from psyche_jax.data.chat import render_prompt
from psyche_jax.errors import UserError
from psyche_jax.evaluate import evaluation
from psyche_jax.evaluate.benchmarks import read_benchmark
from psyche_jax.evaluate.endpoint import Endpoint, same_model
from psyche_jax.evaluate.tasks import Benchmark
from psyche_jax.llm.retries import Patience

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


@pytest.mark.parametrize("streams", [True, False])
def test_reasoning_in_a_field_of_its_own_is_kept_and_no_answer(streams: bool) -> None:
    with chat_server(
        lambda request, _: {"reasoning": "答案：Z", "text": f"答案：{gold(request)}"}, streams=streams
    ) as server:
        found = evaluate(server.url)
    assert found["scores"]["strict"] == 1.0
    assert found["items"][0]["response"] == f"<think>答案：Z</think>答案：{TASKS[0].gold}"
    with chat_server(lambda *_: {"reasoning": "答案：A", "text": ""}, streams=streams) as server:
        found = evaluate(server.url)
    assert found["items"][0]["response"] == "<think>答案：A</think>"
    assert found["scores"]["failures"] == {"reasoning only": len(TASKS)}


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize(
    ("fault", "reason", "greedy", "drawn"),
    [
        ({"reason": "content_filter"}, "content_filter", 1, 3),
        ({"reason": "stop", "text": "", "message": {"refusal": "no"}}, "refusal", 1, 3),
        ({"reason": "error"}, "error", 3, 3),
    ],
)
def test_what_is_no_answer_is_counted_apart_and_asked_again_where_that_helps(
    fault: dict[str, Any], reason: str, greedy: int, drawn: int, streams: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def answer(request: dict[str, Any], again: int) -> Any:
        if not request["messages"][-1]["content"].endswith(TASKS[2].text):
            return right(request, again)
        asked.append(request["seed"])
        return {"text": f"答案：{gold(request)}", **fault}

    with chat_server(answer, streams=streams) as server:
        for temperature, times in ((0.0, greedy), (0.5, drawn)):
            asked.clear()
            found = evaluate(server.url, temperature=temperature)
            assert len(asked) == times
            assert found["no_answer"] == {reason: 1} and found["scores"]["count"] == len(TASKS) - 1
            assert found["scores"]["strict"] == 1.0 and found["set_aside"][0].startswith(
                f"{TASKS[2].id}: no answer: {reason}"
            )
        if reason in ("content_filter", "refusal"):
            assert len(set(asked)) == 3, "another draw each time"


def test_what_a_filter_lets_through_at_the_second_draw_is_the_answer() -> None:
    def answer(request: dict[str, Any], again: int) -> Any:
        return {"text": "半", "reason": "content_filter"} if request["seed"] < 9 else right(request, again)

    with chat_server(answer) as server:
        assert evaluate(server.url)["scores"]["strict"] == 1.0


def test_an_endpoint_that_never_answers_is_given_up_early() -> None:
    """Not after all questions were paid for."""
    tasks = read_benchmark("samples").tasks
    for fault, reason in (
        ({"reason": "content_filter"}, "content_filter"),
        ({"model": "other"}, "another model answered"),
    ):
        with chat_server(lambda *_, fault=fault: {"text": "答案：A", **fault}) as server:
            endpoint = Endpoint(f"{server.url}#tiny", max_new_tokens=9, temperature=0.0, concurrency=4)
            with pytest.raises(UserError, match=f"no answer 20 times in a row: {reason}"):
                evaluation.evaluate(endpoint, Benchmark("b", tasks), label="x")
            assert len(server.requests) < 28 < len(tasks)


def test_an_answer_that_drips_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from psyche_jax.evaluate import endpoint

    monkeypatch.setattr(endpoint, "SILENCES", 2)
    monkeypatch.setattr(endpoint, "UNREACHABLE_AFTER", 100)

    def answer(request: dict[str, Any], again: int) -> Any:
        return {"drips": 0.1} if request["messages"][-1]["content"].endswith(TASKS[1].text) else right(request, again)

    with chat_server(answer) as server:
        found = evaluate(f"{server.url}#tiny", timeout=0.5)
    assert found["set_aside"] == [f"{TASKS[1].id}: no answer: no answer in time"]


@pytest.mark.parametrize("streams", [True, False])
def test_parameters_that_are_refused_are_left_out_and_said_in_the_record(
    streams: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(request: dict[str, Any], again: int) -> Any:
        for name in ("max_tokens", "seed"):
            if name in request:
                return {"status": 400, "error": f"Unsupported parameter: '{name}' is not supported with this model."}
        return right(request, again)

    with chat_server(answer, streams=streams) as server:
        found = evaluate(f"{server.url}#tiny", concurrency=1)
        assert found["scores"]["strict"] == 1.0 and len(server.requests) == len(TASKS) + 2
        assert found["sampling"]["parameters"] == {"max_tokens": "max_completion_tokens", "seed": None}
        assert capsys.readouterr().err.count("from now on psyche") == 2
        server.requests.clear()
        evaluate(f"{server.url}#tiny", names={"max_tokens": "max_completion_tokens", "seed": None})
        assert len(server.requests) == len(TASKS) and "seed" not in server.requests[0]
    assert "from now on" not in capsys.readouterr().err


def test_a_deployment_that_answers_under_its_models_name_is_accepted_if_one_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with chat_server(lambda *_: {"text": "答案：A", "model": "gpt-4o-2024-08-06"}) as server:
        command = ["eval", f"{server.url}#my-deployment", "--bench", "samples", "--limit", "3", "--json"]
        assert cli.main(command) == 1
        assert "--served-as gpt-4o-2024-08-06 accepts it" in capsys.readouterr().err
        command += ["--served-as", "gpt-4o-2024-08-06", "--parameter", "seed=", "--parameter", "max_tokens=most"]
        assert cli.main([*command, "--out", "e.json"]) == 0
        assert json.loads(capsys.readouterr().out)["count"] == 3
        assert "seed" not in server.requests[-1] and server.requests[-1]["most"] == 512
        sampling = json.loads(Path("e.json").read_text(encoding="utf-8"))["sampling"]
        assert sampling["served_as"] == ["gpt-4o-2024-08-06"] and sampling["parameters"] == {
            "seed": None,
            "max_tokens": "most",
        }
        assert cli.main([*command, "--parameter", "sed=x"]) == 2
        assert "--parameter sed=x: must be NAME=ITS" in capsys.readouterr().err


def test_a_server_that_names_no_model_is_accepted_if_one_says_so() -> None:
    with chat_server(lambda *_: {"text": "答案：A", "model": ""}) as server:
        with pytest.raises(UserError, match="'', not 'm'; --served-as '' accepts it"):
            evaluate(f"{server.url}#m")
        assert evaluate(f"{server.url}#m", served_as=("",))["set_aside"] == []


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
    expected = "answered none of 12 questions: another model answered: 'cheaper', not 'm'"
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

    monkeypatch.setattr(endpoint, "PATIENCE", Patience(retries=0))
    dead = [False]

    def dies(request: dict[str, Any], again: int) -> Any:
        if len(server.requests) > 5:
            dead[0] = True
        return {"status": 500} if dead[0] else right(request, again)

    with chat_server(dies) as server:
        with pytest.raises(UserError, match=r"no longer answers \(HTTP 500: .*\); run the command again"):
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
    assert "of 40 answers are already done" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]


def test_which_model_is_meant() -> None:
    with chat_server(right, models=("a", "b")) as server, pytest.raises(UserError, match=r"has 2 models \(a, b\)"):
        evaluate(server.url)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/v1: lists no model"):
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


@pytest.mark.parametrize(
    "url",
    [
        "http://user:s3cret@localhost/v1",
        "http://s3cret@localhost/v1",
        "https://h/v1?api-key=s3cret",
        "http://u:s3cret@h:x/v1",
    ],
)
def test_a_key_in_the_address_is_refused_and_not_shown(url, capsys, tmp_path):
    """It would stand in the evaluation, in the report and in messages."""
    out = tmp_path / "out.json"
    assert cli.main(["eval", f"{url}#m", "--bench", "samples", "--limit", "1", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "must not contain a key" in error and "s3cret" not in error and error.count("\n") == 1
    assert not out.exists()
    for broken in ("http://#m", "http://h:port/v1#m", "http://h:99999/v1#m", "http://\u200bh/v1#m"):
        assert cli.main(["eval", broken, "--bench", "samples", "--limit", "1"]) == 2
        assert "is not a URL such as" in capsys.readouterr().err
