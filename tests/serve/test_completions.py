"""Plain completions: prompts scored as transformers scores them, asked as lm-eval asks; prompts continued; the gate."""

import json
import math
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import transformers
from support.optional_torch import torch

PROMPTS = ["答案：A", "心理学是什么？<think>想一想</think>\n答案：AC", "a"]


def post(server: Any, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.address}/v1/completions", json={"model": "tiny", **body}, timeout=300)


def asked_by_lm_eval(prompts: list[list[int]]) -> dict[str, Any]:
    """What its `local-completions` sends to score token ids."""
    return {"prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}


def test_scores_are_those_of_transformers(server: Any, tiny_model: Any) -> None:
    float32 = torch.float32
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=float32)
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    by_ids = post(server, **asked_by_lm_eval(ids)).json()
    by_text = post(server, prompt=PROMPTS, echo=True, max_tokens=0, logprobs=20).json()
    for place, (own, prompt) in enumerate(zip(ids, PROMPTS, strict=True)):
        with torch.no_grad():
            expected = torch.log_softmax(model(torch.tensor([own])).logits[0], dim=-1).numpy()
        chosen = [expected[at, token] for at, token in enumerate(own[1:])]
        scored, told = by_ids["choices"][place], by_text["choices"][place]
        own_probs = scored["logprobs"]["token_logprobs"]
        assert scored["index"] == place and own_probs[0] is None and len(own_probs) == len(own) + 1
        np.testing.assert_allclose(own_probs[1:-1], chosen, atol=1e-4)
        np.testing.assert_allclose(own_probs[-1], expected[-1].max(), atol=1e-4)  # the token that is generated
        best = [max(top.values()) for top in scored["logprobs"]["top_logprobs"][1:]]
        np.testing.assert_allclose(best, expected.max(axis=1), atol=1e-4)
        greedy = [token == row.argmax() for token, row in zip(own[1:], expected, strict=False)]
        assert [a == b for a, b in zip(own_probs[1:-1], best, strict=False)] == greedy, "compared by == in lm-eval"
        assert told["text"] == prompt and scored["text"].startswith(prompt)
        np.testing.assert_allclose(told["logprobs"]["token_logprobs"][1:], chosen, atol=1e-4)
        assert all(len(top) == 20 for top in told["logprobs"]["top_logprobs"][1:]), "no two are called the same"
        pieces = zip(told["logprobs"]["tokens"], told["logprobs"]["text_offset"], strict=True)
        assert all(prompt[offset:].startswith(piece) for piece, offset in pieces)
    assert by_ids["usage"]["completion_tokens"] == 3 and by_text["usage"]["completion_tokens"] == 0


