"""One request to a server of LLMs over real HTTP: every way to spell an answer, and servers that do odd things."""

import asyncio
import gzip
import json
import time
from email.utils import formatdate

import pytest
from starlette.requests import Request

from psyche_jax.llm.objects import json_object
from psyche_jax.llm.reply import NoReplyError, joined, read_reply
from psyche_jax.llm.retries import retry_after
from psyche_jax.llm.server import Server
from psyche_jax.synth.canned import serving

KEY = "sk-secret-of-the-test"
BODY = {
    "model": "m",
    "messages": [{"role": "user", "content": "问"}],
    "max_tokens": 9,
    "temperature": 0.5,
    "top_p": 0.9,
}


class Scripted:
    """`answer(request, path)` gives a status, headers and the parts of a body, or an object to be sent as JSON."""

    def __init__(self, answer):
        self.answer = answer
        self.requests = []

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        body = await Request(scope, receive).body()
        request = json.loads(body) if body else {}
        self.requests.append(request)
        given = self.answer(request, scope["path"])
        status, headers, parts = given if isinstance(given, tuple) else (200, {}, [json.dumps(given).encode()])
        named = [
            (name.encode(), value.encode()) for name, value in {"content-type": "application/json", **headers}.items()
        ]
        await send({"type": "http.response.start", "status": status, "headers": named})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def ask(answer, body=BODY, names=None, again=1, timeout=5.0):
    """What comes of asking (an error that is raised is returned), and the requests that the server saw."""

    async def work(url):
        async with Server(f"{url}/v1", KEY, timeout=timeout, names=names) as server:
            found = []
            for _ in range(again):
                try:
                    found.append(await server.ask(body))
                except NoReplyError as error:
                    found.append(str(error))
            return found

    scripted = Scripted(answer)
    with serving(scripted) as url:
        return asyncio.run(work(url)), scripted.requests


def message(finish="stop", **fields):
    return {
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", **fields}, "finish_reason": finish}],
    }


def streamed(*deltas, finish="stop"):
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    events = [f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks]
    return 200, {"content-type": "text/event-stream"}, [*events, b"data: [DONE]\n\n"]


# Spellings of a thought "想" and a text "答案：A"

SPELLINGS = [
    {"content": "答案：A", "reasoning_content": "想"},
    {"content": "答案：A", "reasoning": "想"},
    {"content": "答案：A", "reasoning": "想", "reasoning_content": "想"},
    {"content": "答案：A", "thinking": "想"},
    {"content": "答案：A", "reasoning": "想", "reasoning_details": [{"type": "reasoning.text", "text": "想"}]},
    {"content": "答案：A", "reasoning_details": [{"type": "reasoning.summary", "summary": "想"}]},
    {"content": "答案：A", "reasoning_content": None, "thinking_blocks": [{"type": "thinking", "thinking": "想"}]},
    {"content": [{"type": "thinking", "thinking": "想"}, {"type": "text", "text": "答案：A"}]},
    {
        "content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": "想"}]},
            {"type": "text", "text": "答案：A"},
        ]
    },
    {
        "content": [
            {"type": "reasoning", "text": "想"},
            {"type": "output_text", "text": "答案"},
            {"type": "text", "text": "：A"},
        ]
    },
    {"content": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "想"}]}, "答案：A"]},
    {"content": [{"text": "想", "thought": True}, {"text": "答案：A"}]},
    {"content": {"type": "text", "text": "答案：A"}, "reasoning": {"content": "想"}},
]


@pytest.mark.parametrize("fields", SPELLINGS)
@pytest.mark.parametrize("stream", [False, True])
def test_thought_and_text_are_read_however_they_are_spelled(fields, stream):
    given = streamed({"role": "assistant", "content": ""}, fields) if stream else message(**fields)
    (answer,), _ = ask(lambda *_: given, {**BODY, "stream": stream})
    assert (answer.reasoning, answer.text, answer.finish, answer.fault) == ("想", "答案：A", "stop", "")
    assert answer.whole == "<think>想</think>答案：A"


@pytest.mark.parametrize(
    ("fields", "whole"),
    [
        ({"content": "想</think>答案：A"}, "<think>想</think>答案：A"),
        ({"content": "<think>想</think>答案：A"}, "<think>想</think>答案：A"),
        ({"content": "<think>后想</think>A", "reasoning": "先想"}, "<think>先想\n后想</think>A"),
        ({"content": "<think>后想", "reasoning": "先想"}, "<think>先想\n后想"),
        ({"content": "A", "reasoning": "<think>\n想\n</think>"}, "<think>\n想\n</think>A"),
        ({"content": None, "reasoning_content": "想"}, "<think>想</think>"),
        ({"content": None}, ""),
    ],
)
def test_thought_and_text_as_one(fields, whole):
    assert read_reply(json.dumps(message(**fields))).whole == whole


