"""The second opinion: read from log-probs of letters, of an endpoint or of the served model, and never in the way."""

import asyncio
import json
import math
import time

import pytest
from support.chat_server import chat_server

from psyche_jax import cli
from psyche_jax.config_files import parse_config
from psyche_jax.data.records import Message
from psyche_jax.errors import UsageError
from psyche_jax.serve.batcher import Piece
from psyche_jax.serve.config import CrisisSection, ServeConfig
from psyche_jax.serve.crisis import Risk, opinion
from psyche_jax.serve.crisis.opinion import CANDIDATES, read_opinion
from psyche_jax.serve.service import Service, Wanted

HINT = "那只猫以后就拜托你了"  # which the gate lets pass
PLAN = [("G", 0.6), (" G", 0.1), ("A", 0.2), ("好", 0.1)]


def log_probs(shares):
    return [(token, math.log(share)) for token, share in shares]


@pytest.mark.parametrize(
    ("shares", "risk", "band"),
    [
        (PLAN, Risk.PLAN_OR_PREPARATION, "0.7 to 0.8"),
        ([("A", 0.6), ("H", 0.3)], Risk.NONE, None),
        ([("A", 0.4), ("E", 0.25), ("F", 0.3)], Risk.ACTIVE_IDEATION, "0.5 to 0.6"),
    ],
)
def test_the_class_is_the_likeliest_letter_if_all_but_a_outweigh_it(shares, risk, band):
    opinion = read_opinion(log_probs(shares))
    assert opinion.risk is risk and opinion.rules == ((f"second opinion, {band}",) if band else ())


def test_where_hardly_any_token_is_a_letter_there_is_no_opinion():
    assert read_opinion([]) is None
    assert read_opinion(log_probs([("<think>", 0.95), ("H", 0.05)])) is None


def scripted(shares):
    """An endpoint that answers by these letters."""
    top = [{"token": token, "logprob": value} for token, value in log_probs(shares)]
    choice = {"index": 0, "message": {"role": "assistant", "content": "G"}, "finish_reason": "length"}
    choice["logprobs"] = {"content": [{"token": "G", "logprob": 0.0, "top_logprobs": top}]}
    return lambda request, _: {"raw": json.dumps({"model": "tiny", "choices": [choice]})}


def test_safety_measures_it_with_an_endpoint(tmp_path, capsys, monkeypatch):
    posts = tmp_path / "posts.jsonl"
    lines = [{"text": HINT, "labels": ["plan_or_preparation"]}, {"text": "我想自杀", "labels": ["active_ideation"]}]
    posts.write_text("\n".join(map(json.dumps, lines)))
    with chat_server(scripted(PLAN)) as server:
        command = ["safety", "--posts", str(posts), "--json", "--second-opinion", f"{server.url}#tiny"]
        assert cli.main(command) == 0
        (asked,) = server.requests  # the gate answers the other
        assert asked["max_tokens"] == 1 and asked["top_logprobs"] == CANDIDATES and HINT in str(asked["messages"])
    measured = json.loads(capsys.readouterr().out)["posts"]
    assert measured["classes"]["plan_or_preparation"]["own"]["share"] == 1
    assert measured["decided"] == {"rules": 1, "second opinion, 0.7 to 0.8": 1}
    # Nobody waits for what is measured: slow answers count, though in a conversation they would come too late.
    monkeypatch.setattr(opinion, "_SECONDS", 0.2)
    answer = scripted(PLAN)
    with chat_server(lambda *request: (time.sleep(1), answer(*request))[1]) as server:
        assert asyncio.run(opinion.ask_endpoint(f"{server.url}#tiny", HINT)) is None
        assert cli.main([*command[:-1], f"{server.url}#tiny"]) == 0
    measured = json.loads(capsys.readouterr().out)["posts"]
    assert measured["decided"] == {"rules": 1, "second opinion, 0.7 to 0.8": 1}
    with chat_server(lambda *_: "没有") as server:
        assert cli.main([*command[:-1], f"{server.url}#tiny"]) == 0
    measured = json.loads(capsys.readouterr().out)["posts"]
    assert measured["decided"] == {"no second opinion": 1, "rules": 1}


def served(tiny_model, opinion, answer=None):
    service = Service(
        parse_config(ServeConfig, {"model": str(tiny_model), "crisis": {"second_opinion": opinion}}, "test")
    )
    if answer is not None:
        service._batcher.submit = answer
    return service


def reply_of(service, text):
    async def ask():
        return (await service.answer(Wanted([Message("user", text)], 0.0, 1.0, max_new_tokens=1))).gate_reply

    try:
        return asyncio.run(ask())
    finally:
        service.close(0)


def test_the_served_model_is_asked_itself(tiny_model):
    asked = []

    def answer(job):
        asked.append(job)
        if job.alternatives == CANDIDATES:
            letter = service.tokenizer.encode("H", add_special_tokens=False)[-1]
            job.deliver(Piece(0, [letter], [0.0], [[(letter, 0.0)]], "length"))

    service = served(tiny_model, "served", answer)
    reply = reply_of(service, HINT)
    assert reply is not None and reply.assessment.risk is Risk.ATTEMPT and "120" in reply.text
    assert len(asked) == 1 and asked[0].settings[0].max_new_tokens == 1
    assert HINT in service.tokenizer.decode(asked[0].prompt)


def test_an_endpoint_is_asked_and_the_model_answers_where_it_cannot(tiny_model, caplog):
    with chat_server(scripted(PLAN)) as server:
        reply = reply_of(served(tiny_model, f"{server.url}#tiny", lambda job: None), HINT)
    assert reply is not None and reply.assessment.risk is Risk.PLAN_OR_PREPARATION
    assert reply_of(served(tiny_model, f"{server.url}#tiny", lambda job: None), HINT) is None  # it is gone
    assert "no second opinion" in caplog.text and HINT not in caplog.text


def test_it_is_off_by_default_and_wrong_names_are_refused():
    assert CrisisSection().second_opinion is None
    for wrong in ("yes", "http://localhost:1/v1", "model"):
        with pytest.raises(UsageError, match="second_opinion must be `served`, or URL#MODEL"):
            CrisisSection(second_opinion=wrong)
