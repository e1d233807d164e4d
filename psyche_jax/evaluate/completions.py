"""Completions of tokenized prompts, batch by batch."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import jax

from psyche_jax.data.chat import decoded_text
from psyche_jax.data.streams import pad_prompts
from psyche_jax.evaluate.answers import Completion
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.decoding import Rollout, generate
from psyche_jax.model.qwen2 import Execution, Parameters
from psyche_jax.model.sampling import Sampling


def complete(
    config: ModelConfig,
    parameters: Parameters,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    execution: Execution,
    batch_size: int,
    seed: int = 0,
    keep: Callable[[int, Completion], object] = lambda index, completion: None,
    skip: Collection[int] = (),
    opened: str = "",
) -> dict[int, Completion]:
    """One completion for each prompt, by its place.

    Prompts are sorted by length, so that batches waste little and few shapes are compiled. `keep(place, completion)`
    is called as they come. Prompts at the places `skip` have theirs already; the others get what they would have got
    without it, since batches are always cut alike. `batch_size` is rounded up to a multiple of what the mesh's batch
    axes need. `opened` is what the chat template has written of each response; their texts begin with it.
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
        if all(index in skip for index in indices):
            continue
        padded = indices + indices[:1] * (rows - len(indices))
        batch = jax.device_put(pad_prompts([prompts[i] for i in padded], config.max_position_embeddings), place)
        key = jax.random.fold_in(jax.random.key(seed), start)
        rollout = jax.device_get(program(parameters, batch["tokens"], batch["mask"], key))
        for row, index in enumerate(indices):
            if index in skip:
                continue
            tokens = rollout.tokens[row][rollout.mask[row]].tolist()
            finished = bool(tokens) and tokens[-1] in config.stop_token_ids
            text = opened + decoded_text(tokenizer, tokens[:-1] if finished else tokens)
            completions[index] = Completion(text, len(tokens), finished)
            keep(index, completions[index])
    return completions


def _batch_places(execution: Execution) -> int:
    shape = execution.sharding.mesh.shape
    return shape["data"] * shape["fsdp"]
