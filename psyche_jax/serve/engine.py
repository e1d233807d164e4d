"""Decoding for the server: requests share a cache, which each joins when it comes and leaves when it has ended.

waiting ─► a free slot of a batch, which grows if there is none ─► its prompt is read ─► a chunk of tokens for all ─► …

Between two chunks what was said is handed out, rows are given up, and others join.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from psyche_jax.config import Dtype, MeshSection
from psyche_jax.data.streams import pad_prompts
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.linear import Parameters
from psyche_jax.model.log_probs import LikeliestScores, likeliest_scores
from psyche_jax.model.qwen2 import Execution, KVCache, bind, take_rows
from psyche_jax.model.sampling import keep_nucleus, tempered
from psyche_jax.model.sharding import DECODE_RULES, Sharding, check_mesh_fits, make_mesh
from psyche_jax.train.stored_models import StoredModel

MOST_ALTERNATIVES = 20  # the most likely tokens of a step whose log-probs can be asked for
_SHORTEST = 64  # a cache has places for prompts and for responses of so many tokens, or a power of two times as many
_WASTE = 4  # a shared cache is so many times as large, at most, as those that each request would have by itself …
_CHEAP = 4  # … unless it is but a quarter as large as the weights


@dataclass(frozen=True)
class RowSettings:
    """How one response is drawn. `temperature` 0 is greedy; a seed gives the same response again."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


class Chunk(NamedTuple):
    """What a batch said in one step of `Engine.advance`, a row for each slot.

    `tokens`: int32 [rows, steps]; `mask`: bool, True on tokens up to and including the first stop token, or the last
    one allowed;
    `log_probs`: float32 [rows, steps], of each token under the model at temperature 1, whatever it was drawn with;
    `best`, `best_log_probs`: [rows, steps, MOST_ALTERNATIVES], the likeliest tokens; zeros if not asked for.
    On the device they are JAX's.
    """

    tokens: Any
    mask: Any
    log_probs: Any
    best: Any
    best_log_probs: Any


def likeliest(tokens: np.ndarray, log_probs: np.ndarray, count: int | None) -> list[list[tuple[int, float]]]:
    """Of each place the first `count` of its likeliest tokens, with their log-probs."""
    places = zip(tokens.tolist(), log_probs.tolist(), strict=True)
    return [list(zip(*place, strict=True))[:count] for place in places]


class PromptScores(NamedTuple):
    """How likely a prompt of n tokens is.

    `log_probs`: float32 [n - 1], of each token but the first, given those before it; `best`, `best_log_probs`:
    [n, count], the likeliest tokens after each.
    """

    log_probs: np.ndarray
    best: np.ndarray
    best_log_probs: np.ndarray


class _State(NamedTuple):
    """`hidden` [rows, width] predicts the token that is due; `place`: int32, where in the ring the next one goes."""

    cache: KVCache
    hidden: jax.Array
    place: jax.Array


class _Shape(NamedTuple):
    """Of a cache: its slots, and the places that each has for a prompt and for a response."""

    rows: int
    prompt: int
    response: int

    @property
    def places(self) -> int:
        """Keys and values of so many tokens."""
        return self.rows * (self.prompt + self.response)


class _Rows(NamedTuple):
    """What is in each slot, [rows]: the lengths of its prompt and of its response as yet, how that is drawn."""

    prompt: Any
    said: Any
    temperature: Any
    top_p: Any
    seed: Any


class Batch:
    """Responses that are decoded together, each in a slot of one cache.

    `left` [rows]: how many tokens each may still get; 0 gives a row up, and frees its slot.
    """

    def __init__(self) -> None:
        self.shape = _Shape(0, 0, 0)
        self.state: _State | None = None
        self.rows = _Rows(*(np.zeros(0, dtype) for dtype in (np.int32, np.int32, np.float32, np.float32, np.uint32)))
        self.left = np.zeros(0, np.int32)


