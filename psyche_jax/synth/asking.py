"""Asking an LLM for one thing: the prompt from its template, and a reply that is read or asked for again."""

import dataclasses
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import pydantic
from jinja2.sandbox import SandboxedEnvironment

from psyche_jax.data.records import from_json
from psyche_jax.errors import UsageError, UserError
from psyche_jax.evaluate.extraction import answer_part
from psyche_jax.llm.objects import json_object
from psyche_jax.llm.reply import FILTERED, Reply, printable
from psyche_jax.synth.calls import Call
from psyche_jax.synth.client import Client
from psyche_jax.synth.config import CallsSection

_VERSION = re.compile(r"^\{#-?\s*version:\s*(\S+)\s*-?#\}")
_PACKAGED = Path(str(files("psyche_jax.synth") / "prompts"))


@dataclass(frozen=True)
class Prompt:
    """A prompt file. `id` is its name, its version and a hash of its text: `questions@1-3f2a9c04`."""

    id: str
    template: jinja2.Template

    def text(self, **values: Any) -> str:
        """The user's turn."""
        return self._block("user", values)

    def messages(self, **values: Any) -> tuple[dict[str, str], ...]:
        """System and user turns."""
        turns = ((role, self._block(role, values)) for role in ("system", "user"))
        return tuple({"role": role, "content": content} for role, content in turns if content)

    def _block(self, name: str, values: Mapping[str, Any]) -> str:
        if name not in self.template.blocks:
            return ""
        try:
            return "".join(self.template.blocks[name](self.template.new_context(dict(values)))).strip()
        except jinja2.TemplateError as error:
            raise UsageError(f"prompt {self.id}: {error}") from None


class Prompts:
    """The package's prompts, or those of a folder where it has a file of that name."""

    def __init__(self, folder: str | None = None) -> None:
        if folder and not Path(folder).is_dir():
            raise UsageError(f"prompts: there is no folder {folder}")
        self._paths = {path.stem: path for path in sorted(_PACKAGED.glob("*.jinja"))}
        for path in sorted(Path(folder).glob("*.jinja")) if folder else ():
            if path.stem not in self._paths:
                raise UsageError(f"{path}: no stage has a prompt of that name; known: {', '.join(self._paths)}")
            self._paths[path.stem] = path
        self._environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined)
        self._environment.filters["fenced"] = fenced
        self._prompts: dict[str, Prompt] = {}

    def __getitem__(self, name: str) -> Prompt:
        """The prompt `name`.

        Raises:
          UsageError: its file is broken or lacks the version or the block `user`.
        """
        if name not in self._prompts:
            path = self._paths[name]
            text = path.read_text(encoding="utf-8")
            version = _VERSION.match(text)
            if version is None:
                raise UsageError(f"{path}: must begin with a version, for example {{#- version: 1 -#}}")
            try:
                template = self._environment.from_string(text)
            except jinja2.TemplateError as error:
                raise UsageError(f"{path}: {error}") from None
            if "user" not in template.blocks:
                raise UsageError(f"{path}: lacks the block `user`")
            digest = hashlib.sha256(text.encode()).hexdigest()[:8]
            self._prompts[name] = Prompt(f"{name}@{version[1]}-{digest}", template)
        return self._prompts[name]


def fenced(text: str, name: str) -> str:
    """Text between marks that it cannot close: they hold a hash of it."""
    mark = hashlib.sha256(text.encode()).hexdigest()[:16]  # so long that no text holds its own
    return f"<{name} {mark}>\n{text}\n</{name} {mark}>"


T = TypeVar("T")
_LONGEST_FAULT = 200  # characters
_LONGEST_SHOWN = 300  # characters of a reply
_DRAW = 1_000_000  # samples of a request that were filtered are drawn again under numbers that no stage uses


class FaultyReplyError(Exception):
    """A reply cannot be used; the message says why, in words for the LLM."""


class SetAsideError(Exception):
    """An item is given up; the message says why."""


