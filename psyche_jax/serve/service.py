"""From a request to its answer: template, gate, batches, and tokens as text, thought and answer apart."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from psyche_jax.data.chat import chosen_prompt, decoded_text, opened_text, prompt_tokens
from psyche_jax.data.records import Message
from psyche_jax.errors import UserError
from psyche_jax.model.huggingface import load_tokenizer
from psyche_jax.rewards.token_bytes import token_bytes_from_tokenizer
from psyche_jax.serve.batcher import Batcher, BusyError, Job, Piece
from psyche_jax.serve.config import CrisisSection, ServeConfig
from psyche_jax.serve.crisis.gate import Gate, GateReply, OutputFilter, language_of
from psyche_jax.serve.engine import RowSettings, load_engine
from psyche_jax.train.checkpoints import open_model

Finish = Literal["stop", "length", "content_filter"]
_READERS = 4  # threads that tokenize conversations and hold them against the gate
_BROKEN = "\ufffd"  # what bytes that are no whole character decode to


@dataclass(frozen=True)
class TokenLogProb:
    """One token of a response, and the likeliest ones in its place."""

    token: int
    log_prob: float
    best: list[tuple[int, float]]


@dataclass(frozen=True)
class Delta:
    """What may be shown next; `finish` if that was the end."""

    text: str = ""
    log_probs: list[TokenLogProb] = field(default_factory=list)
    finish: Finish | None = None


def overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop` with which `text` ends: more of it may follow."""
    return next((size for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size])), 0)


class Speech:
    """One response. `finish` is None until it has ended; `tokens` counts those that were drawn.

    `opened` is what the chat template has written of it. It is shown first, and holds no stop string.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str],
        output: OutputFilter | None,
        keep_log_probs: bool = False,
        opened: str = "",
    ) -> None:
        self.finish: Finish | None = None
        self.tokens = 0
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._output = output
        self._keep = keep_log_probs
        self._opened = opened
        self._ids: list[int] = []
        self._text = ""  # all of it, as far as it is whole characters and no stop string
        self._given = 0  # characters of it that the filter was given
        self._log_probs: list[tuple[int, TokenLogProb]] = []  # with the place in the text where each token begins

    def feed(self, piece: Piece) -> Delta:
        """Add what was decoded; returns what may be shown of it."""
        self.tokens += len(piece.tokens)
        if self._keep:
            for index, token in enumerate(piece.tokens):
                start = len(self._decode([*self._ids, *piece.tokens[:index]]).rstrip(_BROKEN))
                self._log_probs.append((start, TokenLogProb(token, piece.log_probs[index], piece.best[index])))
        self._ids += piece.tokens
        text = self._decode(self._ids)
        if piece.finish is None:
            text = text.rstrip(_BROKEN)  # more bytes may follow
        self._text = text
        end, self.finish = self._end(piece.finish)
        shown, opened, self._opened = self._shown(end), self._opened, ""
        return replace(shown, text=opened + shown.text)

    def _end(self, finish: Finish | None) -> tuple[int, Finish | None]:
        """How much of the text is certain, and whether it ends there."""
        begin = [max(self._given - len(stop), 0) for stop in self._stop]
        found = [place for stop, at in zip(self._stop, begin, strict=True) if (place := self._text.find(stop, at)) >= 0]
        if found:
            return min(found), "stop"
        if finish is not None:
            return len(self._text), finish
        held = max((overlap(self._text, stop) for stop in self._stop), default=0)
        return len(self._text) - held, None

    def _shown(self, end: int) -> Delta:
        piece, self._given = self._text[self._given : end], max(end, self._given)
        if self._output is None:
            return Delta(piece, self._released(self._given), self.finish)
        withheld = self._output.withheld
        shown = self._output.feed(piece)
        if self.finish is not None:
            shown += self._output.finish()
        checked = self._given - self._output.held_back
        if self._output.withheld > withheld:
            self._log_probs = [entry for entry in self._log_probs if entry[0] >= checked]
        if self._output.stopped:
            self.finish = "content_filter"
        return Delta(shown, self._released(checked), self.finish)

    def _released(self, place: int) -> list[TokenLogProb]:
        """Log-probs of the tokens that begin before `place`; all that are left never come out after a stop string."""
        released = [entry for start, entry in self._log_probs if start < place]
        self._log_probs = [entry for entry in self._log_probs if entry[0] >= place]
        return released

    def _decode(self, ids: Sequence[int]) -> str:
        return decoded_text(self._tokenizer, ids)


class TooLongError(ValueError):
    """A conversation that does not fit the model's context."""


class FailedError(Exception):
    """Decoding failed, or the server closed, in the middle."""


@dataclass(frozen=True)
class Wanted:
    """What a request asks for. `max_new_tokens` None: as many as the limits and the context leave."""

    turns: Sequence[Message]
    temperature: float
    top_p: float
    choices: int = 1
    max_new_tokens: int | None = None
    stop: Sequence[str] = ()
    alternatives: int | None = None  # None: no log-probs
    seed: int | None = None


@dataclass(frozen=True)
class Said:
    """A part of one choice."""

    choice: int
    delta: Delta
    tokens: int  # of this choice so far


@dataclass(frozen=True)
class Answer:
    """What is being answered: an asynchronous iterator of `Said`. Left early, decoding stops."""

    prompt_tokens: int
    gate_reply: GateReply | None
    parts: AsyncIterator[Said]


def open_gate(crisis: CrisisSection) -> Gate | None:
    """The gate as configured; None if it is off.

    Raises:
      UsageError: the region has no hotline.
      OSError: the log cannot be written.
    """
    if not crisis.gate:
        return None
    log = Path(crisis.log) if crisis.log else None
    if log is not None:
        log.open("a", encoding="utf-8").close()
    return Gate(crisis.region, log, crisis.classifier)