def test_a_stream_may_send_whole_messages_counts_of_its_own_and_halves_of_an_emoji():
    first = {"choices": [], "prompt_filter_results": []}
    events = [first, {"model": "x", "choices": [{"message": {"content": "甲\ud83d"}}]},
              {"choices": [{"delta": None, "content_filter_results": {}}]},
              {"choices": [{"delta": {"content": "\ude00"}, "finish_reason": "end_turn"}]},
              {"choices": None, "usage": {"prompt_tokens": 7, "completion_tokens": 3}}]  # fmt: skip
    body = b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events)
    (answer,), _ = ask(lambda *_: (200, {"content-type": "text/event-stream;charset=latin-1"}, [body]))
    assert (answer.text, answer.finish, answer.served_by) == ("甲😀", "stop", "x")
    assert (answer.prompt_tokens, answer.completion_tokens) == (7, 3)


@pytest.mark.parametrize(
    ("given", "finish"),
    [
        (message("content_filter", content="半"), "content_filter"),
        (message("SAFETY", content=None), "content_filter"),
        (message("error", content="半"), "error"),
        (message("network_error", content=""), "network_error"),
        (message("stop", content=None, refusal="I can't help."), "refusal"),
        (message("stop", content=[{"type": "refusal", "refusal": "I can't help."}]), "refusal"),
        (message("stop", content=None, tool_calls=[{"id": "1"}]), "tool_calls"),
        (streamed({"content": "半"}, finish="content_filter"), "content_filter"),
        (streamed({"content": ""}, {"refusal": "I can't "}, {"refusal": "help."}), "refusal"),
        (message("ContentFilter", content="半"), "content_filter"),
        (message("FINISH_REASON_SAFETY", content="半"), "content_filter"),
        (message({"type": "abort"}, content="半"), "abort"),
        (message(1, content="半"), "1"),
    ],
)
def test_answers_that_are_none_say_why(given, finish):
    (answer,), _ = ask(lambda *_: given)
    assert answer.finish == finish and answer.fault.startswith(finish)
    assert finish != "refusal" or answer.fault == "refusal: I can't help."


def test_an_end_that_is_none_is_not_taken_back_by_what_follows():
    chunks = [{"choices": [{"delta": {"content": "半"}, "finish_reason": reason}]} for reason in ("safety", "stop")]
    assert joined([read_reply(json.dumps(chunk), False) for chunk in chunks]).fault == "content_filter"


def test_a_text_in_place_of_a_message():
    choice = {"index": 0, "text": "好", "finish_reason": "stop"}
    whole = read_reply(json.dumps({"choices": [choice]}))
    streamed = joined([read_reply(json.dumps({"choices": [choice]}), False)] * 2)
    assert (whole.text, whole.finish, streamed.text) == ("好", "stop", "好好")


def test_what_a_stream_says_of_other_choices_or_once_more_at_its_end_is_not_added():
    chunks = [
        {"choices": [{"index": 0, "delta": {"content": "甲"}}, {"index": 1, "delta": {"content": "别"}}]},
        {"choices": [{"index": 1, "delta": {"content": "的"}, "finish_reason": "length"}]},
        {"choices": [{"index": 0, "delta": {"content": "乙"}}]},
        {"choices": [{"index": 0, "delta": {}, "message": {"content": "甲乙"}, "finish_reason": "stop"}]},
    ]
    answer = joined([read_reply(json.dumps(chunk), False) for chunk in chunks])
    assert (answer.text, answer.finish) == ("甲乙", "stop")


@pytest.mark.parametrize(
    ("reason", "finish"),
    [("stop", "stop"), ("end_turn", "stop"), ("STOP", "stop"), (None, "stop"), ("", "stop"), ("null", "stop"),
     ("length", "length"), ("MAX_TOKENS", "length"), ("model_length", "length"), ("FinishReason.STOP", "stop"),
     ("FINISH_REASON_MAX_TOKENS", "length"), ("endTurn", "stop"), (" stop ", "stop"), ({"type": "length"}, "length")],
)  # fmt: skip
def test_words_for_the_two_ends_of_an_answer(reason, finish):
    answer = read_reply(json.dumps(message(reason, content="好")))
    assert (answer.finish, answer.fault) == (finish, "")


