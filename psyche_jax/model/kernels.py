"""Causal self-attention over whole sequences, by the kernel that suits the device. All give the same result."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec

from psyche_jax.errors import UsageError
from psyche_jax.model.attention import Source, attention, by_head, causal_mask
from psyche_jax.model.sharding import Sharding

AttentionKernel: TypeAlias = Literal["auto", "xla", "blocked", "splash", "cudnn"]

_QUERY_BLOCK = 128  # of the blocked kernel
_KEPT_BLOCKS = 8  # beyond so many, the blocked kernel computes scores again in backward instead of keeping them
_LANES = 128  # splash works on whole lanes: of positions and of the head's dimensions
_SPLASH_BLOCK = 512


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
        rows computes scores again in backward; `splash` is Pallas' kernel for TPUs, `cudnn` that for GPUs, both for
        bfloat16; `auto` chooses by device, dtype and shape.
      sharding: splash runs on each device's part, batch over the batch axes and heads over `tensor`.
      shared: rows are a prompt with its responses, which do not see each other.
      interpret: run splash without a TPU, slowly, for tests.

    Returns:
      [batch, sequence, heads, head_dim] in the dtype of `query`.

    Raises:
      UsageError: splash cannot work on these shapes, or in float32.
    """
    if kernel == "auto":
        kernel = _choose(query, sharding, shared)
    if kernel == "splash":
        if not _fits_splash(query):
            raise UsageError(
                f"model.attention: splash needs lengths and head_dim in multiples of {_LANES}, "
                f"not {query.shape[1]} and {query.shape[3]}; use auto"
            )
        if query.dtype == jnp.float32 and not interpret:
            raise UsageError(
                "model.attention: splash multiplies float32 in one bfloat16 pass; use auto, or "
                "model.compute_dtype=bfloat16"
            )
        return _splash(query, key, value, segments, sharding, shared, interpret)
    if shared is not None:
        return _shared(query, key, value, segments, "xla" if kernel == "xla" else "blocked", shared)
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(
            query, key, value, mask=causal_mask(segments)[:, None], implementation="cudnn"
        )
    return _causal(query, by_head(key), by_head(value), segments, kernel, None)


def _choose(query: jax.Array, sharding: Sharding, shared: SharedPrompt | None) -> AttentionKernel:
    platform = sharding.mesh.devices.flat[0].platform
    if query.dtype == jnp.bfloat16:  # these do not multiply float32 as float32
        if platform == "tpu" and _fits_splash(query):
            return "splash"
        if platform == "gpu" and shared is None:
            return "cudnn"
    longest = query.shape[1] if shared is None else max(shared.prompt_length, shared.response_length)
    return "blocked" if longest >= 2 * _QUERY_BLOCK else "xla"


def _fits_splash(query: jax.Array) -> bool:
    return query.shape[1] % _LANES == 0 and query.shape[3] % _LANES == 0


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
    """`SharedPrompt` as splash wants it: any block of the mask on demand, never the whole."""

    def __init__(self, shared: SharedPrompt) -> None:
        self._shared = shared

    @property
    def shape(self) -> tuple[int, int]:
        """Queries and keys."""
        return self._shared.length, self._shared.length

    def __getitem__(self, index: Any) -> np.ndarray:
        queries, keys = (np.arange(self._shared.length)[part] for part in index)
        queries, keys = queries[:, None], keys[None, :]

        def response(position: np.ndarray) -> np.ndarray:
            return (position - self._shared.prompt_length) // self._shared.response_length

        in_prompt = keys < self._shared.prompt_length
        return (keys <= queries) & (in_prompt | (response(queries) == response(keys)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SharedPromptMask) and self._shared == other._shared

    def __hash__(self) -> int:
        return hash(self._shared)


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
        of_head = _SharedPromptMask(shared)
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
