"""Chat in the terminal: with a local model, with an endpoint, folded reasoning, commands, stopping."""

import asyncio
import fcntl
import http.server
import io
import json
import logging
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import OPENED_THOUGHT, THINKING_SWITCH, begin_responses, save_model

from psyche_jax import cli
from psyche_jax.cli import start
from psyche_jax.data.records import Message
from psyche_jax.errors import UserError
from psyche_jax.serve.chat import Chat, LocalModel, Screen
from psyche_jax.serve.config import LimitsSection, ServeConfig


class Parrot:
    """A model that says what it was prepared to say, in small pieces."""

    name = "parrot"
    gate = None

    def __init__(self, *answers):
        self.answers = list(answers)
        self.seen = []

    async def answer(self, turns):
        self.seen.append([(turn.role, turn.content) for turn in turns])
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        for first in range(0, len(answer), 3):
            yield answer[first : first + 3]


def talk(model, *lines, show=False, system=""):
    out = io.StringIO()
    chat = Chat(model, system, Screen(out, show), out)
    with asyncio.Runner() as runner:
        chat.run(lines, runner)
    return out.getvalue(), chat


def test_reasoning_is_folded_or_shown_and_not_sent_again():
    model = Parrot("<think>想一想</think>\n好的。", "<think>再想</think>不客气。")
    out, _ = talk(model, "你好", "谢谢")
    assert out == (
        "[reasoning folded: 3 characters; /think shows it]\n好的。\n\n"
        "[reasoning folded: 2 characters; /think shows it]\n不客气。\n\n"
    )
    assert model.seen[1] == [("user", "你好"), ("assistant", "好的。"), ("user", "谢谢")]
    out, _ = talk(Parrot("<think>想一想</think>\n好的。"), "你好", show=True)
    assert out == "想一想\n--\n好的。\n\n"
    out, _ = talk(Parrot("<think>想一想</think>好。"), "你好", "/think", "/think")
    assert out.endswith("reasoning is shown\n想一想\nreasoning is folded\n")


@given(st.text(alphabet="<think>/ 好\n", max_size=40), st.booleans())
def test_the_screen_loses_nothing_of_an_answer(answer, show):
    text = f"<think>x</think>{answer}"
    out, _ = talk(Parrot(text, text), "问", show=show)
    assert out.rstrip().endswith(answer.strip())
    out, _ = talk(Parrot("a" + answer), "问", show=show)
    assert out == f"a{answer}\n\n"


def test_commands(tmp_path):
    model = Parrot("一", "二", "三")
    saved = tmp_path / "chat.json"
    out, chat = talk(
        model, "/help", "甲", "/history", f"/save {saved}", f"/save {saved}", "/save", "/save /no/such/x",
        "/new", "乙", "/system 短。", "丙", "/nonsense", "", "/quit", "never",
    )  # fmt: skip
    assert "/think" in out and "user: 甲\nassistant: 一" in out
    messages = [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "一"}]
    assert json.loads(saved.read_text()) == {"model": "parrot", "messages": messages}
    for line in ("already exists", "give a file name: /save FILE", "/no/such/x: No such file", "there is no /nonsense"):
        assert line in out
    assert model.seen == [[("user", "甲")], [("user", "乙")], [("system", "短。"), ("user", "丙")]]
    assert [turn.content for turn in chat.turns] == ["丙", "三"]


def test_a_failure_is_shown_and_the_conversation_goes_on():
    model = Parrot(UserError("too long; /new starts over"), "好")
    out, chat = talk(model, "甲", "乙")
    assert out == "[too long; /new starts over]\n\n好\n\n"
    assert chat.turns == [Message("user", "乙"), Message("assistant", "好")]