@pytest.mark.parametrize(
    "given",
    [
        {"error": {"message": f"overloaded, {KEY}", "code": 502}},
        {"object": "error", "message": f"overloaded, {KEY}"},
        {"error": f"overloaded, {KEY}"},
        {"error": [f"overloaded, {KEY}"]},
        {"error": None, "message": f"overloaded, {KEY}"},
        {"code": 1001, "msg": f"overloaded, {KEY}", "choices": None},
        {"detail": f"overloaded, {KEY}"},
        (200, {"content-type": "text/event-stream"}, [f"event: error\ndata: overloaded, {KEY}\n\n".encode()]),
        (
            200,
            {"content-type": "text/event-stream"},
            [f'data: {{"error": {{"message": "overloaded, {KEY}"}}}}\n\n'.encode()],
        ),
    ],
)
def test_an_error_in_place_of_an_answer_is_said_without_the_key(given):
    (said,), _ = ask(lambda *_: given)
    assert said == "an error came instead of the answer: overloaded, ***"


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"choices": ' + b"9" * 5000 + b"}", b"{", b"[]", b"3", b'{"choices": [{"message": 3}]}'],
)
def test_what_is_no_answer_is_broken(content):
    (said,), _ = ask(lambda *_: (200, {}, [content]))
    assert said in ("the answer is not JSON", "the answer contains no message")


@pytest.mark.parametrize(
    ("tokens", "count"),
    [(7, 7), (7.0, 7), (0, 0), (10**30, None), (-1, None), (1.5, None), ("7", None), (True, None), ([7], None),
     (float("nan"), None), (float("inf"), None)],
)  # fmt: skip
def test_counts_are_whole_numbers_or_unknown(tokens, count):
    answer = read_reply(
        json.dumps({**message(content="好"), "usage": {"prompt_tokens": tokens, "completion_tokens": 1}})
    )
    assert (answer.prompt_tokens, answer.completion_tokens) == (count, 1)
    assert read_reply(json.dumps({**message(content="好"), "usage": [1]})).prompt_tokens is None


