"""Causal self-attention over whole sequences, by the kernel that suits the device. All give the same result."""

from functools import partial
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec

from psyche_jax.errors import UsageError
from psyche_jax.model.attention import Source, attention, causal_mask
from psyche_jax.model.sharding import Sharding

AttentionKernel: TypeAlias = Literal["auto", "xla", "blocked", "splash", "cudnn"]

_QUERY_BLOCK = 256  # of the blocked kernel
_LANES = 128  # splash works on whole lanes: of positions and of the head's dimensions
_SPLASH_BLOCK = 512


def self_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    kernel: AttentionKernel,
    sharding: Sharding,
    interpret: bool = False,
) -> jax.Array:
    """Each position attends to itself and to earlier ones of its segment.

    Args:
      query: [batch, sequence, heads, head_dim]; key, value: [batch, sequence, kv_heads, head_dim].
      segments: int32 [batch, sequence]; 0 is padding, whose results are finite and mean nothing.
      kernel: `xla` holds all scores at once; `blocked` those of 256 queries, and computes them again in backward;
        `splash` is Pallas' kernel for TPUs; `cudnn` that for GPUs, in 16 bits; `auto` chooses by device and shape.
      sharding: splash runs on each device's part, batch over the batch axes and heads over `tensor`.
      interpret: run splash without a TPU, slowly, for tests.

    Returns:
      [batch, sequence, heads, head_dim] in the dtype of `query`.

    Raises:
      UsageError: splash cannot work on these shapes.
    """
    if kernel == "auto":
        kernel = _choose(query, sharding)
    if kernel == "xla":
        return attention(query, (Source(key, value, causal_mask(segments)),))
    if kernel == "blocked":
        return _blocked(query, key, value, segments)
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(
            query, key, value, mask=causal_mask(segments)[:, None], implementation="cudnn"
        )
    if not _fits_splash(query):
        raise UsageError(
            f"model.attention: splash needs lengths and head_dim in multiples of {_LANES}, "
            f"not {query.shape[1]} and {query.shape[3]}; use auto"
        )
    return _splash(query, key, value, segments, sharding, interpret)


def _choose(query: jax.Array, sharding: Sharding) -> AttentionKernel:
    platform = sharding.mesh.devices.flat[0].platform
    if platform == "tpu" and _fits_splash(query):
        return "splash"
    if platform == "gpu" and query.dtype in (jnp.bfloat16, jnp.float16):
        return "cudnn"
    return "blocked" if query.shape[1] >= 2 * _QUERY_BLOCK else "xla"


def _fits_splash(query: jax.Array) -> bool:
    return query.shape[1] % _LANES == 0 and query.shape[3] % _LANES == 0


def _blocked(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
    """Blocks of queries, one after the other, each against all keys up to its own end."""

    @partial(jax.checkpoint, static_argnums=4)
    def block(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, start: int) -> jax.Array:
        stop = start + query.shape[1]
        allowed = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)
        same = segments[:, start:stop, None] == segments[:, None, :stop]
        allowed = allowed & same & (segments[:, None, :stop] > 0)
        return attention(query, (Source(key[:, :stop], value[:, :stop], allowed),))

    starts = range(0, query.shape[1], _QUERY_BLOCK)
    outputs = [block(query[:, start : start + _QUERY_BLOCK], key, value, segments, start) for start in starts]
    return jnp.concatenate(outputs, axis=1)


def _splash(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, sharding: Sharding, interpret: bool
) -> jax.Array:
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    size = next(size for size in (_SPLASH_BLOCK, 256, _LANES) if length % size == 0)
    blocks = splash_attention_kernel.BlockSizes(
        block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size
    )
    causal = splash_attention_mask.CausalMask((length, length))
    mask = splash_attention_mask.MultiHeadMask([causal] * (heads // kv_heads))
    with jax.ensure_compile_time_eval():
        kernel = splash_attention_kernel.make_splash_mqa_single_device(mask, block_sizes=blocks, interpret=interpret)

    def on_device(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
        ids = splash_attention_kernel.SegmentIds(segments, segments)
        over_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
        return jax.vmap(over_heads)(query, key, value, ids)

    batch_axes, head_axis = sharding.rules["batch"], sharding.rules["kv_heads"]
    by_head = PartitionSpec(batch_axes, head_axis)
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    # Splash leaves the scale to its caller.
    output = jax.shard_map(
        on_device,
        mesh=sharding.mesh,
        in_specs=(by_head, by_head, by_head, PartitionSpec(batch_axes)),
        out_specs=by_head,
        check_vma=False,
    )(grouped * np.float32(head_dim**-0.5).astype(query.dtype), key.swapaxes(1, 2), value.swapaxes(1, 2), segments)
    return output.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)
