"""The queue of what waits for a person, and the decisions on it; the page is in `test_review_in_browser.py`."""

import contextlib
import json
from dataclasses import replace

import pytest
from fastapi.testclient import TestClient

from psyche_jax import cli
from psyche_jax.data.records import Question, write_records
from psyche_jax.errors import UserError
from psyche_jax.serve.guard import LOOPBACK
from psyche_jax.synth.canned import canned_config, replay_app, serving
from psyche_jax.synth.config import SelectConfig
from psyche_jax.synth.pipeline import run_select
from psyche_jax.synth.review import Decision, ReviewStore, review_app, reviewed


def test_a_review_is_of_the_question_as_it_was(tmp_path):
    """One of one's own whose text or key was changed under its id is another."""
    first = Question("第一问？", {"A": "甲", "B": "乙"}, "A", "single", "想一想，是甲。", id="7")
    file, run = tmp_path / "q.jsonl", tmp_path / "run"
    with serving(replay_app(lambda request: "答案：B")) as url:
        base = canned_config(run, tmp_path / "out", url, 0)
        config = SelectConfig(base.run, base.out, (str(file),), base.llms, selection=base.selection)
        for question in (first, replace(first, stem="改过的一问？")):
            write_records(file, [question])
            with pytest.raises(UserError, match="nothing to publish"):
                run_select(config)
            with contextlib.closing(ReviewStore(run)) as store:
                item = list(store.items())[-1]
                assert item.question.stem == question.stem and item.decision is None
                store.decide(Decision(item.question.id, "reject", "王"))
        write_records(file, [replace(first, answer="B")])
        assert run_select(config)["selection"]["counts"]["out/sft"] == 1


def test_a_rationale_does_not_outlive_its_key(tmp_path):
    question = Question("第一问？", {"A": "甲", "B": "乙"}, "A", "single", "想一想，是甲。")
    for edited, rationale in (
        (replace(question, answer="B"), None),
        (replace(question, options={"A": "乙", "B": "甲"}), None),
        (replace(question, answer="B", rationale="想一想，是乙。"), "想一想，是乙。"),
        (replace(question, stem="第一问是？"), "想一想，是甲。"),
    ):
        kept = reviewed(question, Decision(question.id, "edit", "王", edited))
        assert kept is not None and kept.rationale == rationale


def test_a_decision_is_found_again_when_the_other_question_of_its_id_is_gone(tmp_path):
    first = Question("第一问？", {"A": "甲", "B": "乙"}, "A", "single", id="7")
    second = replace(first, stem="改过的一问？")
    with contextlib.closing(ReviewStore(tmp_path)) as store:
        store.add([first])
        store.add([second])
        store.decide(Decision(store.as_item(second).id, "reject", "王"))
        store.keep([second])
        (item,) = store.items()
        assert store.as_item(second).id == item.question.id and item.decision is not None
        assert store.as_item(first).id == "7" and store.add([first]) == 1 and store.as_item(second) == item.question


def test_a_queue_that_is_damaged_is_one_line(tmp_path, capsys):
    store = ReviewStore(tmp_path)
    store.add([Question("第一问？" * 900, {"A": "甲", "B": "乙"}, "A", "single")])
    store.close()
    path = tmp_path / "review.sqlite"
    content = path.read_bytes()
    for broken in (content[:-6000] + b"\xff" * 6000, content.replace(b'"stem"', b'\0stem"'), content[:-4096]):
        path.write_bytes(broken)
        assert cli.main(["review", str(tmp_path), "--export", str(tmp_path / "q.jsonl")]) == 1
        said = capsys.readouterr().err
        assert "is not a store of reviews, or damaged" in said and said.count("\n") == 1


def test_a_decision_that_cannot_be_written_is_said(tmp_path):
    question = Question("第一问？", {"A": "甲", "B": "乙"}, "A", "single")
    with contextlib.closing(ReviewStore(tmp_path)) as store:
        store.add([question])
        store._database.execute("PRAGMA query_only = 1")
        with pytest.raises(UserError, match="cannot be written"):
            store.decide(Decision(question.id, "accept", "王"))
        store._database.execute("PRAGMA query_only = 0")
        assert store.decide(Decision(question.id, "accept", "王")).number == 1


def test_export_and_import_of_reviews(tmp_path, capsys):
    questions = [Question(f"第{n}问？", {"A": "甲", "B": "乙"}, "A", "single") for n in range(4)]
    store = ReviewStore(tmp_path)
    assert store.add(questions) == 4 and store.add(questions) == 0
    file = tmp_path / "elsewhere.jsonl"
    assert cli.main(["review", str(tmp_path), "--export", str(file)]) == 0
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lines[0]["decision"] = {"verdict": "accept", "who": "远方"}
    lines[1]["decision"] = {"verdict": "edit", "edited": {**lines[1]["question"], "answer": "B"}}
    lines[2]["decision"] = {"verdict": "maybe"}
    lines[3]["decision"] = {"verdict": "accept", "time": 1.8e12}  # milliseconds, in which no calendar ends
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    file.write_text(text + "no JSON\n", encoding="utf-8")
    assert cli.main(["review", str(tmp_path), "--import", str(file), "--who", "我"]) == 0
    out, err = capsys.readouterr()
    assert "2 decisions imported, 3 skipped" in out and "elsewhere.jsonl:3: verdict" in err and ":5:" in err
    assert "elsewhere.jsonl:4: time: Input should be less than" in err
    found = [(item.decision.verdict, item.decision.who) if item.decision else None for item in store.items()]
    assert found == [("accept", "远方"), ("edit", "我"), None, None]
    before = file.read_bytes()
    assert cli.main(["review", str(tmp_path), "--export", str(file)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "already exists, and may hold decisions" in line
    assert file.read_bytes() == before
    again = file.with_name("again.jsonl")
    store.export(again)
    assert store.load(again, "我") == (0, []), "what is stored already is not stored again"
    store.close()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--port", "99999"], "port must be 0-65535"),
        (["--host", "no.such.invalid"], "cannot serve on no.such.invalid"),
    ],
)
def test_an_address_that_cannot_be_served_on_is_one_line(tmp_path, capsys, arguments, what):
    ReviewStore(tmp_path).close()
    assert cli.main(["review", str(tmp_path), *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert what in line


@pytest.mark.parametrize(("hosts", "status"), [((), 200), (LOOPBACK, 421)])
def test_a_review_on_every_address_is_answered_under_any_name(tmp_path, hosts, status):
    store = ReviewStore(tmp_path)
    client = TestClient(review_app(store, "王", "token", hosts), base_url="http://192.0.2.7:8000")
    assert client.get("/api/items", headers={"Authorization": "Bearer token"}).status_code == status
    store.close()