def test_a_model_cannot_steer_the_terminal():
    out, _ = talk(Parrot("<think>\x1b[2Ja</think>\x1b]0;owned\x07好\r\x9b31m。"), "你好", show=True)
    assert out == "[2Ja\n--\n]0;owned好31m。\n\n"
    evil = "<think>\x1b[2Ja</think>\x1b]0;owned\x07好"
    failing = UserError("HTTP 500: \x1b[2Jno")
    out, _ = talk(Parrot(evil, failing), "你好", "/history", "/think", "/nonsense\x1b[2J", "再")
    assert "assistant: <think>[2Ja</think>]0;owned好" in out and "reasoning is shown\n[2Ja" in out
    assert not [character for character in out if not character.isprintable() and character != "\n"]


def test_a_thought_whose_beginning_a_server_keeps_is_not_sent_again():
    """Behind a template that opens the thought, a server may send what follows `<think>` alone."""
    model = Parrot("想一想</think>\n\n好的。", "不客气。")
    talk(model, "你好", "谢谢")
    assert model.seen[1] == [("user", "你好"), ("assistant", "好的。"), ("user", "谢谢")]


def piped(model, lines, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "psyche_jax.cli", "chat", str(model), *arguments],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **environment},
        timeout=300,
    )


def test_a_template_that_opens_the_thought(tmp_path):
    """A random model never ends it, so that all it says is reasoning."""
    folder = begin_responses(save_model(tmp_path / "model"), OPENED_THOUGHT)
    model = LocalModel(ServeConfig(str(folder), limits=LimitsSection(new_tokens=8)))
    try:
        out, chat = talk(model, "你好")
    finally:
        model.close()
    assert out.startswith("[reasoning folded: ")
    assert chat.turns[1].content.startswith("<think>\n") and chat.turns[1].content != "<think>\n"


def test_thinking_switched_off(tmp_path):
    """As for a model that is served; what the prompt has closed is folded with nothing in it."""
    folder = begin_responses(save_model(tmp_path / "model"), THINKING_SWITCH)
    model = LocalModel(ServeConfig(str(folder), thinking=False, limits=LimitsSection(new_tokens=8)))
    try:
        _, chat = talk(model, "你好")
    finally:
        model.close()
    assert chat.turns[1].content.startswith("<think>\n\n</think>\n\n")


def test_with_a_local_model_from_a_pipe(tiny_model, tmp_path):
    log = tmp_path / "events.jsonl"
    done = piped(tiny_model, ["你好", "我想自杀", "/history"], "--set", "limits.new_tokens=8", "--crisis-log", str(log))
    assert done.returncode == 0 and done.stderr == ""
    assert "> 你好\n" in done.stdout, "what is answered can be seen"
    assert "不是医生" in done.stdout and "not a clinician" in done.stdout
    assert "12356" in done.stdout.split("user: 我想自杀")[1], "the fixed text"
    assert json.loads(log.read_text())["risk"] == "active_ideation"
    assert "自杀" not in log.read_text()


