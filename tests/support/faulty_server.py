"""A server with the OpenAI protocol and the faults of real ones, and a model in it that does what the prompts ask.

What goes wrong is decided by the content of a request (faults of the model) or by content and the number of the try
(faults of the server), so that a run that is killed and started again meets the same.
"""

import asyncio
import hashlib
import json
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

from starlette.requests import Request

from psyche_jax.synth.canned import completion

SERVER_FAULTS = ("429", "500", "time-out", "cut")
MODEL_FAULTS = ("invalid JSON", "wrong letters", "refusal", "injection")
MARK = "HACKED"  # what an injected instruction wants to hear
KEY = "sk-secret-of-the-test"


class FaultyServer:
    """An ASGI application. `share`: of each kind of fault. `log`: a file where every request that was answered whole
    is written before the answer leaves (key and number), so that a test can see what was asked for twice."""

    def __init__(self, share: float = 0.1, delay: float = 0.0, log: Path | None = None, hang: float = 30.0) -> None:
        self.share = share
        self.delay = delay
        self.hang = hang
        self.tries: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.running = self.most_running = 0
        self.answer: Callable[[dict[str, Any]], str] = lambda request: model_answer(request, self.share)
        self._log = log.open("a", encoding="utf-8") if log else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = await Request(scope, receive).body()
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self._respond(json.loads(body), headers, send)
        finally:
            self.running -= 1

    async def _respond(self, request: dict[str, Any], headers: dict[str, str], send: Any) -> None:
        key = headers["idempotency-key"]
        if headers.get("authorization") != f"Bearer {KEY}":
            said = f"Incorrect API key provided: {headers.get('authorization', '').removeprefix('Bearer ')}"
            return await send_answer(send, 401, {"error": {"message": said}})
        self.tries[key] += 1
        fault = None
        if self.tries[key] == 1:
            fault = pick(key, SERVER_FAULTS, self.share)
        if fault:
            self.faults[fault] += 1
        await asyncio.sleep(self.delay)
        if fault == "429":
            wait = formatdate(time.time() + 1, usegmt=True) if int(key[:2], 16) % 8 == 0 else "0.02"
            return await send_answer(send, 429, {"error": {"message": "slow down"}}, [(b"retry-after", wait.encode())])
        if fault == "500":
            return await send_answer(send, 500, {"error": {"message": "oops"}})
        if fault == "time-out":
            await asyncio.sleep(self.hang)
        value = completion(request, self.answer(request))
        if fault is None:
            self.answered[key] += 1
            if self._log:
                self._log.write(key + "\n")
                self._log.flush()
        if request.get("stream"):
            return await _stream(send, value, cut=fault == "cut")
        await send_answer(send, 200, value, cut=fault == "cut")
        return None


@contextmanager
def answering(*answers: str) -> Iterator[FaultyServer]:
    """A server without faults that gives these answers in turn, the last one for ever."""
    server = FaultyServer(share=0.0)
    given = list(answers)
    server.answer = lambda request: given.pop(0) if len(given) > 1 else given[0]
    yield server


def pick(text: str, faults: tuple[str, ...], share: float) -> str | None:
    """One of `faults`, each with probability `share`, or none; always the same for the same text."""
    place = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
    return faults[int(place / share)] if share and place < share * len(faults) else None


async def send_answer(send: Any, status: int, value: Any, headers: Any = (), cut: bool = False) -> None:
    content = json.dumps(value).encode()
    length = str(len(content)).encode()
    start = [(b"content-type", b"application/json"), (b"content-length", length), *headers]
    await send({"type": "http.response.start", "status": status, "headers": start})
    if cut:
        await send({"type": "http.response.body", "body": content[: len(content) // 2], "more_body": True})
        raise ConnectionResetError("cut on purpose")
    await send({"type": "http.response.body", "body": content})


async def _stream(send: Any, value: dict[str, Any], cut: bool) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    text = value["choices"][0]["message"]["content"]
    parts = [text[start : start + 20] for start in range(0, len(text), 20)]
    base = {**value, "object": "chat.completion.chunk", "usage": None}
    chunks = [{**base, "choices": [{"index": 0, "delta": {"content": part}, "finish_reason": None}]} for part in parts]
    chunks.append({**base, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    chunks.append({**base, "choices": [], "usage": value["usage"]})
    for chunk in chunks[: len(chunks) // 2] if cut else chunks:
        await send({"type": "http.response.body", "body": f"data: {json.dumps(chunk)}\n\n".encode(), "more_body": True})
    if not cut:
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def model_answer(request: dict[str, Any], share: float) -> str:
    """What the model in the server says: sensible, unless the content of the request makes it fail."""
    said = "\n".join(message["content"] for message in request["messages"])
    first = next(message["content"] for message in request["messages"] if message["role"] == "user")
    fault = pick(said + request["model"], MODEL_FAULTS, share)
    if fault == "refusal":
        return "抱歉，我不能协助完成这个请求。"
    if fault == "injection" and MARK in first:
        return MARK
    number = int(hashlib.sha256(first.encode()).hexdigest()[:6], 16)
    if "独立审查" in first:
        score = 2 if number % 17 == 0 else 5
        text = json.dumps({"correct": score, "clear": 5, "options": 4, "worth": 4, "reason": "理由"})
    elif "命题" in first:
        text = json.dumps({"questions": [_question(first, number, kind, fault) for kind in ("single", "multi")]})
    elif "解题指令" in first:
        text = json.dumps({"instruction": f"请先界定概念，再逐一排除（第{number % 7}种写法）。"})
    elif "推理一" in first:
        text = json.dumps({"better": 1 + number % 2, "reason": "更完整"})
    elif "改写得更温暖" in first:
        text = json.dumps(
            {"reply": "听起来这段时间你真的很不容易，愿意把它说出来已经很难得。" * 2 + f"我们可以慢慢来（{number}）。"}
        )
    elif "请核对" in first:
        text = json.dumps({"advice_kept": number % 13 > 0, "safe": True, "warmer": True, "fault": ""})
    else:  # an exam question: the letters that the server hid in the stem, wrong for some models
        key = re.search(r"【(\d+)([A-H]+)】", first)
        right = key[2] if key else "A"
        wrong = fault == "wrong letters" or (request["model"] == "weak" and number % 3 == 0)
        return (
            f"<think>先看题目考查什么，再逐项判断，最后得出结论（{number}）。</think>\n答案：{'H' if wrong else right}"
        )
    return text[: len(text) // 2] if fault == "invalid JSON" else text


def _question(first: str, number: int, kind: str, fault: str | None) -> dict[str, Any]:
    answer = "ABCD"[number % 4] if kind == "single" else ("AB", "BC", "ACD", "BD")[number % 4]
    told = f"关于编号{number}的材料，下列哪{'一' if kind == 'single' else '几'}项符合其中的论述？【{number}{answer}】"
    options = {letter: f"论述{(number + place * 7919) % 100000}之{letter}" for place, letter in enumerate("ABCD")}
    return {
        "kind": kind,
        "stem": told,
        "options": options,
        "answer": "Z" if fault == "wrong letters" else answer,
    }


def repeated_keys(log: Path) -> list[str]:
    """Requests that were answered more than once."""
    counts = Counter(log.read_text(encoding="utf-8").split())
    return [key for key, count in counts.items() if count > 1]


def stored_keys(path: Path) -> dict[str, int]:
    """Keys with a stored reply and how often each was in flight when a run was killed."""
    with sqlite3.connect(path) as database:
        return dict(database.execute("SELECT key, repeated FROM calls WHERE received IS NOT NULL"))
