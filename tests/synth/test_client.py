"""The client against a real HTTP server that does what servers do."""

import asyncio
import json
import sqlite3
import time

import pytest
from support.faulty_server import KEY, FaultyServer, answering, send_answer, stored_keys

from psyche_jax.errors import UsageError, UserError
from psyche_jax.llm.reply import NoReplyError, Reply
from psyche_jax.synth.asking import SetAsideError
from psyche_jax.synth.calls import Call, CallStore
from psyche_jax.synth.canned import completion, serving
from psyche_jax.synth.client import Client
from psyche_jax.synth.config import BudgetSection, CallsSection, LlmSection


def user(text):
    return [{"role": "user", "content": text}]


def call(asker, text, llm="llm", sample=0):
    return asker.client.reply(asker.client.request(llm, "p@1", user(text), sample))


def many(count, llm="llm"):
    async def work(asker):
        calls = (call(asker, f"第{n}问", llm) for n in range(count))
        return await asyncio.gather(*calls), asker.client

    return work


class Scripted(FaultyServer):
    """Answers each try of each request by the next of `steps`: (status, headers) or "ok"; the last one for ever."""

    def __init__(self, *steps):
        super().__init__(share=0.0)
        self.steps = steps
        self.times = []

    async def _respond(self, request, headers, send):
        key = headers["idempotency-key"]
        step = self.steps[min(self.tries[key], len(self.steps) - 1)]
        self.times.append(time.monotonic())
        if step != "ok":
            self.tries[key] += 1
            return await send_answer(send, step[0], {"error": {"message": f"no, {KEY}"}}, step[1])
        return await super()._respond(request, headers, send)


@pytest.mark.parametrize("stream", [False, True])
def test_all_faults_pass_and_nothing_is_asked_twice(ask, tmp_path, stream):
    server = FaultyServer(share=0.15, hang=0.6)
    settings = {"stream": stream, "timeout_seconds": 0.4}
    replies, client = ask(server, many(60), llm=settings, concurrency=8)
    assert len(replies) == 60 and all(reply.text for reply in replies)
    assert set(server.faults) == {"429", "500", "time-out", "cut"}
    assert client.faults >= sum(server.faults.values())
    assert server.most_running <= 8 + server.faults["time-out"], "those that the client gave up may still run there"
    assert len(stored_keys(tmp_path / "calls.sqlite")) == 60
    again, client = ask(server, many(60), llm=settings)
    assert [reply.text for reply in again] == [reply.text for reply in replies]
    assert (client.sent, client.known) == (0, 60)


def test_a_request_that_is_under_way_is_not_sent_again(ask):
    async def work(asker):
        calls = [call(asker, "同一问") for _ in range(10)]
        await asyncio.gather(*calls)
        await call(asker, "同一问", "llm", sample=1)
        await call(asker, "同一问", "other")
        return asker.client.sent

    assert ask(FaultyServer(share=0.0, delay=0.05), work) == 3


def test_the_same_idempotency_key_with_each_try(ask):
    server = Scripted((500, ()), (503, ()), "ok")
    ask(server, many(1))
    assert list(server.tries.values()) == [3]


def test_retry_after_is_waited_for_by_all_calls_to_that_llm(ask):
    server = Scripted((429, [(b"retry-after", b"0.6")]), "ok")
    ask(server, many(3), concurrency=3)
    gap = max(later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False))
    assert gap > 0.5


def test_a_server_is_waited_for_only_so_long_and_that_is_said_once(ask, capsys):
    server = Scripted((429, [(b"retry-after", b"1e9")]), "ok")
    started = time.monotonic()
    replies, _ = ask(server, many(3), longest_rest_seconds=0.3, concurrency=3)
    assert len(replies) == 3 and time.monotonic() - started < 3
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "asks to wait" in line)
    assert line.startswith("LLM llm at http://") and "asks to wait 1,000,000,000 s; waiting 0.3 s, see calls." in line


def test_a_call_that_never_succeeds_fails_alone(ask):
    async def work(asker):
        with pytest.raises(NoReplyError, match="HTTP 500"):
            await call(asker, "问")
        return asker.client.sent

    assert ask(Scripted((500, ())), work, retries=2) == 3