def test_with_an_endpoint(server, monkeypatch, capsys):
    monkeypatch.setattr(start, "start_jax", lambda *_: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("你好\n我不想活了\n"))
    assert cli.main(["chat", f"{server.address}/v1", "--set", "limits.new_tokens=8", "--region", "US"]) == 0
    out = capsys.readouterr().out
    assert "988" in out.split("\n\n", 1)[1], "this side's gate answered, with its own region"
    monkeypatch.setattr(sys, "stdin", io.StringIO("你好\n"))
    assert cli.main(["chat", f"{server.address}/v1#gpt"]) == 0
    assert "this server's model is 'tiny'" in capsys.readouterr().out
    assert cli.main(["chat", "http://127.0.0.1:9/v1"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_second_opinion_that_cannot_be_had_is_said(server, monkeypatch, capsys, caplog):
    monkeypatch.setattr(start, "start_jax", lambda *_: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("那只猫以后就拜托你了\n我不想活了\n"))
    opinion = ["--set", "crisis.second_opinion=http://127.0.0.1:9/v1#m"]
    assert cli.main(["chat", f"{server.address}/v1", "--set", "limits.new_tokens=8", *opinion]) == 0
    assert "no second opinion" in caplog.text, "though what the gate answered is not told"
    assert [record.name for record in caplog.records if record.name == "psyche_jax.crisis"] == []
    assert not logging.getLogger("psyche_jax.crisis").disabled, "as it was before"


SAYS = 'data: {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [%s]}\n\n'
PART = '{"index": 0, "delta": {"content": "一半"}}'
FILTERED = '{"index": 0, "delta": {}, "finish_reason": "content_filter"}'


@pytest.mark.parametrize(
    ("status", "kind", "body", "shown"),
    [
        (200, "text/event-stream", "", "broke off"),
        (200, "text/event-stream", "data: [DONE]\n\n", "broke off"),
        (200, "text/event-stream", SAYS % PART, "一半[http"),
        (200, "text/event-stream", SAYS % PART + "data: {nonsense\n\n", "一半[http"),
        (200, "text/event-stream", SAYS % "" + "data: [DONE]\n\n", "broke off"),
        (200, "text/event-stream", SAYS % PART + SAYS % FILTERED, "一半[http"),
        (200, "application/json", '{"choices": [{"message": {"content": null, "refusal": "不行"}}]}', "不行[http"),
        (200, "application/json", '{"error": {"message": "overloaded"}}', "overloaded"),
        (401, "application/json", '{"error": {"message": "no such key"}}', "see OPENAI_API_KEY"),
        (400, "text/html", "<html>oops</html>", "[http"),
    ],
    ids=range(10),
)
def test_faulty_endpoints_are_one_line_and_the_chat_goes_on(status, kind, body, shown, monkeypatch, capsys):
    class Faulty(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-type", kind)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    endpoint = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    threading.Thread(target=endpoint.serve_forever, daemon=True).start()
    monkeypatch.setattr(start, "start_jax", lambda *_: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("你好\n我不想活了\n"))
    assert cli.main(["chat", f"http://127.0.0.1:{endpoint.server_port}/v1#m"]) == 0
    endpoint.shutdown()
    out, err = capsys.readouterr()
    first, second = out.split("\n\n")[1:3]
    first = first.removeprefix("> 你好\n")  # a line that is piped is shown as one that is typed
    assert shown in first and "\n" not in first and "Traceback" not in out + err
    assert "12356" in second, "the gate needs no endpoint"


def test_a_model_without_a_chat_template_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(start, "start_jax", lambda *_: None)
    folder = save_model(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    for verb in ("chat", "serve"):
        assert cli.main([verb, str(folder)]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "has no chat template" in err


@pytest.mark.slow
def test_in_a_terminal_ctrl_c_stops_the_answer_only(tiny_model):
    mine, theirs = pty.openpty()
    # Who is started in the background of a script ignores SIGINT, and so would the chat.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "psyche_jax.cli", "chat", str(tiny_model), "--no-crisis-gate", "--plain"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        # Nothing comes compiled from a cache: the answer takes seconds, and cannot be there before it is stopped.
        env={
            **os.environ,
            "XLA_FLAGS": "",
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "TERM": "dumb",
        },
        start_new_session=True,
    )
    signal.signal(signal.SIGINT, inherited)
    seen = b""

    def until(text, seconds=120):
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen:
            assert select.select([mine], [], [], max(0.0, end - time.monotonic()))[0], seen
            seen += os.read(mine, 4096)
        seen = seen.split(text, 1)[1]

    until(b"> ")
    os.write(mine, "说说话\n".encode())
    until("说说话\r\n".encode())
    # The terminal echoes a line before the program has read it; then it waits for programs to be compiled.
    while int.from_bytes(fcntl.ioctl(theirs, termios.FIONREAD, bytes(4)), sys.byteorder):
        time.sleep(0.01)
    os.close(theirs)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    until(b"[stopped]")
    until(b"> ")
    os.write(mine, b"/quit\n")
    assert process.wait(60) == 0
    os.close(mine)
