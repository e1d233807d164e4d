"""From bare turns to tokens: the system prompt, the instruction, the chat template and the loss mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psyche_jax.config import PromptSection
from psyche_jax.data.records import Message
from psyche_jax.errors import UserError, first_reason


def render_prompt(turns: Sequence[Message], prompt: PromptSection) -> list[dict[str, str]]:
    """The one place where turns get the system prompt (unless they bring one) and the per-turn instruction.

    Training, GRPO, evaluation, chat and serving all call it. The result is what chat templates take.
    """
    messages = []
    if prompt.system and turns[0].role != "system":
        messages.append({"role": "system", "content": prompt.system})
    for turn in turns:
        content = prompt.instruction + turn.content if turn.role == "user" else turn.content
        messages.append({"role": turn.role, "content": content})
    return messages


def prompt_tokens(tokenizer: Any, turns: Sequence[Message], prompt: PromptSection) -> list[int]:
    """Token ids of a conversation up to where the assistant begins to speak."""
    return _encode(tokenizer, _template(tokenizer, render_prompt(turns, prompt), opening=True))


def opened_text(tokenizer: Any) -> str:
    """What the template's generation prompt has already written of the response: '' or an opened thought.

    QwQ's and R1-Distill's templates end in `<think>` and a newline, Qwen3's without thinking also close it. What reads
    a response (rewards, evaluation, chat, serving) reads this text before it.
    """
    turns = [{"role": "user", "content": "-"}]
    prompt = _template(tokenizer, turns, opening=True)
    _, tag, rest = prompt.removeprefix(_template(tokenizer, turns, opening=False)).partition("<think>")
    return tag + rest


def end_of_turn_id(tokenizer: Any) -> int:
    """The token that the chat template writes after what the assistant says: what SFT teaches as the end of a turn.

    Raises:
      UserError: it writes none.
    """
    said = "心"
    turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": said}]
    rest = _template(tokenizer, turns, opening=False).rpartition(said)[2]
    added = tokenizer.added_tokens_decoder
    token = next((token for token in _encode(tokenizer, rest) if token in added), None)
    if token is None:
        raise UserError("the chat template writes no special token after what the assistant says; use Qwen2.5's")
    return token


@dataclass(frozen=True)
class TokenizedExample:
    """`tokens` int32 [length]; `loss_mask` bool [length], True on tokens that the model is to learn to say."""

    tokens: np.ndarray
    loss_mask: np.ndarray


def tokenize_example(tokenizer: Any, turns: Sequence[Message], prompt: PromptSection) -> TokenizedExample:
    """Tokenize a conversation with a loss mask on every assistant turn: its content and its `<|im_end|>`.

    The template is cut where the assistant begins and ends, and the pieces are tokenized apart, so that what is
    trained is what generation meets: the prompt's tokens never merge with the response's.

    Raises:
      UserError: the template rewrites earlier turns, or the mask comes out all ones or all zeros.
    """
    messages = render_prompt(turns, prompt)
    tokens: list[int] = []
    mask: list[bool] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opened = _template(tokenizer, messages[:index], opening=True)
        closed = _template(tokenizer, messages[: index + 1], opening=False)
        end = f"{message['content']}<|im_end|>"
        if not opened.startswith(done) or not closed.startswith(opened + end):
            raise UserError("the chat template changes what was said; it must be ChatML as Qwen2.5's is")
        for text, learned in ((opened.removeprefix(done), False), (end, True)):
            piece = _encode(tokenizer, text)
            tokens += piece
            mask += [learned] * len(piece)
        done = opened + end
    if all(mask) or not any(mask):
        raise UserError(f"the loss mask of a conversation is all {'ones' if any(mask) else 'zeros'}")
    return TokenizedExample(np.asarray(tokens, np.int32), np.asarray(mask, bool))


def _template(tokenizer: Any, messages: list[dict[str, str]], opening: bool) -> str:
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; put Qwen2.5's chat_template.jinja into its folder")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening)
    except Exception as error:  # whatever a program can raise
        raise UserError(f"the tokenizer's chat template is broken: {first_reason(error)}; use Qwen2.5's") from None


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)
