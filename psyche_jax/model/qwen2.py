"""The decoder as a Flax NNX module: one decoder layer, whose parameters carry a leading axis of layers.

It is Qwen2's, Qwen3's or Llama's: what differs are the traits that `ModelConfig` derives from the model's type.
Weights keep Hugging Face's orientation, [out, in], so that conversion copies and never transposes. Source of the
architecture: the Qwen2.5 and Qwen3 technical reports (arXiv 2412.15115, 2505.09388) and transformers' `modeling_*.py`.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from psyche_jax.config import LINEAR_MAPS
from psyche_jax.model.attention import Source, Weighed, by_head, by_key, highest, joined, masked_scores, weigh
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.kernels import AttentionKernel, SharedPrompt, ring_attention, ring_block, self_attention
from psyche_jax.model.linear import Linear, Parameters, apply, as_multiplied
from psyche_jax.model.products import gradients_materialized, materialized, product
from psyche_jax.model.rotary import rotary_tables, rotate
from psyche_jax.model.sharding import Sharding

RematPolicy: TypeAlias = Literal["none", "full", "dots"]
Extra = TypeVar("Extra")
_FLOAT32 = jnp.dtype("float32")

# Compiling all layers at once takes long in a deeper model.
_UNROLLED_LAYERS = 12
# Decoding looks at the last so many places of the cache, or twice, four times as many; from the second on by quarters.
# The first are a TPU's lanes: for fewer its compiler would turn the whole cache of narrow heads.
_FIRST_PLACES, _QUARTERED_PLACES = 128, 512


@dataclass(frozen=True)
class Execution:
    """How a program computes: dtype of activations, what backward recomputes, the kernel, where arrays are placed."""

    sharding: Sharding
    compute_dtype: jnp.dtype
    remat: RematPolicy = "none"
    attention: AttentionKernel = "auto"


class KVCache(NamedTuple):
    """Keys and values of prompts (one row a prompt) and of what was decoded after them (one row a response).

    `prompt_key`, `prompt_value`: [layers, prompts, kv_heads, prompt_length, head_dim];
    `prompt_allowed`: bool [prompts, prompt_length], False on padding;
    `key`, `value`: [layers, rows, kv_heads, places, head_dim], of the responses that are decoded: a ring of places.
    There may be more rows than are decoded, of which the first ones of each part of the batch axes are used;
    `rows`: which row decodes each response, int32 [prompts * responses to each], and which response each row decodes,
    int32 [rows], as they are numbered within a part of the batch axes. None: those to one prompt are consecutive rows.
    """

    prompt_key: jax.Array
    prompt_value: jax.Array
    prompt_allowed: jax.Array
    key: jax.Array
    value: jax.Array
    rows: tuple[jax.Array, jax.Array] | None = None


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32; `scale` [(layers,) features]."""

    def __init__(self, shape: tuple[int, ...], epsilon: float, dtype: jnp.dtype) -> None:
        axes = ("layers", "activation_embed")[-len(shape) :]
        self.scale = nnx.Param(jnp.ones(shape, dtype), logical_axes=axes)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Normalize the last axis of `x`, and round once, to `dtype`."""
        x = x.astype(jnp.float32)
        normal = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (normal * self.scale[...].astype(jnp.float32)).astype(dtype)


class DecoderLayer(nnx.Module):
    """Attention and SwiGLU with residuals."""

    def __init__(self, config: ModelConfig, key: jax.Array, dtype: jnp.dtype) -> None:
        layers, width, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        heads, kv_heads = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        keys, int8 = jax.random.split(key, 7), config.int8
        self.input_norm = RMSNorm((layers, width), config.rms_norm_eps, dtype)
        self.q_proj = Linear(keys[0], (layers, heads, width), ("heads", "embed"), config.qkv_bias, dtype, int8)
        self.k_proj = Linear(keys[1], (layers, kv_heads, width), ("kv_heads", "embed"), config.qkv_bias, dtype, int8)
        self.v_proj = Linear(keys[2], (layers, kv_heads, width), ("kv_heads", "embed"), config.qkv_bias, dtype, int8)
        self.o_proj = Linear(keys[3], (layers, width, heads), ("embed", "heads"), config.o_bias, dtype, int8)
        self.q_norm, self.k_norm = (
            RMSNorm((layers, config.head_dim), config.rms_norm_eps, dtype) if config.qk_norm else None for _ in "qk"
        )
        self.post_attention_norm = RMSNorm((layers, width), config.rms_norm_eps, dtype)
        self.gate_proj = Linear(keys[4], (layers, inner, width), ("mlp", "embed"), False, dtype, int8)
        self.up_proj = Linear(keys[5], (layers, inner, width), ("mlp", "embed"), False, dtype, int8)
        self.down_proj = Linear(keys[6], (layers, width, inner), ("embed", "mlp"), False, dtype, int8)
        self.head_dim = config.head_dim
        for number, name in enumerate(LINEAR_MAPS):
            if config.adapter is not None and name in config.adapter.targets:
                getattr(self, name).add_adapter(jax.random.fold_in(key, number), config.adapter)

    def __call__(
        self,
        x: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        attend: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Extra]],
        sharding: Sharding,
    ) -> tuple[jax.Array, Extra]:
        """What one layer adds to `x` [batch, sequence, width], float32; it computes in the dtype of `x`.

        `attend(query, key, value)` gives its result and an extra.
        """
        batch, length, _ = x.shape
        normal = materialized(self.input_norm(x, x.dtype))
        normal = sharding.gather_rows(normal)
        # Written before they are cut into heads: else a decoding step on a TPU copies the weights, cut the same way.
        query, key, value = (
            materialized(y).reshape(batch, length, -1, self.head_dim)
            for y in apply(normal, self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query, x.dtype), self.k_norm(key, x.dtype)
        query, key = rotate(query, rotary), rotate(key, rotary)
        query = sharding.constrain(query, "batch", "sequence", "heads", None)
        key = sharding.constrain(key, "batch", "sequence", "kv_heads", None)
        value = sharding.constrain(value, "batch", "sequence", "kv_heads", None)
        mixed, extra = attend(query, key, value)
        (attended,) = apply(mixed.reshape(batch, length, -1), self.o_proj)
        attended = sharding.constrain(attended, "residual_batch", "sequence", "activation_embed").astype(jnp.float32)
        normal = materialized(self.post_attention_norm(x + attended, x.dtype))
        normal = sharding.gather_rows(normal)
        # Rounded once: where every step of SiLU is bfloat16, compilers round at places of their own, and sampler and
        # trainer drift apart.
        gate, up = gradients_materialized(*apply(normal, self.gate_proj, self.up_proj))
        inner = materialized((jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(x.dtype))
        (transformed,) = apply(sharding.constrain(inner, "batch", "sequence", "mlp"), self.down_proj)
        transformed = sharding.constrain(materialized(transformed), "residual_batch", "sequence", "activation_embed")
        return attended + transformed, extra


class Qwen2(nnx.Module):
    """The whole decoder. Its methods are pure functions of its parameters; see `build` and `bind`."""

    def __init__(self, config: ModelConfig, key: jax.Array, dtype: jnp.dtype) -> None:
        dtype = jnp.dtype("bfloat16") if config.int8 else dtype
        embed_key, layer_key, head_key = jax.random.split(key, 3)
        shape = (config.vocab_size, config.hidden_size)
        axes = ("vocab", "embed")
        by_columns = ((None, "embed_for_vocab"), (None, "embed"))  # where the mesh does not divide the vocabulary
        self.embedding = nnx.Param(
            0.02 * jax.random.normal(embed_key, shape, dtype), logical_axes=axes, otherwise=by_columns
        )
        self.layers = DecoderLayer(config, layer_key, dtype)
        self.final_norm = RMSNorm((config.hidden_size,), config.rms_norm_eps, dtype)
        # Laid out as the loss uses it, where the mesh divides the vocabulary: its gradient is summed in place.
        self.head = (
            None
            if config.tie_word_embeddings
            else nnx.Param(
                0.02 * jax.random.normal(head_key, shape, dtype),
                logical_axes=("loss_vocab", None),
                otherwise=(axes, *by_columns),
            )
        )
        self.config = config

    @property
    def output_embedding(self) -> jax.Array:
        """The head's weights [vocab, width], which are the embedding's when tied."""
        return (self.embedding if self.head is None else self.head)[...]

    def __call__(
        self,
        tokens: jax.Array,
        segments: jax.Array,
        positions: jax.Array,
        execution: Execution,
        shared: SharedPrompt | None = None,
    ) -> jax.Array:
        """Final hidden states [batch, sequence, width] of whole sequences, for training and scoring.

        Args:
          tokens, segments, positions: int32 [batch, sequence]; segment 0 is padding, and tokens of different
            segments do not see each other.
          execution: dtype, rematerialization, sharding.
          shared: rows are a prompt with its responses, which do not see each other.
        """
        hidden, _ = self._whole(tokens, segments, positions, execution, shared, keep_cache=False)
        return hidden

    def prefill(
        self, tokens: jax.Array, segments: jax.Array, positions: jax.Array, execution: Execution
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """As `__call__`, and the keys and values of all layers, [layers, batch, kv_heads, sequence, head_dim]."""
        return self._whole(tokens, segments, positions, execution, None, keep_cache=True)

    def decode(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        place: jax.Array,
        cache: KVCache,
        execution: Execution,
        lengths: jax.Array | None = None,
        layers: Sequence[Any] | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """One decoding step of every row.

        Args:
          tokens, positions: int32 [rows].
          place: int32 scalar, where in the ring of all rows the keys and values of these tokens go.
          cache: what to attend to.
          execution: dtype and sharding.
          lengths: int32 [rows], how many places of the ring, up to this one and with it, are the row's own. None:
            all from the first one on.
          layers: what `cut_layers` gave before the loop that this step is in.

        Returns:
          Hidden states [rows, width] and the cache with these tokens in it.
        """
        sharding = execution.sharding
        x = self._embed(tokens[:, None], execution)
        rotary = rotary_tables(positions[:, None], self.config, execution.compute_dtype)
        own = _OwnPlaces(cache.key, execution, place, jnp.full(tokens.shape, place + 1) if lengths is None else lengths)
        graph, stacked = nnx.split(self.layers)

        def to_prompts(tree: Any) -> Any:  # from the order of rows to that of the prompts which they share
            return tree if cache.rows is None else sharding.by_part(take_rows, tree, cache.rows[0])

        def from_prompts(tree: Any) -> Any:
            return tree if cache.rows is None else sharding.by_part(take_rows, tree, cache.rows[1])

        def body(carry: tuple[jax.Array, jax.Array, jax.Array], layer_inputs: tuple[Any, ...]) -> tuple[Any, None]:
            x, keys, values = carry
            parameters, layer_index, prompt_key, prompt_value = layer_inputs
            layer = nnx.merge(graph, parameters)

            def mixed(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Any]:
                new_keys = own.write(keys, by_head(key), layer_index)
                new_values = own.write(values, by_head(value), layer_index)
                # The prompt's part, and that of what was decoded, by weights relative to the largest score of both.
                prompt = Source(prompt_key, prompt_value, cache.prompt_allowed[:, None])
                query = by_key(query, self.config.num_key_value_heads)
                of_prompts = to_prompts(query)
                scores = masked_scores(of_prompts, prompt)
                largest = from_prompts(highest(scores, len(of_prompts)))
                largest, of_own = own.weigh(query, largest, new_keys, new_values, layer_index)
                of_prompt = from_prompts(weigh(scores, to_prompts(largest), prompt, query.dtype))
                return joined((of_prompt, of_own), query.dtype), (new_keys, new_values)

            change, (keys, values) = layer(x.astype(execution.compute_dtype), rotary, mixed, sharding)
            return (x + change, keys, values), None

        carry = (x, cache.key, cache.value)
        with jax.named_scope("layer_loop"):
            if layers is None:
                numbers = jnp.arange(self.config.num_hidden_layers)
                carry, _ = jax.lax.scan(body, carry, (stacked, numbers, cache.prompt_key, cache.prompt_value))
            else:
                for number, parameters in enumerate(layers):
                    prompt = cache.prompt_key[number], cache.prompt_value[number]
                    carry, _ = body(carry, (parameters, jnp.int32(number), *prompt))
        x, keys, values = carry
        return self.final_norm(x, execution.compute_dtype)[:, 0], cache._replace(key=keys, value=values)

    def cut_layers(self, execution: Execution) -> Sequence[Any] | None:
        """The parameters of each layer, for a loop over decoding steps: where `_unroll` says so, else None.

        The CPU compiler would cut, that is copy, all of them in every step.
        """
        if self._unroll(execution) == 1:
            return None
        _, stacked = nnx.split(self.layers)
        numbers = range(self.config.num_hidden_layers)
        cut = [jax.tree.map(operator.itemgetter(number), stacked) for number in numbers]
        return jax.lax.optimization_barrier(cut)  # else it would be moved into the loop

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits [..., vocab] of `hidden` [..., width]: for a few positions only, never a whole batch."""
        return product("...d,vd->...v", hidden, self.output_embedding.astype(hidden.dtype), jnp.float32)

    def _embed(self, tokens: jax.Array, execution: Execution) -> jax.Array:
        # Looked up where the table is: rows of tokens travel, the table and its gradient never do. A table that
        # holds whole rows (as in decoding) serves each device's own tokens, any other those of all devices.
        sharding = execution.sharding
        rows = "batch" if sharding.rules["embed"] is None else None
        x = self.embedding[...][sharding.constrain(tokens, rows, None)].astype(execution.compute_dtype)
        x = sharding.constrain(x, rows, None, "embed")
        return sharding.constrain(x, "residual_batch", "sequence", "activation_embed").astype(jnp.float32)

    def _whole(
        self,
        tokens: jax.Array,
        segments: jax.Array,
        positions: jax.Array,
        execution: Execution,
        shared: SharedPrompt | None,
        keep_cache: bool,
    ) -> tuple[jax.Array, Any]:
        rotary = rotary_tables(positions, self.config, execution.compute_dtype)
        graph, stacked = nnx.split(self.layers)

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Any]:
            mixed = self_attention(query, key, value, segments, execution.attention, execution.sharding, shared)
            return mixed, (by_head(key), by_head(value)) if keep_cache else None

        def change(x: jax.Array, parameters: Any) -> tuple[jax.Array, Any]:
            return nnx.merge(graph, parameters)(x, rotary, attend, execution.sharding)

        # What layers add to is float32, so that its rounding does not pile up; each reads it, and backward keeps it,
        # in the dtype that it computes in.
        change = rematerialize(change, execution.remat)

        def body(x: jax.Array, parameters: Any) -> tuple[jax.Array, Any]:
            added, cache = change(x.astype(execution.compute_dtype), parameters)
            return x + added, cache

        x = self._embed(tokens, execution)
        with jax.named_scope("layer_loop"):
            x, cache = jax.lax.scan(body, x, stacked, unroll=self._unroll(execution))
        return self.final_norm(x, execution.compute_dtype), cache

    def _unroll(self, execution: Execution) -> int:
        """How many layers a turn of the loop holds: all those of a shallow model on one CPU, else one.

        The CPU compiler copies what a loop keeps for backward. Recomputation needs the loop, which keeps forward and
        backward apart; several virtual devices stand for TPUs in tests, and run what TPUs run.
        """
        sharding, layers = execution.sharding, self.config.num_hidden_layers
        one_cpu = sharding.mesh.devices.size == 1 and sharding.platform == "cpu"
        return layers if one_cpu and execution.remat == "none" and layers <= _UNROLLED_LAYERS else 1


