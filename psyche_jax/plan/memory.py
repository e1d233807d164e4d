"""What a chip's memory holds, by kind: from the program's arguments, the compiler's peak, and a little arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp

from psyche_jax.config import GrpoConfig, SftConfig
from psyche_jax.model.config import ModelConfig
from psyche_jax.plan.compile import GIB, Lowered, PlanConfig, bytes_per_chip

ARGUMENTS = ("parameters", "optimizer", "reference", "batch")
WITHIN_TEMPORARIES = ("gradients", "saved_activations", "kv_cache", "decoding_weights")


def memory_by_kind(lowered: Lowered, config: PlanConfig, peak: int | None) -> dict[str, float | None]:
    """GiB a chip. The arguments and `temporaries` add up to `peak`; the other kinds lie within the temporaries, and
    not all at the same time (the cache and the decoding weights are gone when gradients stand)."""
    kinds: dict[str, float | None] = {
        name: bytes_per_chip(lowered.arguments.get(name)) / GIB for name in ARGUMENTS if name in lowered.arguments
    }
    held = sum(value for value in kinds.values() if value is not None)
    kinds["temporaries"] = None if peak is None else max(0.0, peak / GIB - held)
    kinds["peak"] = None if peak is None else peak / GIB
    parts = estimated_parts(config, lowered.model, lowered.mesh.shape)
    return {**kinds, **{name: size / GIB for name, size in parts.items()}}


def estimated_parts(config: PlanConfig, model: ModelConfig, mesh: Mapping[str, int]) -> dict[str, float]:
    """Bytes a chip of what is large among the temporaries, by arithmetic: a lower bound, which prunes a search."""
    chips_of_parameters = mesh["fsdp"] * mesh["tensor"]
    compute, stored = jnp.dtype(config.model.compute_dtype).itemsize, jnp.dtype(config.model.dtype).itemsize
    batch_places = mesh["data"] * mesh["fsdp"]
    parts = {"gradients": model.num_parameters * stored / chips_of_parameters}
    tokens = micro_batch(config, mesh).tokens / batch_places
    parts["saved_activations"] = tokens * saved_per_token(config, model, mesh["tensor"]) * compute
    if isinstance(config, GrpoConfig):
        prompts = config.prompts_per_step / config.rollout_waves
        tokens = prompts * (config.data.max_prompt_length + config.generations_per_prompt * config.max_new_tokens)
        heads = model.num_key_value_heads / mesh["tensor"]
        parts["kv_cache"] = 2 * model.num_hidden_layers * tokens / batch_places * heads * model.head_dim * compute
        parts["decoding_weights"] = model.num_parameters * compute / mesh["tensor"]
    return parts


def saved_per_token(config: PlanConfig, model: ModelConfig, tensor: int) -> float:
    """Numbers a token that all layers keep for backward, under the remat policy."""
    width, inner = model.hidden_size, model.intermediate_size / tensor
    heads = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim / tensor
    matrix_products = heads + 2 * width + 2 * inner
    kept = {"full": width, "dots": width + matrix_products, "none": 4 * width + heads + matrix_products + 2 * inner}
    return model.num_hidden_layers * kept[config.model.remat]


@dataclass(frozen=True)
class MicroBatch:
    """What a forward and backward pass reads at once: `rows` of `length` tokens and, where these are responses that
    share prompts, `prompts` of `prompt_length`, each read once."""

    rows: int
    length: int
    prompts: int = 0
    prompt_length: int = 0

    @property
    def tokens(self) -> int:
        """All that are read."""
        return self.rows * self.length + self.prompts * self.prompt_length


def micro_batch(config: PlanConfig, mesh: Mapping[str, int]) -> MicroBatch:
    """The micro-batch of a program, at its largest lengths."""
    if isinstance(config, SftConfig):
        return MicroBatch(config.micro_batch_size or config.batch_size, config.data.max_length)
    prompts = config.micro_batch_prompts or config.minibatch_prompts or config.prompts_per_step
    responses, prompt = prompts * config.generations_per_prompt, config.data.max_prompt_length
    if config.share_prompt and prompts % (mesh["data"] * mesh["fsdp"]) == 0:
        return MicroBatch(responses, config.max_new_tokens, prompts, prompt)
    return MicroBatch(responses, prompt + config.max_new_tokens)


def least_peak(config: PlanConfig, model: ModelConfig, mesh: Mapping[str, int]) -> float:
    """Bytes a chip below which the program cannot be."""
    chips = mesh["fsdp"] * mesh["tensor"]
    stored = jnp.dtype(config.model.dtype).itemsize
    held = 3 * model.num_parameters * stored / chips
    parts = estimated_parts(config, model, mesh)
    if isinstance(config, GrpoConfig) and config.objective.kl_coefficient:
        held += model.num_parameters * jnp.dtype(config.reference_dtype).itemsize / chips
    update = parts["gradients"] + parts["saved_activations"]
    return held + max(update, parts.get("kv_cache", 0.0) + parts.get("decoding_weights", 0.0))