def test_too_many_failed_calls_end_the_run(ask):
    async def work(asker):
        calls = (call(asker, f"第{n}问") for n in range(9))
        return await asyncio.gather(*calls, return_exceptions=True)

    faults = ask(Scripted((500, ())), work, retries=0, give_up_after=3, concurrency=1)
    assert [type(fault) for fault in faults[:3]] == [NoReplyError, NoReplyError, UserError]
    assert "start again later" in str(faults[2])


@pytest.mark.parametrize(("status", "hint"), [(401, "FAULTY_KEY"), (404, "base_url and model")])
def test_what_no_retry_mends_ends_the_run_without_showing_the_key(ask, tmp_path, status, hint):
    with pytest.raises(UserError, match=hint) as caught:
        ask(Scripted((status, ())), many(2))
    assert KEY not in str(caught.value) and "***" in str(caught.value)
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir())


def test_prompts_do_not_follow_to_another_host(ask):
    elsewhere = FaultyServer(share=0.0)
    with serving(elsewhere) as url:
        server = Scripted((307, [(b"location", f"{url}/v1/chat/completions".encode())]))
        with pytest.raises(UserError, match=f"HTTP 307: redirects to {url}"):
            ask(server, many(3), concurrency=1)
    assert not elsewhere.tries and len(server.times) <= 2, "the second may be under way"


class Odd(FaultyServer):
    """Every answer has these fields, of the whole and of its choice."""

    def __init__(self, choice=None, **changes):
        super().__init__(share=0.0)
        self.changes, self.choice, self.requests = changes, choice or {}, []

    async def _respond(self, request, headers, send):
        self.requests.append(request)
        value = completion(request, "好")
        value["choices"][0] |= self.choice
        await send_answer(send, 200, {**value, **self.changes})


def test_counts_that_no_store_can_hold_are_taken_for_unknown(ask):
    server = Odd(usage={"prompt_tokens": 10**30, "completion_tokens": 2**63})
    (reply,), client = ask(server, many(1))
    assert (reply.prompt_tokens, reply.completion_tokens) == (3, 1), "a character a token"
    assert client.tokens == 4


@pytest.mark.parametrize(("text", "count"), [("好", 10**30), ("\ud800", 1)])
def test_whatever_the_store_cannot_write_reaches_all_who_wait(tmp_path, text, count):
    async def work():
        store = CallStore(tmp_path / "calls.sqlite")
        asked = Call("llm", "m", "p@1", tuple(user("问")), ())
        bad = Reply(text, finish="stop", prompt_tokens=count, completion_tokens=1)
        async with asyncio.timeout(5):
            waiting = [store.opened(asked), store.answered(asked.key, bad), store.opened(asked)]
            found = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(one) for one in found] == [UserError] * 3 and "cannot be written" in str(found[0])
            await store.opened(asked)  # it goes on
        store.close()

    asyncio.run(work())


@pytest.mark.parametrize("finish", ["error", "insufficient_system_resource"])
def test_what_a_server_broke_off_is_asked_again_and_never_a_reply(ask, tmp_path, finish):
    async def work(asker):
        with pytest.raises(NoReplyError, match=f"no answer: {finish}"):
            await call(asker, "问")
        return asker.client.sent

    assert ask(Odd({"finish_reason": finish}), work, retries=2) == 3
    assert stored_keys(tmp_path / "calls.sqlite") == {}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("答案：A", "<think>自己想的</think>答案：A"),
        ("<think>写出来的</think>答案：A", "<think>写出来的</think>答案：A"),
    ],
)
def test_a_reply_has_the_thought_that_was_asked_for_else_the_llms_own(ask, content, text):
    (reply,), _ = ask(Odd({"message": {"content": content, "reasoning": "自己想的"}}), many(1))
    assert reply.text == text


