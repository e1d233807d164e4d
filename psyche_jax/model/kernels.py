"""Attention by the kernel that suits the device: causal over whole sequences, where all give the same result; and, for
decoding on TPUs, each row's over its own places of a ring."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec

from psyche_jax.errors import UsageError
from psyche_jax.model.attention import MASKED, Source, Weighed, attention, by_head, causal_mask
from psyche_jax.model.sharding import Sharding

AttentionKernel: TypeAlias = Literal["auto", "xla", "blocked", "splash", "cudnn"]

_QUERY_BLOCK = 128  # of the blocked kernel
_KEPT_BLOCKS = 8  # beyond so many, the blocked kernel computes scores again in backward instead of keeping them
_LANES = 128
_SPLASH_BLOCK = 512
RING_BLOCKS = (256, _LANES)  # of places that the kernel of decoding brings at once
_RING_BYTES = 8 * 2**20  # of keys and values that it holds in a chip's own memory


class _Needs(NamedTuple):
    """What a kernel for bfloat16 needs: lengths are padded to multiples, what else is missing is refused."""

    platform: str
    length: int
    head_dim: int


# Splash pads heads of half the lanes; what else it can pad was not measured.
_NEEDS = {"splash": _Needs("tpu", _LANES, 64), "cudnn": _Needs("gpu", 2, 8)}


@dataclass(frozen=True)
class SharedPrompt:
    """Rows that hold a prompt and then its responses, each of which sees the prompt and itself.

    `prompt_length + responses * response_length` positions a row.
    """

    prompt_length: int
    responses: int
    response_length: int

    @property
    def length(self) -> int:
        """Positions of a row."""
        return self.prompt_length + self.responses * self.response_length


def self_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    kernel: AttentionKernel,
    sharding: Sharding,
    shared: SharedPrompt | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Each position attends to itself and to earlier ones of its segment.

    Args:
      query: [batch, sequence, heads, head_dim]; key, value: [batch, sequence, kv_heads, head_dim].
      segments: int32 [batch, sequence]; 0 is padding, whose results are finite and mean nothing.
      kernel: `xla` holds all scores at once; `blocked` leaves out keys that no query of a block may see, and for long
        rows computes scores again in backward; `splash` is Pallas' kernel for TPUs, `cudnn` that for GPUs (not for
        shared prompts), both for bfloat16; `auto` chooses by device, dtype and shape.
      sharding: splash runs on each device's part, batch over the batch axes and heads over `tensor`.
      shared: rows are a prompt with its responses, which do not see each other.
      interpret: run splash without a TPU, slowly, for tests.

    Returns:
      [batch, sequence, heads, head_dim] in the dtype of `query`.

    Raises:
      UsageError: splash or cudnn cannot work on this device, with this head_dim, or in float32.
    """
    if kernel == "auto":
        kernel = _choose(query, sharding, shared)
    if shared is not None and kernel != "splash":
        return _shared(query, key, value, segments, "xla" if kernel == "xla" else "blocked", shared)
    if kernel not in _NEEDS:
        return _causal(query, by_head(key), by_head(value), segments, kernel, None)
    if not interpret:
        _check(kernel, query, sharding.platform)
    # Batches come in lengths of many kinds: one that does not fit must not end a run on its way.
    length = query.shape[1]
    behind = ((0, 0), (0, -length % _NEEDS[kernel].length))
    query, key, value = (jnp.pad(array, (*behind, (0, 0), (0, 0))) for array in (query, key, value))
    segments = jnp.pad(segments, behind)
    if kernel == "splash":
        output = _splash(query, key, value, segments, sharding, shared, interpret)
    else:
        output = jax.nn.dot_product_attention(
            query, key, value, mask=causal_mask(segments)[:, None], implementation="cudnn"
        )
    return output[:, :length]


def _check(kernel: AttentionKernel, query: jax.Array, platform: str) -> None:
    """Raise UsageError unless `kernel`, of those with needs, can be used."""
    needs = _NEEDS[kernel]
    if query.shape[3] % needs.head_dim:
        reason = f"needs a head_dim in multiples of {needs.head_dim}, not {query.shape[3]}; use auto"
    elif query.dtype == jnp.float32:
        reason = "multiplies float32 in one bfloat16 pass; use auto, or model.compute_dtype=bfloat16"
    elif platform != needs.platform:
        reason = f"is for a {needs.platform.upper()}, not a {platform.upper()}; use auto"
    else:
        return
    raise UsageError(f"model.attention: {kernel} {reason}")


