"""The real program compiled for a slice, and what is in a chip's memory."""

import math
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from psyche_jax.config import GrpoConfig, SftConfig
from psyche_jax.errors import UserError
from psyche_jax.model.adapters import as_trained, num_trained, without_adapter
from psyche_jax.model.config import ModelConfig, check_architecture, published_architecture
from psyche_jax.model.qwen2 import Execution
from psyche_jax.model.sharding import Sharding, check_mesh_fits, training_sharding
from psyche_jax.rewards.score import compile_rules
from psyche_jax.train.grpo import Iteration
from psyche_jax.train.setup import abstract_train_state, check_grpo_rows, check_rows
from psyche_jax.train.sft import make_sft_step
from psyche_jax.train.state import make_optimizer, make_schedule
from psyche_jax.train.stored_models import abstract_parameters, open_model

PlanConfig: TypeAlias = SftConfig | GrpoConfig
FULL_LENGTH = "every response is as long as max_new_tokens"
_STEPS = 1000  # of the schedule, which changes nothing in the size of a program
GIB = 2**30


@dataclass(frozen=True)
class Lowered:
    """A program before compilation, and what its arguments take."""

    model: ModelConfig
    mesh: dict[str, int]  # the sizes of its axes, as training uses them
    lowered: Any
    arguments: dict[str, Any]  # by kind: pytrees of ShapeDtypeStructs with shardings
    assumptions: tuple[str, ...]


@dataclass(frozen=True)
class Compiled:
    """What the compiler said. Without `executable` the program takes more memory than a chip has."""

    executable: Any | None
    seconds: float
    peak_bytes: int | None  # live at once; where the compiler refused, what it asked for, if it said so
    limit_bytes: int | None  # where the compiler has named it


def find_architecture(config: PlanConfig) -> tuple[ModelConfig, tuple[str, ...]]:
    """The model's shape: of the model at `model.path`, else of the name in `model.architecture`; with the adapter.

    Raises:
      UserError: there is neither, or they differ.
    """
    section = config.model
    if Path(section.path).exists():
        model = open_model(section.path).config
        check_architecture(section.architecture, model, section.path)
        return as_trained(model, config.model.dtype, config.adapter), ()
    if section.architecture is None:
        raise UserError(
            f"{section.path}: no such model, and the config names no architecture to plan without it; "
            "add for example --set model.architecture=Qwen2.5-7B"
        )
    model = as_trained(published_architecture(section.architecture), section.dtype, config.adapter)
    return model, (f"{section.path} is not on this machine: the shape is that of {section.architecture}",)


def sharding_of(config: PlanConfig, devices: list[Any] | None = None) -> Sharding:
    """The mesh of a run with `config` on `devices`; None: on all there are."""
    mesh, decoding_tensor = config.mesh, config.rollout.tensor if isinstance(config, GrpoConfig) else None
    return training_sharding(mesh.data, mesh.fsdp, mesh.tensor, decoding_tensor, devices)