def test_parameters_that_are_refused_are_paid_for_once(ask, tmp_path, capsys):
    class Newer(Odd):
        async def _respond(self, request, headers, send):
            if "max_tokens" in request:
                self.requests.append(request)
                said = (
                    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
                )
                return await send_answer(send, 400, {"error": {"message": said, "param": "max_tokens"}})
            return await super()._respond(request, headers, send)

    server = Newer()
    replies, _ = ask(server, many(9), concurrency=1)
    assert {reply.finish for reply in replies} == {"stop"} and len(server.requests) == 10
    assert server.requests[-1]["max_completion_tokens"] == 2048
    assert capsys.readouterr().err.count("from now on psyche calls max_tokens max_completion_tokens") == 1
    ask(Odd(), many(9))
    assert len(stored_keys(tmp_path / "calls.sqlite")) == 9, "a reply is known whatever its parameters were called"
    server = Newer()
    ask(server, many(2, "other"), llm={"parameters": {"max_tokens": "limit", "top_p": None}})
    assert len(server.requests) == 2 and server.requests[0]["limit"] == 2048 and "top_p" not in server.requests[0]


def test_parameters_that_we_do_not_send_cannot_be_named():
    with pytest.raises(ValueError, match="parameters: cannot send 'max_token', only temperature, top_p"):
        LlmSection("llm", "m", parameters={"max_token": None})


def test_a_request_that_is_refused_is_a_reply(ask, tmp_path):
    class Picky(FaultyServer):
        async def _respond(self, request, headers, send):
            if "第1问" in request["messages"][0]["content"]:
                return await send_answer(send, 400, {"error": {"message": f"no, {KEY}"}})
            return await super()._respond(request, headers, send)

    (taken, refused), _ = ask(Picky(share=0.0), many(2), concurrency=1)
    assert taken.finish == "stop" and refused.finish == "refused" and KEY not in refused.text
    assert len(stored_keys(tmp_path / "calls.sqlite")) == 2, "it is not asked again"


def test_an_llm_that_refuses_everything_ends_the_run_and_is_asked_again_when_it_is_mended(ask):
    async def work(asker):
        calls = [asker.client.request("llm", "p@1", user(f"第{n}问")) for n in range(9)]
        return await asyncio.gather(*map(asker.reply, calls), return_exceptions=True)

    faults = ask(Scripted((400, ())), work, give_up_after=3)
    assert [type(fault) for fault in faults] == [SetAsideError] * 2 + [UserError] * 7
    assert "3 replies in a row could not be used, 3 of them: refused by the server: p, llm: HTTP 400" in str(faults[2])
    replies, client = ask(FaultyServer(share=0.0), many(9))
    assert {reply.finish for reply in replies} == {"stop"} and client.known == 0


def test_what_is_no_completion_is_tried_again(ask):
    class Once(FaultyServer):
        async def _respond(self, request, headers, send):
            if not self.tries["odd"]:
                self.tries["odd"] += 1
                return await send_answer(send, 200, {"choices": []})
            return await super()._respond(request, headers, send)

    (reply,), client = ask(Once(share=0.0), many(1))
    assert reply.text and client.faults == 1


def test_the_budget_stops_the_run_and_counts_what_was_spent_before(ask):
    with pytest.raises(UserError, match=r"budget.tokens of 300 is used up"):
        ask(FaultyServer(share=0.0), many(50), budget=BudgetSection(tokens=300), concurrency=1)
    with pytest.raises(UserError, match=r"budget\.tokens"):
        ask(FaultyServer(share=0.0), many(50), budget=BudgetSection(tokens=100), concurrency=1)
    with answering("答" * 1000) as server, pytest.raises(UserError, match=r"budget.cost of 0.01 is used up"):
        ask(server, many(50, "other"), llm={"output_price": 10.0}, budget=BudgetSection(cost=0.01), concurrency=1)


def test_rate_limit(ask):
    started = time.monotonic()
    ask(Scripted("ok"), many(5), llm={"requests_per_minute": 600.0})
    assert time.monotonic() - started >= 0.4, "four waits of a tenth of a second"
    with answering("答" * 100) as counted:
        started = time.monotonic()
        ask(counted, many(4, "other"), llm={"tokens_per_minute": 60_000.0}, concurrency=1)
        assert time.monotonic() - started >= 0.3, "three waits for replies of 100 tokens and more at 1,000 a second"