class Asker:
    """A client with prompts. `asked_again` counts replies that had to be asked again.

    Where `give_up_after` replies of one LLM to one prompt in a row are of no use, it asks for nothing more.
    """

    def __init__(self, client: Client, prompts: Prompts, calls: CallsSection) -> None:
        self.client = client
        self.prompts = prompts
        self.asked_again = 0
        self._of_use: set[tuple[str, str]] = set()  # LLMs and prompts that brought something
        self._reasks = calls.reasks
        self._give_up_after = calls.give_up_after
        self._rows: dict[tuple[str, str], list[tuple[Call, Reply, str]]] = {}  # those since the last one of use
        self._stopped: UserError | None = None

    async def ask(self, llm: str, prompt: str, values: dict[str, Any], read: Callable[[str], T], sample: int = 0) -> T:
        """What `read` makes of the reply. One that it refuses is asked again, with its fault named.

        Raises:
          SetAsideError: none of the replies could be used, or the server refused or filtered all of them.
          NoReplyError, UserError: as `Client.reply`; the latter also where too many in a row could not be used.
        """
        template = self.prompts[prompt]
        call = self.client.request(llm, template.id, template.messages(**values), sample)
        for attempt in range(self._reasks + 1):
            reply = await self.reply(call)
            try:
                if reply.finish == "length":
                    raise FaultyReplyError("回答太长，没有写完")
                if not reply.text.strip():
                    raise FaultyReplyError("回答是空的")
                found = read(reply.text)
            except FaultyReplyError as error:
                fault = str(error)[:_LONGEST_FAULT]
            else:
                self.count(call, reply)
                return found
            self.count_unusable(call, reply, fault)
            if attempt < self._reasks:
                self.asked_again += 1
                said = answer_part(reply.text) or "（空）"  # servers want no thoughts back
                again = self.prompts["again"].text(fault=fault)
                turns = ({"role": "assistant", "content": said}, {"role": "user", "content": again})
                call = replace(call, messages=(*call.messages, *turns))
        raise SetAsideError(f"no usable reply: {prompt}, {llm}: {fault}")

    async def reply(self, call: Call) -> Reply:
        """What the LLM answers. What its server filters out is drawn again, if it is drawn at all.

        Raises:
          SetAsideError: the server refused the request, or filtered every answer.
          NoReplyError, UserError: as `ask`.
        """
        draws = self._reasks + 1 if self.client.temperature(call.llm) > 0 else 1
        for draw in range(draws):
            if self._stopped is not None:
                raise self._stopped
            drawn = replace(call, sample=call.sample + draw * _DRAW)
            reply = await self.client.reply(drawn)
            if reply.finish not in ("refused", *FILTERED):
                return reply
            what = "refused" if reply.finish == "refused" else "filtered"
            said = f": {reply.text[:_LONGEST_FAULT]}" if reply.text else ""
            reason = f"{what} by the server: {_names(call)}{said}"
            self.count_unusable(drawn, reply, reason)
            if what == "refused":
                break
        raise SetAsideError(reason)

    def count(self, call: Call, reply: Reply) -> None:
        """A reply was of use."""
        self._of_use.add((call.llm, call.prompt))
        self._rows.pop((call.llm, call.prompt), None)

    def count_unusable(self, call: Call, reply: Reply, fault: str) -> None:
        """A reply was of no use.

        Raises:
          UserError: so were many before it.
        """
        if not reply.stored:
            self.client.fault(call.llm, fault)
        row = self._rows.setdefault((call.llm, call.prompt), [])
        row.append((call, reply, fault))
        if self._stopped is not None:
            self.client.forget(call)
            raise self._stopped
        fresh = sum(not reply.stored for _, reply, _ in row)
        if fresh >= self._give_up_after:
            self._stop(row, f"{fresh} replies in a row could not be used")

    def check(self, kept: bool) -> None:
        """Called at the end of a stage, which `kept` something or not. Says which LLM never gave anything of use.

        Raises:
          UserError: it kept nothing, and one LLM's replies to one prompt were never of use.
        """
        never = [row for pair, row in self._rows.items() if pair not in self._of_use]
        if never and not kept:
            row = max(never, key=len)
            self._stop(row, f"none of {len(row)} replies could be used")
        for row in never:
            call, _, fault = row[-1]
            what = f"{_names(call)}: none of {len(row)} replies could be used"
            print(f"warning: {what}, the last one because: {fault}", file=sys.stderr, flush=True)

    def _stop(self, row: list[tuple[Call, Reply, str]], what: str) -> None:
        """Show what is wrong, and forget those replies: once it is mended they are to be asked for again."""
        call, reply, _ = row[-1]
        fault, count = Counter(fault for _, _, fault in row).most_common(1)[0]
        self._stopped = UserError(
            f"{_names(call)}: {what}, {count} of them: {fault}; the last one was: "
            f"{printable(reply.text, _LONGEST_SHOWN) or '(nothing)'}; "
            "fix the LLM or its prompt and start again, or raise calls.give_up_after"
        )
        self.client.stop()
        for one, _, _ in row:
            self.client.forget(one)
        raise self._stopped


def _names(call: Call) -> str:
    """The prompt and the LLM."""
    return f"{call.prompt.partition('@')[0]}, {call.llm}"


def read_json(kind: type[T]) -> Callable[[str], T]:
    """A reader of replies that hold one JSON object of the form of the dataclass `kind`, whatever is around it."""
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    names = {field.name for field in fields if field.default is dataclasses.MISSING}

    def read(text: str) -> T:
        try:
            value = json_object(answer_part(text), names)
            if value is None:
                raise FaultyReplyError("回答里没有 JSON 对象")
            json.dumps(value, ensure_ascii=False).encode()  # raises for half of a surrogate pair
            return from_json(kind, value)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise FaultyReplyError(f"JSON 不合要求：{where} {first['msg'].removeprefix('Value error, ')}") from None
        except (ValueError, RecursionError) as error:
            raise FaultyReplyError(f"不是合法的 JSON（{error}）") from None

    return read
