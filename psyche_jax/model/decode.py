"""Decoding: prompts to responses, in slots that are never idle for long.

prompts ─► read once ─► the first token of every response
        ─► slots: each step adds a token to the response of every slot; one that has ended hands its slot on
        ─► nothing waits any more, and half of the slots are idle: the others are gathered, and so on
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from psyche_jax.errors import UsageError
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.log_probs import last_positions
from psyche_jax.model.qwen2 import (
    Execution,
    KVCache,
    Parameters,
    Qwen2,
    bind,
    build,
    in_compute_dtype,
    take_rows,
)
from psyche_jax.model.sampling import Sampling, draw, uniform, whole_blocks

# The rows of a device are halved as long as so many are left: a step of fewer takes no less time.
_FEWEST_ROWS = 8


class Rollout(NamedTuple):
    """Responses, those of one prompt in consecutive rows.

    `tokens`: int32 [responses, max_new_tokens], padded after the first stop token;
    `mask`: bool, True up to and including the first stop token;
    `log_probs`: float32, of each token under the distribution it was drawn from (greedy: temperature 1), 0 off
    the mask.
    """

    tokens: jax.Array
    mask: jax.Array
    log_probs: jax.Array


def generate(
    config: ModelConfig,
    parameters: Parameters,
    prompt_tokens: jax.Array,
    prompt_mask: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    execution: Execution,
) -> Rollout:
    """Sample `generations_per_prompt` responses to each prompt, inside a jitted program: see `generate_counted`."""
    return generate_counted(config, parameters, prompt_tokens, prompt_mask, key, sampling, execution)[0]


def generate_counted(
    config: ModelConfig,
    parameters: Parameters,
    prompt_tokens: jax.Array,
    prompt_mask: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    execution: Execution,
) -> tuple[Rollout, jax.Array]:
    """Sample `generations_per_prompt` responses to each prompt, inside a jitted program.

    Args:
      config, parameters: the model.
      prompt_tokens: int32 [prompts, prompt_length], padded on either side.
      prompt_mask: bool [prompts, prompt_length], False on padding.
      key: random key; a token is drawn by it, the number of its response and its place in that one alone.
      sampling: lengths and temperature.
      execution: its mesh and dtype are used; the table of rules is the one for decoding.

    Returns:
      The responses, and how many steps they took, the first tokens counted as one.
    """
    execution = replace(execution, sharding=execution.sharding.for_decoding(), remat="none")
    # One change of layout before the loop: weights in the dtype they compute in, whole but for the tensor axis. A
    # vocabulary that is not divided goes by columns to rows: at once, the compiler would copy all of it everywhere.
    parameters = in_compute_dtype(parameters, execution.compute_dtype)
    for padded in (False, True):
        places = execution.sharding.of_parameters(build(config)[1], padded)
        parameters = jax.lax.with_sharding_constraint(parameters, places)
    model = bind(config, parameters)

    # Each prompt is read once: its keys and values serve all of its responses, where these are decoded.
    prompt_tokens, prompt_mask = (
        execution.sharding.constrain(array, "batch", None) for array in (prompt_tokens, prompt_mask)
    )
    positions = jnp.maximum(jnp.cumsum(prompt_mask, axis=1) - 1, 0)
    hidden, (prompt_key, prompt_value) = model.prefill(
        prompt_tokens, prompt_mask.astype(jnp.int32), positions, execution
    )
    hidden = jnp.take_along_axis(hidden, last_positions(prompt_mask)[:, None, None], axis=1)[:, 0]
    prompts = _Prompts(prompt_key, prompt_value, prompt_mask, prompt_mask.sum(axis=1))
    decoder = _Decoder(model, model.cut_layers(execution), sampling, execution, key, prompts)
    if (sampling.slots or 0) % (parts := decoder.parts):
        raise UsageError(f"{sampling.slots} slots cannot be spread over data × fsdp = {parts} devices; use a multiple")

    # The first token of each response follows from what was read. What is left to decode waits in a queue.
    first = decoder.first_tokens(hidden)
    if sampling.max_new_tokens == 1:
        return decoder.rollout(first), jnp.int32(1)
    queue = decoder.queue(first)
    state = decoder.fill_slots(first, queue)

    # One loop for as long as anything waits or more than half of the slots are busy, one for half of the slots, …
    waiting: _Queue | None = queue
    for rows, following in pairwise([*loop_sizes(decoder.rows), 0]):
        if waiting is None:
            state = decoder.gather(state, rows)
        state, waiting = decoder.loop(state, waiting, following), None
    return decoder.rollout(state.said), 1 + state.step


def loop_sizes(rows: int) -> list[int]:
    """How many rows of a part each loop of decoding has: all slots, half of them, …"""
    sizes = [rows]
    while (half := sizes[-1] // 2) >= _FEWEST_ROWS:
        sizes.append(half)
    return sizes


class _Prompts(NamedTuple):
    """`key`, `value`: of all layers, [layers, prompts, kv_heads, prompt_length, head_dim]; `allowed`: bool [prompts,
    prompt_length]; `lengths`: int32 [prompts]."""

    key: jax.Array
    value: jax.Array
    allowed: jax.Array
    lengths: jax.Array


class _Said(NamedTuple):
    """`tokens`: int32, `log_probs`: float32 [responses, max_new_tokens]; a log-prob of infinity: not drawn yet."""

    tokens: jax.Array
    log_probs: jax.Array


class _Slots(NamedTuple):
    """What the rows decode, all int32 [rows].

    `response`: which one, as numbered within the row's part of the batch axes; beyond the last one: none;
    `length`: how many tokens of it are drawn; `token`: the last of them.
    """

    response: jax.Array
    length: jax.Array
    token: jax.Array


class _Queue(NamedTuple):
    """What there is to decode. `order`: int32 [responses], of each part of the batch axes, those that go on after their
    first token come first; `going`: int32 [parts], how many these are; `first`: int32 [responses], all first tokens."""

    order: jax.Array
    going: jax.Array
    first: jax.Array


class _State(NamedTuple):
    """What one step hands to the next. `step`: int32, how many were done; `taken`: int32 [parts], how many of the queue
    were given a slot."""

    step: jax.Array
    slots: _Slots
    taken: jax.Array
    cache: KVCache
    said: _Said


@dataclass(frozen=True)
class _Decoder:
    """Responses to prompts that were read.

    The rows of every array of responses and slots are spread over the parts of the mesh's batch axes. Each part has its
    own prompts, their responses, its own slots and queue, so that nothing of the cache ever travels; but all do their
    steps together.

    The keys and values of a step lie at one place of all rows' cache, which goes round: `step % max_new_tokens`. Those
    of a response are the last `length` ones of its row, wherever it began. (The positions are in keys and queries.)
    """

    model: Qwen2
    layers: Sequence[Any] | None  # as `Qwen2.cut_layers` gives them
    sampling: Sampling
    execution: Execution
    key: jax.Array
    prompts: _Prompts

    def first_tokens(self, hidden: jax.Array) -> _Said:
        """The first token of all responses; `hidden` [prompts, width] predicts it."""
        prompts, each, longest = len(hidden), self.sampling.generations_per_prompt, self.sampling.max_new_tokens
        padding = self.model.config.pad_token_id or 0
        logits = self.model.logits(hidden)
        numbers = jnp.arange(prompts * each, dtype=jnp.int32).reshape(prompts, each)
        # One response of every prompt at a time: logits of all responses would be large.
        tokens, log_probs = jax.lax.map(
            lambda response: self.choose(logits, response, jnp.zeros_like(response)), numbers.T
        )
        shape = (prompts * each, longest)
        empty = _Said(jnp.full(shape, padding, jnp.int32), jnp.full(shape, jnp.inf, jnp.float32))
        said = jax.tree.map(lambda all_, new: all_.at[:, 0].set(new.T.reshape(-1)), empty, _Said(tokens, log_probs))
        return _Said(*(self.execution.sharding.constrain(array, "batch", None) for array in said))

    def choose(self, logits: jax.Array, response: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A token for each row and its log-prob. `response`: its number among all."""
        sharding = self.execution.sharding
        logits = sharding.constrain(whole_blocks(logits, sharding.mesh.shape["tensor"]), "batch", "vocab")
        return draw(logits, uniform(self.key, response, position), self.sampling)

    def queue(self, first: _Said) -> _Queue:
        """All responses whose first token does not end them."""
        tokens = first.tokens[:, 0]
        order, going = self.execution.sharding.by_part(_true_first, ~self.is_stop(tokens))
        return _Queue(order, going, tokens)

    def fill_slots(self, first: _Said, queue: _Queue) -> _State:
        """The first of the queue in the slots. Where there is a slot for each response, they are in their own order."""
        rows, none = self.rows, self.responses

        def fill(queue: _Queue) -> tuple[_Slots, jax.Array]:
            response = jnp.where(jnp.arange(rows) < queue.going, queue.order[:rows], none)
            if rows == none:
                response = jnp.where(self.is_stop(queue.first), none, jnp.arange(rows, dtype=jnp.int32))
            token = take_rows(queue.first, response)
            return _Slots(response, (response < none).astype(jnp.int32), token), jnp.minimum(queue.going, rows)

        slots, taken = self.execution.sharding.by_part(fill, queue)
        layers, _, kv_heads, _, head_dim = self.prompts.key.shape
        shape = (layers, len(slots.token), kv_heads, self.sampling.max_new_tokens, head_dim)
        own = jnp.zeros(shape, self.prompts.key.dtype)
        own = self.execution.sharding.constrain(own, None, "batch", "kv_heads", None, None)
        cache = KVCache(self.prompts.key, self.prompts.value, self.prompts.allowed, own, own)
        return _State(jnp.int32(0), slots, taken, self.with_prompts(cache, slots), first)

    def loop(self, state: _State, queue: _Queue | None, following: int) -> _State:
        """Steps until at most `following` rows of each part are busy, and nothing of the queue waits."""
        most = -(-self.responses // self.rows) * (self.sampling.max_new_tokens - 1)

        def goes_on(state: _State) -> jax.Array:
            busy = jnp.sum((state.slots.response < self.responses).reshape(self.parts, -1), axis=1)
            if queue is None:
                return busy.max() > following
            busy = jnp.where(state.taken < queue.going, self.responses, busy)
            # The number of steps is for those who read the program: no lengths of responses take more.
            return (state.step < most) & (busy.max() > following)

        with jax.named_scope("decoding_loop"):  # the name by which `psyche plan` finds it in the compiled program
            return jax.lax.while_loop(goes_on, lambda state: self.advance(state, queue), state)

    def advance(self, state: _State, queue: _Queue | None) -> _State:
        """One more token of every response that has a slot."""
        by_part, none, longest = self.execution.sharding.by_part, self.responses, self.sampling.max_new_tokens
        slots, cache = state.slots, state.cache

        # The last token of each is read, and the next one drawn.
        start = by_part(take_rows, self.prompts.lengths, self.prompt_of(slots.response))
        position, place = start + slots.length - 1, state.step % longest
        token = slots.token
        hidden, cache = self.model.decode(token, position, place, cache, self.execution, slots.length, self.layers)
        part = jnp.arange(len(slots.token)) // (len(slots.token) // self.parts)
        token, log_prob = self.choose(self.model.logits(hidden), slots.response + part * none, slots.length)

        def write(said: _Said, slots: _Slots, token: jax.Array, log_prob: jax.Array) -> _Said:
            at = (slots.response, slots.length)  # a row without a response writes nothing
            return _Said(said.tokens.at[at].set(token, mode="drop"), said.log_probs.at[at].set(log_prob, mode="drop"))

        said = by_part(write, state.said, slots, token, log_prob)

        # What has ended makes room.
        length = jnp.where(slots.response < none, slots.length + 1, 0)
        ended = self.is_stop(token) | (length == longest)
        slots, taken = _Slots(slots.response, length, token), state.taken
        if queue is None or self.rows == none:  # nothing ever waits
            slots = _Slots(jnp.where(ended, none, slots.response), jnp.where(ended, 0, length), token)
        else:
            old = slots.response
            slots, taken = by_part(self.hand_on, slots, ended, taken, queue)
            cache = self.with_prompts(cache, slots, old)
        return _State(state.step + 1, slots, taken, cache, said)

    def hand_on(self, slots: _Slots, ended: jax.Array, taken: jax.Array, queue: _Queue) -> tuple[_Slots, jax.Array]:
        """The slots of what has ended go to the next of the queue, in order; of one part."""
        none = self.responses
        free = ended & (slots.response < none)
        turn = taken + jnp.cumsum(free, dtype=jnp.int32) - 1
        following = jnp.where(turn < queue.going, take_rows(queue.order, turn), none)
        begun = _Slots(following, (following < none).astype(jnp.int32), take_rows(queue.first, following))
        slots = jax.tree.map(lambda new, old: jnp.where(free, new, old), begun, slots)
        return slots, jnp.minimum(taken + free.sum(dtype=jnp.int32), queue.going)

    def gather(self, state: _State, rows: int) -> _State:
        """The same with so many rows in each part, as many at least as are busy.

        What is busy behind them moves into free ones, a row at a time and within the cache as it is: a second, smaller
        one would have to be held beside it.
        """
        by_part, none = self.execution.sharding.by_part, self.responses

        def find(busy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            kept = jnp.arange(len(busy)) < rows
            moved, count = _true_first(busy & ~kept)
            return moved, _true_first(~busy & kept)[0], count

        moves = by_part(find, state.slots.response < none)

        def move(turn: jax.Array, arrays: Any, moves: tuple[jax.Array, jax.Array, jax.Array], axis: int) -> Any:
            moved, free, count = moves
            to = jnp.where(turn < count[0], free[turn], moved[turn])  # a part that has none left: onto itself
            row = jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, moved[turn], axis), arrays)
            return jax.tree.map(
                lambda array, row: jax.lax.dynamic_update_slice_in_dim(array, row, to, axis), arrays, row
            )

        def one(carry: tuple[jax.Array, Any, Any]) -> tuple[jax.Array, Any, Any]:
            turn, slots, own = carry
            slots = by_part(lambda slots, moves: move(turn, slots, moves, 0), slots, moves)
            own = by_part(lambda own, moves: move(turn, own, moves, 1), own, moves, axes=(1, 0), out=1)
            return turn + 1, slots, own

        count = moves[2].max()
        start = (jnp.int32(0), state.slots, (state.cache.key, state.cache.value))
        _, slots, own = jax.lax.while_loop(lambda carry: carry[0] < count, one, start)
        slots = by_part(lambda slots: jax.tree.map(lambda array: array[:rows], slots), slots)
        cache = KVCache(self.prompts.key, self.prompts.value, self.prompts.allowed, *own)
        return state._replace(slots=slots, cache=self.with_prompts(cache, slots))

    def with_prompts(self, cache: KVCache, slots: _Slots, before: jax.Array | None = None) -> KVCache:
        """`cache` with what the rows attend to of prompts.

        Where rows are many, that is the prompts as they were read, each for all of its responses at once. Where rows
        are fewer than prompts, each has a copy. `before`: which responses the rows of `cache` were set to, if so.
        """
        by_part, rows = self.execution.sharding.by_part, len(slots.token) // self.parts
        if rows == self.responses:  # all responses, in their own order
            return cache
        if rows > self.responses // self.sampling.generations_per_prompt:

            def find(response: jax.Array) -> tuple[jax.Array, jax.Array]:
                row_of = jnp.zeros(self.responses, jnp.int32).at[response].set(jnp.arange(rows), mode="drop")
                return row_of, response

            return cache._replace(rows=by_part(find, slots.response))
        prompt = self.prompt_of(slots.response)
        read = (self.prompts.key, self.prompts.value)
        allowed = by_part(take_rows, self.prompts.allowed, prompt)
        if before is None:
            key, value = by_part(partial(take_rows, axis=1), read, prompt, axes=(1, 0), out=1)
            return cache._replace(prompt_key=key, prompt_value=value, prompt_allowed=allowed)

        # Copied one by one, for the rows that decode something new: mostly there are none.
        order, count = by_part(_true_first, slots.response != before)

        def copy(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            turn, caches = carry

            def one(caches: Any, read: Any, prompt: jax.Array, order: jax.Array, count: jax.Array) -> Any:
                row = jnp.where(turn < count[0], order[turn], rows)
                return jax.tree.map(
                    lambda to, of: to.at[:, row].set(of[:, prompt[order[turn]]], mode="drop"), caches, read
                )

            return turn + 1, by_part(one, caches, read, prompt, order, count, axes=(1, 1, 0, 0, 0), out=1)

        caches = (cache.prompt_key, cache.prompt_value)
        _, (key, value) = jax.lax.while_loop(lambda carry: carry[0] < count.max(), copy, (jnp.int32(0), caches))
        return cache._replace(prompt_key=key, prompt_value=value, prompt_allowed=allowed)

    def rollout(self, said: _Said) -> Rollout:
        """What was drawn, as it is handed out."""
        mask = said.log_probs != jnp.inf
        return Rollout(said.tokens, mask, jnp.where(mask, said.log_probs, 0.0))

    def prompt_of(self, response: jax.Array) -> jax.Array:
        """Which of its part's prompts a response of that number answers; where there is none: any."""
        return jnp.minimum(response, self.responses - 1) // self.sampling.generations_per_prompt

    def is_stop(self, token: jax.Array) -> jax.Array:
        """Whether a token ends its response."""
        return jnp.isin(token, jnp.asarray(self.model.config.stop_token_ids, jnp.int32))

    @property
    def parts(self) -> int:
        """Over how many devices, or groups of them, rows are spread."""
        return self.execution.sharding.parts("batch")

    @property
    def responses(self) -> int:
        """How many responses a part has."""
        return len(self.prompts.lengths) * self.sampling.generations_per_prompt // self.parts

    @property
    def rows(self) -> int:
        """How many slots a part has."""
        return min(self.responses, (self.sampling.slots or self.responses * self.parts) // self.parts)


def _true_first(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The numbers of rows, those where `mask` [rows] is True first, in their order, and how many these are: [1]."""
    return jnp.argsort(~mask, stable=True).astype(jnp.int32), jnp.sum(mask, dtype=jnp.int32)[None]
