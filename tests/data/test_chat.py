"""Chat rendering and the loss mask, with a tiny tokenizer and with Qwen's own."""

import copy
import itertools
import json
import unicodedata
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_jax.config import PromptSection
from psyche_jax.data.chat import opened_text, prompt_tokens, render_prompt, tokenize_example
from psyche_jax.data.dataset import load_records
from psyche_jax.data.records import Dialogue, Message, Question, SftExample, question_to_sft
from psyche_jax.demo import chat_template
from psyche_jax.errors import UserError

PROMPT = PromptSection(system="你是专家。", instruction="先想再答。\n")
TALK = (
    Message("user", "你好"),
    Message("assistant", "<think>他问好</think>\n你好！"),
    Message("user", "1+1=?"),
    Message("assistant", "<think>加法</think>\n答案：B"),
)
ASKED = (Message("system", "你是猫。"), *TALK)
SAMPLES = Path(str(files("psyche_jax.data") / "samples"))


@pytest.fixture(params=["tiny", "qwen"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def learned(tokenizer, example):
    """The text of each unbroken stretch of the loss mask."""
    stretches = itertools.groupby(zip(example.tokens.tolist(), example.loss_mask.tolist(), strict=True), lambda x: x[1])
    return [tokenizer.decode([token for token, _ in stretch]) for on, stretch in stretches if on]


def test_render_prompt_adds_system_and_instruction():
    assert render_prompt(TALK, PROMPT) == [
        {"role": "system", "content": "你是专家。"},
        {"role": "user", "content": "先想再答。\n你好"},
        {"role": "assistant", "content": "<think>他问好</think>\n你好！"},
        {"role": "user", "content": "先想再答。\n1+1=?"},
        {"role": "assistant", "content": "<think>加法</think>\n答案：B"},
    ]


def test_a_system_turn_of_the_record_stays_alone():
    messages = render_prompt(ASKED, PROMPT)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[0]["content"] == "你是猫。"


@pytest.mark.parametrize("opened", ["", "<think>\n", "<think>\n\n</think>\n\n"])
def test_what_the_template_has_opened_of_the_response(tiny, opened):
    tokenizer = copy.deepcopy(tiny)
    start = "<|im_start|>assistant\n"
    tokenizer.chat_template = chat_template().replace(start, f"{{{{ {json.dumps(start + opened)} }}}}")
    assert opened_text(tokenizer) == opened


@pytest.mark.parametrize("opened", ["", "<think>\n"])
def test_tags_in_a_turn_are_not_what_is_opened(tiny, opened):
    """Where the rest of the prompt is otherwise too when the assistant is to speak: a hint, an end of the text."""
    other = copy.deepcopy(tiny)
    other.chat_template = (
        "<|im_start|>user\n{{ messages[0].content }}{% if add_generation_prompt %} 先<think>想</think>。<|im_end|>\n"
        "<|im_start|>assistant\n" + opened + "{{ '' }}{% else %}<|im_end|>{% endif %}"
    )
    assert opened_text(other) == opened


def test_no_system_and_no_instruction():
    messages = render_prompt(TALK, PromptSection(system="", instruction=""))
    assert messages == [{"role": turn.role, "content": turn.content} for turn in TALK]


def test_template_is_chatml_as_qwen_publishes_it(tokenizer):
    """Written out by hand from what Qwen2.5's tokenizer_config.json renders where a system prompt is given."""
    rendered = tokenizer.apply_chat_template(render_prompt(TALK, PROMPT), tokenize=False)
    expected = (
        "<|im_start|>system\n你是专家。<|im_end|>\n"
        "<|im_start|>user\n先想再答。\n你好<|im_end|>\n"
        "<|im_start|>assistant\n<think>他问好</think>\n你好！<|im_end|>\n"
        "<|im_start|>user\n先想再答。\n1+1=?<|im_end|>\n"
        "<|im_start|>assistant\n<think>加法</think>\n答案：B<|im_end|>\n"
    )
    assert rendered == expected
    opened = tokenizer.apply_chat_template(render_prompt(TALK[:3], PROMPT), tokenize=False, add_generation_prompt=True)
    assert opened == expected.removesuffix("<think>加法</think>\n答案：B<|im_end|>\n")
    assert tokenizer.decode(prompt_tokens(tokenizer, TALK[:3], PROMPT)) == opened


def test_qwens_ids(qwen):
    """Ids as published: the specials, and a response whose `<think>` is one token in Qwen3 (several in Qwen2.5)."""
    start, end, assistant = 151644, 151645, 77091
    tokens = prompt_tokens(qwen, [Message("user", "x")], PROMPT)
    assert tokens[0] == start
    assert tokens[-3:] == [start, assistant, 198]
    example = tokenize_example(qwen, TALK, PROMPT)
    ends = [int(token) for token, on in zip(example.tokens, example.loss_mask, strict=True) if on and token >= start]
    assert ends.count(end) == 2
    assert start not in ends


@pytest.mark.parametrize("turns", [TALK, ASKED, TALK[:2]], ids=["two turns", "with system", "one turn"])
def test_mask_covers_what_the_assistant_says(turns, tokenizer):
    example = tokenize_example(tokenizer, turns, PROMPT)
    said = [turn.content + "<|im_end|>" for turn in turns if turn.role == "assistant"]
    assert learned(tokenizer, example) == said
    assert example.tokens.dtype == np.int32
    assert example.loss_mask.dtype == bool
    whole = tokenizer.apply_chat_template(render_prompt(turns, PROMPT), tokenize=False)
    assert tokenizer.decode(example.tokens) == whole.removesuffix("\n")
    assert example.loss_mask[-1]


contents = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: text.strip())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(contents, contents), min_size=1, max_size=3), st.booleans(), st.text(max_size=5))
def test_mask_of_any_text(tiny, pairs, system, instruction):
    turns = [Message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    turns = [Message("system", "规则")] * system + turns
    instruction = instruction.encode("utf-8", "ignore").decode()
    example = tokenize_example(tiny, turns, PromptSection("你", instruction))
    # Both tokenizers normalize to NFC.
    said = [unicodedata.normalize("NFC", answer) + "<|im_end|>" for _, answer in pairs]
    assert learned(tiny, example) == said


def test_samples_of_the_package(tokenizer):
    """Prompts are prefixes of examples: what is trained is what generation meets."""
    dialogues = load_records(Dialogue, SAMPLES / "dialogues.jsonl").good[:8]
    examples = [question_to_sft(question) for question in load_records(Question, SAMPLES / "questions.jsonl").good[:8]]
    examples += [SftExample(dialogue.turns) for dialogue in dialogues]
    # Two single turns make a conversation of two turns.
    examples += [SftExample(one.turns + other.turns) for one, other in itertools.pairwise(dialogues)]
    for example in examples:
        tokenized = tokenize_example(tokenizer, example.messages, PromptSection())
        answers = [turn.content + "<|im_end|>" for turn in example.messages if turn.role == "assistant"]
        assert learned(tokenizer, tokenized) == answers
        starts = np.flatnonzero(np.diff(tokenized.loss_mask.astype(int)) == 1) + 1
        assert len(starts) == len(answers)
        for number, start in enumerate(starts):
            prompt = prompt_tokens(tokenizer, example.messages[: 2 * number + 1], PromptSection())
            assert prompt == tokenized.tokens[:start].tolist()


def test_prompt_and_response_never_merge(tiny):
    """A response that begins with a line end would merge with the template's if the whole were tokenized at once."""
    turns = (Message("user", "x"), Message("assistant", "\n\n  y"))
    example = tokenize_example(tiny, turns, PROMPT)
    prompt = prompt_tokens(tiny, turns[:1], PROMPT)
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert not example.loss_mask[: len(prompt)].any()
    assert example.loss_mask[len(prompt) :].all()


@pytest.fixture
def other(tiny):
    """The tiny tokenizer, whose template a test may change."""
    yield tiny
    tiny.chat_template = chat_template()


def test_no_template(other):
    other.chat_template = None
    for action in (lambda: prompt_tokens(other, TALK[:1], PROMPT), lambda: tokenize_example(other, TALK, PROMPT)):
        with pytest.raises(UserError, match="has no chat template"):
            action()


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ messages[7].content.x.y }}",
        "{{ raise_exception('no system turn') }}",
    ],
)
def test_broken_template(template, other):
    other.chat_template = template
    with pytest.raises(UserError, match="chat template is broken"):
        prompt_tokens(other, TALK[:1], PROMPT)


@pytest.mark.parametrize(
    "template",
    [
        # Answers in capitals.
        chat_template().replace("{{ message.content }}", "{{ message.content | upper }}"),
        # A prefix that depends on the number of turns.
        "{{ messages|length }}" + chat_template(),
    ],
    ids=["rewrites", "prefix"],
)
def test_a_template_that_changes_what_was_said(template, other):
    other.chat_template = template
    with pytest.raises(UserError, match="changes the text"):
        tokenize_example(other, TALK, PROMPT)


def test_all_ones(other):
    """A template that says nothing before the assistant speaks leaves nothing unlearned."""
    other.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="all ones"):
        tokenize_example(other, TALK[:2], PROMPT)


def test_all_zeros(tiny):
    with pytest.raises(UserError, match="all zeros"):
        tokenize_example(tiny, TALK[:1], PROMPT)


def test_questions_are_asked_the_same_everywhere(tiny):
    question = Question("问", {"A": "甲", "B": "乙"}, "B", "single", "因为")
    example = question_to_sft(question)
    text = tiny.decode(prompt_tokens(tiny, example.messages[:1], PROMPT))
    assert text.count("先想再答。\n单项选择题：问\nA. 甲\nB. 乙<|im_end|>") == 1