def _choose(query: jax.Array, sharding: Sharding, shared: SharedPrompt | None) -> AttentionKernel:
    platform = sharding.platform
    if query.dtype == jnp.bfloat16:  # these do not multiply float32 as float32
        if platform == "tpu" and query.shape[1] % _LANES == 0 and query.shape[3] % _NEEDS["splash"].head_dim == 0:
            return "splash"
        if platform == "gpu" and query.shape[3] % _NEEDS["cudnn"].head_dim == 0 and shared is None:
            return "cudnn"
    longest = query.shape[1] if shared is None else max(shared.prompt_length, shared.response_length)
    return "blocked" if longest >= 2 * _QUERY_BLOCK else "xla"


def _causal(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    kernel: AttentionKernel,
    before: Source | None,
) -> jax.Array:
    """Causal attention within each segment, and to all that `before` allows; key and value by head."""
    length = query.shape[1]
    size = length if kernel == "xla" else _QUERY_BLOCK

    def block(
        query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, before: Source | None, start: int
    ) -> jax.Array:
        stop = start + query.shape[1]
        allowed = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)
        same = segments[:, start:stop, None] == segments[:, None, :stop]
        allowed = allowed & same & (segments[:, None, :stop] > 0)
        own = Source(key[:, :, :stop], value[:, :, :stop], allowed)
        return attention(query, (own,) if before is None else (before, own))

    if length > _KEPT_BLOCKS * size:
        block = jax.checkpoint(block, static_argnums=5)
    outputs = [
        block(query[:, start : start + size], key, value, segments, before, start) for start in range(0, length, size)
    ]
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def _shared(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    kernel: AttentionKernel,
    shared: SharedPrompt,
) -> jax.Array:
    """The prompt on its own, then all responses, each as a row of its own that also attends to its prompt."""
    batch, prompt = query.shape[0], shared.prompt_length

    def responses(array: jax.Array) -> jax.Array:
        return array[:, prompt:].reshape(batch * shared.responses, shared.response_length, *array.shape[2:])

    key_of_prompt, value_of_prompt = by_head(key[:, :prompt]), by_head(value[:, :prompt])
    of_prompt = segments[:, :prompt]
    first = _causal(query[:, :prompt], key_of_prompt, value_of_prompt, of_prompt, kernel, None)
    before = Source(key_of_prompt, value_of_prompt, (of_prompt > 0)[:, None])
    rest = _causal(
        responses(query), by_head(responses(key)), by_head(responses(value)), responses(segments), kernel, before
    )
    return jnp.concatenate([first, rest.reshape(batch, -1, *rest.shape[2:])], axis=1)


