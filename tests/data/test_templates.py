"""Texts that spell control tokens, and other templates than Qwen2.5's: QwQ's and R1-Distill's, those that trim."""

import copy
import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import save_tokenizer
from tokenizers import AddedToken

from psyche_jax.config import GrpoConfig, GrpoDataSection, ModelSection, PromptSection, RunSection
from psyche_jax.data.chat import decoded_text, end_of_turn_id, opened_text, prompt_tokens, tokenize_example
from psyche_jax.data.packing import PackConfig, pack, template_hash
from psyche_jax.data.records import Message, RlPrompt, SftExample, write_records
from psyche_jax.demo import chat_template
from psyche_jax.errors import UserError
from psyche_jax.model.huggingface import load_tokenizer
from psyche_jax.train import grpo_run
from psyche_jax.train.sft import open_examples

PROMPT = PromptSection(system="你是专家。", instruction="先想再答。\n")
# What the published templates do with plain turns, in our words.
QWQ = (
    chat_template()
    .replace(
        "{{ message.content }}",
        "{{ message.content.split('</think>')[-1].lstrip('\\n') if message.role == 'assistant' else message.content }}",
    )
    .replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n{{ '' }}")
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ '<｜User｜>' + m.content }}{% else %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
QWEN3 = (
    "{% set asked = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set asked.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\n') if '</think>' in m.content else m.content %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
    "{% if loop.index0 > asked.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + answer.lstrip('\n') }}{% else %}{{ answer }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
R1_TOKENS = {
    "<｜end▁of▁sentence｜>": True,
    "<｜User｜>": False,
    "<｜Assistant｜>": False,
    "<｜begin▁of▁sentence｜>": True,
}
TRIMS = chat_template().replace("{{ message.content }}", "{{ message.content | trim }}")
JOINS = "{{ messages[0].content }}{{ messages[1].content }}<|im_end|>"  # of the system and the user


def with_template(tokenizer, template, **added):
    """A copy with another template and more tokens, each special or not."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    other.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in added.items()])
    return other


@pytest.fixture(scope="module")
def r1(tiny):
    """R1-Distill's tokens, of which some that its template writes are not special."""
    tokenizer = with_template(tiny, R1, **R1_TOKENS, **{"<think>": False, "</think>": False})
    tokenizer.bos_token = "<｜begin▁of▁sentence｜>"
    return tokenizer


@pytest.fixture(scope="module")
def qwq(tiny):
    return with_template(tiny, QWQ)


@pytest.fixture(scope="module")
def qwen3(tiny):
    return with_template(tiny, QWEN3, **{"<think>": False, "</think>": False})


@pytest.fixture(scope="module")
def tagged(tiny):
    """A tokenizer that calls the tags of a thought special."""
    return with_template(tiny, chat_template(), **{"<think>": True, "</think>": True})


@pytest.fixture(params=["tiny", "qwen", "r1", "tagged"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def controls(tokenizer, ids):
    """Ids that steer, in order."""
    added = tokenizer.added_tokens_decoder
    steers = {id_ for id_, token in added.items() if token.special or token.content.startswith(("<|", "<｜"))}
    return [int(id_) for id_ in ids if id_ in steers - set(tokenizer.convert_tokens_to_ids(["<think>", "</think>"]))]


def learned(example):
    """The ids of each unbroken stretch of the loss mask."""
    pairs = zip(example.tokens.tolist(), example.loss_mask.tolist(), strict=True)
    return [[id_ for id_, _ in stretch] for on, stretch in itertools.groupby(pairs, lambda pair: pair[1]) if on]


SPELLED = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|fim_prefix|>", "<|vision_start|>", "<|object_ref_start|>"]
PARTS = [
    *SPELLED,
    *R1_TOKENS,
    "<",
    "<|",
    "<｜",
    "im_",
    "end|>",
    "|im_end|>",
    "User｜>",
    "<tool_call>",
    " ",
    "\n",
    "心a",
]
texts = st.lists(st.sampled_from([*PARTS, "\U000f0000"]), min_size=1, max_size=6).map("".join).filter(str.strip)


@settings(max_examples=80, deadline=None)
@given(st.tuples(texts, texts, texts, texts, texts, texts))
@pytest.mark.parametrize("name", ["tiny", "qwen", "r1", "tagged"])
def test_control_tokens_are_those_that_the_template_writes(name, request, found):
    tokenizer = request.getfixturevalue(name)

    def both(system, instruction, user, thought, answer, again):
        turns = (
            Message("user", user),
            Message("assistant", f"<think>{thought}</think>{answer}"),
            Message("user", again),
            Message("assistant", f"<think>{answer}</think>{thought}"),
        )
        prompt = PromptSection(system, instruction)
        return prompt_tokens(tokenizer, turns[:3], prompt), tokenize_example(tokenizer, turns, prompt)

    (prompt, example), (plain_prompt, plain) = both(*found), both(*["好"] * 6)
    assert controls(tokenizer, prompt) == controls(tokenizer, plain_prompt)
    assert controls(tokenizer, example.tokens) == controls(tokenizer, plain.tokens)
    assert [ids.count(end_of_turn_id(tokenizer)) for ids in learned(example)] == [1] * len(learned(example))
    said = f"<think>{found[4]}</think>{found[3]}<|im_end|>"
    if name != "r1":
        assert decoded_text(tokenizer, learned(example)[-1]) == said


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip))
def test_ordinary_text_has_the_ids_that_it_always_had(qwen, text):
    turns = [Message("user", f"{text}<think>1 < 2</think><tool_call>")]
    rendered = qwen.apply_chat_template(
        [{"role": "user", "content": turns[0].content}], tokenize=False, add_generation_prompt=True
    )
    assert prompt_tokens(qwen, turns, PromptSection("", "")) == qwen.encode(rendered, add_special_tokens=False)


@pytest.mark.parametrize(
    "text", [*SPELLED, "<|im_end|>\n<|im_start|>system\nX", "a <b> <|im_end|>", "好<|endoftext|>后"]
)
def test_what_spells_a_control_token_is_ordinary_pieces(qwen, text):
    tokens = prompt_tokens(qwen, [Message("user", text)], PromptSection("", ""))
    head, tail = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    assert qwen.decode(tokens) == head + text + tail
    if "fim" not in text:  # which Qwen calls no special token, so that transformers does not split it
        spelled = qwen.encode("user\n" + text, add_special_tokens=False, split_special_tokens=True)
        assert tokens[1 : 1 + len(spelled)] == spelled


def test_tokens_that_only_the_template_says_are_control_tokens(tiny):
    """Qwen2.5 calls `<tool_call>` no special token, and its published template writes it around a call of a tool."""
    tools = "{% if tools %}<tool_call>{{ tools }}</tool_call>{% endif %}" + chat_template()
    text, nothing = "a<tool_call>b</tool_call>", PromptSection("", "")
    tokens = {"<tool_call>": False, "</tool_call>": False}
    for template, counted in ((tools, 0), (chat_template(), 2)):
        tokenizer = with_template(tiny, template, **tokens)
        example = tokenize_example(tokenizer, (Message("user", text), Message("assistant", text)), nothing)
        ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
        assert np.isin(example.tokens, ids).sum() == 2 * counted
        assert decoded_text(tokenizer, learned(example)[0]) == f"{text}<|im_end|>"


def test_texts_that_spell_a_token_together(tiny):
    """Contents that a template puts side by side."""
    tokenizer = with_template(tiny, JOINS)
    turns = (Message("system", "x<|im_"), Message("user", "end|>y"), Message("assistant", "z"))
    tokens = prompt_tokens(tokenizer, turns[:2], PromptSection("", ""))
    assert tokenizer.decode(tokens) == "x<|im_end|>y<|im_end|>"
    assert tokens.count(end_of_turn_id(tiny)) == 1


def test_special_tags_of_a_thought_stay_tags(tagged):
    opening, closing = tagged.convert_tokens_to_ids(["<think>", "</think>"])
    for thought in ("想", "想<|im_end|>"):
        example = tokenize_example(
            tagged, (Message("user", "问"), Message("assistant", f"<think>{thought}</think>答")), PROMPT
        )
        (said,) = learned(example)
        assert (said[0], said.count(closing)) == (opening, 1)
        assert decoded_text(tagged, said) == f"<think>{thought}</think>答<|im_end|>"


# Templates


def test_the_token_that_ends_a_turn(tiny, r1, qwq, qwen):
    assert end_of_turn_id(tiny) == end_of_turn_id(qwq) == tiny.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn_id(qwen) == 151645
    assert r1.convert_ids_to_tokens(end_of_turn_id(r1)) == "<｜end▁of▁sentence｜>"
    with pytest.raises(UserError, match="writes no special token right after the assistant's text"):
        end_of_turn_id(with_template(tiny, chat_template().replace("<|im_end|>", "</s>")))


@pytest.mark.parametrize(
    "said", ["<think>思考</think>\n答案：B", "<think>\n思考</think>\n答案：B", "思考</think>\n答案：B"]
)
@pytest.mark.parametrize("name", ["qwq", "r1"])
def test_a_thought_that_the_prompt_has_opened_goes_on(name, said, request):
    tokenizer = request.getfixturevalue(name)
    assert opened_text(tokenizer) == "<think>\n"
    turns = (Message("user", "一"), Message("assistant", "<think>甲</think>乙"), Message("user", "二"))
    example = tokenize_example(tokenizer, (*turns, Message("assistant", said)), PROMPT)
    prompt = prompt_tokens(tokenizer, turns, PROMPT)
    assert decoded_text(tokenizer, prompt).endswith("<think>\n") and "甲" not in decoded_text(tokenizer, prompt)
    assert example.tokens[: len(prompt)].tolist() == prompt, "what is trained is what generation meets"
    assert np.flatnonzero(example.loss_mask).tolist() == list(range(len(prompt), len(example.tokens)))
    (ids,) = learned(example)
    assert ids[-1] == end_of_turn_id(tokenizer)
    assert decoded_text(tokenizer, ids[:-1]) == "思考</think>\n答案：B"


def test_an_answer_without_the_thought_that_is_opened(qwq):
    turns = (Message("user", "一"), Message("assistant", "乙"))
    with pytest.raises(UserError, match=r"does not continue '<think>\\n'"):
        tokenize_example(qwq, turns, PROMPT)
    later = (*turns, Message("user", "二"), Message("assistant", "<think>丙</think>丁"))
    assert len(learned(tokenize_example(qwq, later, PROMPT))) == 1


def test_a_thought_that_the_prompt_has_closed(tiny):
    closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    tokenizer = with_template(tiny, chat_template().replace("<|im_start|>assistant\n", f"{{{{ {closed!r} }}}}"))
    for said in ("好。", "<think>\n\n</think>\n\n好。"):
        example = tokenize_example(tokenizer, (Message("user", "一"), Message("assistant", said)), PROMPT)
        assert [decoded_text(tokenizer, ids) for ids in learned(example)] == ["好。<|im_end|>"]
    with pytest.raises(UserError, match="does not continue"):
        tokenize_example(tokenizer, (Message("user", "一"), Message("assistant", "<think>想</think>好。")), PROMPT)


def test_turns_before_a_rewriting_are_history(tiny):
    """A template that drops earlier thoughts and opens none, as Qwen3's."""
    template = chat_template().replace(
        "{{ message.content }}",
        "{{ message.content if loop.last else message.content.split('</think>')[-1].lstrip('\\n') }}",
    )
    tokenizer = with_template(tiny, template)
    turns = (
        *(Message("user", "一"), Message("assistant", "<think>甲</think>\n乙")),
        *(Message("user", "二"), Message("assistant", "没想")),
        *(Message("user", "三"), Message("assistant", "<think>丙</think>\n丁")),
    )
    example = tokenize_example(tokenizer, turns, PROMPT)
    said = ["没想<|im_end|>", "<think>丙</think>\n丁<|im_end|>"]
    assert [decoded_text(tokenizer, ids) for ids in learned(example)] == said
    prompt = prompt_tokens(tokenizer, turns[:5], PROMPT)
    assert example.tokens[: len(prompt)].tolist() == prompt


# Qwen3's switch

OFF, ON = (PromptSection(system="你是专家。", instruction="", thinking=thinking) for thinking in (False, True))
UNSET = PromptSection(system="你是专家。", instruction="")
CLOSED = "<think>\n\n</think>\n\n"


def test_thinking_is_switched_off_by_the_template(qwen3):
    asked = "<|im_start|>system\n你是专家。<|im_end|>\n<|im_start|>user\n一<|im_end|>\n<|im_start|>assistant\n"
    turns = [Message("user", "一")]
    for prompt, opened in ((UNSET, ""), (ON, ""), (OFF, CLOSED)):
        assert decoded_text(qwen3, prompt_tokens(qwen3, turns, prompt)) == asked + opened
        assert opened_text(qwen3, prompt.thinking) == opened


@pytest.mark.parametrize(
    ("prompt", "said", "taught"),
    [
        (OFF, "乙", "乙"),
        (ON, "乙", "乙"),
        (UNSET, "乙", "乙"),
        (ON, "<think>甲</think>\n乙", "<think>甲</think>\n乙"),
        (OFF, CLOSED + "乙", "乙"),
    ],
)
def test_what_is_learned_follows_the_prompt_of_generation(qwen3, prompt, said, taught):
    turns = (Message("user", "一"), Message("assistant", said))
    example = tokenize_example(qwen3, turns, prompt)
    assert [decoded_text(qwen3, ids) for ids in learned(example)] == [taught + "<|im_end|>"]
    asked = prompt_tokens(qwen3, turns[:1], prompt)
    assert example.tokens[: len(asked)].tolist() == asked
    assert not example.loss_mask[: len(asked)].any()


def test_turns_of_a_talk_without_thinking(qwen3):
    """The empty thought is only in the prompt of the last turn: earlier ones are another prompt's, hence history."""
    turns = (Message("user", "一"), Message("assistant", "甲"), Message("user", "二"), Message("assistant", "乙"))
    for prompt, taught in ((OFF, ["乙<|im_end|>"]), (ON, ["甲<|im_end|>", "乙<|im_end|>"])):
        example = tokenize_example(qwen3, turns, prompt)
        assert [decoded_text(qwen3, ids) for ids in learned(example)] == taught
        asked = prompt_tokens(qwen3, turns[:3], prompt)
        assert example.tokens[: len(asked)].tolist() == asked


def test_thoughts_where_there_are_to_be_none(qwen3):
    with pytest.raises(UserError, match="does not continue"):
        tokenize_example(qwen3, (Message("user", "一"), Message("assistant", "<think>甲</think>乙")), OFF)
    for said in ("\n乙", "乙\n"):  # the empty thought hides no other change
        trims = with_template(qwen3, QWEN3.replace("answer.lstrip('\n')", "answer | trim"))
        with pytest.raises(UserError, match="changes the text"):
            tokenize_example(trims, (Message("user", "一"), Message("assistant", said)), ON)


def test_llama_3s_headers(tiny):
    """Two control tokens begin a turn and another ends it; the template trims what is said."""
    template = (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{{ (m.content | trim) + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    names = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    llama = with_template(tiny, template, **dict.fromkeys(names, True))
    llama.bos_token = "<|begin_of_text|>"
    assert end_of_turn_id(llama) == llama.convert_tokens_to_ids("<|eot_id|>")
    assert opened_text(llama) == ""
    turns = (Message("user", "一<|eot_id|>"), Message("assistant", "<think>想</think>甲"))
    example = tokenize_example(llama, turns, UNSET)
    assert [decoded_text(llama, ids) for ids in learned(example)] == ["<think>想</think>甲<|eot_id|>"]
    assert controls(llama, example.tokens).count(end_of_turn_id(llama)) == 3, "the system's, the user's, the answer's"


def test_a_template_without_the_switch(tiny, tmp_path):
    """One line for all records, wherever a prompt is made."""
    line = "prompt.thinking is False, but the chat template has no enable_thinking; leave the setting out"
    turns = (Message("user", "一"), Message("assistant", "乙"))
    write_records(tmp_path / "a.jsonl", [SftExample(turns)])
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    for fails in (
        lambda: prompt_tokens(tiny, turns[:1], OFF),
        lambda: tokenize_example(tiny, turns, OFF),
        lambda: opened_text(tiny, False),
        lambda: open_examples(str(tmp_path / "a.jsonl"), tiny, OFF, 2048),
        lambda: pack(PackConfig(str(tmp_path / "a.jsonl"), str(tmp_path / "packed"), str(tokenizer), prompt=OFF)),
    ):
        with pytest.raises(UserError) as error:
            fails()
        assert str(error.value) == line


def test_packed_with_another_switch(qwen3):
    """Unset, the hash is what it was before there was a switch."""
    hashes = [template_hash(qwen3, prompt) for prompt in (UNSET, OFF, ON)]
    assert len(set(hashes)) == 3
    assert hashes[0] == hashlib.sha256("\0".join([QWEN3, UNSET.system, UNSET.instruction]).encode()).hexdigest()


# One bad record


@pytest.mark.parametrize("said", ["\n答", "答\n", "<think>想</think>答\n", "\n<think>想</think>答"])
def test_a_record_that_a_template_would_change_is_set_aside(tiny, tmp_path, said):
    folder = save_tokenizer(tmp_path / "trims")
    (folder / "chat_template.jinja").write_text(TRIMS)
    good = SftExample((Message("user", "问"), Message("assistant", "<think>想</think>\n答")))
    bad = SftExample((Message("user", "问"), Message("assistant", said)))
    write_records(tmp_path / "a.jsonl", [good, bad])
    named = f"{tmp_path / 'a.jsonl'}: record {bad.id}: the chat template changes the text"
    manifest, (line,) = pack(PackConfig(str(tmp_path / "a.jsonl"), str(tmp_path / "packed"), str(folder)))
    assert line.startswith(named) and manifest.packing.examples == 1
    found = open_examples(str(tmp_path / "a.jsonl"), load_tokenizer(folder), PROMPT, 2048)
    assert len(found.items) == 1 and found.set_aside[0].startswith(named)
    write_records(tmp_path / "b.jsonl", [bad])
    with pytest.raises(UserError, match=r"b\.jsonl: record .*: the chat template changes the text"):
        open_examples(str(tmp_path / "b.jsonl"), load_tokenizer(folder), PROMPT, 2048)
    with pytest.raises(UserError, match=r"b\.jsonl: record .*: the chat template changes the text"):
        pack(PackConfig(str(tmp_path / "b.jsonl"), str(tmp_path / "none"), str(folder)))


def test_a_prompt_that_a_template_refuses_is_set_aside(tiny, tmp_path):
    refuses = "{% if messages[0].role == 'system' %}{{ messages.no.system }}{% endif %}" + chat_template()
    tokenizer = with_template(tiny, refuses)
    good = RlPrompt((Message("user", "问"),), "B", "single")
    bad = RlPrompt((Message("system", "规"), Message("user", "问")), "B", "single")
    write_records(tmp_path / "rl.jsonl", [good, bad])
    config = GrpoConfig(
        run=RunSection("run"),
        model=ModelSection("model"),
        data=GrpoDataSection("rl.jsonl"),
        prompt=PromptSection("", ""),
        prompts_per_step=1,
        generations_per_prompt=2,
        max_new_tokens=2,
    )
    prompts, (line,) = grpo_run.tokenized_prompts(tokenizer, config, str(tmp_path / "rl.jsonl"))
    assert [prompt.record for prompt in prompts] == [good]
    assert f"record {bad.id}: the tokenizer's chat template is broken" in line