def test_prompts_are_continued_as_they_stand(server: Any) -> None:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        wanted = {"model": "tiny", "temperature": 0, "max_tokens": 9, "logprobs": 2}
        both = client.completions.create(prompt=PROMPTS[:2], n=2, **wanted)  # type: ignore[call-overload]
        alone = [client.completions.create(prompt=prompt, **wanted) for prompt in PROMPTS[:2]]  # type: ignore[call-overload]
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    texts = [one.choices[0].text for one in alone]
    assert [choice.text for choice in both.choices] == [texts[0], texts[0], texts[1], texts[1]]
    first = both.choices[0].logprobs
    assert "".join(first.tokens) == texts[0] and len(first.top_logprobs[0]) == 2
    # What was said is as likely as scoring finds it.
    scored = post(server, prompt=PROMPTS[0] + texts[0], echo=True, max_tokens=0, logprobs=0).json()["choices"][0]
    if scored["logprobs"]["tokens"][-len(first.tokens) :] == first.tokens:
        found = scored["logprobs"]["token_logprobs"][-len(first.tokens) :]
        np.testing.assert_allclose(found, first.token_logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "prompt 0 is empty"),
        ({"prompt": []}, "prompt: is not a text"),
        ({"prompt": [["a"]]}, "prompt: is not a text"),
        ({"prompt": ["a"] * 129}, "prompt: has 129 prompts, more than 128"),
        ({"prompt": [5, -1]}, "prompt.1: Input should be greater than or equal to 0"),
        ({"prompt": ["a", [5, -1]]}, "prompt.1.1: Input should be greater than or equal to 0"),
        ({"prompt": ["a", [5, 999_999]]}, "prompt 1 holds token 999999; the model has 304"),
        ({"prompt": [5] * 1025, "echo": True, "max_tokens": 0}, "1025 tokens, more than the context of 1024"),
        ({"prompt": [5] * 1024}, "no room left in a context of 1024"),
        ({"prompt": "a" * 99_999}, "too long for 1024 tokens"),
        ({"max_tokens": 0}, "max_tokens of 0 needs echo"),
        ({"echo": True, "max_tokens": 5}, "echo scores a prompt"),
        ({"echo": True, "max_tokens": 1}, "echo scores a prompt"),
        ({"stream": True}, "stream: "),
        ({"suffix": "z"}, "suffix: "),
        ({"model": "other"}, "'tiny'"),
    ],
)
def test_wrong_requests_are_named(server: Any, change: dict[str, Any], message: str) -> None:
    answer = post(server, **{"prompt": "a", **change})
    assert answer.status_code in (400, 404) and message in answer.json()["error"]["message"]


def test_false_asks_for_no_log_probs(server: Any) -> None:
    for asked in ({}, {"echo": True, "max_tokens": 0}):
        wanted = {"prompt": "a", "max_tokens": 1, **asked}
        assert post(server, **wanted, logprobs=False).json()["choices"][0]["logprobs"] is None
        assert post(server, **wanted, logprobs=0).json()["choices"][0]["logprobs"] is not None


def test_the_gate_answers_what_would_be_continued_and_leaves_scores_alone(server: Any) -> None:
    said = "我今晚就要从楼顶跳下去。"
    continued = post(server, prompt=["天气", said], max_tokens=3, temperature=0).json()
    assert "12356" in continued["choices"][1]["text"] and "12356" not in continued["choices"][0]["text"]
    assert continued["crisis"]["risk"] == "plan_or_preparation"
    scored = post(server, prompt=said, echo=True, max_tokens=0, logprobs=1).json()
    assert scored["choices"][0]["text"] == said and "crisis" not in scored


def test_lm_eval_itself(server: Any, tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package as it is, where it is installed: scores, whether greedy, rolling, generation."""
    models = pytest.importorskip("lm_eval.models.openai_completions")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    model = models.LocalCompletionsAPI(
        base_url=f"{server.address}/v1/completions", model="tiny", tokenizer=str(tiny_model), batch_size=2
    )
    pairs = [("单项选择题：", "答案：A"), ("单项选择题：", "答案：B"), ("多项选择题：想一想", "\n答案：AC")]
    found = model.loglikelihood([instance("loglikelihood", {}, pair, 0) for pair in pairs])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for (context, more), (log_prob, greedy) in zip(pairs, found, strict=True):
        ids = tokenizer.encode(context + more)
        begin = len(tokenizer.encode(context))
        with torch.no_grad():
            expected = torch.log_softmax(torch_model(torch.tensor([ids])).logits[0], dim=-1)
        own = [float(expected[at - 1, ids[at]]) for at in range(begin, len(ids))]
        assert math.isclose(log_prob, sum(own), abs_tol=1e-3) and greedy is False
    (rolling,) = model.loglikelihood_rolling([instance("loglikelihood_rolling", {}, ("心理学是什么？",), 0)])
    assert rolling < 0
    asked = {"until": ["\n"], "max_gen_toks": 8}
    said = model.generate_until([instance("generate_until", {}, (pair[0], dict(asked)), 0) for pair in pairs])
    assert said[0] == said[1] and all(isinstance(one, str) for one in said)
    json.dumps(said)