class Engine:
    """A model on its mesh. Not for several threads at once."""

    def __init__(self, config: ModelConfig, parameters: Parameters, execution: Execution, chunk: int = 8) -> None:
        self.config = config
        self._parameters = parameters
        sharding = execution.sharding
        self._parts = sharding.parts("batch")
        kv_width = config.num_key_value_heads * config.head_dim
        self._cheap = config.num_parameters // _CHEAP // (2 * config.num_hidden_layers * kv_width)
        # Said here once for all programs, so that what one hands to another never compiles that again.
        spread = sharding.named(None, "batch", "kv_heads", None, None)
        cache = KVCache(spread, spread, sharding.named("batch", None), spread, spread)  # type: ignore[arg-type]
        state = _State(cache, sharding.named("batch", None), sharding.named())  # type: ignore[arg-type]
        whole = sharding.named(None, None, "kv_heads", None, None)
        self._read = jax.jit(partial(_read, config, execution), out_shardings=(sharding.named(), (whole, whole)))
        self._score = jax.jit(
            partial(_score, config, execution), static_argnames="count", out_shardings=sharding.named()
        )
        self._enter = jax.jit(partial(_enter, execution), donate_argnames="state", out_shardings=state)
        self._grow = jax.jit(partial(_grown, config, execution), static_argnames="shape", out_shardings=state)
        self._advance = jax.jit(
            partial(_advance, config, execution, chunk), donate_argnames="state", out_shardings=(state, None)
        )

    def takes(self, batch: Batch, prompts: Sequence[Sequence[int]], settings: Sequence[RowSettings]) -> bool:
        """Whether these may join a batch: there is room for them, or it can be made without wasting much."""
        shape = self._shape_with(batch, prompts, settings)
        if shape == batch.shape:
            return True
        live = batch.left > 0
        lengths = [*batch.rows.prompt[live], *map(len, prompts)]
        longest = [*(batch.rows.said + batch.left)[live], *(row.max_new_tokens for row in settings)]
        alone = self._parts * sum(map(_places, [*lengths, *longest]))
        return shape.places <= max(_WASTE * alone, self._cheap)

    def join(self, batch: Batch, prompts: Sequence[Sequence[int]], settings: Sequence[RowSettings]) -> list[int]:
        """Read the prompts, one a row, each but once where several are the same. Returns the slots that they get."""
        shape = self._shape_with(batch, prompts, settings)
        if shape != batch.shape:
            batch.state = jax.block_until_ready(self._grow(batch.state, shape=shape))
            added = shape.rows - batch.shape.rows
            batch.rows = _Rows(*(np.pad(array, (0, added)) for array in batch.rows))
            batch.left = np.pad(batch.left, (0, added))
            batch.shape = shape
        slots = np.flatnonzero(batch.left == 0)[: len(prompts)]
        own = list(map(tuple, prompts))
        distinct = sorted(set(own), key=lambda prompt: (len(prompt), prompt))
        for start in range(0, len(distinct), self._parts):  # a prompt for each device, or group of them
            group = distinct[start : start + self._parts]
            padded = pad_prompts([*group, *group[:1] * (self._parts - len(group))], self.config.max_positions)
            read = jax.block_until_ready(self._read(self._parameters, padded["tokens"], padded["mask"]))
            source = np.full(shape.rows, -1, np.int32)
            for slot, prompt in zip(slots, own, strict=True):
                source[slot] = group.index(prompt) if prompt in group else -1
            batch.state = self._enter(read, padded["mask"], self._by_part(source), state=batch.state)
        for slot, prompt, row in zip(slots, own, settings, strict=True):
            for array, value in zip(batch.rows, (len(prompt), 0, row.temperature, row.top_p, row.seed), strict=True):
                array[slot] = value
            batch.left[slot] = row.max_new_tokens
        return slots.tolist()

    def advance(self, batch: Batch, alternatives: bool = False) -> Chunk:
        """Decode the next few tokens of every row that has any left. `alternatives`: the likeliest ones are wanted."""
        rows, left = self._by_part((batch.rows, batch.left))
        batch.state, said = self._advance(self._parameters, rows, left, alternatives, state=batch.state)
        chunk = jax.tree.map(
            lambda array: array.reshape(self._parts, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape),
            jax.device_get(said),
        )
        count = chunk.mask.sum(axis=1, dtype=np.int32)
        batch.rows = batch.rows._replace(said=batch.rows.said + count)
        stopped = np.isin(chunk.tokens, self.config.stop_token_ids) & chunk.mask
        batch.left = np.where(stopped.any(axis=1), 0, batch.left - count)
        return chunk

    def score(self, prompts: Sequence[Sequence[int]], alternatives: int = 0) -> list[PromptScores]:
        """How likely prompts are by themselves. So many alternatives come with each place, one at least."""
        rows = self._parts << (-(-len(prompts) // self._parts) - 1).bit_length()
        padded = pad_prompts([*prompts, *[prompts[0]] * (rows - len(prompts))], self.config.max_positions)
        count = 1 if alternatives <= 1 else MOST_ALTERNATIVES
        scores = jax.device_get(self._score(self._parameters, padded["tokens"], padded["mask"], count=count))
        own = [[part[row, -len(prompt) :] for part in scores] for row, prompt in enumerate(prompts)]
        return [PromptScores(log_probs[:-1], *best) for log_probs, *best in own]

    def _by_part(self, tree: Any) -> Any:
        """Arrays of slots as rows lie on the mesh: slots are dealt out to its parts, so that growing moves none."""
        return jax.tree.map(lambda array: array.reshape(-1, self._parts).T.ravel(), tree)

    def _shape_with(self, batch: Batch, prompts: Sequence[Sequence[int]], settings: Sequence[RowSettings]) -> _Shape:
        """What the batch's cache must be to hold these too: never less than it is."""
        rows = max(batch.shape.rows, self._parts)
        while rows < np.count_nonzero(batch.left) + len(prompts):
            rows *= 2
        prompt = _places(max(map(len, prompts)))
        response = _places(max(row.max_new_tokens for row in settings))
        return _Shape(rows, max(batch.shape.prompt, prompt), max(batch.shape.response, response))


def load_engine(stored: StoredModel, compute_dtype: Dtype, mesh: MeshSection) -> Engine:
    """Place a model's weights for decoding.

    Raises:
      UserError: the mesh does not fit the model, or its weights cannot be read.
    """
    sharding = Sharding(make_mesh(mesh.data, mesh.fsdp, mesh.tensor), DECODE_RULES)
    check_mesh_fits(sharding, stored.config)
    dtype = jnp.dtype(compute_dtype)
    return Engine(stored.config, stored.read_parameters(sharding, dtype), Execution(sharding, dtype))


def _places(tokens: int) -> int:
    """In how many places so many tokens are kept: 64, 128, 256, …"""
    return max(_SHORTEST, 1 << (int(tokens) - 1).bit_length())


def _read(
    config: ModelConfig, execution: Execution, parameters: Parameters, tokens: jax.Array, mask: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Prefill left-padded prompts [prompts, length]: their last hidden states, and what `Qwen2.prefill` keeps."""
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    hidden, read = bind(config, parameters).prefill(tokens, mask.astype(jnp.int32), positions, execution)
    return hidden[:, -1], read


def _score(
    config: ModelConfig, execution: Execution, parameters: Parameters, tokens: jax.Array, mask: jax.Array, count: int
) -> LikeliestScores:
    """What left-padded prompts [prompts, length] say of the token after each place; after the last there is none."""
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    model = bind(config, parameters)
    hidden = model(tokens, mask.astype(jnp.int32), positions, execution)
    return likeliest_scores(model, hidden, jnp.roll(tokens, -1, axis=1), execution, count)


def _enter(
    execution: Execution,
    read: tuple[jax.Array, tuple[jax.Array, jax.Array]],
    mask: jax.Array,
    source: jax.Array,
    state: _State,
) -> _State:
    """`state` with prompts that were read in some of its slots. `source` [rows]: which one, or -1: as it was."""
    cache, length = state.cache, mask.shape[1]
    joins = source >= 0
    hidden, (key, value) = read

    def enter(old: jax.Array, new: jax.Array) -> jax.Array:
        new = execution.sharding.constrain(take_rows(new, source, axis=1), None, "batch", "kv_heads", None, None)
        kept = old[..., :length, :]
        return old.at[..., :length, :].set(jnp.where(joins[:, None, None, None], new, kept))

    unused = cache.prompt_allowed.shape[1] - length
    allowed = jnp.pad(take_rows(mask, source), ((0, 0), (0, unused)))
    cache = cache._replace(
        prompt_key=enter(cache.prompt_key, key),
        prompt_value=enter(cache.prompt_value, value),
        prompt_allowed=jnp.where(joins[:, None], allowed, cache.prompt_allowed),
    )
    return state._replace(cache=cache, hidden=jnp.where(joins[:, None], take_rows(hidden, source), state.hidden))


def _grown(config: ModelConfig, execution: Execution, state: _State | None, shape: _Shape) -> _State:
    """The same with more slots, or more places in them; None: an empty one."""

    def empty(places: int) -> jax.Array:
        size = (config.num_hidden_layers, shape.rows, config.num_key_value_heads, places, config.head_dim)
        return jnp.zeros(size, execution.compute_dtype)

    prompt, own = empty(shape.prompt), empty(shape.response)
    cache = KVCache(prompt, prompt, jnp.zeros((shape.rows, shape.prompt), bool), own, own)
    hidden = jnp.zeros((shape.rows, config.hidden_size), execution.compute_dtype)
    if state is None:
        return _State(cache, hidden, jnp.int32(0))
    old = state.cache
    ring = [jnp.roll(array, -state.place, axis=3) for array in (old.key, old.value)]  # as if it had begun at place 0

    def fill(new: Any, old: Any) -> Any:  # from the first of its rows and places on
        return jax.tree.map(lambda new, old: new.at[tuple(map(slice, old.shape))].set(old), new, old)

    by_part = execution.sharding.by_part
    arrays = by_part(fill, [prompt, prompt, own, own], [old.prompt_key, old.prompt_value, *ring], axes=(1, 1), out=1)
    allowed, hidden = by_part(fill, (cache.prompt_allowed, hidden), (old.prompt_allowed, state.hidden))
    prompt_key, prompt_value, key, value = arrays
    place = old.key.shape[3] % shape.response
    return _State(KVCache(prompt_key, prompt_value, allowed, key, value), hidden, jnp.int32(place))


def _advance(
    config: ModelConfig,
    execution: Execution,
    steps: int,
    parameters: Parameters,
    slots: _Rows,
    left: jax.Array,
    alternatives: jax.Array,
    state: _State,
) -> tuple[_State, Chunk]:
    """Draw and decode `steps` tokens, fewer if every row is finished before. `left` [rows]: how many each may have."""
    model = bind(config, parameters)
    stop = jnp.asarray(config.stop_token_ids, jnp.int32)
    rows, places = len(left), state.cache.key.shape[3]

    def unfinished(carry: tuple[jax.Array, jax.Array, _State, Chunk]) -> jax.Array:
        step, left, _, _ = carry
        return (step < steps) & jnp.any(left > 0)

    def advance(carry: tuple[jax.Array, jax.Array, _State, Chunk]) -> tuple[jax.Array, jax.Array, _State, Chunk]:
        step, left, state, chunk = carry
        said = slots.said + step
        logits = model.logits(state.hidden)
        token = _draw(logits, slots, said)
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        # The likeliest tokens want a sort of the vocabulary, so only batches that asked for them pay for it.
        best_log_probs, best = jax.lax.cond(
            alternatives,
            lambda: tuple(jax.lax.top_k(log_probs, MOST_ALTERNATIVES)),
            lambda: (jnp.zeros((rows, MOST_ALTERNATIVES)), jnp.zeros((rows, MOST_ALTERNATIVES), jnp.int32)),
        )
        chunk = Chunk(
            chunk.tokens.at[:, step].set(token),
            chunk.mask.at[:, step].set(left > 0),
            chunk.log_probs.at[:, step].set(jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]),
            chunk.best.at[:, step].set(best),
            chunk.best_log_probs.at[:, step].set(best_log_probs),
        )
        # Idle rows decode with the others, and nobody reads what: the mask says what was said, and whoever gets the
        # slot sees nothing from before.
        lengths = jnp.where(left > 0, said + 1, 0)
        hidden, cache = model.decode(token, slots.prompt + said, state.place, state.cache, execution, lengths)
        left = jnp.where(jnp.isin(token, stop), 0, jnp.maximum(left - 1, 0))
        return step + 1, left, _State(cache, hidden, (state.place + 1) % places), chunk

    empty = Chunk(
        jnp.zeros((rows, steps), jnp.int32),
        jnp.zeros((rows, steps), bool),
        jnp.zeros((rows, steps)),
        jnp.zeros((rows, steps, MOST_ALTERNATIVES), jnp.int32),
        jnp.zeros((rows, steps, MOST_ALTERNATIVES)),
    )
    _, _, state, chunk = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), left, state, empty))
    return state, chunk


def _draw(logits: jax.Array, slots: _Rows, said: jax.Array) -> jax.Array:
    """A token for each row [rows], each by its own temperature, top-p, seed, and how many it has said."""
    likely = tempered(logits, jnp.where(slots.temperature > 0, slots.temperature, 1.0)[:, None])
    likely = jax.lax.cond((slots.top_p < 1).any(), lambda: keep_nucleus(likely, slots.top_p[:, None]), lambda: likely)
    keys = jax.vmap(lambda seed, said: jax.random.fold_in(jax.random.key(seed), said))(slots.seed, said)
    sampled = jax.vmap(jax.random.categorical)(keys, likely)
    return jnp.where(slots.temperature > 0, sampled, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
