"""From bare turns to tokens: the system prompt, the instruction, the chat template and the loss mask; and back.

Text that spells a control token (`<|im_end|>` in a question on chat templates) stays text: the control ids of what is
tokenized here are those that the template wrote. Training, packing, evaluation, chat and serving all come here for it.
"""

import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from psyche_jax.config import PromptSection
from psyche_jax.data.records import Message
from psyche_jax.errors import UserError, first_reason
from psyche_jax.rewards.reference import CLOSE, OPEN

# Qwen2.5 calls `<|fim_prefix|>` no special token, R1-Distill not even `<｜User｜>`, which its template writes.
_BARRED = re.compile(r"<[|｜].*[|｜]>")
_TAG = re.compile(r"[<\[].+[>\]]")  # nor `<tool_call>`, which its template writes around a call
_SWITCH = "enable_thinking"  # what Qwen3's template calls it
_ENCODING = threading.Lock()  # whether special tokens are split is a state of the tokenizer, which threads share


def chosen_prompt(
    given: PromptSection | None, trained: PromptSection | None, thinking: bool | None = None
) -> PromptSection:
    """How a model is asked: as `given`, else as it was `trained`, else by the defaults.

    Its template's switch is `thinking`, else what `given` says of it, else what `trained` does.
    """
    prompt = given or trained or PromptSection()
    switches = (thinking, prompt.thinking, None if trained is None else trained.thinking)
    return replace(prompt, thinking=next((switch for switch in switches if switch is not None), None))


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
    """Token ids of a conversation up to where the assistant begins to speak.

    Raises:
      UserError: the chat template is missing or broken, or refuses these turns.
    """
    messages, mark = _marked(tokenizer, render_prompt(turns, prompt))
    return _encode(tokenizer, _template(tokenizer, messages, True, prompt.thinking), mark)


def opened_text(tokenizer: Any, thinking: bool | None = None) -> str:
    """What the template's generation prompt has already written of the response: '' or an opened thought.

    QwQ's and R1-Distill's templates end in `<think>` and a newline, Qwen3's without thinking also close it. What reads
    a response (rewards, evaluation, chat, serving) reads this text before it. Tags that are written before the last
    control token are of another turn. `thinking` is that of the `PromptSection`.

    Raises:
      UserError: the chat template is missing or broken, or has no switch for `thinking`.
    """
    turns = [{"role": "user", "content": "-"}]
    prompt = _template(tokenizer, turns, True, thinking).removeprefix(_template(tokenizer, turns, False, thinking))
    _, tag, rest = _spellings(tokenizer).control.split(prompt)[-1].partition(OPEN)
    return tag + rest


def end_of_turn_id(tokenizer: Any) -> int:
    """The id of the control token that the template writes right after what the assistant says: SFT teaches it.

    Raises:
      UserError: the template writes none there.
    """
    return int(tokenizer.convert_tokens_to_ids(_end_of_turn(tokenizer)))