class Service:
    """A loaded model. `close` ends its thread."""

    def __init__(self, config: ServeConfig) -> None:
        if config.model.startswith(("http://", "https://")):
            raise UserError(f"{config.model}: is served already; serve a Hugging Face folder, a checkpoint or a run")
        self.gate = open_gate(config.crisis)
        stored = open_model(config.model)
        stored.check_shapes()
        self.name = config.name or Path(config.model).absolute().name
        self.tokenizer = load_tokenizer(stored.tokenizer_folder)
        self._limits = config.limits
        self._prompt = chosen_prompt(config.prompt, stored.prompt, config.thinking)
        self._places = stored.config.max_positions
        self._bytes = token_bytes_from_tokenizer(self.tokenizer, stored.config.vocab_size)
        self._opened = opened_text(self.tokenizer, self._prompt.thinking)  # a broken template is an error now
        self._most_bytes = self._places * max(len(token or b"") for token in self._bytes)  # of a message that may fit
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="read")
        self._reading = 0
        engine = load_engine(stored, config.compute_dtype, config.mesh)
        self._batcher = Batcher(engine, config.limits.rows, config.limits.waiting)

    def close(self, seconds: float) -> None:
        """Refuse new requests; let running ones finish for so long."""
        self._batcher.close(seconds)
        self._readers.shutdown(wait=False, cancel_futures=True)

    def token_text(self, token: int) -> tuple[str, list[int] | None]:
        """A token as text, and its bytes (None for ids that are not text)."""
        own = self._bytes[token] if token < len(self._bytes) else None
        if own is None:
            return self.tokenizer.convert_ids_to_tokens(token) or "", None
        return own.decode("utf-8", errors="replace"), list(own)

    async def answer(self, wanted: Wanted) -> Answer:
        """Begin to answer. The conversation is read in threads: the server answers others meanwhile.

        Raises:
          TooLongError: the conversation does not fit the context.
          BusyError, ClosingError: the request is refused.
          UserError: the chat template refuses these turns.
        """
        if self._reading >= self._limits.waiting + _READERS:
            raise BusyError
        self._reading += 1
        try:
            prompt, reply = await asyncio.get_running_loop().run_in_executor(self._readers, self._read, wanted.turns)
        finally:
            self._reading -= 1
        # Who is in a crisis hears the gate, before any model.
        if reply is not None:
            return Answer(len(prompt), reply, _fixed(reply.text, wanted.choices))
        # Each choice is a row with a seed of its own: the same seed gives the same choices again.
        own = [turn.content for turn in wanted.turns if turn.role == "user"]
        room = self._places - len(prompt)
        longest = min(wanted.max_new_tokens or self._limits.new_tokens, self._limits.new_tokens, room)
        seed = secrets.randbits(32) if wanted.seed is None else wanted.seed % 2**32
        settings = [
            RowSettings(longest, wanted.temperature, wanted.top_p, (seed + choice * 0x9E3779B1) % 2**32)
            for choice in range(wanted.choices)
        ]
        # The batcher's thread hands pieces over to this event loop, and may outlive it by a moment.
        pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(piece: Piece | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        job = Job(prompt, settings, wanted.alternatives or 0, deliver)
        language = language_of(own[-1]) if own else None
        speeches = [
            Speech(
                self.tokenizer,
                wanted.stop,
                OutputFilter(self.gate, language) if self.gate else None,
                wanted.alternatives is not None,
                self._opened,
            )
            for _ in settings
        ]
        self._batcher.submit(job)
        return Answer(len(prompt), None, _speak(job, speeches, pieces))

    def _read(self, turns: Sequence[Message]) -> tuple[list[int], GateReply | None]:
        """The prompt's tokens, and the gate's reply if there is one. The gate reads no message that is too long.

        A short one in a long conversation it does read: who is in a crisis gets its answer and no error.
        """
        last = turns[-1].content if turns else ""
        if len(last.encode()) > self._most_bytes:
            raise TooLongError(f"the message has {len(last.encode())} bytes: no room in a context of {self._places}")
        prompt = prompt_tokens(self.tokenizer, turns, self._prompt)
        said = _last_said(turns)
        fits = len(prompt) < self._places
        readable = fits or (
            said and len(prompt_tokens(self.tokenizer, [Message("user", said[-1])], self._prompt)) < self._places
        )
        reply = self.gate.reply(said) if self.gate and readable else None
        if reply is None and not fits:
            raise TooLongError(
                f"the conversation has {len(prompt)} tokens: no room to answer in a context of {self._places}"
            )
        return prompt, reply


def _last_said(turns: Sequence[Message]) -> list[str]:
    """The person's turns; several without an answer between them are one."""
    said: list[str] = []
    previous = ""
    for turn in turns:
        if turn.role == "user":
            if previous == "user":
                said[-1] += "\n" + turn.content
            else:
                said.append(turn.content)
        previous = turn.role
    return said


async def _fixed(text: str, choices: int) -> AsyncIterator[Said]:
    for choice in range(choices):
        yield Said(choice, Delta(text, finish="stop"), 0)


async def _speak(job: Job, speeches: Sequence[Speech], pieces: "asyncio.Queue[Piece | None]") -> AsyncIterator[Said]:
    try:
        while not all(speech.finish is not None for speech in speeches):
            piece = await pieces.get()
            if piece is None:
                raise FailedError
            speech = speeches[piece.row]
            if speech.finish is not None:
                continue
            delta = speech.feed(piece)
            if delta.finish is not None:
                job.give_up(piece.row)
            if delta.text or delta.log_probs or delta.finish is not None:
                yield Said(piece.row, delta, speech.tokens)
    finally:
        job.give_up()
