"""`psyche chat`: a conversation in the terminal with a local model or an endpoint, behind the same crisis gate."""

import asyncio
import contextlib
import logging
import os
import re
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from psyche_jax.config import PromptSection
from psyche_jax.data.chat import render_prompt
from psyche_jax.data.records import Message
from psyche_jax.errors import UsageError, UserError
from psyche_jax.evaluate.endpoint import Endpoint
from psyche_jax.llm.reply import NoReplyError
from psyche_jax.llm.server import SCHEMES, Names, Server
from psyche_jax.rewards.reference import CLOSE, OPEN, split_thought
from psyche_jax.serve.config import ServeConfig
from psyche_jax.serve.crisis.gate import OutputFilter, language_of
from psyche_jax.serve.crisis.opinion import SERVED, ask_endpoint
from psyche_jax.serve.service import FailedError, Service, TooLongError, Wanted, open_gate, overlap
from psyche_jax.storage.files import write_json

_SECONDS = 300.0  # without a byte, after which an endpoint has failed
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
HELP = """\
/think        show or fold the model's reasoning
/system TEXT  start over with this system prompt (empty: the model's own)
/new          start over
/history      show the conversation so far
/save FILE    write the conversation as JSON
/quit         leave; also Ctrl-D, or Ctrl-C while no answer is running
Ctrl-C stops an answer. A line that ends with \\ continues in the next one."""


