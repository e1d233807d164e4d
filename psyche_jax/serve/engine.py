"""Decoding for the server: the model in chunks of tokens, and requests batched together.

Rows that begin together are a batch with one key-value cache; between two chunks of a batch others may run, rows may be
given up, and what was said is handed out.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from psyche_jax.config import Dtype, MeshSection
from psyche_jax.data.streams import pad_prompts
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.decode import keep_nucleus
from psyche_jax.model.qwen2 import Execution, KVCache, Parameters, bind
from psyche_jax.model.sharding import DECODE_RULES, Sharding, check_mesh_fits, make_mesh
from psyche_jax.train.checkpoints import StoredModel

_LOG = logging.getLogger("psyche_jax.serve")
MOST_ALTERNATIVES = 20  # the most likely tokens of a step whose log-probs can be asked for
_SHORTEST = 64  # responses are given room for this many tokens, or a power of two times as many


@dataclass(frozen=True)
class RowSettings:
    """How one response is drawn. `temperature` 0 is greedy; a seed gives the same response again."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


class Chunk(NamedTuple):
    """What a batch said in one step of `Engine.advance`, rows as they were given to `Engine.begin`.

    `tokens`: int32 [rows, steps]; `mask`: bool, True on tokens up to and including the first stop token;
    `log_probs`: float32 [rows, steps], of each token under the model at temperature 1, whatever it was drawn with;
    `best`, `best_log_probs`: [rows, steps, MOST_ALTERNATIVES], the likeliest tokens; zeros if not asked for.
    On the device they are JAX's, with the rows of padding.
    """

    tokens: Any
    mask: Any
    log_probs: Any
    best: Any
    best_log_probs: Any


class _State(NamedTuple):
    """`logits` float32 [rows, vocab] of the next token; `finished` bool [rows]; `step` int32, tokens drawn so far."""

    cache: KVCache
    logits: jax.Array
    positions: jax.Array
    finished: jax.Array
    step: jax.Array


class _Draw(NamedTuple):
    """How each row is drawn: [rows]."""

    temperature: jax.Array
    top_p: jax.Array
    seed: jax.Array


class Batch:
    """Rows that are decoded together. `capacity` rows stay in memory until the last of them is done."""

    def __init__(self, state: _State, draw: _Draw, settings: Sequence[RowSettings], alternatives: bool) -> None:
        self.capacity = len(draw.seed)
        self.state = state
        self.draw = draw
        self.alternatives = alternatives
        self.left = np.array([row.max_new_tokens for row in settings] + [0] * (self.capacity - len(settings)))
        self.rows = len(settings)

    def give_up(self, row: int) -> None:
        """Nobody waits for the rest of this row."""
        self.left[row] = 0

    @property
    def done(self) -> bool:
        """No row has anything left to say."""
        return not self.left.any()


