"""The reply of an LLM, read in every spelling that servers have for it: text, thought, why it ended."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

ANSWERED = ("stop", "length")  # `finish` of an answer, whole or cut at its limit; any other says why there is none
FILTERED = ("content_filter", "refusal")  # of these: what another draw may pass, and the same one never
REFUSED = frozenset({401, 402, 403, 404, 405, *range(300, 400)})  # statuses: so will be all other requests
PASSING = frozenset({408, 409, 425, 429, *range(500, 600)})
_OPEN, _CLOSE = "<think>", "</think>"
_FINISHES = {
    "stop": "eos eos_token eos_token_id end_turn end_of_turn stop_sequence stop_token stop_str stop_string stopped "
    "complete completed finished done",
    "length": "max_tokens max_length max_new_tokens max_output_tokens max_completion_tokens model_length "
    "length_limit token_limit context_length model_context_window_exceeded",
    "content_filter": "safety image_safety sensitive content_filtered prohibited_content blocklist recitation spii "
    "blocked moderation guardrail_intervened",
}
_SPELLINGS = {word: finish for finish, words in _FINISHES.items() for word in (finish, *words.split())}
_THOUGHTS = (  # fields beside `content`; a server that sends several says the same in each
    *("reasoning_content", "reasoning", "thinking", "reasoning_details", "thinking_blocks"),
    *("reasoning_text", "thinking_content", "thoughts", "thought"),
)
_TEXTS = ("text", "thinking", "reasoning", "reasoning_content", "summary", "content", "value", "refusal")  # in a part
_THINKS = re.compile("think|thought|reason")  # the type of a part
_COMPLAINTS = ("message", "msg", "detail", "error_msg", "error", "errors")  # fields that say what is wrong
_MOST_TOKENS = 10**9  # more is no count, but a fault
_LONGEST_LINE = 200  # characters


class NoReplyError(Exception):
    """A request brought no reply of the model. The message says why, in one line without the key.

    Args:
      reason: the message.
      status: the HTTP status with which the server refused.
      wait: seconds that it asked to be left alone.
      came: something came, but no answer of this model, or not whole.
    """

    def __init__(
        self, reason: str, *, status: int | None = None, wait: float | None = None, came: bool = False
    ) -> None:
        super().__init__(reason)
        self.status, self.wait, self.came = status, wait, came

    @property
    def passing(self) -> bool:
        """It may be gone at the next try."""
        return self.status is None or self.status in PASSING

    @property
    def for_all(self) -> bool:
        """The server will refuse all other requests likewise."""
        return self.status in REFUSED


@dataclass(frozen=True)
class Reply:
    """What an LLM says, or a part of it. `finish` is what ended it, see ANSWERED; counts are None if unknown.

    `reasoning` is what the server sent apart from the text, `refusal` what it said in place of an answer; `served_by`
    is the model's name as the server gives it; `stored`: it was paid for before.
    """

    text: str = ""
    reasoning: str = ""
    refusal: str = ""
    finish: str | None = None
    served_by: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    stored: bool = False
    likeliest: tuple[tuple[str, float], ...] = ()  # of the first token, with log-probs, where they were asked for

    @property
    def whole(self) -> str:
        """Thought and text in one, the thought in `<think>…</think>`, however the server sent it."""
        text = self.text
        if _CLOSE in text and _OPEN not in text.partition(_CLOSE)[0]:
            text = _OPEN + text  # the template of the server's model had opened it
        thought = self.reasoning.strip().removeprefix(_OPEN).removesuffix(_CLOSE)
        if thought and text.lstrip().startswith(_OPEN):  # one of its own before the one that was asked for
            return f"{_OPEN}{thought}\n{text.lstrip().removeprefix(_OPEN)}"
        return f"{_OPEN}{thought}{_CLOSE}{text}" if thought else text

    @property
    def fault(self) -> str:
        """Why this is no answer of the model; empty if it is one."""
        if self.finish in ANSWERED:
            return ""
        return f"{self.finish}: {self.refusal}" if self.refusal else str(self.finish)


def read_reply(content: str | bytes, whole: bool = True) -> Reply:
    """The JSON that a server sent: a whole reply, or an event of a stream.

    Raises:
      NoReplyError: it is neither; a server may have put an error in its place.
    """
    try:
        value = json.loads(content)
        no_choice = whole and not value.get("choices") and not value.keys().isdisjoint(_COMPLAINTS)
        if value.get("error") or value.get("object") == "error" or no_choice:
            raise NoReplyError(f"an error came instead of the answer: {complaint(value)}", came=True)
        usage = value["usage"] if isinstance(value.get("usage"), Mapping) else {}
        about = Reply(
            served_by=printable(value.get("model")),
            prompt_tokens=_count(usage.get("prompt_tokens")),
            completion_tokens=_count(usage.get("completion_tokens")),
        )
        own = [choice for choice in value.get("choices") or () if not choice.get("index")]  # one was asked for
        if not whole and not own:  # an event that counts tokens, or one of the server's own
            return about
        message = _message(own[0], whole)
        texts = _texts(message)
        finish = _finish(own[0].get("finish_reason"))
    except (ValueError, RecursionError):
        raise NoReplyError("the answer is not JSON", came=True) from None
    except (KeyError, IndexError, TypeError, AttributeError):
        raise NoReplyError("the answer contains no message", came=True) from None
    if not whole:
        return replace(about, **texts, finish=finish)
    if not texts["text"] and (message.get("tool_calls") or message.get("function_call")):
        finish = "tool_calls"  # which nobody offered
    return joined([replace(about, **texts, finish=finish or "stop", likeliest=_likeliest(own[0]))])


def _likeliest(choice: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """What might have been said first; empty where the server does not tell."""
    try:
        first = choice["logprobs"]["content"][0]
        return tuple((str(one["token"]), float(one["logprob"])) for one in first.get("top_logprobs") or [first])
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        return ()


def joined(parts: Sequence[Reply]) -> Reply:
    """One reply of its parts: of what several of them say the last counts; an end that is no answer's stays."""

    def last(name: str) -> Any:
        said = (getattr(part, name) for part in reversed(parts))
        return next((value for value in said if value not in (None, "")), getattr(Reply, name))

    def text(name: str) -> str:
        """Joined: halves of a surrogate pair may have come apart; one that stays alone is replaced."""
        whole = "".join(getattr(part, name) for part in parts)
        return whole.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    finish = next((part.finish for part in parts if part.finish not in (None, *ANSWERED)), last("finish"))
    refusal = text("refusal")
    return Reply(
        text=text("text"),
        reasoning=text("reasoning"),
        refusal=refusal,
        finish="refusal" if refusal and finish in ANSWERED else finish,
        served_by=last("served_by"),
        prompt_tokens=last("prompt_tokens"),
        completion_tokens=last("completion_tokens"),
        likeliest=next((part.likeliest for part in parts if part.likeliest), ()),
    )


