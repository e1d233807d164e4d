"""Replies written beforehand, and a server that gives them: LLMs for the demo, without a key."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from psyche_jax.config import RunSection
from psyche_jax.storage.files import read_jsonl
from psyche_jax.synth.config import (
    CallsSection,
    ControlSection,
    DialoguesSection,
    LlmSection,
    QuestionsSection,
    RationalesSection,
    SelectionSection,
    SourcesSection,
    SynthConfig,
)


def replay_app(answer: Callable[[Mapping[str, Any]], str]) -> Starlette:
    """An application whose `answer` says what the assistant replies to a request's JSON."""

    async def reply(request: Request) -> JSONResponse:
        body = await request.json()
        return JSONResponse(completion(body, answer(body)))

    return Starlette(routes=[Route("/v1/chat/completions", reply, methods=["POST"])])


def completion(request: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A chat completion with one choice; a character counts as a token."""
    asked = sum(len(message["content"]) for message in request["messages"])
    return {
        "id": "chatcmpl-replay",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request["model"],
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": asked, "completion_tokens": len(text), "total_tokens": asked + len(text)},
    }


@contextmanager
def serving(app: Callable[..., Any]) -> Iterator[str]:
    """Serve an ASGI application on a free port of the loopback interface, in a thread; yields its URL."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


FOLDER = Path(str(files("psyche_jax.synth") / "canned"))
_PASSAGES = Path(str(files("psyche_jax.data") / "samples" / "passages.jsonl"))
_MALFORMED = "记忆系统与工作记忆"  # the passage whose first reply is cut short
_POOR = "神经冲动的产生与传递"  # whose second question the votes turn down
_TWICE = "依恋的形成与类型"  # whose question comes twice, in other words
_INSTRUCTION = "请先说出题干中关键概念的定义，再对照定义逐项说明每个说法是否成立。"


def canned_config(run: Path, out: Path, url: str, seed: int) -> SynthConfig:
    """The synthesis of the demo: canned LLMs at `url`."""
    names = ("writer", "judge", "solver-a", "solver-b")
    return SynthConfig(
        run=RunSection(str(run), seed),
        out=str(out),
        sources=SourcesSection((str(_PASSAGES),), (str(FOLDER / "posts.jsonl"),)),
        llms=tuple(LlmSection(name, f"canned-{name}", f"{url}/v1", key_env=None) for name in names),
        calls=CallsSection(concurrency=8),
        questions=QuestionsSection(single=1, multi=1),
        control=ControlSection(llms=("judge",), votes=2),
        rationales=RationalesSection(rounds=1),
        dialogues=DialoguesSection(),
        selection=SelectionSection(("solver-a", "solver-b"), 1),
    )


def canned_answer(request: Mapping[str, Any]) -> str:
    """The reply to a chat request. The form of answer that its prompt asks for tells which prompt it is."""
    messages = request["messages"]
    asked = next(message["content"] for message in messages if message["role"] == "user")
    again = any(message["role"] == "assistant" for message in messages)
    if '{"questions"' in asked:
        return _written(asked, again)
    if '"advice_kept"' in asked:
        return json.dumps({"advice_kept": True, "safe": True, "warmer": True, "fault": ""})
    if '{"reply"' in asked:
        reply = next(line["reply"] for line in _lines(FOLDER / "warmer.jsonl") if line["post"] in asked)
        return json.dumps({"reply": reply}, ensure_ascii=False)
    if '{"instruction"' in asked:
        return json.dumps({"instruction": _INSTRUCTION}, ensure_ascii=False)
    question = next((question for question in _lines(FOLDER / "questions.jsonl") if question["stem"] in asked), None)
    if '"worth"' in asked:
        return _vote(question)
    if question is None:
        return "<think>这道题没有备好的回答，无从推理。</think>\n答案：A"
    if request["model"].startswith("canned-solver"):
        return _solved(question, request["model"])
    first, _, rest = question["rationale"].partition("。")
    thought = question["rationale"] if _INSTRUCTION not in asked else f"先看定义：{first}。再逐项对照：{rest}"
    return f"<think>{thought}</think>\n答案：{question['answer']}"


def _written(asked: str, again: bool) -> str:
    title = next(passage["meta"]["title"] for passage in _lines(_PASSAGES) if passage["text"] in asked)
    keys = ("kind", "stem", "options", "answer")
    written = [question for question in _lines(FOLDER / "questions.jsonl") if question["title"] == title]
    found = [{key: question[key] for key in keys} for question in written]
    if title == _POOR:
        options = {"A": "1924年", "B": "1905年", "C": "1956年", "D": "材料没有说"}
        found.append({"kind": "single", "stem": "神经元是哪一年被命名的？", "options": options, "answer": "D"})
    if title == _TWICE:
        found.append({**found[0], "stem": f"请问，{found[0]['stem']}"})
    text = json.dumps({"questions": found}, ensure_ascii=False)
    return text[: len(text) // 2] if title == _MALFORMED and not again else text


def _vote(question: Mapping[str, Any] | None) -> str:
    scores = {"correct": 5, "clear": 5, "options": 4, "worth": 4, "reason": "表述清楚，答案确定"}
    if question is None:
        scores |= {"correct": 2, "worth": 1, "reason": "细枝末节，答案不能确定"}
    return json.dumps(scores, ensure_ascii=False)


def _solved(question: Mapping[str, Any], model: str) -> str:
    """`solvers`: both, one (the first) or none of them is right, or all agree on another answer."""
    who = question["solvers"]
    wrong = next(letter for letter in "DCBA" if letter not in question["answer"])
    if who.startswith("agree:"):
        said = who.removeprefix("agree:")
    elif who == "both" or (who == "one" and model.endswith("a")):
        said = question["answer"]
    else:
        said = wrong if model.endswith("a") else "".join(sorted({wrong, question["answer"][0]}))
    return f"<think>逐项比较以后作答。</think>\n答案：{said}"


@cache
def _lines(path: Path) -> list[dict[str, Any]]:
    return [value for _, value in read_jsonl(path)]