class Engine:
    """A model on its mesh. Not for several threads at once."""

    def __init__(self, config: ModelConfig, parameters: Parameters, execution: Execution, chunk: int = 8) -> None:
        self.config = config
        self._parameters = parameters
        self._places = execution.sharding.parts("batch")
        self._begin = jax.jit(partial(_begin, config, execution), static_argnames="room")
        self._advance = jax.jit(partial(_advance, config, execution, chunk), donate_argnames="state")

    def begin(
        self, prompts: Sequence[Sequence[int]], settings: Sequence[RowSettings], alternatives: bool = False
    ) -> Batch:
        """Read the prompts, one a row. `alternatives`: the likeliest tokens of each step will be wanted."""
        rows = self._places
        while rows < len(prompts):
            rows *= 2
        padding = rows - len(prompts)
        padded = pad_prompts([*prompts, *[prompts[0]] * padding], self.config.max_positions)
        room = _SHORTEST
        while room < max(row.max_new_tokens for row in settings):
            room *= 2
        whole = [*settings, *[replace(settings[0], temperature=0.0)] * padding]
        draw = _Draw(
            jnp.asarray([row.temperature for row in whole], jnp.float32),
            jnp.asarray([row.top_p for row in whole], jnp.float32),
            jnp.asarray([row.seed for row in whole], jnp.uint32),
        )
        state = self._begin(self._parameters, padded["tokens"], padded["mask"], room=room)
        return Batch(state, draw, settings, alternatives)

    def advance(self, batch: Batch) -> Chunk:
        """Decode the next few tokens of every row that has any left."""
        batch.state, said = self._advance(
            self._parameters, batch.draw, batch.left <= 0, batch.alternatives, state=batch.state
        )
        chunk = Chunk(*(part[: batch.rows] for part in jax.device_get(said)))
        # Never more than a row was allowed, though the chunk may have gone further.
        steps = np.arange(chunk.mask.shape[1])
        chunk = chunk._replace(mask=chunk.mask & (steps < batch.left[: batch.rows, None]))
        batch.left[: batch.rows] -= chunk.mask.sum(axis=1)
        stopped = np.isin(chunk.tokens, self.config.stop_token_ids) & chunk.mask
        batch.left[: batch.rows][stopped.any(axis=1)] = 0
        return chunk


def load_engine(stored: StoredModel, compute_dtype: Dtype, mesh: MeshSection) -> Engine:
    """Place a model's weights for decoding.

    Raises:
      UserError: the mesh does not fit the model, or its weights cannot be read.
    """
    sharding = Sharding(make_mesh(mesh.data, mesh.fsdp, mesh.tensor), DECODE_RULES)
    check_mesh_fits(sharding.mesh, stored.config)
    dtype = jnp.dtype(compute_dtype)
    return Engine(stored.config, stored.read_parameters(sharding, dtype), Execution(sharding, dtype))


def _begin(
    config: ModelConfig, execution: Execution, parameters: Parameters, tokens: jax.Array, mask: jax.Array, room: int
) -> _State:
    """Prefill left-padded prompts [rows, length], with room for so many tokens after each."""
    model = bind(config, parameters)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    hidden, (prompt_key, prompt_value) = model.prefill(tokens, mask.astype(jnp.int32), positions, execution)
    layers, rows, kv_heads, _, head_dim = prompt_key.shape
    own = jnp.zeros((layers, rows, kv_heads, room, head_dim), prompt_key.dtype)
    own = execution.sharding.constrain(own, None, "batch", "kv_heads", None, None)
    cache = KVCache(prompt_key, prompt_value, mask, own, own)
    logits = model.logits(hidden[:, -1])
    return _State(cache, logits, mask.sum(axis=1), jnp.zeros(rows, bool), jnp.int32(0))


