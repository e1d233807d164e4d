"""Completions of tokenized prompts, batch by batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from psyche_jax.data.streams import pad_prompts
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.decoding import Rollout, Sampling, generate
from psyche_jax.model.qwen2 import Execution, Parameters


@dataclass(frozen=True)
class Completion:
    """What a model said. `finished`: it ended with a stop token, which `text` leaves out."""

    text: str
    tokens: int
    finished: bool


def complete(
    config: ModelConfig,
    parameters: Parameters,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    execution: Execution,
    batch_size: int,
    seed: int = 0,
    advance: Callable[[int], object] = lambda done: None,
) -> list[Completion]:
    """One completion for each prompt, in their order.

    Prompts are sorted by length, so that batches waste little and few shapes are compiled. `advance(n)` is told
    of each n prompts done. `batch_size` is rounded up to a multiple of what the mesh's batch axes need.
    """
    places = _batch_places(execution)
    rows = -(-min(batch_size, len(prompts)) // places) * places
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    program: Callable[..., Rollout] = jax.jit(
        partial(generate, config, sampling=sampling, execution=execution), donate_argnums=()
    )
    place = execution.sharding.named("batch", None)
    completions: dict[int, Completion] = {}
    for start in range(0, len(order), rows):
        indices = order[start : start + rows]
        padded = indices + indices[:1] * (rows - len(indices))
        batch = jax.device_put(pad_prompts([prompts[i] for i in padded], config.max_position_embeddings), place)
        key = jax.random.fold_in(jax.random.key(seed), start)
        rollout = jax.device_get(program(parameters, batch["tokens"], batch["mask"], key))
        for row, index in enumerate(indices):
            tokens = rollout.tokens[row][rollout.mask[row]].tolist()
            finished = bool(tokens) and tokens[-1] in config.stop_token_ids
            text = tokenizer.decode(tokens[:-1] if finished else tokens)
            completions[index] = Completion(text, len(tokens), finished)
        advance(len(indices))
    return [completions[index] for index in range(len(prompts))]


def _batch_places(execution: Execution) -> int:
    shape = execution.sharding.mesh.shape
    return shape["data"] * shape["fsdp"]