class LocalModel:
    """A model in this process."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._service = Service(config)
        self.name = self._service.name
        self.gate = self._service.gate

    async def answer(self, turns: Sequence[Message]) -> AsyncGenerator[str, None]:
        """The answer to the last turn, piece by piece.

        Raises:
          UserError: there is none.
        """
        try:
            answer = await self._service.answer(Wanted(turns, self._config.temperature, self._config.top_p))
            async with contextlib.aclosing(answer.parts) as parts:
                async for said in parts:
                    yield said.delta.text
        except TooLongError as error:
            raise UserError(f"{error}; /new starts over") from None
        except FailedError:
            raise UserError("decoding failed; see the reason above") from None

    def close(self) -> None:
        """End its thread."""
        self._service.close(0)


class RemoteModel:
    """A model behind an OpenAI-compatible endpoint, named as `URL#MODEL`; the key is OPENAI_API_KEY."""

    def __init__(self, config: ServeConfig) -> None:
        endpoint = Endpoint(config.model, max_new_tokens=config.limits.new_tokens, temperature=config.temperature)
        self.name = endpoint.model
        self.gate = open_gate(config.crisis)
        self._config = config
        self._url = endpoint.url
        self._prompt = config.prompt or PromptSection("", "")  # its own server may add one
        if config.thinking is not None or self._prompt.thinking is not None:
            raise UsageError("thinking: the endpoint's server sets this; leave it out")
        self._names: Names = {}  # of parameters, as the endpoint turns out to want them

    async def answer(self, turns: Sequence[Message]) -> AsyncGenerator[str, None]:
        """As `LocalModel.answer`."""
        own = [turn.content for turn in turns if turn.role == "user"]
        reply = self.gate.reply(own) if self.gate else None
        if reply is None and self.gate and (asked := self._config.crisis.second_opinion):
            opinion = await ask_endpoint(f"{self._url}#{self.name}" if asked == SERVED else asked, own[-1])
            reply = self.gate.reply(own, opinion) if opinion else None
        if reply:
            yield reply.text
            return
        output = OutputFilter(self.gate, language_of(own[-1])) if self.gate else None
        failure = None
        key = os.environ.get("OPENAI_API_KEY")
        async with Server(self._url, key, timeout=_SECONDS, retries=2, names=self._names) as server:
            try:
                async for piece in self._stream(server, turns):
                    yield output.feed(piece) if output else piece
                    if output and output.stopped:
                        return
            except NoReplyError as error:
                hint = f"{error}; see OPENAI_API_KEY, the URL and the model"
                failure = hint if error.status else f"the answer broke off ({error})"
        if output:
            yield output.finish()
        if failure:
            raise UserError(f"{self._url}: {failure}")

    async def _stream(self, server: Server, turns: Sequence[Message]) -> AsyncIterator[str]:
        body = {
            "model": self.name,
            "messages": render_prompt(turns, self._prompt),
            "temperature": self._config.temperature,
            "top_p": self._config.top_p,
            "max_tokens": self._config.limits.new_tokens,
            "stream": True,
        }
        thinking = False
        async for part in server.parts(body):
            if part.reasoning:
                yield part.reasoning if thinking else OPEN + part.reasoning
                thinking = True
            if text := part.text or part.refusal:
                yield (CLOSE if thinking else "") + text
                thinking = False
            if part.finish is not None and part.fault:
                raise NoReplyError(part.fault)

    def close(self) -> None:
        """Nothing to end."""


class Screen:
    """Writes an answer as it comes; its reasoning dimmed, or folded to one line."""

    def __init__(self, out: TextIO, show_reasoning: bool) -> None:
        self.show_reasoning = show_reasoning
        self._out = out
        self._colour = out.isatty() and "NO_COLOR" not in os.environ
        self.begin()

    def begin(self) -> None:
        """A new answer."""
        self._part = "start"  # then "thought" and the "gap" behind it, then "answer"
        self._waiting = ""
        self._thought = 0

    def feed(self, piece: str) -> None:
        """Write what is certain of the answer so far."""
        self._waiting += harmless(piece)
        if self._part == "start":
            begun = self._waiting.lstrip()
            if not begun or (len(begun) < len(OPEN) and OPEN.startswith(begun)):
                return
            if begun.startswith(OPEN):
                self._part, self._waiting = "thought", begun.removeprefix(OPEN)
                if self._colour and not self.show_reasoning:
                    self._out.write("\x1b[2mthinking …\x1b[0m")
                    self._out.flush()
            else:
                self._part = "answer"
        if self._part == "thought":
            thought, ended, rest = self._waiting.partition(CLOSE)
            if not ended:
                held = overlap(thought, CLOSE)
                thought, rest = thought[: len(thought) - held], thought[len(thought) - held :]
            self._write_thought(thought)
            self._waiting = rest
            if not ended:
                return
            self._end_thought()
        if self._part == "gap":
            self._waiting = self._waiting.lstrip()
            self._part = "answer" if self._waiting else "gap"
        self._out.write(self._waiting)
        self._out.flush()
        self._waiting = ""

    def end(self, note: str = "") -> None:
        """The answer is over."""
        if self._part == "thought":
            self._write_thought(self._waiting)
            self._end_thought()
        elif self._part == "start":
            self._out.write(self._waiting)
        self._out.write(f"{harmless(note)}\n\n")
        self._out.flush()
        self.begin()

    def _write_thought(self, text: str) -> None:
        self._thought += len(text)
        if self.show_reasoning and text:
            self._out.write(f"\x1b[2m{text}\x1b[0m" if self._colour else text)
            self._out.flush()

    def _end_thought(self) -> None:
        self._part = "gap"
        if self.show_reasoning:
            self._out.write("\n--\n")
        else:
            back = "\r\x1b[K" if self._colour else ""
            self._out.write(f"{back}[reasoning folded: {self._thought} characters; /think shows it]\n")


class Chat:
    """The conversation: what was said, and the commands."""

    def __init__(self, model: LocalModel | RemoteModel, system: str, screen: Screen, out: TextIO) -> None:
        self._model = model
        self._screen = screen
        self._out = out
        self._system = system
        self.turns: list[Message] = []

    def run(self, lines: Iterable[str], runner: asyncio.Runner) -> None:
        """Answer line after line, until they end or /quit."""
        for line in lines:
            if line.startswith("/"):
                name, _, rest = line[1:].strip().partition(" ")
                if name == "quit":
                    return
                self._command(name, rest.strip())
            elif line.strip():
                self._talk(line.strip(), runner)

    def _talk(self, text: str, runner: asyncio.Runner) -> None:
        turn = Message("user", text)
        said: list[str] = []

        async def speak() -> None:
            system = [Message("system", self._system)] if self._system else []
            answer = self._model.answer([*system, *map(without_reasoning, self.turns), turn])
            async with contextlib.aclosing(answer) as pieces:
                async for piece in pieces:
                    said.append(piece)
                    self._screen.feed(piece)

        try:
            runner.run(speak())
            self._screen.end()
        except KeyboardInterrupt:
            self._screen.end(" [stopped]")
        except UserError as error:
            self._screen.end(f"[{error}]")
        if answer := "".join(said).strip():
            self.turns += [turn, Message("assistant", answer)]

    def _command(self, name: str, rest: str) -> None:
        commands: dict[str, Callable[[str], str]] = {
            "help": lambda _: HELP,
            "think": self._think,
            "new": lambda _: self._anew(self._system),
            "system": self._anew,
            "history": lambda _: "\n".join(f"{turn.role}: {turn.content}" for turn in self.turns) or "nothing yet",
            "save": self._save,
        }
        run = commands.get(name, lambda _: f"there is no /{name}; /help lists the commands")
        self._out.write(harmless(run(rest)) + "\n")
        self._out.flush()

    def _think(self, _: str) -> str:
        self._screen.show_reasoning = not self._screen.show_reasoning
        if not self._screen.show_reasoning:
            return "reasoning is folded"
        thought = split_thought(self.turns[-1].content)[0] if self.turns else None
        return f"reasoning is shown\n{thought or ''}".rstrip()

    def _anew(self, system: str) -> str:
        self._system, self.turns = system, []
        return "a new conversation"

    def _save(self, name: str) -> str:
        path = Path(name).expanduser()
        if not name:
            return "give a file name: /save FILE"
        if path.exists():
            return f"{path}: already exists; choose another name"
        system = [Message("system", self._system)] if self._system else []
        messages = [{"role": turn.role, "content": turn.content} for turn in [*system, *self.turns]]
        try:
            write_json(path, {"model": self._model.name, "messages": messages})
        except OSError as error:
            return f"{path}: {error.strerror}"
        return f"{path}: {len(messages)} messages"


def harmless(text: str) -> str:
    """What a model or a server says, without what would steer the terminal."""
    return _CONTROL.sub("", text)


def without_reasoning(turn: Message) -> Message:
    """The turn as the model sees it later."""
    answer = split_thought(turn.content)[1]
    return replace(turn, content=answer) if turn.role == "assistant" and answer else turn


def typed_lines(prompt: str) -> Iterable[str]:
    """What is typed, until Ctrl-D or Ctrl-C; lines that end with a backslash are joined."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history in input()
    line = ""
    while True:
        try:
            line += input("  " if line else prompt)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.endswith("\\"):
            line = line[:-1] + "\n"
            continue
        yield line
        line = ""


def _piped_lines(lines: Iterable[str], out: TextIO) -> Iterable[str]:
    """Lines from a pipe, each shown as if it had been typed, so that one sees what is being answered."""
    for line in lines:
        print(f"> {harmless(line.rstrip())}", file=out, flush=True)
        yield line.rstrip("\n")


def chat(config: ServeConfig, system: str, show_reasoning: bool) -> None:
    """Talk in the terminal, or with lines from a pipe.

    Raises:
      UserError: the model cannot be used.
    """
    model = RemoteModel(config) if config.model.startswith(SCHEMES) else LocalModel(config)
    out, typing = sys.stdout, sys.stdin.isatty()
    if typing:
        print(f"{harmless(model.name)}. /help lists the commands.", file=out)
    if model.gate:
        print(f"{model.gate.notice('zh')}\n{model.gate.notice('en')}\n", file=out)
    lines = typed_lines("> ") if typing else _piped_lines(sys.stdin, out)
    events = logging.getLogger("psyche_jax.crisis")
    events.disabled = True  # they go to the log file only
    try:
        with asyncio.Runner() as runner:
            Chat(model, system, Screen(out, show_reasoning), out).run(lines, runner)
    finally:
        events.disabled = False
        model.close()