def _advance(
    config: ModelConfig,
    execution: Execution,
    steps: int,
    parameters: Parameters,
    draw: _Draw,
    given_up: jax.Array,
    alternatives: jax.Array,
    state: _State,
) -> tuple[_State, Chunk]:
    """Draw and decode `steps` tokens, fewer if every row is finished before."""
    model = bind(config, parameters)
    stop = jnp.asarray(config.stop_token_ids, jnp.int32)
    rows = state.logits.shape[0]

    def unfinished(carry: tuple[jax.Array, _State, Chunk]) -> jax.Array:
        step, state, _ = carry
        return (step < steps) & ~jnp.all(state.finished)

    def advance(carry: tuple[jax.Array, _State, Chunk]) -> tuple[jax.Array, _State, Chunk]:
        step, state, chunk = carry
        # `state.logits` are of the token that is due: those of the prompt at first, of the last token drawn later.
        token = _draw(state.logits, draw, state.step)
        log_probs = jax.nn.log_softmax(state.logits, axis=-1)
        # The likeliest tokens want a sort of the vocabulary, so only batches that asked for them pay for it.
        best_log_probs, best = jax.lax.cond(
            alternatives,
            lambda: _likeliest(log_probs),
            lambda: (jnp.zeros((rows, MOST_ALTERNATIVES)), jnp.zeros((rows, MOST_ALTERNATIVES), jnp.int32)),
        )
        chunk = Chunk(
            chunk.tokens.at[:, step].set(token),
            chunk.mask.at[:, step].set(~state.finished),
            chunk.log_probs.at[:, step].set(jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]),
            chunk.best.at[:, step].set(best),
            chunk.best_log_probs.at[:, step].set(best_log_probs),
        )
        # Finished rows decode with the others, into places that nobody reads: the mask says what was said.
        positions = state.positions + state.step
        hidden, cache = model.decode(token, positions, state.step, state.cache, execution)
        finished = state.finished | jnp.isin(token, stop)
        state = _State(cache, model.logits(hidden), state.positions, finished, state.step + 1)
        return step + 1, state, chunk

    # What is given up counts as finished, so that a batch of such rows ends at once.
    empty = Chunk(
        jnp.zeros((rows, steps), jnp.int32),
        jnp.zeros((rows, steps), bool),
        jnp.zeros((rows, steps)),
        jnp.zeros((rows, steps, MOST_ALTERNATIVES), jnp.int32),
        jnp.zeros((rows, steps, MOST_ALTERNATIVES)),
    )
    state = state._replace(finished=state.finished | given_up)
    _, state, chunk = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), state, empty))
    return state, chunk


