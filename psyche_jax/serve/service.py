"""From a request to its answer: template, gate, batches, and tokens as text, thought and answer apart."""

import asyncio
import queue
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from psyche_jax.data.chat import chosen_prompt, decoded_text, opened_text, prompt_tokens
from psyche_jax.data.records import Message
from psyche_jax.data.streams import length_bucket
from psyche_jax.errors import UserError
from psyche_jax.model.huggingface import load_tokenizer
from psyche_jax.rewards.reference import CLOSE, OPEN
from psyche_jax.rewards.token_bytes import token_bytes_from_tokenizer
from psyche_jax.serve.batcher import Batcher, BusyError, Job, Piece, ScoreJob
from psyche_jax.serve.config import CrisisSection, ServeConfig
from psyche_jax.serve.crisis import Assessment
from psyche_jax.serve.crisis.gate import Gate, GateReply, OutputFilter, language_of
from psyche_jax.serve.crisis.opinion import CANDIDATES, SERVED, ask_endpoint, question, read_opinion
from psyche_jax.serve.engine import PromptScores, RowSettings, load_engine
from psyche_jax.train.stored_models import open_model

Finish = Literal["stop", "length", "content_filter"]
_USUAL = 128  # tokens that a conversation may have beyond a greeting for its shapes to be compiled before serving
_READERS = 4  # threads that tokenize conversations and hold them against the gate
T = TypeVar("T")
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
        self._decode = partial(decoded_text, tokenizer)
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


class TooLongError(ValueError):
    """A conversation or a prompt that does not fit the model's context."""


class FailedError(Exception):
    """Decoding failed, or the server closed, in the middle."""


@dataclass(frozen=True)
class Wanted:
    """What a request asks for: an answer to a conversation, or how prompts (texts or token ids) go on.

    `max_new_tokens` None: as many as the limits and the context leave.
    """

    asked: Sequence[Message] | Sequence[str | Sequence[int]]
    temperature: float
    top_p: float
    choices: int = 1
    max_new_tokens: int | None = None
    stop: Sequence[str] = ()
    alternatives: int | None = None  # None: no log-probs
    seed: int | None = None


@dataclass(frozen=True)
class Said:
    """A part of one choice. They are counted through: those of a second prompt follow those of the first."""

    choice: int
    delta: Delta
    tokens: int  # of this choice so far


@dataclass(frozen=True)
class Answer:
    """What is being answered. Where `parts` are left early, decoding stops.

    `prompt_tokens`: of all prompts; `gate_reply`: the first, if the gate answered any.
    """

    prompt_tokens: int
    gate_reply: GateReply | None
    parts: AsyncGenerator[Said, None]


@dataclass(frozen=True)
class Scored:
    """One of the prompts of a request, tokens and scores."""

    place: int
    tokens: list[int]
    scores: PromptScores