def decoded_text(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> str:
    """The text of token ids, as all that read responses see it: every token's own, the special ones' too.

    A tokenizer may call `<think>` special; left out of the text, a thought would look like an answer. The caller leaves
    out the stop token, and puts `opened_text` before a response.
    """
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@dataclass(frozen=True)
class TokenizedExample:
    """`tokens` int32 [length]; `loss_mask` bool [length], True on tokens that the model is to learn to say."""

    tokens: np.ndarray
    loss_mask: np.ndarray


def tokenize_example(tokenizer: Any, turns: Sequence[Message], prompt: PromptSection) -> TokenizedExample:
    """Tokenize a conversation with a loss mask on every assistant turn: its content and its end-of-turn token.

    The template is cut where the assistant begins and ends, and the pieces are tokenized apart, so that what is
    trained is what generation meets: the prompt's tokens never merge with the response's. A thought that the prompt has
    opened belongs to it, and the learned part continues from there. Where the template rewrites earlier turns (QwQ's,
    R1-Distill's and Qwen3's drop their thoughts), these are only history: what follows the last rewriting is learned.
    An empty thought that the template writes before what is said (Qwen3's) is learned by nobody.

    Raises:
      UserError: the template would write something else than what the assistant says (it trims, say); the last turn
        does not continue the thought that is opened; the mask comes out all ones or all zeros.
    """
    messages, mark = _marked(tokenizer, render_prompt(turns, prompt))
    opened, end = _frame(tokenizer, str(tokenizer.chat_template), prompt.thinking)
    spoken = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    tokens: list[int] = []
    mask: list[bool] = []
    done = ""
    for index in spoken:
        content = messages[index]["content"]
        before = _template(tokenizer, messages[:index], True, prompt.thinking)
        closed = _template(tokenizer, messages[: index + 1], False, prompt.thinking)
        _check_written(content, closed, before.removesuffix(opened), end)
        said = _continued(content, opened)
        if said is None:
            if index == spoken[-1]:
                raise UserError(f"the last turn does not continue {opened!r}, which the chat template puts first")
            continue
        if not before.startswith(done):
            tokens, mask, done = [], [], ""
        for text, learned in ((before.removeprefix(done), False), (said + end, True)):
            piece = _encode(tokenizer, text, mark)
            tokens += piece
            mask += [learned] * len(piece)
        done = before + said + end
    if all(mask) or not any(mask):
        raise UserError(f"the loss mask of a conversation is all {'ones' if any(mask) else 'zeros'}")
    return TokenizedExample(np.asarray(tokens, np.int32), np.asarray(mask, bool))


def _check_written(content: str, closed: str, head: str, end: str) -> None:
    """Raise UserError unless the template writes `content`, `end` after `head`; a thought may be dropped or spaced, and
    an empty one added."""
    written, ended, _ = closed.removeprefix(head).partition(end)
    if closed.startswith(head) and ended:
        if written == content:
            return
        (thought, thinks, answer), (kept, shows, shown) = content.rpartition(CLOSE), written.rpartition(CLOSE)
        same_thought = kept.removeprefix(OPEN).strip() in ("", thought.removeprefix(OPEN).strip())
        if (thinks or shows) and not content[:1].isspace() and same_thought and shown.lstrip() == answer.lstrip():
            return
    raise UserError("the chat template changes the text (for example, trims white space)")


def _continued(content: str, opened: str) -> str | None:
    """What is left to say of `content` after `opened`; None if it does not begin so."""
    if not opened or content.startswith(opened):
        return content.removeprefix(opened)
    if CLOSE in opened:  # the thought is over: an answer is due
        return None if CLOSE in content else content
    return content.removeprefix(OPEN) if CLOSE in content else None


@lru_cache(maxsize=4)
def _frame(tokenizer: Any, template: str, thinking: bool | None) -> tuple[str, str]:
    """`opened_text` and the end-of-turn token of a tokenizer with that chat template."""
    return opened_text(tokenizer, thinking), _end_of_turn(tokenizer)


def _end_of_turn(tokenizer: Any) -> str:
    said = "psyche"
    turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": said}]
    after = _template(tokenizer, turns, False, None).rpartition(said)[2]
    found = _spellings(tokenizer).control.match(after)
    if found is None:
        raise UserError("the chat template writes no special token right after the assistant's text; use Qwen2.5's")
    return found[0]


@dataclass(frozen=True)
class _Spellings:
    """What a tokenizer's added tokens look like in text, as patterns.

    `control`: tokens that steer; `token`: these and the tags of a thought, which are text even where they are special;
    `unsplit`: tokens that steer and are not special, so that a tokenizer cannot be told to read them as text; `start`:
    a character at which a control token might begin.
    """

    control: re.Pattern[str]
    token: re.Pattern[str]
    unsplit: re.Pattern[str]
    start: re.Pattern[str]


def _spellings(tokenizer: Any) -> _Spellings:
    added = tuple((token.content, token.special) for token in tokenizer.added_tokens_decoder.values())
    return _compiled(added, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _compiled(added: tuple[tuple[str, bool], ...], template: str) -> _Spellings:
    tags = [content for content, _ in added if content in (OPEN, CLOSE)]

    def steers(content: str) -> bool:
        return bool(_BARRED.fullmatch(content) or (_TAG.fullmatch(content) and content in template))

    control = {c: special for c, special in added if c not in tags and (special or steers(c))}
    texts = {OPEN, CLOSE, *(content for content, _ in added if content not in control)}
    starts = {content[0] for content in control}
    return _Spellings(
        _any_of(control),
        re.compile(f"({_any_of([*control, *tags]).pattern})"),
        _any_of(content for content, special in control.items() if not special),
        re.compile(f"(?!{_any_of(texts).pattern})(?:{_any_of(starts).pattern})"),
    )


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of `texts`, and nothing if there is none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _marked(tokenizer: Any, messages: Sequence[dict[str, str]]) -> tuple[list[dict[str, str]], str]:
    """Messages in which no text spells a control token, alone or together with another, and the mark that sees to it.

    The mark follows each character that may begin such a token. It is a character that is in none of the texts,
    and `_encode` takes it out again. White space and the tags of a thought, which templates look for, stay as they are.
    """
    known = "".join([str(tokenizer.chat_template), *(message["content"] for message in messages)])
    mark = next(chr(code) for code in range(0xF0000, 0x110000) if chr(code) not in known)  # for private use
    start = _spellings(tokenizer).start
    return [{**m, "content": start.sub(rf"\g<0>{mark}", m["content"])} for m in messages], mark


def _template(tokenizer: Any, messages: Sequence[dict[str, str]], opening: bool, thinking: bool | None) -> str:
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; put Qwen2.5's chat_template.jinja into its folder")
    if thinking is not None and _SWITCH not in tokenizer.chat_template:
        raise UserError(f"prompt.thinking is {thinking}, but the chat template has no {_SWITCH}; leave the setting out")
    switch = {} if thinking is None else {_SWITCH: thinking}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening, **switch)
    except Exception as error:  # whatever a program can raise
        raise UserError(f"the tokenizer's chat template is broken: {first_reason(error)}; use Qwen2.5's") from None


def _encode(tokenizer: Any, rendered: str, mark: str) -> list[int]:
    """Token ids of rendered text. Control tokens are those that hold no mark; what only spells one is read as text."""
    with _ENCODING:
        if mark not in rendered:
            return tokenizer.encode(rendered, add_special_tokens=False)
        spellings = _spellings(tokenizer)
        ids: list[int] = []
        for place, piece in enumerate(spellings.token.split(rendered)):  # text and tokens by turns
            if place % 2:
                ids.append(tokenizer.convert_tokens_to_ids(piece))
                continue
            text = spellings.unsplit.sub(lambda found: found[0][0] + mark + found[0][1:], piece.replace(mark, ""))
            for part in text.split(mark):
                ids += tokenizer.encode(part, add_special_tokens=False, split_special_tokens=True)
        return ids
