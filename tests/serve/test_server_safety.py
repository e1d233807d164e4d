"""Who may ask, how much, how long; shutting down; and nothing of the machine in an answer."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from support.serving import start_server

from psyche_jax import cli
from psyche_jax.cli import start

TOKEN = "0123456789-a-token-of-the-test"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 4}
URL = "/v1/chat/completions"


def raw(server, data, seconds=20):
    """What comes back for bytes on a socket."""
    address = urlsplit(server.address)
    with socket.create_connection((address.hostname, address.port), timeout=seconds) as connection:
        connection.sendall(data)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "line"),
    [
        (["--host", "0.0.0.0"], {}, 2, "host 0.0.0.0 can be reached from other machines: set PSYCHE_SERVE_TOKEN"),
        (["--host", "0.0.0.0"], {"PSYCHE_SERVE_TOKEN": "short"}, 2, "at least 16 ASCII characters"),
        (["--port", "70000"], {}, 2, "port must be below 65536, not 70000"),
        (["--region", "XX"], {}, 2, "region 'XX' has no hotline"),
        (["--set", "limits.rows=0"], {}, 2, "limits.rows must be above 0, not 0"),
        (["--set", "limits.wating=3"], {}, 2, "waiting"),
        (["--crisis-log", "/no/such/folder/log"], {}, 1, "/no/such/folder/log: No such file"),
    ],
)
def test_wrong_use_is_one_line(tiny_model, arguments, environment, code, line, monkeypatch, capsys):
    monkeypatch.setattr(start, "start_jax", lambda *_: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["serve", str(tiny_model), "--port", "0", *arguments]) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and line in err and err.startswith("psyche serve: ")


def test_a_missing_model_an_endpoint_and_a_taken_port_are_one_line(server, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(start, "start_jax", lambda *_: None)
    port = str(urlsplit(server.address).port)
    for model, arguments, line in (
        (tmp_path / "none", ["--port", "0"], "none"),
        ("http://localhost:1/v1", ["--port", "0"], "is already a server"),
        (tiny_model, ["--port", port], "Address already in use; choose another with --port"),
    ):
        assert cli.main(["serve", str(model), *arguments]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and line in err


def test_only_this_machine_and_its_own_page_may_ask(server):
    url = server.address + URL
    assert httpx.post(url, json=BODY, timeout=60).status_code == 200  # the first may have to compile
    assert httpx.post(url, json=BODY, headers={"host": "evil.example"}).status_code == 403
    assert httpx.get(server.address, headers={"host": "evil.example"}).status_code == 403
    answer = httpx.post(url, json=BODY, headers={"origin": "http://evil.example"})
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "origin_not_allowed"
    for broken in ("http://[", "null", "//", ""):
        assert httpx.post(url, json=BODY, headers={"origin": broken}).status_code == 403
    assert httpx.post(url, json=BODY, headers={"origin": server.address}).status_code == 200
    preflight = httpx.options(url, headers={"origin": "http://evil.example", "access-control-request-method": "POST"})
    assert preflight.status_code == 403
    assert not [name for name in preflight.headers if name.startswith("access-control")]
    assert httpx.post(url, content=json.dumps(BODY), headers={"content-type": "text/plain"}).status_code == 415


def test_every_answer_has_the_headers_that_close_it(server):
    for answer in (httpx.get(server.address), httpx.get(f"{server.address}/none"), httpx.post(server.address + URL)):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "server" not in answer.headers
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_token_is_required_where_one_is_set(another_server):
    running = another_server("--set", "limits.per_minute=5", "--host", "0.0.0.0", PSYCHE_SERVE_TOKEN=TOKEN)
    address = running.address.replace("0.0.0.0", "127.0.0.1")
    assert TOKEN not in running.log
    assert httpx.get(f"{address}/health").status_code == 200
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": TOKEN},
        {"authorization": f"Basic {TOKEN}"},
    ):
        answer = httpx.get(f"{address}/v1/models", headers=headers)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert httpx.post(address + URL, json=BODY, headers=headers).status_code == 401
    good = {"authorization": f"Bearer {TOKEN}"}
    answers = [httpx.get(f"{address}/v1/models", headers=good) for _ in range(7)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 2
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 13
    assert running.stop(signal.SIGINT) == 0 and "Traceback" not in running.log


def test_bodies_that_are_too_large_or_too_slow_are_refused(server):
    big = json.dumps({**BODY, "user": "x" * 1_100_000}).encode()
    answer = httpx.post(server.address + URL, content=big, headers={"content-type": "application/json"})
    assert answer.status_code == 413

    def chunks():
        for _ in range(1200):
            yield b"x" * 1000

    answer = httpx.post(server.address + URL, content=chunks(), headers={"content-type": "application/json"})
    assert answer.status_code == 413, "also where no length was told"
    head = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    answer = raw(server, f"{head}Content-Length: 1000\r\n\r\n{{".encode())
    assert answer.startswith(b"HTTP/1.1 408"), "limits.body_seconds is 3"
    assert raw(server, f"{head}Content-Length: 99999999999\r\n\r\n".encode()).startswith(b"HTTP/1.1 413")


def test_while_long_messages_are_read_the_server_answers_others(server):
    """One that does not fit is refused for its length; the gate never reads it."""
    found = []

    def one(content):
        body = {**BODY, "messages": [{"role": "user", "content": content}]}
        started = time.monotonic()
        answer = httpx.post(server.address + URL, json=body, timeout=60)
        found.append((answer.status_code, time.monotonic() - started, answer.json()))

    long = "今天天气不错，我和朋友去公园散步，心情很好。" * (900 * 1024 // 66)
    threads = [threading.Thread(target=one, args=(content,)) for content in (long, long[:300_000], "12" * 400_000)]
    for thread in threads:
        thread.start()
    slowest = 0.0
    while any(thread.is_alive() for thread in threads):
        started = time.monotonic()
        assert httpx.get(f"{server.address}/health", timeout=60).status_code == 200
        slowest = max(slowest, time.monotonic() - started)
    assert slowest < 5  # each of them would hold it for ten seconds or more
    for status, seconds, answer in found:
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded" and seconds < 30


def test_a_crisis_is_answered_also_where_the_conversation_is_too_long(server):
    history = [{"role": role, "content": "长" * 2000} for role in ("user", "assistant")]
    body = {**BODY, "messages": [*history, {"role": "user", "content": "我想自杀"}]}
    answer = httpx.post(server.address + URL, json=body, timeout=60)
    assert answer.status_code == 200 and answer.json()["crisis"] == {"risk": "active_ideation"}


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"], ids=["first", "second"])
@pytest.mark.parametrize("drips", [False, True])
def test_a_connection_that_brings_no_request_is_closed(server, before, drips):
    """Not a byte, or a head that drips in and never ends, also behind a request that was answered."""
    address = urlsplit(server.address)
    with socket.create_connection((address.hostname, address.port), timeout=20) as client:
        client.sendall(before)
        answer = b""
        while before and b'"ok"' not in answer:
            answer += client.recv(4096)
        client.settimeout(0.2)
        piece = b"GET /health HTTP/1.1\r\nX: "
        for _ in range(200):
            try:
                if drips:
                    client.sendall(piece)
                piece = b"x"
                if not client.recv(4096):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("it is still open")
    assert httpx.get(f"{server.address}/health").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"1" * 5000,
        b"[" * 50_000,
        b'{"a":' * 20_000,
        b"\xff\xfe\x00",
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 4000 + b"}",
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\u0000\\ud800"}]}',
    ],
    ids=range(11),
)
def test_broken_bodies_are_wrong_requests(server, body):
    answer = httpx.post(server.address + URL, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert len(answer.text) < 1000


def test_answers_tell_nothing_of_the_machine(server, tiny_model):
    wrong = [
        httpx.get(f"{server.address}/../../etc/passwd"),
        httpx.get(f"{server.address}/page/..%2f..%2fserver.py"),
        httpx.get(f"{server.address}/v1/models/..%2f..%2fetc%2fpasswd"),
        httpx.get(f"{server.address}/docs"),
        httpx.put(server.address + URL, json=BODY),
        httpx.post(server.address + URL, content=b"{", headers={"content-type": "application/json"}),
        httpx.post(server.address + URL, json={**BODY, "model": "/etc/passwd"}),
        httpx.post(server.address + URL, json={**BODY, "messages": "x"}),
    ]
    assert all(400 <= answer.status_code < 500 for answer in wrong)
    for answer in [*wrong, httpx.get(f"{server.address}/openapi.json"), httpx.get(f"{server.address}/about")]:
        for secret in (str(tiny_model), str(Path.home()), "Traceback", ".py", "site-packages", socket.gethostname()):
            assert secret not in answer.text


def test_the_page_is_told_each_number_of_the_fixed_texts(server):
    assert {"12356", "120", "110"} <= set(httpx.get(f"{server.address}/about").json()["numbers"])


@pytest.mark.slow
def test_too_many_at_once_get_429_and_nobody_is_lost(another_server):
    running = another_server("--set", "limits.rows=2", "--set", "limits.choices=2", "--set", "limits.waiting=2")
    body = {**BODY, "max_tokens": 300, "temperature": 1, "n": 2}
    statuses = []

    def one():
        answer = httpx.post(running.address + URL, json=body, timeout=120)
        statuses.append((answer.status_code, answer.headers.get("retry-after")))

    threads = [threading.Thread(target=one) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(statuses) == 12 and set(statuses) == {(200, None), (429, "1")}
    assert httpx.post(running.address + URL, json=BODY, timeout=60).status_code == 200


def test_a_response_that_takes_too_long_is_ended(another_server):
    running = another_server("--set", "limits.request_seconds=0.05")
    answer = httpx.post(running.address + URL, json={**BODY, "max_tokens": 700}, timeout=60)
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
    with httpx.stream("POST", running.address + URL, json={**BODY, "max_tokens": 700, "stream": True}) as stream:
        last = list(stream.iter_lines())[-2]
    assert "the response took too long" in last


@pytest.mark.slow
def test_told_to_stop_it_finishes_what_it_has_begun(tiny_model):
    running = start_server(tiny_model)
    httpx.post(running.address + URL, json=BODY, timeout=60)
    body = {**BODY, "max_tokens": 600, "temperature": 1, "stream": True, "n": 4}
    lines = []
    with httpx.stream("POST", running.address + URL, json=body, timeout=60) as stream:
        for line in stream.iter_lines():
            if not lines:
                running.process.send_signal(signal.SIGTERM)
            lines.append(line)
    assert lines[-2] == "data: [DONE]" and sum('"finish_reason":"' in line for line in lines) == 4
    assert running.process.wait(60) == 0 and "Traceback" not in running.log
    assert "stopping: what is being answered has" in running.log
    with pytest.raises(httpx.ConnectError):
        httpx.get(running.address)


def test_interrupted_while_it_compiles(tiny_model, tmp_path):
    """Another thread compiles then, and must not outlive the interpreter: that ended with an abort."""
    # Who is started in the background of a script ignores SIGINT, and so would the server.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "psyche_jax.cli", "serve", str(tiny_model), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path)},
    )
    signal.signal(signal.SIGINT, inherited)
    assert process.stderr is not None
    assert next(line for line in process.stderr if line.startswith("compiling"))
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert (process.returncode, rest) == (1, "psyche serve: interrupted\n")


@pytest.mark.slow
def test_told_to_stop_it_breaks_off_what_takes_too_long(tiny_model):
    running = start_server(tiny_model, "--set", "limits.shutdown_seconds=1", "--set", "limits.rows=8")
    stop = threading.Event()

    def keep_asking():
        while not stop.is_set():
            try:
                httpx.post(running.address + URL, json={**BODY, "max_tokens": 700, "n": 8}, timeout=60)
            except httpx.HTTPError:
                return

    threads = [threading.Thread(target=keep_asking) for _ in range(12)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    assert running.stop(seconds=60) == 0
    stop.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.slow
def test_sixty_four_clients_lose_nothing(server):
    script = Path(__file__).parents[2] / "scripts" / "benchmarks" / "serve_load.py"
    done = subprocess.run(
        [sys.executable, script, server.address, "--seconds", "6", "--pid", str(server.process.pid)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout)
    assert counts["sent"] == counts["answered"] + counts.get("refused", 0) and counts["answered"] > 0


def test_told_to_stop_as_soon_as_it_is_announced(tiny_model):
    """Before the web server listens for signals: it ends, and says so by its exit code."""
    script = (
        "import signal, sys; from psyche_jax.serve.config import serve_config; "
        "from psyche_jax.serve.server import serve; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "config = serve_config(None, ['warm=false', 'port=0'], {'model': sys.argv[1]}); "
        "serve(config, lambda address: signal.raise_signal(signal.SIGINT))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tiny_model)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert (result.returncode, result.stderr) == (0, "")