@dataclass(frozen=True)
class _Read:
    """A prompt's tokens, a person's turns in it (one at least), and the gate's reply, if any."""

    tokens: list[int]
    said: list[str]
    reply: GateReply | None


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
            raise UserError(f"{config.model}: is already a server; serve a Hugging Face folder, a checkpoint or a run")
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
        self._opinion = config.crisis.second_opinion
        thought = f"\n{CLOSE}\n\n" if OPEN in self._opened and CLOSE not in self._opened else ""
        self._verdict = self.tokenizer.encode(f"{thought}答案：", add_special_tokens=False)  # how an opinion begins
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="read")
        self._reading = 0
        engine = load_engine(stored, config.compute_dtype, config.mesh)
        self._batcher = Batcher(engine, config.limits.rows, config.limits.waiting)

    def close(self, seconds: float) -> None:
        """Refuse new requests; let running ones finish for so long."""
        self._batcher.close(seconds)
        self._readers.shutdown(wait=False, cancel_futures=True)

    def warm(self) -> None:
        """Compile what the first turns of one person's conversation need, and answer nothing.

        Raises:
          UserError: the model cannot answer.
        """
        shortest = prompt_tokens(self.tokenizer, [Message("user", "你好")], self._prompt)
        most = self._places - 1
        lengths = {length_bucket(len(shortest) + more, most) for more in range(_USUAL)}
        for length in sorted(lengths):
            pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
            longest = min(self._limits.new_tokens, self._places - length)
            prompt = (shortest * (1 + length // len(shortest)))[:length]
            job = Job(prompt, [RowSettings(longest, 0.7, 0.9, 0)], 0, pieces.put)
            self._batcher.submit(job)
            if pieces.get() is None:
                raise UserError(f"{self.name}: a prompt of {length} tokens could not be answered; the log says why")
            job.give_up()

    def token_text(self, token: int) -> tuple[str, list[int] | None]:
        """A token as text, and its bytes (None for ids that are not text)."""
        own = self._bytes[token] if token < len(self._bytes) else None
        if own is None:
            return self.tokenizer.convert_ids_to_tokens(token) or "", None
        return own.decode("utf-8", errors="replace"), list(own)

    async def answer(self, wanted: Wanted) -> Answer:
        """Begin to answer. What is asked is read in threads: the server answers others meanwhile.

        Raises:
          TooLongError: the conversation, or a prompt, does not fit the context.
          BusyError, ClosingError: the request is refused.
          UserError: the chat template refuses these turns, or a prompt is empty or holds no tokens of the model's.
        """
        if isinstance(wanted.asked[0], Message):
            prompts, opened = [await self._in_thread(self._read, wanted.asked)], self._opened
        else:
            prompts, opened = [await self._in_thread(self._read_plain, *one) for one in enumerate(wanted.asked)], ""
        prompts = [await self._with_opinion(prompt) for prompt in prompts]
        pieces: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue()
        # Who is in a crisis hears the gate, before any model. For the others each choice is a row with a seed of its
        # own: the same seed gives the same choices again.
        fixed: list[Said] = []
        voices: dict[int, tuple[Job, Speech]] = {}
        seed = secrets.randbits(32) if wanted.seed is None else wanted.seed % 2**32
        for number, prompt in enumerate(prompts):
            first_choice = number * wanted.choices
            choices = range(first_choice, first_choice + wanted.choices)
            if prompt.reply is not None:
                fixed += [Said(choice, Delta(prompt.reply.text, finish="stop"), 0) for choice in choices]
                continue
            room = self._places - len(prompt.tokens)
            longest = min(wanted.max_new_tokens or self._limits.new_tokens, self._limits.new_tokens, room)
            settings = [
                RowSettings(longest, wanted.temperature, wanted.top_p, (seed + choice * 0x9E3779B1) % 2**32)
                for choice in range(wanted.choices)
            ]
            job = Job(prompt.tokens, settings, wanted.alternatives or 0, _deliver_to(pieces, first_choice))
            for choice in choices:
                output = OutputFilter(self.gate, language_of(prompt.said[-1])) if self.gate else None
                speech = Speech(self.tokenizer, wanted.stop, output, wanted.alternatives is not None, opened)
                voices[choice] = job, speech
        if voices:
            self._batcher.submit(*dict.fromkeys(job for job, _ in voices.values()))
        reply = next((prompt.reply for prompt in prompts if prompt.reply is not None), None)
        return Answer(sum(len(prompt.tokens) for prompt in prompts), reply, _speak(fixed, voices, pieces))

    async def score(self, prompts: Sequence[str | Sequence[int]], alternatives: int) -> AsyncGenerator[Scored, None]:
        """How likely the tokens of prompts are, as these are done. Nothing is said, so no gate reads them.

        Raises as `answer` does, and:
          FailedError: the model failed, or the server closed.
        """
        tokens = [await self._in_thread(self._plain_tokens, *one) for one in enumerate(prompts)]
        if long := next((own for own in tokens if len(own) > self._places), None):
            raise TooLongError(f"a prompt has {len(long)} tokens, more than the context of {self._places}")
        done: asyncio.Queue[tuple[int, PromptScores | None]] = asyncio.Queue()
        jobs = [ScoreJob(own, alternatives, _deliver_to(done, place)) for place, own in enumerate(tokens)]
        self._batcher.submit(*jobs)
        try:
            for _ in jobs:
                place, scores = await done.get()
                if scores is None:
                    raise FailedError
                yield Scored(place, tokens[place], scores)
        finally:
            for job in jobs:
                job.given_up = True

    async def _in_thread(self, read: Callable[..., T], *arguments: Any) -> T:
        """What a reader makes of a prompt.

        Raises:
          BusyError: as many wait as may.
        """
        if self._reading >= self._limits.waiting + _READERS:
            raise BusyError
        self._reading += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, read, *arguments)
        finally:
            self._reading -= 1

    async def _with_opinion(self, prompt: _Read) -> _Read:
        """What the gate lets pass is shown to whoever is asked for a second opinion, if anybody is."""
        if not (self.gate and self._opinion) or prompt.reply is not None:
            return prompt
        last = prompt.said[-1]
        opinion = await (self._own_opinion(last) if self._opinion == SERVED else ask_endpoint(self._opinion, last))
        return replace(prompt, reply=self.gate.reply(prompt.said, opinion)) if opinion else prompt

    async def _own_opinion(self, message: str) -> Assessment | None:
        """What the model thinks of a message, asked for its class; None: it answers by no letter.

        Raises:
          BusyError, ClosingError: the question is refused.
        """
        turns = [Message("user", question(message))]
        prompt = prompt_tokens(self.tokenizer, turns, replace(self._prompt, system="", instruction="")) + self._verdict
        if len(prompt) >= self._places:
            return None
        said: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue()
        job = Job(prompt, [RowSettings(1, 0.0, 1.0, 0)], CANDIDATES, _deliver_to(said, 0))
        self._batcher.submit(job)
        try:
            _, piece = await said.get()
        finally:
            job.give_up()
        best = piece.best[0] if piece is not None and piece.best else []
        return read_opinion((self.token_text(token)[0], log_prob) for token, log_prob in best)

    def _plain_tokens(self, place: int, prompt: str | Sequence[int]) -> list[int]:
        """A prompt's tokens: its text as the tokenizer reads it, control tokens too; or the ids that it is."""
        if isinstance(prompt, str) and len(prompt.encode()) > self._most_bytes:
            raise TooLongError(f"prompt {place} has {len(prompt.encode())} bytes: too long for {self._places} tokens")
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not tokens:
            raise UserError(f"prompt {place} is empty")
        if (largest := max(tokens)) >= len(self._bytes):
            raise UserError(f"prompt {place} holds token {largest}; the model has {len(self._bytes)}")
        return tokens

    def _read_plain(self, place: int, prompt: str | Sequence[int]) -> _Read:
        """A prompt that is continued. All of it counts as a message of a person's: who wrote what, nobody says."""
        tokens = self._plain_tokens(place, prompt)
        if len(tokens) >= self._places:
            raise TooLongError(f"prompt {place} has {len(tokens)} tokens: no room left in a context of {self._places}")
        text = prompt if isinstance(prompt, str) else decoded_text(self.tokenizer, prompt)
        return _Read(tokens, [text], self.gate.reply([text]) if self.gate else None)

    def _read(self, turns: Sequence[Message]) -> _Read:
        """A conversation, of which a person has the last word. The gate reads no message that is too long.

        A short one in a long conversation it does read: who is in a crisis gets its answer and no error.
        """
        last = turns[-1].content
        if len(last.encode()) > self._most_bytes:
            raise TooLongError(
                f"the message has {len(last.encode())} bytes: too long for a context of {self._places} tokens"
            )
        prompt = prompt_tokens(self.tokenizer, turns, self._prompt)
        said = _last_said(turns)
        fits = len(prompt) < self._places
        alone = prompt if fits else prompt_tokens(self.tokenizer, [Message("user", said[-1])], self._prompt)
        reply = self.gate.reply(said) if self.gate and len(alone) < self._places else None
        if reply is None and not fits:
            raise TooLongError(
                f"the conversation has {len(prompt)} tokens: no room to answer in a context of {self._places}; "
                "begin a new one"
            )
        return _Read(prompt, said, reply)


def _deliver_to(waiting: "asyncio.Queue[tuple[int, T | None]]", number: int) -> Callable[[T | None], None]:
    """For the batcher's thread, which may outlive this event loop by a moment: puts what it is given, and `number`."""
    loop = asyncio.get_running_loop()

    def deliver(given: T | None) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(waiting.put_nowait, (number, given))

    return deliver


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


async def _speak(
    fixed: Sequence[Said], voices: Mapping[int, tuple[Job, Speech]], pieces: "asyncio.Queue[tuple[int, Piece | None]]"
) -> AsyncGenerator[Said, None]:
    """`voices`: by choice; `pieces`: with the first choice of their job."""
    try:
        for said in fixed:
            yield said
        while not all(speech.finish is not None for _, speech in voices.values()):
            first, piece = await pieces.get()
            if piece is None:
                raise FailedError
            choice = first + piece.row
            job, speech = voices[choice]
            if speech.finish is not None:
                continue
            delta = speech.feed(piece)
            if delta.finish is not None:
                job.give_up(piece.row)
            if delta.text or delta.log_probs or delta.finish is not None:
                yield Said(choice, delta, speech.tokens)
    finally:
        for job, _ in voices.values():
            job.give_up()