def test_in_flight_calls_are_counted_when_they_are_repeated(ask, tmp_path):
    ask(FaultyServer(share=0.0), many(2))
    with sqlite3.connect(tmp_path / "calls.sqlite") as database:
        database.execute("UPDATE calls SET received = NULL, text = NULL")  # as a kill leaves it
    _, client = ask(FaultyServer(share=0.0), many(2))
    assert client.sent == 2
    assert set(stored_keys(tmp_path / "calls.sqlite").values()) == {1}


def test_no_key_in_the_environment_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("FAULTY_KEY")
    llm = LlmSection("llm", "m", "http://127.0.0.1:1/v1", "FAULTY_KEY")
    store = CallStore(tmp_path / "calls.sqlite")
    with pytest.raises(UsageError, match="no FAULTY_KEY"):
        Client([llm], CallsSection(), BudgetSection(), store)
    store.close()


@pytest.mark.parametrize("key", ["sk-\nabc", "sk-密钥"])
def test_a_key_that_no_header_can_hold_is_said_at_once_and_not_shown(tmp_path, monkeypatch, key):
    monkeypatch.setenv("FAULTY_KEY", key)
    store = CallStore(tmp_path / "calls.sqlite")
    with pytest.raises(UsageError, match="FAULTY_KEY has characters that no key has") as caught:
        Client([LlmSection("llm", "m", "http://127.0.0.1:1/v1", "FAULTY_KEY")], CallsSection(), BudgetSection(), store)
    assert "sk-" not in str(caught.value)
    store.close()


@pytest.mark.parametrize(
    "url",
    [
        *("https://user:secret@host/v1", "https://user:se/cret@host/v1", "https://host/v1?api_key=secret"),
        *("host/v1", "ftp://host", "https://host/v1#model", "http://h:99999/v1", "http://h:0/v1", "http://h:x/v1"),
        *("http://h\n/v1", "http://\u200bh/v1", "http://[::1/v1"),
    ],
)
def test_base_urls_that_are_refused(url):
    with pytest.raises(ValueError, match="base_url") as caught:
        LlmSection("llm", "m", url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_store_that_is_none(tmp_path):
    (tmp_path / "calls.sqlite").write_text("no database at all, but long enough to be looked at" * 10)
    with pytest.raises(UserError, match="is not a store of calls"):
        CallStore(tmp_path / "calls.sqlite")


def test_a_store_that_is_damaged_or_has_other_columns(ask, tmp_path):
    path = tmp_path / "calls.sqlite"
    ask(FaultyServer(share=0.0), many(1))
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\x55" * (len(content) - 4096))
    with pytest.raises(UserError, match=r"is not a store of calls.*malformed.*move it away"):
        CallStore(path)
    path.write_bytes(content)
    with sqlite3.connect(path) as database:
        ((key,),) = database.execute("UPDATE calls SET text = CAST(x'ff1b' AS TEXT) RETURNING key")
    store = CallStore(path)
    with pytest.raises(UserError, match=r"or damaged .*UTF-8") as caught:
        store.find(key)
    store.close()
    assert str(caught.value).isprintable()
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE calls (key TEXT)")
    with pytest.raises(UserError, match=r"is not a store of calls.*no such column"):
        CallStore(path)


def test_a_store_is_not_called_damaged_where_its_place_is_at_fault(tmp_path):
    """Whoever moved it away would pay for all calls again."""
    with pytest.raises(UserError, match=r"cannot be used \(unable to open") as caught:
        CallStore(tmp_path)
    assert "move it away" not in str(caught.value)


def test_requests_are_stored_as_they_were_sent(ask, tmp_path):
    ask(FaultyServer(share=0.0), many(1))
    with sqlite3.connect(tmp_path / "calls.sqlite") as database:
        request, prompt = database.execute("SELECT request, prompt FROM calls").fetchone()
    assert json.loads(request)[2] == user("第0问") and prompt == "p@1"
