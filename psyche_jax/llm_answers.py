"""What servers of LLMs say, in every spelling that they have for it: text, thought, why it ended, objects in text."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

ANSWERED = ("stop", "length")  # `finish` of an answer, whole or cut at its limit; any other says why there is none
FILTERED = ("content_filter", "refusal")  # of these: what another draw may pass, and the same one never
_OPEN, _CLOSE = "<think>", "</think>"
_FINISHES = {
    "stop": (
        *("eos", "eos_token", "eos_token_id", "end_turn", "end_of_turn", "stop_sequence", "stop_token", "stop_str"),
        *("stop_string", "stopped", "complete", "completed", "finished", "done"),
    ),
    "length": (
        *("max_tokens", "max_length", "max_new_tokens", "max_output_tokens", "max_completion_tokens", "model_length"),
        *("length_limit", "token_limit", "context_length", "model_context_window_exceeded"),
    ),
    "content_filter": (
        *("safety", "image_safety", "sensitive", "content_filtered", "prohibited_content", "blocklist", "recitation"),
        *("spii", "blocked", "moderation", "guardrail_intervened"),
    ),
}
_SPELLINGS = {spelling: finish for finish, spellings in _FINISHES.items() for spelling in spellings}
_THOUGHTS = (  # fields beside `content`; a server that sends several says the same in each
    *("reasoning_content", "reasoning", "thinking", "reasoning_details", "thinking_blocks"),
    *("reasoning_text", "thinking_content", "thoughts", "thought"),
)
_TEXTS = ("text", "thinking", "reasoning", "reasoning_content", "summary", "content", "value", "refusal")  # in a part
_THINKS = re.compile("think|thought|reason")  # the type of a part
_COMPLAINTS = ("message", "msg", "detail", "error_msg", "error", "errors")  # fields that say what is wrong
_MOST_TOKENS = 10**9  # what is more is no count
_LONGEST_LINE = 200  # characters
_MOST_STARTS = 256  # braces that begin no object
_COMMA = re.compile(r'("(?:\\.|[^"\\])*+"?)|,(?=\s*[}\]])', re.DOTALL)  # before a closing bracket; strings stay
_JSON = json.JSONDecoder(strict=False)  # line ends within strings are no reason to ask again


class BrokenAnswerError(Exception):
    """An answer that came, and is none or not whole."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer, or all of it. `finish` is what ends one, see ANSWERED; counts are None if unknown.

    `reasoning` is what the server sent apart from the text, `refusal` what it said in place of an answer; `served_by`
    is the model's name as the server gives it.
    """

    text: str = ""
    reasoning: str = ""
    refusal: str = ""
    finish: str | None = None
    served_by: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

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


def read_answer(content: str | bytes, whole: bool = True) -> Piece:
    """The JSON that a server sent: a whole answer, or an event of a stream.

    Raises:
      BrokenAnswerError: it is no answer; a server may have put an error in its place.
    """
    try:
        value = json.loads(content)
        no_choice = whole and not value.get("choices") and not value.keys().isdisjoint(_COMPLAINTS)
        if value.get("error") or value.get("object") == "error" or no_choice:
            raise BrokenAnswerError(f"an error came in place of the answer: {_line(complaint(value))}")
        own = [choice for choice in value.get("choices") or () if not choice.get("index")]  # one was asked for
        if not whole and not own:  # an event that counts tokens, or one of the server's own
            return _about(value)
        choice = own[0]
        message = _message(choice, whole)
        finish = _finish(choice.get("finish_reason"))
        said = _said(message)
    except (ValueError, RecursionError):
        raise BrokenAnswerError("the answer is not JSON") from None
    except (KeyError, IndexError, TypeError, AttributeError):
        raise BrokenAnswerError("the answer holds no message") from None
    if whole:
        finish = finish or "stop"
        if not said.text and (message.get("tool_calls") or message.get("function_call")):
            finish = "tool_calls"  # which nobody offered
    piece = replace(_about(value), text=said.text, reasoning=said.reasoning, refusal=said.refusal, finish=finish)
    return joined([piece]) if whole else piece


def read_models(content: bytes) -> list[dict[str, Any]]:
    """What `/models` lists, by `id`.

    Raises:
      BrokenAnswerError: it is not JSON.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise BrokenAnswerError("the answer is not JSON") from None
    listed = value.get("data") if isinstance(value, dict) else None
    models = listed if isinstance(listed, list) else []
    return [model for model in models if isinstance(model, dict) and isinstance(model.get("id"), str)]


