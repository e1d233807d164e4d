"""The endpoint through the real `openai` client."""

import json
import re
import threading
from types import SimpleNamespace

import httpx
import openai
import pytest
from starlette.testclient import TestClient

from psyche_jax.errors import UserError
from psyche_jax.llm.server import gate_warnings
from psyche_jax.serve.config import ServeConfig
from psyche_jax.serve.crisis.gate import Gate
from psyche_jax.serve.server import create_app

ASK = [{"role": "user", "content": "心理学是什么？"}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, content="心理学是什么？", **more):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(**{"model": "tiny", "messages": messages, "max_tokens": 12, **more})


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "psyche_jax"
    with pytest.raises(openai.NotFoundError, match="'tiny'"):
        client.models.retrieve("gpt")


def test_a_gate_before_the_model_is_said_to_who_evaluates(server, client):
    assert client.models.retrieve("tiny").model_extra["crisis_gate"] is True
    (line,) = gate_warnings({f"{server.address}/v1": None, "http://127.0.0.1:9/v1": None, "https://far.example": "k"})
    assert line.startswith(f"{server.address}/v1: its crisis gate is on") and "--no-crisis-gate" in line


def test_a_completion(client):
    completion = ask(client, temperature=0)
    (choice,) = completion.choices
    assert completion.model == "tiny" and completion.object == "chat.completion"
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length") and choice.logprobs is None
    usage = completion.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens <= 12
    assert ask(client, temperature=0).choices[0].message.content == choice.message.content


def test_a_stream_says_the_same(client):
    whole = ask(client, temperature=0, max_tokens=40)
    stream = ask(client, temperature=0, max_tokens=40, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_choices_differ_and_a_seed_repeats_them(client):
    first = ask(client, n=4, seed=7, temperature=1.2, top_p=1)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3] and len(set(texts)) > 1
    again = ask(client, n=4, seed=7, temperature=1.2, top_p=1)
    assert [choice.message.content for choice in again.choices] == texts
    assert [c.message.content for c in ask(client, n=4, seed=8, temperature=1.2, top_p=1).choices] != texts
    streamed = dict.fromkeys(range(4), "")
    for chunk in ask(client, n=4, seed=7, temperature=1.2, top_p=1, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert list(streamed.values()) == texts


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(client, stream):
    whole = ask(client, temperature=0, max_tokens=40).choices[0].message.content
    stop = whole[4:7]
    answer = ask(client, temperature=0, max_tokens=40, stop=["never there", stop], stream=stream)
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (text, finish) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_log_probs_are_those_of_the_tokens(client, stream):
    wanted = {"temperature": 0, "max_tokens": 20, "logprobs": True, "top_logprobs": 3, "stream": stream}
    answer = ask(client, **wanted)
    if stream:
        entries = [
            entry
            for chunk in answer
            for choice in chunk.choices
            if choice.logprobs
            for entry in choice.logprobs.content
        ]
    else:
        entries = answer.choices[0].logprobs.content
        assert len(entries) == answer.usage.completion_tokens
        spelled = bytes(byte for entry in entries for byte in entry.bytes or []).decode("utf-8", errors="replace")
        assert spelled == answer.choices[0].message.content
    assert len(entries) > 5
    for entry in entries:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token, "greedy takes the likeliest"
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-5)


def test_the_last_tokens_that_fit_the_context_are_used_and_no_more(client):
    answer = ask(client, "长" * 250, max_tokens=None, temperature=0, n=1)
    assert answer.usage.total_tokens <= 1024
    with pytest.raises(openai.BadRequestError, match="no room to answer in a context of 1024") as caught:
        ask(client, "长" * 400)
    assert caught.value.code == "context_length_exceeded"


def test_tokens_that_steer_are_only_text(client):
    """They are as many tokens as their bytes: none of them is one token."""
    tricky = ask(client, "<|im_end|>" * 9, max_tokens=1).usage.prompt_tokens
    assert tricky == ask(client, "<|xx_xxx|>" * 9, max_tokens=1).usage.prompt_tokens


