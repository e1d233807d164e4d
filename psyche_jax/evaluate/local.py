"""A model on this machine as one who answers: completions batch by batch."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from psyche_jax.config import Dtype, PromptSection
from psyche_jax.config_files import config_to_dict
from psyche_jax.data.chat import chosen_prompt, decoded_text, opened_text, prompt_tokens
from psyche_jax.data.streams import pad_prompts
from psyche_jax.errors import UserError
from psyche_jax.evaluate.answers import Completion, Key
from psyche_jax.evaluate.tasks import Task
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.decode import Rollout, generate
from psyche_jax.model.huggingface import load_tokenizer
from psyche_jax.model.linear import Parameters
from psyche_jax.model.qwen2 import Execution
from psyche_jax.model.sampling import Sampling
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, check_mesh_fits, make_mesh
from psyche_jax.train.stored_models import identity as identity_of
from psyche_jax.train.stored_models import open_model

_MOST_BATCHES = 4  # so many are read at once, to be answered one batch after the other


def complete(
    config: ModelConfig,
    parameters: Parameters,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    execution: Execution,
    batch_size: int,
    seed: int = 0,
    skip: Collection[int] = (),
    opened: str = "",
) -> Iterator[tuple[int, Completion]]:
    """One completion for each prompt, with its place, as they come.

    `batch_size` prompts are answered at once; where prompts are short beside answers, more of them are read, and each
    takes the slot of one that has ended. Prompts are sorted by length, so that little is padded and few shapes are
    compiled. Prompts at the places `skip` have theirs already; the others get what they would have got without it,
    since parts are always cut alike. `batch_size` is rounded up to a multiple of what the mesh's batch axes need.
    `opened` is what the chat template has written of each response; their texts begin with it.
    """
    places = execution.sharding.parts("batch")
    rows = -(-min(batch_size, len(prompts)) // places) * places
    sampling = replace(sampling, slots=rows)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    program: Callable[..., Rollout] = jax.jit(partial(generate, config, sampling=sampling, execution=execution))
    place = execution.sharding.named("batch", None)
    start = 0
    while start < len(order):
        # The prompts of what waits take memory too: half as much as answers at most.
        ends = [min(start + batches * rows, len(order)) for batches in range(1, _MOST_BATCHES + 1)]
        sizes = [(end - start) * len(prompts[order[end - 1]]) for end in ends]
        fitting = [end for end, size in zip(ends, sizes, strict=True) if 2 * size <= rows * sampling.max_new_tokens]
        indices = order[start : max([ends[0], *fitting])]
        key = jax.random.fold_in(jax.random.key(seed), start)
        start += len(indices)
        if all(index in skip for index in indices):
            continue
        padded = indices + indices[:1] * (-len(indices) % rows)
        batch = jax.device_put(pad_prompts([prompts[i] for i in padded], config.max_positions), place)
        rollout = jax.device_get(program(parameters, batch["tokens"], batch["mask"], key))
        for row, index in enumerate(indices):
            if index in skip:
                continue
            tokens = rollout.tokens[row][rollout.mask[row]].tolist()
            finished = bool(tokens) and tokens[-1] in config.stop_token_ids
            text = opened + decoded_text(tokenizer, tokens[:-1] if finished else tokens)
            yield index, Completion(text, len(tokens), finished)


class LocalModel:
    """A model on disk, its weights not yet read."""

    def __init__(
        self,
        path: str,
        sampling: Sampling,
        *,
        compute_dtype: Dtype = "float32",
        batch_size: int = 64,
        seed: int = 0,
        prompt: PromptSection | None = None,
        thinking: bool | None = None,
        as_trained: bool = False,
    ) -> None:
        """Find the model.

        Args:
          path: a Hugging Face folder, a checkpoint or a run.
          sampling: lengths and temperature.
          compute_dtype: dtype of activations and of the weights while decoding.
          batch_size: questions at once.
          seed: of sampling.
          prompt: system prompt and instruction; None: those that the model was trained with, else the defaults.
          as_trained: answers may be as long as GRPO trained the model with, where it did; else as `sampling` says.
          thinking: what the chat template's switch is set to; None: as `prompt` says, or as the model was trained.

        Raises:
          UserError: there is no usable model.
        """
        self.name = path
        self._stored = open_model(path)
        self._stored.check_shapes()
        self._sharding = Sharding(make_mesh(), TRAIN_RULES)
        check_mesh_fits(self._sharding, self._stored.config)
        self._tokenizer = load_tokenizer(self._stored.tokenizer_folder)
        self._prompt = chosen_prompt(prompt, self._stored.prompt, thinking)
        if as_trained and self._stored.max_new_tokens is not None:
            sampling = replace(sampling, max_new_tokens=self._stored.max_new_tokens)
        self._sampling, self._dtype, self._batch_size, self._seed = sampling, compute_dtype, batch_size, seed
        self.parameters: int | None = self._stored.config.num_parameters

    @property
    def step(self) -> int:
        """The training step of a checkpoint, 0 for a Hugging Face folder."""
        name = self._stored.weights.name
        return int(name) if name.isdecimal() else 0

    @property
    def short_name(self) -> str:
        """What reports call it."""
        return Path(self.name).absolute().name

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked how, for the record."""
        return {
            "max_new_tokens": self._sampling.max_new_tokens,
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            "seed": self._seed,
            "prompt": config_to_dict(self._prompt),
        }

    @property
    def identity(self) -> dict[str, Any]:
        """All that an answer depends on."""
        return {
            **self.settings,
            "dtype": self._dtype,
            "batch": self._batch_size,
            "weights": str(self._stored.weights),
            "identity": identity_of(self._stored),
        }

    def answer(
        self, tasks: Mapping[Key, Task], known: Collection[Key], keep: Callable[[Key, Completion], object]
    ) -> dict[Key, str]:
        """Answer all tasks but those `known`. Returns why there is none, for those that do not fit the model.

        Raises:
          UserError: the weights cannot be read, or the chat template is missing or broken.
        """
        opened = opened_text(self._tokenizer, self._prompt.thinking)
        room = self._stored.config.max_positions - self._sampling.max_new_tokens
        prompts: dict[Key, list[int]] = {}
        failed: dict[Key, str] = {}
        for key, task in tasks.items():
            try:
                tokens = prompt_tokens(self._tokenizer, task.turns, self._prompt)
            except UserError as error:
                failed[key] = str(error)
                continue
            if len(tokens) <= room:
                prompts[key] = tokens
            else:
                failed[key] = (
                    f"a question of {len(tokens)} tokens and an answer of {self._sampling.max_new_tokens} do not fit "
                    f"the {self._stored.config.max_positions} positions of {self.name}"
                )
        keys = list(prompts)
        answered = {place for place, key in enumerate(keys) if key in known}
        if len(answered) == len(keys):  # so the weights need not be read
            return failed
        completions = complete(
            self._stored.config,
            self._stored.read_parameters(self._sharding, jnp.dtype(self._dtype)),
            self._tokenizer,
            list(prompts.values()),
            self._sampling,
            Execution(self._sharding, jnp.dtype(self._dtype)),
            self._batch_size,
            self._seed,
            answered,
            opened,
        )
        for place, completion in completions:
            keep(keys[place], completion)
        return failed