def joined(pieces: Sequence[Piece]) -> Piece:
    """One answer of its pieces: of what is said again in several of them, the last counts; what is none stays none."""
    last = Piece()
    for piece in pieces:
        last = Piece(
            finish=last.finish if last.finish not in (None, *ANSWERED) else piece.finish or last.finish,
            served_by=piece.served_by or last.served_by,
            prompt_tokens=last.prompt_tokens if piece.prompt_tokens is None else piece.prompt_tokens,
            completion_tokens=last.completion_tokens if piece.completion_tokens is None else piece.completion_tokens,
        )
    text, reasoning, refusal = (
        _clean("".join(getattr(piece, name) for piece in pieces)) for name in ("text", "reasoning", "refusal")
    )
    finish = "refusal" if refusal and last.finish in ANSWERED else last.finish
    return replace(last, text=text, reasoning=reasoning, refusal=refusal, finish=finish)


def json_object(text: str, names: Collection[str]) -> dict[str, Any] | None:
    """The object in what an LLM said (without its thought): the last of those that have most of `names`.

    What stands around it (a code fence, a remark with braces of its own, a list, another object, a comma before a
    closing bracket) does not matter. None if there is none.

    Raises:
      ValueError: there is the beginning of one.
    """
    found, faults = _objects(text)
    if not any(_named(value, names) for value in found) and faults:
        found, _ = _objects(_COMMA.sub(lambda match: match[1] or "", text))
    if not any(_named(value, names) for value in found):
        found = [inner for value in found for inner in _within(value)] or found
    most = max((_named(value, names) for value in found), default=0)
    if most == 0 and faults:
        raise ValueError(faults[0])
    return next((value for value in reversed(found) if _named(value, names) == most), None)


def _named(value: Mapping[str, Any], names: Collection[str]) -> int:
    return sum(name in value for name in names)


def _within(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The objects in the fields of an object, and in lists there: some LLMs put a name around what they say."""
    fields = [one for field in value.values() for one in (field if isinstance(field, list) else [field])]
    return [one for one in fields if isinstance(one, dict)]


def _objects(text: str) -> tuple[list[dict[str, Any]], list[str]]:
    """All objects in a text that do not stand in another, and why what begins as one is none."""
    found: list[dict[str, Any]] = []
    faults: list[str] = []
    start = text.find("{")
    while start >= 0 and len(faults) < _MOST_STARTS:
        try:
            value, end = _JSON.raw_decode(text, start)
            found.append(value)
        except (ValueError, RecursionError) as error:
            faults.append(str(error))
            end = start + 1
        start = text.find("{", end)
    return found, faults


def _about(value: Mapping[str, Any]) -> Piece:
    usage = value.get("usage")
    usage = usage if isinstance(usage, Mapping) else {}
    asked, said = (_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
    return Piece(served_by=_line(value.get("model")), prompt_tokens=asked, completion_tokens=said)


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


def _message(choice: Mapping[str, Any], whole: bool) -> Any:
    """What a choice says. A stream's last event may hold the whole message again, beside an empty delta."""
    names = ("message",) if whole else ("delta", "message")
    found = next((choice[name] for name in names if choice.get(name) is not None), None)
    if found is None and (not whole or isinstance(choice.get("text"), str)):  # as completions without a chat have it
        return {"content": choice.get("text")}
    return found


def _said(message: Any) -> Piece:
    """The texts of a message or a delta. `content` is one, or a list of parts, each of a kind of its own."""
    content = message.get("content")
    texts = {"text": "", "reasoning": "", "refusal": ""}
    for part in content if isinstance(content, list) else [content]:
        texts[_kind(part)] += _flat(part)
    apart = next((said for name in _THOUGHTS if (said := _flat(message.get(name)))), "")
    return Piece(texts["text"], apart or texts["reasoning"], _flat(message.get("refusal")) or texts["refusal"])


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
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(map(_flat, value))
    if isinstance(value, Mapping):
        return next((text for name in _TEXTS if (text := _flat(value.get(name)))), "")
    return ""


def _finish(reason: Any) -> str | None:
    """Servers' words for the three usual ends as OpenAI's; any other as it is."""
    if isinstance(reason, Mapping):  # with what ended it
        reason = reason.get("type") or reason.get("reason")
    if reason is None:
        return None
    said = str(reason).strip()[:_LONGEST_LINE]
    plain = re.sub(r"[\W_]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", said)).lower().removeprefix("finish_reason_")
    if plain in ("", "null", "none"):
        return None
    return _SPELLINGS.get(plain, plain if plain in _FINISHES else _line(said))


def _count(value: Any) -> int | None:
    whole = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MOST_TOKENS
    return int(value) if whole and value == int(value) else None


def _line(value: Any) -> str:
    """A name or a remark of a server: short, and without what would steer a terminal."""
    text = value if isinstance(value, str) else ""
    return "".join(character if character.isprintable() else " " for character in text[:_LONGEST_LINE]).strip()


def _clean(text: str) -> str:
    """Halves of a surrogate pair that came apart are put together; one that is alone is no text."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