class _OwnPlaces:
    """The ring at one step: where it is written, and what rows attend to: on TPUs by a kernel each its own places,
    elsewhere its last places, so many that the longest row finds all of its own."""

    def __init__(self, cache: jax.Array, execution: Execution, place: jax.Array, lengths: jax.Array) -> None:
        layers, rows, kv_heads, self._all, head_dim = cache.shape
        self._place, self._lengths, self._sharding = place, lengths, execution.sharding
        self._block = ring_block(cache.shape, cache.dtype, execution.attention, execution.sharding)
        parts = execution.sharding.parts("batch")
        self._by_part = (layers, parts, rows // parts, kv_heads, self._all, head_dim)
        self._sizes = look_sizes(self._all)
        # Where the longest row's places begin at the end of the ring, all of it is looked at.
        longest = lengths.max()
        enough = jnp.asarray(self._sizes) >= longest
        self._choice = jnp.where(longest > place + 1, len(self._sizes) - 1, jnp.argmax(enough))

    def write(self, array: jax.Array, new: jax.Array, layer: jax.Array) -> jax.Array:
        """`array`, keys or values of all layers, with `new` [rows, kv_heads, 1, head_dim] at this step's place."""
        _, parts, _, kv_heads, _, head_dim = self._by_part
        new = new.reshape(1, parts, -1, kv_heads, 1, head_dim)
        start = (layer, 0, 0, 0, self._place, 0)
        written = jax.lax.dynamic_update_slice(array.reshape(self._by_part), new, start).reshape(array.shape)
        # Else what reads it may be fused with the writing, of which there are two then, and neither can be in place.
        return written if self._sharding.platform == "tpu" else jax.lax.optimization_barrier(written)

    def weigh(
        self, query: jax.Array, largest: jax.Array, keys: jax.Array, values: jax.Array, layer: jax.Array
    ) -> tuple[jax.Array, Weighed]:
        """The largest score of all, given `largest` of other sources, and this one's part by weights relative to it.

        `query` and `largest` as in `attention`; `keys` and `values` of all layers.
        """
        if self._block:
            return ring_attention(
                query, largest, keys, values, layer, self._place, self._lengths, self._block, self._sharding
            )
        looks = [partial(self._look, size) for size in self._sizes]
        return jax.lax.switch(self._choice, looks, query, largest, keys, values, layer)

    def _look(
        self, size: int, query: jax.Array, largest: jax.Array, keys: jax.Array, values: jax.Array, layer: jax.Array
    ) -> tuple[jax.Array, Weighed]:
        _, parts, _, kv_heads, _, head_dim = self._by_part
        rows = len(self._lengths)
        first = jnp.clip(self._place + 1 - size, 0, self._all - size)
        start, shape = (layer, 0, 0, 0, first, 0), (1, parts, rows // parts, kv_heads, size, head_dim)
        key, value = (
            jax.lax.dynamic_slice(array.reshape(self._by_part), start, shape).reshape(rows, kv_heads, size, head_dim)
            for array in (keys, values)
        )
        age = (self._place - first - jnp.arange(size)) % self._all
        source = Source(key, value, (age < self._lengths[:, None])[:, None])
        scores = masked_scores(query, source)
        largest = jnp.maximum(largest, highest(scores, rows))
        return largest, weigh(scores, largest, source, query.dtype)


def look_sizes(places: int) -> list[int]:
    """How many of a ring's places a step of decoding may look at: the last 128, 256, 512, 640, 768, 896, 1,024, …

    Each is a branch to compile. So few places are doubled; of more, which take time, the steps are quarters.
    """
    sizes, size = [], _FIRST_PLACES
    while size < places:
        sizes.append(size)
        size += size if size < _QUARTERED_PLACES else 2 ** (size.bit_length() - 3)
    return [*sizes, places]


def take_rows(tree: Any, rows: jax.Array, axis: int = 0) -> Any:
    """Of each array the rows with these numbers; rows lie along `axis`."""
    return jax.tree.map(lambda array: jnp.take(array, rows, axis=axis, mode="clip"), tree)


def in_compute_dtype(parameters: Parameters, dtype: jnp.dtype) -> Parameters:
    """`parameters` cast to `dtype`, but for kernels of int8 and their scales."""

    def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return x if x.dtype == jnp.int8 or path[-1].key == "kernel_scale" else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, parameters)


def rematerialize(body: Callable[..., Any], policy: RematPolicy) -> Callable[..., Any]:
    """Wrap a layer's function so that backward recomputes all of it, all but its matrix products, or nothing."""
    if policy == "none":
        return body
    saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    return jax.checkpoint(body, policy=saved, prevent_cse=False)


def build(config: ModelConfig, dtype: jnp.dtype = _FLOAT32) -> tuple[nnx.GraphDef, nnx.State]:
    """The module's structure and its abstract parameters, without any memory being taken."""
    return nnx.split(nnx.eval_shape(lambda: Qwen2(config, jax.random.key(0), dtype)))


def bind(config: ModelConfig, parameters: Parameters) -> Qwen2:
    """The module with `parameters` (nested dicts of arrays, `turned` or not) in it; usable inside a jitted function."""
    return nnx.merge(build(config)[0], as_multiplied(parameters))


def initialize(config: ModelConfig, key: jax.Array, sharding: Sharding, dtype: jnp.dtype) -> Parameters:
    """Random parameters (normal, 0.02), created where they belong on the mesh."""
    shardings = sharding.of_parameters(build(config, dtype)[1])
    create = jax.jit(lambda key: nnx.to_pure_dict(nnx.state(Qwen2(config, key, dtype))), out_shardings=shardings)
    return create(key)
