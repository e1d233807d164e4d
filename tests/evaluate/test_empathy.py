"""Judges over real HTTP: fair ones, those that like what comes first, and those that say no JSON."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.answerers import Answerer
from support.chat_server import chat_server

from psyche_jax import cli
from psyche_jax.errors import UserError
from psyche_jax.evaluate.benchmarks import read_benchmark
from psyche_jax.evaluate.empathy import DIMENSIONS, Judgement, Marks, Pair, summarize_empathy
from psyche_jax.evaluate.endpoint import Endpoint
from psyche_jax.evaluate.evaluation import evaluate, scores_table
from psyche_jax.evaluate.tasks import Benchmark

BENCH = Benchmark("dialogues", read_benchmark("dialogues").tasks[:6])


def marks(value: int, **changes: int) -> dict[str, int]:
    return {**dict.fromkeys(DIMENSIONS, value), **changes}


TOO_HIGH = marks(6)
NONSENSE = ["好的", '{"first": ', '{"first": {}, "second": {}}', json.dumps({"first": TOO_HIGH, "second": TOO_HIGH})]


def replies(request: dict[str, Any]) -> list[str]:
    """The two replies as the judge sees them."""
    return re.findall(r"<回复[一二]>\n(.*?)\n</回复[一二]>", request["messages"][0]["content"], re.DOTALL)


def fair(request: dict[str, Any], again: int) -> str:
    """Likes replies that are warm, wherever they stand."""
    first, second = (marks(5, safety=4) if "温暖" in reply else marks(2) for reply in replies(request))
    return f"<think>想 {{</think>```json\n{json.dumps({'first': first, 'second': second})}\n```"


def biased(request: dict[str, Any], again: int) -> str:
    return json.dumps({"first": marks(4), "second": marks(3)})


def judged(*urls: str, files: tuple[Path, ...] = (), reply: str = "<think>想</think>温暖的回复") -> dict[str, Any]:
    judges = [Endpoint(url, max_new_tokens=64, temperature=0.0) for url in urls]
    return evaluate(Answerer(lambda *_: reply), BENCH, label="x", judges=judges, files=files)


def test_what_a_judge_sees() -> None:
    with chat_server(fair) as server:
        found = judged(server.url)
    assert len(server.requests) == 2 * len(BENCH.tasks)
    seen = [replies(request) for request in server.requests]
    for task in BENCH.tasks:
        assert ["温暖的回复", task.gold] in seen and [task.gold, "温暖的回复"] in seen, "both orders, no reasoning"
        assert any(task.text in request["messages"][0]["content"] for request in server.requests)
        assert task.gold not in task.text
    assert {task.cell for task in BENCH.tasks} <= {"single_turn", "multi_turn"}
    (judge,) = found["empathy"]["judges"].values()
    assert judge == {"count": 6, "win": 6, "tie": 0, "lose": 0, "same_in_both_orders": 1.0, "first_preferred": 0.5}
    assert found["empathy"]["dimensions"]["technique"] == {
        "model": 5.0,
        "other": 2.0,
        "difference": 3.0,
        "interval": (3.0, 3.0),
    }
    assert found["empathy"]["dimensions"]["safety"]["difference"] == 2.0
    assert len(found["judgements"]) == 12 and found["judgements"][0]["model"] == marks(5, safety=4)
    assert found["scores"]["count"] == 0


def test_a_judge_that_likes_what_comes_first_decides_nothing() -> None:
    with chat_server(fair) as one, chat_server(biased, models=("partial",)) as other:
        found = judged(one.url, other.url)["empathy"]
    judge = found["judges"][f"{other.url}#partial"]
    assert judge == {"count": 6, "win": 0, "tie": 6, "lose": 0, "same_in_both_orders": 0.0, "first_preferred": 1.0}
    assert found["agreement"] == [
        {"judges": [f"{one.url}#tiny", f"{other.url}#partial"], "count": 6, "share": 0.0, "kappa": 0.0}
    ]
    assert found["dimensions"]["technique"]["difference"] == 1.5
    table = scores_table({"count": 0, "set_aside": 0, "empathy": found})
    assert "0 won, 6 tied, 0 lost of 6; same verdict in both orders 0.00, first preferred 1.00" in table


def test_kappa_by_hand() -> None:
    """Outcomes win/lose of two judges: observed agreement 0.7, expected 0.5, kappa 0.4."""
    pairs = [Pair(str(n), "", "", "") for n in range(10)]
    high, low = Marks(5, 5, 5, 5, 5), Marks(1, 1, 1, 1, 1)

    def judge(wins: set[int]) -> dict[tuple[str, int], Judgement]:
        return {
            (str(n), order): Judgement(high, low) if (n in wins) == (order == 0) else Judgement(low, high)
            for n in range(10)
            for order in (0, 1)
        }

    found = summarize_empathy(pairs, {"a": judge({0, 1, 2, 3, 4}), "b": judge({0, 1, 2, 3, 5, 6})})["agreement"][0]
    assert found["share"] == pytest.approx(0.7)
    assert found["kappa"] == pytest.approx((0.7 - 0.5) / (1 - 0.5))


@pytest.mark.parametrize(
    "form",
    [
        '<think>草稿 {{"first": 1}}</think>{}',
        "{}（注：{{}}）",
        "评分如下：\n```json\n{}\n```\n以上。",
        "想 {{</think>{}",
    ],
)
def test_marks_are_read_whatever_stands_around_them(form: str) -> None:
    with chat_server(lambda request, _: form.format(biased(request, 0))) as server:
        assert judged(server.url)["empathy"]["count"] == 6
    assert len(server.requests) == 12, "nothing was asked again"


def test_a_judge_that_is_filtered_gives_no_marks() -> None:
    def answer(request: dict[str, Any], again: int) -> Any:
        filtered = BENCH.tasks[0].gold in replies(request)
        return {"text": fair(request, again), "reason": "content_filter" if filtered else "stop"}

    with chat_server(answer) as server:
        found = judged(server.url)["empathy"]
    (missing,) = found["not_judged"].values()
    assert found["count"] == 5 and all(line.endswith(": content_filter") for line in missing)
    assert len(server.requests) == 12


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_nonsense_is_asked_for_again_with_the_fault_named(nonsense: str) -> None:
    def answer(request: dict[str, Any], again: int) -> str:
        return nonsense if len(request["messages"]) == 1 else fair(request, again)

    with chat_server(answer) as server:
        found = judged(server.url)
    assert found["empathy"]["count"] == 6 and len(server.requests) == 24
    assert any("格式不对" in request["messages"][-1]["content"] for request in server.requests)


def test_a_judge_that_never_says_json(tmp_path: Path) -> None:
    gold = BENCH.tasks[0].gold

    def answer(request: dict[str, Any], again: int) -> str:
        return "不" if gold in replies(request) else fair(request, again)

    with chat_server(answer) as server:
        found = judged(server.url, files=(tmp_path / "e.json",))["empathy"]
        assert found["count"] == 5
        (missing,) = found["not_judged"].values()
        expected = {f"{BENCH.tasks[0].id}, order {order}: no judgement: there is no JSON object" for order in (0, 1)}
        assert set(missing) == expected
        server.answer, before = fair, len(server.requests)
        assert judged(server.url, files=(tmp_path / "e.json",))["empathy"]["count"] == 6
        assert len(server.requests) == before + 2, "only what was missing is asked again"
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]
    with chat_server(lambda *_: "不") as server, pytest.raises(UserError, match="judged none of 6 dialogues"):
        judged(server.url)


def test_killed_while_judging_neither_model_nor_judge_is_asked_again(tmp_path: Path) -> None:
    asked: list[object] = []

    def answer(request: dict[str, Any], again: int) -> Any:
        return {"status": 401} if len(server.requests) > 5 else fair(request, again)

    def say(task: object, _: int) -> str:
        asked.append(task)
        return "温暖"

    file = tmp_path / "e.json"
    with chat_server(answer) as server:
        judge = Endpoint(f"{server.url}#tiny", max_new_tokens=64, temperature=0.0, concurrency=1)
        with pytest.raises(UserError, match="HTTP 401"):
            evaluate(Answerer(say), BENCH, label="x", judges=[judge], files=[file])
        server.answer = fair
        server.requests.clear()
        found = evaluate(Answerer(say), BENCH, label="x", judges=[judge], files=[file])
    assert (len(asked), len(server.requests), found["empathy"]["count"]) == (6, 7, 6)
    assert list(tmp_path.iterdir()) == [file]


def test_two_models_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    evaluate(
        Answerer(lambda *_: "冷"), Benchmark("dialogues", read_benchmark("dialogues").tasks), label="o", files=[other]
    )
    with chat_server(lambda *_: "温暖") as model, chat_server(fair, models=("judge",)) as server:
        arguments = ["eval", model.url, "--bench", "dialogues", "--limit", "3", "--judge", server.url, "--json"]
        assert cli.main([*arguments, "--against", str(other)]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert summary["empathy"]["judges"][f"{server.url}#judge"]["win"] == 3
        other.write_text('{"items": []}', encoding="utf-8")
        assert cli.main([*arguments, "--against", str(other)]) == 1
        assert "other.json: has no reply to 3 dialogues" in capsys.readouterr().err
        assert cli.main(arguments[:6]) == 0
        assert capsys.readouterr().out.startswith("3 replies to dialogues; no --judge was given")
        assert cli.main([*arguments[:3], "samples", *arguments[4:]]) == 2
        assert "--judge: samples holds no dialogues" in capsys.readouterr().err