def test_answers_without_an_end_are_ended(monkeypatch):
    monkeypatch.setattr("psyche_jax.llm.server._MOST_BYTES", 100_000)
    event = f"data: {json.dumps({'choices': [{'delta': {'content': 'x' * 1000}}]})}\n\n".encode()
    kinds = {
        "whole": (200, {}, [b" " * 10_000] * 1000),
        "packed": (200, {"content-encoding": "gzip"}, [gzip.compress(b" " * 10**8)]),
        "events": (200, {"content-type": "text/event-stream"}, [event] * 1000),
        "empty events": (200, {"content-type": "text/event-stream"}, [b'data: {"choices": []}\n\n' * 1000] * 10),
        "line": (200, {"content-type": "text/event-stream"}, [b"data: "] + [b"x" * 10_000] * 1000),
    }
    for kind, given in kinds.items():
        (said,), _ = ask(lambda *_, given=given: given)
        assert said in ("the answer has no end", "the answer broke off"), kind
    (said,), _ = ask(lambda *_: (400, {}, [b"\x1b[2Jno " * 10_000] * 1000))
    assert said.startswith("HTTP 400") and "\x1b" not in said and len(said) < 300


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ([b"SSH-2.0-OpenSSH_9.6\r\n"], "not HTTP: Bad status line"),
        ([b"\x15\x03\x01\x00\x02\x02\x46"], "not HTTP: Bad status line"),  # as TLS answers one who speaks without
        ([b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n"], "not HTTP: Invalid character in Content-Length"),
        ([b"HTTP/1.1 200 OK\r\nx: ", b"y" * 100_000, b"\r\n\r\n"], "not HTTP: Got more than"),
        ([b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n", None, b"zz\r\n"], "no answer in time"),
    ],
)
def test_what_is_not_http_is_said(sent, said):
    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        for part in sent:
            await (asyncio.sleep(0.1) if part is None else writer.drain())
            writer.write(part or b"")
        writer.close()

    async def work():
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
            port = listening.sockets[0].getsockname()[1]
            async with Server(f"http://127.0.0.1:{port}/v1", KEY, timeout=0.5) as server:
                with pytest.raises(NoReplyError, match=said) as caught:
                    await server.ask(BODY)
                assert caught.value.passing and len(str(caught.value)) < 300 and str(caught.value).isprintable()
                with pytest.raises(NoReplyError):
                    await server.models()

    asyncio.run(work())


def test_a_long_stream_of_short_events_is_read():
    given = streamed(*({"content": "字", "filling": "x" * 300} for _ in range(60_000)))
    (answer,), _ = ask(lambda *_: given, timeout=30)
    assert answer.text == "字" * 60_000


# Parameters


def refusing(*names, successor=""):
    def answer(request, path):
        for name in names:
            if name in request:
                said = f"Unsupported parameter: '{name}' is not supported with this model."
                said += f" Use '{successor}' instead." if successor else ""
                return 400, {}, [json.dumps({"error": {"message": said, "param": None, "code": None}}).encode()]
        return message(content="好")

    return answer


def test_a_parameter_that_is_refused_is_left_out_from_then_on_and_said_once(capsys):
    names = {}
    answers, requests = ask(refusing("seed"), {**BODY, "seed": 3}, names, again=3)
    assert [answer.text for answer in answers] == ["好"] * 3
    assert ["seed" in request for request in requests] == [True, False, False, False]
    (line,) = capsys.readouterr().err.splitlines()
    assert "HTTP 400" in line and line.endswith("from now on psyche leaves seed out for it")
    assert names == {"seed": None}
    _, requests = ask(refusing("seed"), {**BODY, "seed": 3}, names)
    assert len(requests) == 1 and capsys.readouterr().err == "", "known to a server of the same LLM"


@pytest.mark.parametrize("successor", ["max_completion_tokens", ""])
def test_the_limit_gets_its_newer_name(capsys, successor):
    _, (first, second) = ask(refusing("max_tokens", successor=successor))
    assert first["max_tokens"] == 9 and "max_tokens" not in second and second["max_completion_tokens"] == 9
    assert "calls max_tokens max_completion_tokens for it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "error", "left"),
    [
        (400, {"error": {"message": "`temperature` and `top_p` cannot both be specified for this model."}}, "top_p"),
        (400, {"error": {"message": "top_p and temperature cannot be used together"}}, "top_p"),
        (
            400,
            {"error": {"message": "Only the default (1) value is supported.", "param": "temperature"}},
            "temperature",
        ),
        (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "top_p"], "input": 0.9}]}, "top_p"),
        (400, {"object": "error", "message": "Unrecognized request argument supplied: top_p"}, "top_p"),
        (400, {"error": "unknown parameter top_p"}, "top_p"),
        (400, {"error": None, "message": "unknown parameter top_p"}, "top_p"),
        (400, ["top_p is not supported"], "top_p"),
        (400, {"errors": {"top_p": ["unknown field"]}}, "top_p"),
        (400, {"error": {"message": "Top_P must be omitted"}}, "top_p"),
        (400, {"error": {"message": "temperature must be 1 for this model"}}, "temperature"),
        (400, {"error": {"message": "at most 1", "code": "unsupported_parameter", "param": "top_p"}}, "top_p"),
        (400, {"error": {"message": "Unknown name maxTokens"}}, "max_tokens"),
        (400, {"error": "please send max_completion_tokens"}, "max_tokens"),
        (400, {"error": "Not permitted: top_p. Allowed: temperature, max_tokens"}, "top_p"),
        (400, {"error": "Supported parameters are temperature, max_tokens. Got top_p"}, "top_p"),
        (422, {"body": BODY, "detail": [{"type": "extra_forbidden", "loc": ["body", "top_p"]}]}, "top_p"),
    ],
)
def test_what_is_refused_is_found_in_what_servers_say(status, error, left):
    def answer(request, path):
        return (status, {}, [json.dumps(error).encode()]) if left in request else message(content="好")

    (found,), requests = ask(answer)
    assert found.text == "好" and [left in request for request in requests] == [True, False]
    assert set(BODY) - set(requests[-1]) == {left}, "nothing else"


@pytest.mark.parametrize(
    "said",
    [
        "max_tokens is too large: 9. This model's maximum context length is 8 tokens",
        "temperature must be between 0 and 0.1",
        "max_tokens must be 1 or more",
        "top_p must be 1.5",
        "the prompt was filtered",
        "the model `top_p-1b` does not exist",
    ],
)
def test_a_wrong_value_is_no_refusal_of_the_parameter(said):
    names = {}
    (found,), requests = ask(lambda *_: (400, {}, [json.dumps({"error": {"message": said}}).encode()]), names=names)
    assert "HTTP 400" in found and len(requests) == 1 and names == {}


def test_what_leaving_out_does_not_mend_is_not_remembered(capsys):
    names = {}
    (found,), requests = ask(lambda *_: (400, {}, [b'{"error": {"message": "temperature: no"}}']), names=names)
    assert "HTTP 400" in found and len(requests) == 2 and names == {} and capsys.readouterr().err == ""


def test_parameters_are_left_out_or_called_otherwise_from_the_start():
    _, (request,) = ask(refusing(), names={"max_tokens": "max_completion_tokens", "top_p": None})
    assert set(request) == {"model", "messages", "max_completion_tokens", "temperature"}