def test_parts_system_and_history_are_taken(client):
    messages = [
        {"role": "developer", "content": "简短回答。"},
        {"role": "user", "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]},
        {"role": "assistant", "content": "你好！"},
        {"role": "user", "content": "再见"},
    ]
    assert ask(client, messages=messages).choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the last message must be the user's"),
        ({"messages": [{"role": "user", "content": " "}]}, "the user's message is empty"),
        ({"messages": [*ASK, {"role": "system", "content": "x"}, *ASK]}, "system message can only be the first"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type: ",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text: Field required"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n: "),
        ({"n": 9}, "n: at most 8 here"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a"] * 5}, "stop: List should have at most 4 items"),
        ({"stop": ["a", "a" * 65]}, "stop.1: String should have at most 64 characters"),
        ({"stop": "a" * 65}, "stop: String should have at most 64 characters"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"top_k": 40}, "top_k"),
        ({"tools": ["f"]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{}], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "f"}}, "function_call"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"store": True}, "store"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream"),
        ({"metadata": {"str": 5}}, "metadata.str: Input should be a valid string"),
        ({"metadata": dict.fromkeys(map(str, range(2000)), "x")}, "metadata: has 2000 entries"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, *ASK]}, "tool_calls"),
        ({"messages": [{"role": "assistant", "content": "x", "refusal": "no"}, *ASK]}, "refusal"),
        ({"messages": [{"role": "user", "content": [0] * 100_000}]}, "messages.0.content"),
        ({"frobnicate": 1}, "frobnicate"),
        ({"enable_thinking": False}, "enable_thinking"),
        ({str(number): 1 for number in range(50_000)}, "0: Extra inputs are not permitted"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_wrong_requests_are_named(server, change, message):
    body = {"model": "tiny", "messages": ASK, **change}
    answer = httpx.post(
        f"{server.address}/v1/chat/completions",
        content=json.dumps(body),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"] and error["type"] == "invalid_request_error"


def test_a_body_that_is_not_json_is_called_so(server):
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.address}/v1/chat/completions", content='{"model": "tiny" 5}', headers=headers)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] is None
    assert error["message"] == "the body is not JSON: Expecting ',' delimiter at character 17"


def test_health_may_be_asked_for_without_its_body(server):
    answer = httpx.head(f"{server.address}/health")
    assert answer.status_code == 200 and not answer.content


OPTIONAL = """
temperature top_p n stream stream_options stop max_tokens max_completion_tokens logprobs top_logprobs seed user audio
presence_penalty frequency_penalty response_format metadata store tools tool_choice logit_bias functions function_call
parallel_tool_calls modalities prediction reasoning_effort service_tier verbosity web_search_options"""


@pytest.mark.parametrize(
    "nothing",
    [
        {**dict.fromkeys(OPTIONAL.split()), "max_tokens": 1},
        {"tools": [], "tool_choice": "none", "functions": [], "function_call": "none", "parallel_tool_calls": True},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": "auto"},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "functions": [{"name": "f"}]},
        {"stop": "", "logit_bias": {}, "metadata": {}, "user": "", "response_format": {}, "stream_options": {}},
        {"stop": [""], "logit_bias": {"5": 0, "6": 0.0}, "presence_penalty": 0.0, "frequency_penalty": -0.0, "n": 1},
        {"tool_choice": "auto", "modalities": ["text"], "service_tier": "auto", "store": False, "stop": []},
        {"response_format": {"type": "text"}, "stream_options": {"include_usage": None}, "logprobs": False},
        {"stream_options": {"include_usage": False}, "top_logprobs": 0, "web_search_options": None, "audio": None},
        {"best_of": 1, "repetition_penalty": 1.0, "length_penalty": 1, "min_p": 0.0, "top_k": -1, "echo": False},
        {"stop": [None, ""], "metadata": {"a": None}, "top_k": 0},
        {"safety_identifier": "x", "prompt_cache_key": "x", "user": "x", "metadata": {"a": "b"}},
        {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "你好", "name": None}]},
    ],
)
def test_what_asks_for_nothing_changes_nothing(client, server, nothing):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 1, **nothing}
    answer = httpx.post(f"{server.address}/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    plain = ask(client, "你好", max_tokens=1)
    assert answer.json()["usage"] == plain.usage.model_dump(exclude_none=True)


@pytest.mark.parametrize("as_clients_have_it", [True, False])
def test_its_own_message_can_be_given_back(client, server, as_clients_have_it):
    first = ask(client, max_tokens=3, temperature=0)
    message = first.choices[0].message
    given = message.model_dump() if as_clients_have_it else {"role": "assistant", "content": "", "refusal": None}
    again = client.chat.completions.create(model="tiny", messages=[*ASK, given, *ASK], max_tokens=3)
    assert again.choices[0].finish_reason in ("stop", "length")
    assert again.usage.prompt_tokens > first.usage.prompt_tokens


def test_many_at_once_get_what_they_get_alone(client):
    questions = [f"问题{number}" for number in range(8)]
    alone = [ask(client, question, temperature=0).choices[0].message.content for question in questions]
    answers = {}

    def one(question):
        answers[question] = ask(client, question, temperature=0).choices[0].message.content

    threads = [threading.Thread(target=one, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[question] for question in questions] == alone and len(set(alone)) > 1


def test_a_crisis_is_answered_by_the_fixed_text(client, server):
    completion = ask(client, "我想自杀", n=2, max_tokens=1)
    expected = Gate().reply(["我想自杀"]).text
    assert [choice.message.content for choice in completion.choices] == [expected] * 2
    assert completion.crisis == {"risk": "active_ideation"} and "12356" in expected
    chunks = list(ask(client, "我想自杀", stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"
    events = server.crisis_log.read_text().splitlines()
    assert json.loads(events[-1])["risk"] == "active_ideation" and "自杀" not in "".join(events) + server.log
    follow_up = [
        {"role": "user", "content": "我想自杀"},
        {"role": "assistant", "content": expected},
        {"role": "user", "content": "谢谢你听我说"},
    ]
    assert getattr(ask(client, messages=follow_up), "crisis", None) is None, "the conversation goes on"


def test_the_gate_can_be_off(another_server):
    running = another_server("--no-crisis-gate", "--plain", "--name", "mine")
    assert "crisis gate OFF" in running.log
    with openai.OpenAI(base_url=f"{running.address}/v1", api_key="none") as client:
        completion = ask(client, "我想自杀", model="mine", max_tokens=4)
        assert getattr(completion, "crisis", None) is None
        assert completion.usage.prompt_tokens < 40, "nothing was added to the message"
    assert running.stop() == 0


@pytest.mark.slow
def test_what_a_conversation_begins_with_is_compiled_before_serving(another_server):
    running = another_server("--plain", "--set", "warm=true", JAX_LOG_COMPILES="1")
    programs = re.compile(r"Finished XLA compilation of jit\(_(?:read|grown|enter|advance)\)")
    compiled = len(programs.findall(running.log))
    assert compiled >= 4 and "compiling for conversations" in running.log
    with openai.OpenAI(base_url=f"{running.address}/v1", api_key="none") as client:
        for words in ("你好", "怎样准备考试？" * 3):
            with ask(client, words, max_tokens=None, stream=True) as stream:
                assert any(chunk.choices[0].delta.content for chunk in stream)
    assert running.stop() == 0
    assert len(programs.findall(running.log)) == compiled


def test_a_client_that_leaves_frees_its_place(server):
    body = {"model": "tiny", "messages": ASK, "max_tokens": 400, "n": 8, "stream": True, "temperature": 1}
    for _ in range(4):
        with httpx.stream("POST", f"{server.address}/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines())
    body = {"model": "tiny", "messages": ASK, "max_tokens": 1}
    answer = httpx.post(f"{server.address}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, "32 responses of 400 tokens would have filled the server"


def test_turns_that_the_chat_template_refuses():
    def refuses(_):
        raise UserError("the tokenizer's chat template is broken: no system turn; use Qwen2.5's")

    app = create_app(SimpleNamespace(name="tiny", gate=None, answer=refuses), ServeConfig("tiny"))
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        response = client.post("/v1/chat/completions", json={"model": "tiny", "messages": ASK})
    assert response.status_code == 400
    assert "no system turn" in response.json()["error"]["message"]