class _SharedPromptMask(splash_attention_mask.Mask):
    """`SharedPrompt` as splash wants it: any block of the mask on demand, never the whole; padded to `length`."""

    def __init__(self, shared: SharedPrompt, length: int) -> None:
        self._shared, self._length = shared, length

    @property
    def shape(self) -> tuple[int, int]:
        """Queries and keys."""
        return self._length, self._length

    def __getitem__(self, index: Any) -> np.ndarray:
        queries, keys = (np.arange(self._length)[part] for part in index)
        queries, keys = queries[:, None], keys[None, :]

        def response(position: np.ndarray) -> np.ndarray:
            return (position - self._shared.prompt_length) // self._shared.response_length

        in_prompt = keys < self._shared.prompt_length
        return (keys <= queries) & (in_prompt | (response(queries) == response(keys)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SharedPromptMask) and (self._shared, self.shape) == (other._shared, other.shape)

    def __hash__(self) -> int:
        return hash((self._shared, self._length))


def _splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    sharding: Sharding,
    shared: SharedPrompt | None,
    interpret: bool,
) -> jax.Array:
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    size = next(size for size in (_SPLASH_BLOCK, 256, _LANES) if length % size == 0)
    blocks = splash_attention_kernel.BlockSizes(
        block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size
    )
    if shared is None:
        of_head: splash_attention_mask.Mask = splash_attention_mask.CausalMask((length, length))
    else:
        of_head = _SharedPromptMask(shared, length)
    mask = splash_attention_mask.MultiHeadMask([of_head] * (heads // kv_heads))
    with jax.ensure_compile_time_eval():
        kernel = splash_attention_kernel.make_splash_mqa_single_device(mask, block_sizes=blocks, interpret=interpret)

    def on_device(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
        ids = splash_attention_kernel.SegmentIds(segments, segments)
        over_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
        return jax.vmap(over_heads)(query, key, value, ids)

    batch_axes, head_axis = sharding.rules["batch"], sharding.rules["kv_heads"]
    spec = PartitionSpec(batch_axes, head_axis)
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    # Splash leaves the scale to its caller.
    output = jax.shard_map(
        on_device,
        mesh=sharding.mesh,
        in_specs=(spec, spec, spec, PartitionSpec(batch_axes)),
        out_specs=spec,
        check_vma=False,
    )(grouped * np.float32(head_dim**-0.5).astype(query.dtype), by_head(key), by_head(value), segments)
    return output.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def ring_block(cache_shape: tuple[int, ...], dtype: jnp.dtype, kernel: AttentionKernel, sharding: Sharding) -> int:
    """How many places of the ring `ring_attention` brings at once; 0 where another way has to be taken.

    `cache_shape`: [layers, rows, kv_heads, places, head_dim]; `dtype`: that of its numbers.
    """
    _, rows, kv_heads, places, head_dim = cache_shape
    asked = kernel == "splash" and sharding.platform == "tpu"
    # It multiplies in one bfloat16 pass, on whole lanes, and holds all that a row has said.
    fits = dtype == jnp.bfloat16 and head_dim % _LANES == 0 and 4 * places * head_dim <= _RING_BYTES
    if not (asked and fits and sharding.divides(rows, "batch") and sharding.divides(kv_heads, "kv_heads")):
        return 0
    return next((size for size in RING_BLOCKS if places % size == 0), 0)


def ring_attention(
    query: jax.Array,
    largest: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array,
    place: jax.Array,
    lengths: jax.Array,
    block: int,
    sharding: Sharding,
    interpret: bool = False,
) -> tuple[jax.Array, Weighed]:
    """Each row attends to its own last places of a ring, of which nothing else is read: a Pallas kernel for TPUs.

    (JAX's own kernels for decoding read pages of one layer, from their first place on, and do not tell the largest
    score, without which the prompt's part cannot be added.)

    Args:
      query: [rows, kv_heads, queries that share a key, 1, head_dim], scaled.
      largest: float32 [rows, kv_heads, queries that share a key, 1, 1], the largest score of other sources.
      keys, values: [layers, rows or more, kv_heads, places, head_dim]; of more, the first rows of each part of the
        batch axes are those of `query`.
      layer, place: int32 scalars: which layer, and which place was written last.
      lengths: int32 [rows], how many places, up to that one and with it, are the row's own.
      block: what `ring_block` gives.
      sharding: each device works on its part, rows over the batch axes and heads over `tensor`.
      interpret: run it without a TPU, slowly, for tests.

    Returns:
      The largest score of all, and this source's part by weights relative to it.
    """
    rows, heads = (sharding.rules[name] for name in ("batch", "kv_heads"))
    of_rows, of_cache = PartitionSpec(rows, heads), PartitionSpec(None, rows, heads)
    on_device = partial(_ring_attention, block, interpret)
    largest, total, output = jax.shard_map(
        on_device,
        mesh=sharding.mesh,
        in_specs=(of_rows, of_rows, of_cache, of_cache, PartitionSpec(), PartitionSpec(rows)),
        out_specs=(of_rows, of_rows, of_rows),
        check_vma=False,
    )(query, largest, keys, values, jnp.stack([layer, place]), lengths)
    return largest, Weighed(total, output)


def _ring_attention(
    block: int,
    interpret: bool,
    query: jax.Array,
    largest: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    scalars: jax.Array,
    lengths: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows, kv_heads, shared, _, head_dim = query.shape
    layers, _, _, places, _ = keys.shape
    # A row's heads are rows of their own.
    count = rows * kv_heads
    at_once = next(n for n in (8, 4, 2, 1) if count % n == 0 and (n * 4 * places * head_dim <= _RING_BYTES or n == 1))
    keys, values = (array.reshape(layers, -1, places, head_dim) for array in (keys, values))

    def of_rows(last: int) -> pl.BlockSpec:
        return pl.BlockSpec((at_once, shared, last), lambda group, *_: (group, 0, 0))

    whole = pl.BlockSpec(memory_space=pl.ANY)
    outputs = pl.pallas_call(
        partial(_ring_kernel, block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(count // at_once,),
            in_specs=[of_rows(head_dim), of_rows(1), whole, whole],
            out_specs=[of_rows(1), of_rows(1), of_rows(head_dim)],
            scratch_shapes=[
                pltpu.VMEM((2, at_once, places, head_dim), keys.dtype),
                pltpu.VMEM((at_once, shared, places), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((count, shared, last), jnp.float32) for last in (1, 1, head_dim)],
        interpret=interpret,
    )(
        scalars,
        jnp.repeat(lengths, kv_heads),
        query.reshape(count, shared, head_dim),
        largest.reshape(count, shared, 1),
        keys,
        values,
    )
    largest, total, output = (array.reshape(rows, kv_heads, shared, 1, -1) for array in outputs)
    return largest, total, output


def _ring_kernel(
    block: int,
    scalars: Any,
    lengths: Any,
    query: Any,
    largest: Any,
    keys: Any,
    values: Any,
    top: Any,
    total: Any,
    output: Any,
    held: Any,
    scores: Any,
    arrived: Any,
) -> None:
    """One group of rows. All of their scores are there before any value is weighed: so weights are rounded to bfloat16
    relative to the largest one, as in training. While scores are computed values arrive, and the next group's keys
    while these are weighed.

    A block of places is brought by the row alone that has said something there; computed with are as many as the
    longest row of the group has. Its turns go back from the block of `place`.
    """
    group, layer, place = pl.program_id(0), scalars[0], scalars[1]
    _, rows, places, head_dim = held.shape
    blocks, shared = places // block, query.shape[1]
    here, within = jax.lax.div(place, block), jax.lax.rem(place, block)

    def filled(number: jax.Array) -> jax.Array:
        before = jnp.maximum(lengths[number] - within - 1, 0)
        count = jnp.minimum(1 + jax.lax.div(before + block - 1, block), blocks)
        return jnp.where(lengths[number] > 0, count, 0)

    def at(turn: jax.Array) -> jax.Array:
        return jax.lax.rem(here - turn + blocks, blocks) * block

    def bring(which: int, group: jax.Array, act: Callable[[Any], None]) -> None:
        cache = (keys, values)[which]

        def one(row: int, number: jax.Array, turn: jax.Array) -> None:
            source = cache.at[layer, number, pl.ds(at(turn), block)]
            goal = held.at[which, row, pl.ds(turn * block, block)]
            act(pltpu.make_async_copy(source, goal, arrived.at[which]))

        for row in range(rows):
            number = group * rows + row
            jax.lax.fori_loop(0, filled(number), lambda turn, _, r=row, n=number: one(r, n, turn), None)

    @pl.when(group == 0)
    def _begin() -> None:
        held[1] = jnp.zeros_like(held[1])  # what was never brought has no weight, and must be a number
        bring(0, group, lambda copy: copy.start())

    bring(1, group, lambda copy: copy.start())
    bring(0, group, lambda copy: copy.wait())
    own = [lengths[group * rows + row] for row in range(rows)]
    turns = reduce(jnp.maximum, [filled(group * rows + row) for row in range(rows)])

    def by_lane(combine: Callable[[jax.Array, jax.Array], jax.Array], before: jax.Array, new: jax.Array) -> jax.Array:
        lanes = [new[:, start : start + _LANES] for start in range(0, block, _LANES)]
        return reduce(combine, lanes, before)

    def score(turn: jax.Array, tops: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        columns = pl.ds(turn * block, block)
        index = at(turn) + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
        age = place - index + jnp.where(index > place, places, 0)
        found = []
        for row, before in enumerate(tops):
            product = jax.lax.dot_general(
                query[row], held[0, row, columns], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
            scores[row, :, columns] = product = jnp.where(age < own[row], product, MASKED)
            found.append(by_lane(jnp.maximum, before, product))
        return tuple(found)

    lowest = jnp.full((shared, _LANES), MASKED, jnp.float32)
    tops = jax.lax.fori_loop(0, turns, score, (lowest,) * rows)

    @pl.when(group + 1 < pl.num_programs(0))
    def _next() -> None:
        bring(0, group + 1, lambda copy: copy.start())

    for row, found in enumerate(tops):
        top[row] = jnp.maximum(found.max(axis=-1, keepdims=True), largest[row])
    bring(1, group, lambda copy: copy.wait())

    def weigh(
        turn: jax.Array, sums: tuple[tuple[jax.Array, jax.Array], ...]
    ) -> tuple[tuple[jax.Array, jax.Array], ...]:
        columns, added = pl.ds(turn * block, block), []
        for row, (weight, output) in enumerate(sums):
            weights = jnp.exp(scores[row, :, columns] - top[row])
            product = jax.lax.dot_general(
                weights.astype(held.dtype),
                held[1, row, columns],
                (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            added.append((by_lane(jnp.add, weight, weights), output + product))
        return tuple(added)

    nothing = jnp.zeros((shared, _LANES), jnp.float32), jnp.zeros((shared, head_dim), jnp.float32)
    for row, (weight, product) in enumerate(jax.lax.fori_loop(0, turns, weigh, (nothing,) * rows)):
        total[row], output[row] = weight.sum(axis=-1, keepdims=True), product