# Redirects


def test_prompts_follow_a_redirect_to_the_same_server_only():
    def there(request, path):
        return message(content="好") if path == "/v2" else (307, {"location": "/v2"}, [])

    (answer,), requests = ask(there)
    assert answer.text == "好" and requests == [BODY, BODY]

    stolen = Scripted(lambda *_: message(content="偷"))
    with serving(stolen) as elsewhere:
        for status in (301, 302, 303, 307, 308):
            for target in (f"{elsewhere}/v1/x", elsewhere.replace("http:", ""), "http://[", "https://127.0.0.1/v1"):
                (said,), _ = ask(lambda *_, given=(status, {"location": target}, []): given)
                assert said.startswith(f"HTTP {status}: redirects to "), "one line"
    assert stolen.requests == []


# Waiting


def test_retry_after_of_every_kind_is_a_number_or_nothing():
    for value in ("1e9", "9" * 400, "nan", "-inf", "Fri, 31 Dec 9999 23:59:59 GMT", "Mon, 01 Jan 0001 00:00:00 +2359",
                  "Fri, 99 Xyz 99999 99:99:99 GMT", "\x00", ",", "Thu, 01 Jan 1970 00:00:00 GMT"):  # fmt: skip
        seconds = retry_after({"retry-after": value})
        assert seconds is None or 0 <= seconds < 1e12, value
    assert retry_after({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}) == 0
    assert 1 < retry_after({"retry-after": formatdate(time.time() + 3, usegmt=True)}) <= 3
    for value, seconds in (("3", 3), ("0.5", 0.5), ("-1", 0), ("soon", None), ("inf", None), ("", None)):
        assert retry_after({"retry-after": value}) == seconds
    for value, seconds in (("1500", 1.5), ("-1", 0), ("nan", 7), ("junk", 7)):
        assert retry_after({"retry-after": "7", "retry-after-ms": value}) == seconds


def test_the_models_of_a_server_that_does_not_end_are_given_up(monkeypatch):
    monkeypatch.setattr("psyche_jax.llm.server._MODELS_SECONDS", 0.2)

    async def work(url):
        async with Server(f"{url}/v1", None, timeout=5) as server:
            return await server.models()

    async def drips(scope, receive, send):
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(40):
                await send({"type": "http.response.body", "body": b" ", "more_body": True})
                await asyncio.sleep(0.05)

    with serving(drips) as url:
        started = time.monotonic()
        with pytest.raises(NoReplyError, match="no answer in time"):
            asyncio.run(work(url))
        assert time.monotonic() - started < 1.5


# Objects


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1}', {"a": 1}),
        ('```json\n{"a": 1}\n```', {"a": 1}),
        ('好的：{"a": 1}（注：{}）', {"a": 1}),
        ('形如 {x} 的对象 {"a": {"b": "}"}} 完', {"a": {"b": "}"}}),
        ('草稿 {"a": 1}，改为 {"a": 2}', {"a": 2}),
        ('{"a": "两\n行"}', {"a": "两\n行"}),
        ('{"b": 3}', {"b": 3}),
        ('[{"a": 1}]', {"a": 1}),
        ('{"result": {"a": 1}}', {"a": 1}),
        ('{"results": [{"a": 1}]}', {"a": 1}),
        ('{"a": [1, 2,], "c": ",}", }', {"a": [1, 2], "c": ",}"}),
        ('{"a": 1, "c": 2}，其中 {"a": "说明"}', {"a": 1, "c": 2}),
        ("没有", None),
    ],
)
def test_the_object_in_a_reply(text, found):
    assert json_object(text, ("a", "c")) == found


def test_a_name_that_is_given_two_values_is_asked_about():
    with pytest.raises(ValueError, match="the name 'a' has two values"):
        json_object('{"a": 5, "c": 1, "a": 1}', ("a", "c"))
    assert json_object('{"a": 5, "c": 1, "a": 5}', ("a", "c")) == {"a": 5, "c": 1}


def test_broken_objects_are_found_quickly():
    for text in ('{"a": [{"b": 1}', "{" * 500_000, '{"' + '\\"' * 500_000, '{"a":' * 100_000, '{"a": 1'):
        started = time.monotonic()
        with pytest.raises(ValueError):
            json_object(text, ("a",))
        assert time.monotonic() - started < 2


def test_of_what_is_said_twice_the_last_counts():
    pieces = [
        read_reply(json.dumps({"choices": [{"delta": {"content": text}}], "model": text}), False) for text in "甲乙"
    ]
    assert (joined(pieces).text, joined(pieces).served_by) == ("甲乙", "乙")