def complaint(value: Any) -> str:
    """What an error says, in whatever form it comes."""
    while isinstance(value, Mapping | list):
        if isinstance(value, Mapping):
            inner = next((value[name] for name in _COMPLAINTS if value.get(name)), None)
        else:
            inner = value[0] if len(value) == 1 and isinstance(value[0], str) else None
        if inner is None:
            break
        value = inner
    try:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return ""


def printable(value: Any, most: int = _LONGEST_LINE) -> str:
    """A name or a remark of a server or an LLM: short, and without what would steer a terminal."""
    text = value[:most] if isinstance(value, str) else ""
    return "".join(character if character.isprintable() else " " for character in text).strip()


def _message(choice: Mapping[str, Any], whole: bool) -> Any:
    """What a choice says. A stream's last event may hold the whole message again, beside an empty delta."""
    names = ("message",) if whole else ("delta", "message")
    found = next((choice[name] for name in names if choice.get(name) is not None), None)
    if found is None and (not whole or isinstance(choice.get("text"), str)):  # as completions without a chat have it
        return {"content": choice.get("text")}
    return found


def _texts(message: Any) -> dict[str, Any]:
    """The texts of a message or a delta. `content` is one, or a list of parts, each of a kind of its own."""
    content = message.get("content")
    texts = {"text": "", "reasoning": "", "refusal": ""}
    for part in content if isinstance(content, list) else [content]:
        texts[_kind(part)] += _flat(part)
    apart = next((said for name in _THOUGHTS if (said := _flat(message.get(name)))), "")
    return {
        "text": texts["text"],
        "reasoning": apart or texts["reasoning"],
        "refusal": _flat(message.get("refusal")) or texts["refusal"],
    }


def _kind(part: Any) -> str:
    if not isinstance(part, Mapping):
        return "text"
    named = str(part.get("type", "")).lower()
    if named == "refusal":
        return "refusal"
    thinks = _THINKS.search(named) or part.get("thought") is True
    return "reasoning" if thinks or not part.keys().isdisjoint({"thinking", "reasoning"}) else "text"


def _flat(value: Any) -> str:
    """The text in a value, which may be one, or a part that holds one, or a list of these."""
    if isinstance(value, list):
        return "".join(map(_flat, value))
    if isinstance(value, Mapping):
        return next((text for name in _TEXTS if (text := _flat(value.get(name)))), "")
    return value if isinstance(value, str) else ""


def _finish(reason: Any) -> str | None:
    """Servers' words for the three usual ends as OpenAI's; any other as it is."""
    if isinstance(reason, Mapping):  # with what ended it
        reason = reason.get("type") or reason.get("reason")
    said = "" if reason is None else str(reason).strip()[:_LONGEST_LINE]
    plain = re.sub(r"[\W_]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", said)).lower().removeprefix("finish_reason_")
    return None if plain in ("", "null", "none") else _SPELLINGS.get(plain, printable(said))


def _count(value: Any) -> int | None:
    whole = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MOST_TOKENS
    return int(value) if whole and value == int(value) else None
