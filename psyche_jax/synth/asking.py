"""Asking an LLM for something of a given form: what comes back is data, checked before it is used."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import pydantic

from psyche_jax.synth.client import Client
from psyche_jax.synth.prompts import Prompts

T = TypeVar("T")
_LONGEST_FAULT = 200  # characters


class FaultyReplyError(Exception):
    """A reply cannot be used; the message says why, in words for the LLM."""


class SetAsideError(Exception):
    """An item is given up; the message says why."""


class Asker:
    """A client with prompts. `asked_again` counts replies that had to be asked again."""

    def __init__(self, client: Client, prompts: Prompts, reasks: int) -> None:
        self.client = client
        self.prompts = prompts
        self.asked_again = 0
        self._reasks = reasks

    async def ask(self, llm: str, prompt: str, values: dict[str, Any], read: Callable[[str], T], sample: int = 0) -> T:
        """What `read` makes of the reply. One that it refuses is asked again, with its fault named.

        Raises:
          SetAsideError: none of the replies could be used, or the server refused the request.
          CallFailedError, UserError: as `Client.call`.
        """
        template = self.prompts[prompt]
        messages = template.messages(**values)
        fault = ""
        for attempt in range(self._reasks + 1):
            reply = await self.client.call(llm, template.id, messages, sample)
            if reply.finish == "refused":
                raise SetAsideError(f"refused by the server: {prompt}, {llm}: {reply.text}")
            try:
                if reply.finish == "length":
                    raise FaultyReplyError("回答太长，没有写完")
                if reply.finish == "content_filter" or not reply.text.strip():
                    raise FaultyReplyError("回答是空的")
                return read(reply.text)
            except FaultyReplyError as error:
                fault = str(error)[:_LONGEST_FAULT]
            if attempt < self._reasks:
                self.asked_again += 1
                again = self.prompts["again"].text(fault=fault)
                said = reply.text if reply.text.strip() else "（空）"
                messages = (*messages, {"role": "assistant", "content": said}, {"role": "user", "content": again})
        raise SetAsideError(f"no usable reply: {prompt}, {llm}: {fault}")


def read_json(kind: type[T]) -> Callable[[str], T]:
    """A reader of replies that are one JSON object, possibly in a code fence, of the form of the dataclass `kind`."""
    adapter = pydantic.TypeAdapter(kind)

    def read(text: str) -> T:
        start, end = text.find("{"), text.rfind("}")
        if start < 0 or end < start:
            raise FaultyReplyError("回答里没有 JSON 对象")
        try:
            value = json.loads(text[start : end + 1])
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
            return adapter.validate_python(value)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise FaultyReplyError(f"JSON 不合要求：{where} {first['msg'].removeprefix('Value error, ')}") from None
        except (ValueError, RecursionError) as error:
            raise FaultyReplyError(f"不是合法的 JSON（{error}）") from None

    return read