def decoding_mesh(config: GrpoConfig, mesh: Mapping[str, int]) -> Mapping[str, int]:
    """The sizes of the mesh's axes while decoding, given those while training."""
    tensor = config.rollout.tensor or mesh["tensor"]
    return {**mesh, "fsdp": mesh["fsdp"] * mesh["tensor"] // tensor, "tensor": tensor}


def batch_places(mesh: Mapping[str, int]) -> int:
    """Over how many devices, or groups of them, a mesh of these sizes spreads rows."""
    return mesh["data"] * mesh["fsdp"]


def lower(config: PlanConfig, devices: list[Any]) -> Lowered:
    """Lower the program that `psyche sft` or `psyche grpo` would run with `config` on `devices`.

    Raises:
      UserError: the model is missing, or the mesh does not divide it or the batch.
    """
    model, assumptions = find_architecture(config)
    sharding = sharding_of(config, devices)
    check_mesh_fits(sharding, model)
    section = config.model
    execution = Execution(sharding, jnp.dtype(section.compute_dtype), section.remat, section.attention)
    if isinstance(config, SftConfig):
        lowered, arguments = _lower_sft(config, model, execution)
    else:
        lowered, arguments = _lower_grpo(config, model, execution)
        assumptions += _assumptions(config)
    return Lowered(model, sharding.sizes, lowered, arguments, assumptions)


def compile_lowered(lowered: Lowered) -> Compiled:
    """Run the TPU compiler. A program that is too large for a chip is a result, not an error."""
    started = time.perf_counter()
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # else Ctrl-C would wait for the compiler
    try:
        executable = lowered.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
            raise
        used, limit = out_of_memory(message)
        return Compiled(None, time.perf_counter() - started, used, limit)
    finally:
        signal.signal(signal.SIGINT, before)
    memory = executable.memory_analysis()
    return Compiled(executable, time.perf_counter() - started, int(memory.peak_memory_in_bytes), None)


def out_of_memory(message: str) -> tuple[int | None, int | None]:
    """Bytes used and allowed, from the compiler's message: `Used 17.52G of 15.75G hbm`, or `HLO temporaries (52.51G)
    exceeds available HBM (15.75G)`, which counts the arguments too, whatever it says. Both count gaps between buffers.
    """
    size = r"([\d.]+)([KMGT]?)"
    for form in (rf"Used {size} of {size} hbm", rf"temporaries \({size}\) exceeds available HBM \({size}\)"):
        if match := re.search(form, message):
            return _bytes(match[1], match[2]), _bytes(match[3], match[4])
    return None, None


def bytes_per_chip(tree: Any) -> int:
    """Of ShapeDtypeStructs with shardings: the part of one chip."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[unit])


def _lower_sft(config: SftConfig, model: ModelConfig, execution: Execution) -> tuple[Any, dict[str, Any]]:
    micro_batch = config.rows_per_micro_batch
    check_rows(micro_batch, "micro_batch_size", execution.sharding)
    schedule = make_schedule(config.optimizer, _STEPS)
    optimizer = make_optimizer(config.optimizer, schedule)
    state, shardings = abstract_train_state(model, jnp.dtype(config.model.dtype), execution.sharding, optimizer)
    step = make_sft_step(model, execution, optimizer, schedule, shardings, config.batch_size // micro_batch)
    shape = (config.batch_size, config.data.max_length)
    place = execution.sharding.named("batch", "sequence")
    kinds = {"tokens": jnp.int32, "segments": jnp.int32, "positions": jnp.int32, "loss_mask": jnp.bool_}
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in kinds.items()}
    arguments = {"parameters": state.parameters, "optimizer": state.optimizer_state}
    if config.adapter is None:
        return step.lower(state, batch), {**arguments, "batch": batch}
    base = _abstract_base(config, model, execution.sharding)
    return step.lower(state, batch, base), {**arguments, "base": base, "batch": batch}


def _abstract_base(config: PlanConfig, model: ModelConfig, sharding: Sharding) -> Any:
    return abstract_parameters(without_adapter(model), sharding, jnp.dtype(config.model.dtype))


def _lower_grpo(config: GrpoConfig, model: ModelConfig, execution: Execution) -> tuple[Any, dict[str, Any]]:
    sharding = execution.sharding
    check_grpo_rows(config, sharding)  # what a run would refuse before its first step
    # The very program of a run, with shapes in place of arrays.
    schedule = make_schedule(config.optimizer, _STEPS, config.updates_per_step)
    optimizer = make_optimizer(config.optimizer, schedule)
    state, shardings = abstract_train_state(model, jnp.dtype(config.model.dtype), sharding, optimizer)
    program = Iteration(config, model, execution, optimizer, schedule, shardings).program()
    reference = None
    if config.adapter is not None:
        reference = _abstract_base(config, model, sharding)
    elif config.objective.kl_coefficient:
        reference = abstract_parameters(model, sharding, jnp.dtype(config.reference_dtype))
    # Any byte vocabulary gives tables of nearly the same size; which token is which changes nothing in the program.
    vocabulary: list[bytes | None] = [bytes([byte]) for byte in range(min(256, model.vocab_size))]
    vocabulary += [None] * (model.vocab_size - len(vocabulary))
    everywhere = sharding.named()
    rules = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        compile_rules(config.rules, vocabulary, model.stop_token_ids, cache_dir=None),
    )
    # A batch of the largest shape.
    place = sharding.named("batch")
    prompts, length = config.candidates_per_step, config.data.max_prompt_length
    batch = {
        "tokens": jax.ShapeDtypeStruct((prompts, length), jnp.int32, sharding=place),
        "mask": jax.ShapeDtypeStruct((prompts, length), jnp.bool_, sharding=place),
        "answers": jax.ShapeDtypeStruct((prompts,), jnp.int32, sharding=place),
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere)
    arguments = {
        "parameters": state.parameters,
        "optimizer": state.optimizer_state,
        "reference" if config.adapter is None else "base": reference,
        "batch": (batch, rules),
    }
    return program.lower(state, reference, rules, batch, key), arguments


def _assumptions(config: GrpoConfig) -> tuple[str, ...]:
    more_prompts = config.candidates_per_step > config.prompts_per_step
    return (
        "reward tables are those of a vocabulary of single bytes (the real one's have a column more for each kind "
        "of token, a few MiB; some 40 where answers have forms)",
        FULL_LENGTH,
        *(["dynamic sampling finds all of its prompts at the first try"] if more_prompts else []),
        *(["reward functions take no time"] if config.functions else []),
    )


def memory_by_kind(lowered: Lowered, config: PlanConfig, peak: int | None) -> dict[str, float | None]:
    """GiB a chip. The arguments and `temporaries` add up to `peak`; the other kinds are part of the temporaries, and
    not all at the same time (the cache and the decoding weights are gone when there are gradients)."""
    arguments = {name: bytes_per_chip(tree) / GIB for name, tree in lowered.arguments.items()}
    parts = estimated_parts(config, lowered.model, lowered.mesh)
    return {
        **arguments,
        "temporaries": None if peak is None else max(0.0, peak / GIB - sum(arguments.values())),
        "peak": None if peak is None else peak / GIB,
        **{name: size / GIB for name, size in parts.items()},
    }


def estimated_parts(config: PlanConfig, model: ModelConfig, mesh: Mapping[str, int]) -> dict[str, float]:
    """Bytes a chip of what is large among the temporaries, by arithmetic: a lower bound, which prunes a search."""
    chips_of_parameters = mesh["fsdp"] * mesh["tensor"]
    compute = jnp.dtype(config.model.compute_dtype).itemsize
    places = batch_places(mesh)
    parts = {"gradients": num_trained(model) * 4 / chips_of_parameters}  # what is trained is float32
    tokens = micro_batch(config, mesh).tokens / places
    parts["saved_activations"] = tokens * saved_per_token(config, model, mesh["tensor"]) * compute
    if isinstance(config, GrpoConfig):
        # A base that is held as decoding reads it is not laid out a second time.
        held = config.adapter is not None and config.model.dtype in ("int8", config.model.compute_dtype)
        held &= decoding_mesh(config, mesh)["tensor"] == chips_of_parameters
        mesh = decoding_mesh(config, mesh)
        places = batch_places(mesh)
        tokens = config.prompts_per_step * config.data.max_prompt_length + config.slots * config.max_new_tokens
        heads = model.num_key_value_heads / mesh["tensor"]
        parts["kv_cache"] = 2 * model.num_hidden_layers * tokens / places * heads * model.head_dim * compute
        numbers = 0 if held else model.num_parameters  # the linear maps of int8, which are most of it, stay int8
        parts["decoding_weights"] = numbers * (1 if model.int8 else compute) / mesh["tensor"]
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
        return MicroBatch(config.rows_per_micro_batch, config.data.max_length)
    prompts = config.prompts_per_micro_batch
    responses, prompt = prompts * config.generations_per_prompt, config.data.max_prompt_length
    if config.share_prompt and prompts % batch_places(mesh) == 0:
        return MicroBatch(responses, config.max_new_tokens, prompts, prompt)
    return MicroBatch(responses, prompt + config.max_new_tokens)


def least_peak(config: PlanConfig, model: ModelConfig, mesh: Mapping[str, int]) -> float:
    """Bytes a chip below which the program cannot be."""
    chips = mesh["fsdp"] * mesh["tensor"]
    stored = jnp.dtype(config.model.dtype).itemsize
    parts = estimated_parts(config, model, mesh)
    held = 3 * parts["gradients"]
    if config.adapter is not None:
        held += model.num_parameters * stored / chips
    elif isinstance(config, GrpoConfig) and config.objective.kl_coefficient:
        held += model.num_parameters * jnp.dtype(config.reference_dtype).itemsize / chips
    update = parts["gradients"] + parts["saved_activations"]
    return held + max(update, parts.get("kv_cache", 0.0) + parts.get("decoding_weights", 0.0))