def _draw(logits: jax.Array, draw: _Draw, step: jax.Array) -> jax.Array:
    """A token for each row [rows], each by its own temperature, top-p and seed."""
    tempered = logits / jnp.where(draw.temperature > 0, draw.temperature, 1.0)[:, None]
    tempered = jax.lax.cond(
        (draw.top_p < 1).any(), lambda: keep_nucleus(tempered, draw.top_p[:, None]), lambda: tempered
    )
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(draw.seed)
    sampled = jax.vmap(jax.random.categorical)(keys, tempered)
    return jnp.where(draw.temperature > 0, sampled, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def _likeliest(log_probs: jax.Array) -> tuple[jax.Array, jax.Array]:
    count = min(MOST_ALTERNATIVES, log_probs.shape[-1])
    best_log_probs, best = jax.lax.top_k(log_probs, count)
    missing = ((0, 0), (0, MOST_ALTERNATIVES - count))
    return jnp.pad(best_log_probs, missing, constant_values=-jnp.inf), jnp.pad(best, missing)


class BusyError(Exception):
    """As many requests wait as may."""


class ClosingError(Exception):
    """The server is shutting down."""


@dataclass(frozen=True)
class Piece:
    """What one row of a job said in one chunk: `best[i]` are (token, log-prob) pairs, empty if not asked for.

    `finish`: "stop" after a stop token, which is not among the tokens; "length" after the last token allowed; else
    None.
    """

    row: int
    tokens: list[int]
    log_probs: list[float]
    best: list[list[tuple[int, float]]]
    finish: Literal["stop", "length"] | None


@dataclass(eq=False)
class Job:
    """A prompt and what is wanted of it. The batcher's thread calls `deliver` with Pieces, or with None: it failed."""

    prompt: Sequence[int]
    settings: Sequence[RowSettings]
    alternatives: int
    deliver: Callable[[Piece | None], None]
    given_up: set[int] = field(default_factory=set)

    def give_up(self, row: int | None = None) -> None:
        """Nobody waits for the rest of a row, or of all rows."""
        self.given_up.update(range(len(self.settings)) if row is None else [row])


class _Running:
    """A batch and whose rows it has."""

    def __init__(self, batch: Batch, jobs: Sequence[Job]) -> None:
        self.batch = batch
        self.jobs = jobs
        self.rows = [(job, row) for job in jobs for row in range(len(job.settings))]


class Batcher:
    """Feeds an engine. `rows`: how many may be in memory; `waiting`: how many jobs may wait."""

    def __init__(self, engine: Engine, rows: int, waiting: int) -> None:
        self._engine = engine
        self._rows = rows
        self._most_waiting = waiting
        self._waiting: deque[Job] = deque()
        self._running: list[_Running] = []
        self._closing = False
        self._abandoned = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
          BusyError, ClosingError: it is refused.
        """
        with self._changed:
            if self._closing:
                raise ClosingError
            if len(self._waiting) >= self._most_waiting:
                raise BusyError
            self._waiting.append(job)
            self._changed.notify()

    def close(self, seconds: float) -> None:
        """Refuse new jobs, fail those that wait, let running ones finish for so long, then break them off."""
        with self._changed:
            self._closing = True
            refused = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for job in refused:
            job.deliver(None)
        self._thread.join(seconds)
        self._abandoned.set()
        self._thread.join()  # a step that has begun cannot be broken off, and must not outlive the interpreter

    def _run(self) -> None:
        while not self._abandoned.is_set():
            with self._changed:
                while not (self._waiting or self._running or self._closing):
                    self._changed.wait()
                if self._closing and not self._running:
                    return
                jobs = self._take()
            if jobs:
                self._guarded(jobs, partial(self._begin, jobs))
            for running in list(self._running):
                if self._abandoned.is_set():
                    break
                if not self._guarded(running.jobs, partial(self._advance, running)):
                    self._running.remove(running)
        for running in self._running:
            for job in running.jobs:
                job.deliver(None)

    def _take(self) -> list[Job]:
        """Jobs from the front of the queue for which there is room beside what is running."""
        room = self._rows - sum(running.batch.rows for running in self._running)
        jobs: list[Job] = []
        while self._waiting and (len(self._waiting[0].settings) <= room):
            job = self._waiting.popleft()
            if len(job.given_up) < len(job.settings):
                room -= len(job.settings)
                jobs.append(job)
        return jobs

    def _guarded(self, jobs: Sequence[Job], work: Callable[[], bool]) -> bool:
        """Whether `work` leaves something to do; what goes wrong fails these jobs only."""
        try:
            return work()
        except Exception:
            _LOG.exception("a batch failed")
            for job in jobs:
                job.deliver(None)
            return False

    def _begin(self, jobs: Sequence[Job]) -> bool:
        prompts = [job.prompt for job in jobs for _ in job.settings]
        settings = [row for job in jobs for row in job.settings]
        alternatives = any(job.alternatives for job in jobs)
        self._running.append(_Running(self._engine.begin(prompts, settings, alternatives), jobs))
        return True

    def _advance(self, running: _Running) -> bool:
        live = []
        for index, (job, row) in enumerate(running.rows):
            if row in job.given_up:
                running.batch.give_up(index)
            elif running.batch.left[index] > 0:
                live.append(index)
        if not running.batch.done:
            chunk = self._engine.advance(running.batch)
            for index in live:
                job, row = running.rows[index]
                job.deliver(self._piece(chunk, index, row, job.alternatives, running.batch.left[index] <= 0))
        return not running.batch.done

    def _piece(self, chunk: Chunk, index: int, row: int, alternatives: int, finished: bool) -> Piece:
        said = chunk.mask[index]
        tokens: list[int] = chunk.tokens[index][said].tolist()
        stopped = bool(tokens) and tokens[-1] in self._engine.config.stop_token_ids
        count = len(tokens) - stopped
        best = [
            list(zip(tokens_.tolist(), log_probs.tolist(), strict=True))[:alternatives]
            for tokens_, log_probs in zip(chunk.best[index][said], chunk.best_log_probs[index][said], strict=True)
        ]
        return Piece(
            row,
            tokens[:count],
            chunk.log_probs[index][said].tolist()[:count],
            best[:count],
            "stop" if stopped else "length" if finished else None,
        )
