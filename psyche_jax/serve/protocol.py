"""OpenAI's (chat) completions: what a request may hold, and what this server's own responses are made of.

A field of a request that is not supported is refused by its name. The form of completions is that of the `openai`
library (`openai.types`).
"""

from itertools import islice
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from openai.types.shared import ErrorObject
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from psyche_jax.serve.engine import MOST_ALTERNATIVES
from psyche_jax.storage.files import NO_TEXT

_MOST_MESSAGES = 512
_MOST_PARTS = 512  # of a message
_MOST_PAIRS = 1024  # of an object that is not used
_MOST_TOOLS = 1024
_MOST_PROMPTS = 128  # of a request
Nothing = Annotated[float, Field(ge=0, le=0)]  # numbers that change nothing
Once = Annotated[float, Field(ge=1, le=1)]
Opaque = Annotated[str, StringConstraints(max_length=512)]  # taken and not used
Prompt = str | Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]  # text or token ids
StopString = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class _Request(BaseModel):
    """What asks for nothing (null, an empty text, list or object) is as good as absent, whatever it is called.

    So is a false of a field that is known here, also where it would be read as the number 0.
    Any other field that is not known here is refused by its name.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        required = {name for name, field in cls.model_fields.items() if field.is_required()}
        asked = {
            name: given
            for name, given in value.items()
            if name in required or not (given in (None, "", [], {}) or (given is False and name in cls.model_fields))
        }
        unknown = set(islice((name for name in asked if name not in cls.model_fields), 1))  # one is named, not all
        return {name: given for name, given in asked.items() if name in cls.model_fields or name in unknown}


class TextPart(_Request):
    """A part of a message; text is the only kind."""

    type: Literal["text"]
    text: str


class ChatMessage(_Request):
    """One turn; also an answer of this server's as it was given."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=_MOST_PARTS)] = ""
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @model_validator(mode="after")
    def _check(self) -> "ChatMessage":
        if NO_TEXT.search(self.text):
            raise ValueError("the content has half of a surrogate pair, which is not text")
        if self.role == "user" and not self.text.strip():
            raise ValueError("the user's message is empty")
        return self


class StreamOptions(_Request):
    """`include_usage`: a last chunk counts tokens."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(_Request):
    """Text is the only format."""

    type: Literal["text"]


class _Generation(_Request):
    """What requests for chat completions and for plain ones share."""

    model: str = Field(max_length=256)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=128)
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: Nothing | None = None
    frequency_penalty: Nothing | None = None
    repetition_penalty: Once | None = None  # from here to `best_of`: of other servers
    length_penalty: Once | None = None
    min_p: Nothing | None = None
    top_k: Annotated[int, Field(ge=-1, le=0)] | None = None
    best_of: Once | None = None
    logit_bias: dict[str, Nothing] | None = None
    user: Opaque | None = None  # taken and not used

    @field_validator("logit_bias", "metadata", mode="before", check_fields=False)
    @classmethod
    def _few(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MOST_PAIRS:
            raise ValueError(f"has {len(value)} entries, more than {_MOST_PAIRS}")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: Any) -> Any:
        return [stop for stop in value if stop not in ("", None)] if isinstance(value, list) else value

    @property
    def stops(self) -> list[str]:
        """Stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatRequest(_Generation):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=_MOST_MESSAGES)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    echo: Literal[False] | None = None
    response_format: ResponseFormat | None = None
    # Tools may be offered, as Open WebUI does with every message. Where a model may choose it chooses none of them.
    tools: Annotated[list[dict[str, Any]], Field(max_length=_MOST_TOOLS)] | None = None
    functions: Annotated[list[dict[str, Any]], Field(max_length=_MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str | None] | None = None  # these are taken and not used
    safety_identifier: Opaque | None = None
    prompt_cache_key: Opaque | None = None

    @model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        if any(message.role in ("system", "developer") for message in self.messages[1:]):
            raise ValueError("a system message can only be the first one")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        options = self.stream_options
        if not self.stream and options and (options.include_usage or options.include_obfuscation):
            raise ValueError("stream_options needs stream")
        return self


class CompletionRequest(_Generation):
    """The body of POST /v1/completions: prompts are continued as they stand or, with `echo`, scored."""

    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=_MOST_PROMPTS)]
    max_tokens: int = Field(16, ge=0, le=2**31)
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    echo: bool | None = False
    stream: Literal[False] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        prompts = value if isinstance(value, list) and not _is_prompt(value) else [value]
        if not all(map(_is_prompt, prompts)) or not prompts:
            raise ValueError("is not a text, a list of token ids, or a list of either")
        if len(prompts) > _MOST_PROMPTS:
            raise ValueError(f"has {len(prompts)} prompts, more than {_MOST_PROMPTS}")
        return value

    @model_validator(mode="after")
    def _check(self) -> "CompletionRequest":
        if not self.echo and self.max_tokens < 1:
            raise ValueError("max_tokens of 0 needs echo")
        if self.echo and (self.max_tokens > 1 or (self.max_tokens == 1 and self.temperature != 0) or (self.n or 1) > 1):
            raise ValueError("echo scores a prompt: it needs max_tokens 0, or 1 at temperature 0, and n 1")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """All of them."""
        given: Any = self.prompt
        return [given] if _is_prompt(given) else given


def _is_prompt(value: Any) -> bool:
    """A text, or token ids. An empty one is refused later, by its place."""
    if isinstance(value, str):
        return NO_TEXT.search(value) is None
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "psyche_jax"
    crisis_gate: bool  # whether a gate answers messages in a crisis before the model


class ModelList(BaseModel):
    """All of them: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorResponse(BaseModel):
    """The body of every answer that reports an error."""

    error: ErrorObject


def fault_of(error: RequestValidationError) -> tuple[str, str]:
    """Where in the body the first fault is, and what it is.

    Where a field may be of several types each type has its errors: what counts is the one that read the most.
    """
    first, *others = error.errors()[:1000]
    if first["type"] == "json_invalid":
        return "", f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
    of_field = [first, *(other for other in others if other["loc"][:2] == first["loc"][:2])]
    places = [_place(one, error.body) for one in of_field]
    other_type = [one["type"].endswith(("_type", "_parsing")) for one in of_field]
    best = max(range(len(of_field)), key=lambda index: (not other_type[index], len(places[index])))
    return ".".join(map(str, places[best]))[:200], of_field[best]["msg"].removeprefix("Value error, ")


def _place(fault: dict[str, Any], body: Any) -> list[str | int]:
    """The keys that lead through the body to a fault: its `loc` without the names of types."""
    keys: list[str | int] = []
    for part in fault["loc"][1:]:
        if isinstance(body, list if isinstance(part, int) else dict) and (isinstance(part, int) or part in body):
            body = body[part]
        elif fault["type"] != "missing" or part != fault["loc"][-1]:
            continue
        keys.append(part)
    return keys
