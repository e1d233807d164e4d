"""Compiled GRPO iterations on the tiny model, and what came of their first steps: for the tests that look at them."""

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from support.training_fixtures import PROMPT, execution, grpo_config, largest_difference

from psyche_jax.config import ObjectiveSection
from psyche_jax.data.chat import prompt_tokens
from psyche_jax.data.dataset import load_records
from psyche_jax.data.records import RlPrompt, answer_mask
from psyche_jax.data.streams import pad_prompts
from psyche_jax.model.config import read_hf_config
from psyche_jax.model.huggingface import load_tokenizer, read_parameters
from psyche_jax.model.qwen2 import build
from psyche_jax.rewards.score import compile_rules
from psyche_jax.rewards.token_bytes import token_bytes_from_tokenizer
from psyche_jax.train.grpo import Iteration
from psyche_jax.train.state import initial_state, state_shardings

RATE = 0.001
ONE, FSDP, ALL = (1, 1, 1), (1, 8, 1), (2, 2, 2)  # meshes
# Nearly all the time of these tests is compilation; this takes some of it away.
FAST = {"xla_backend_optimization_level": 0}
# Two ways through the program: one update a step, and several with old log-probs, clips and micro-batches.
PLAIN: dict[str, Any] = {}
SEVERAL: dict[str, Any] = {
    "temperature": 0.7,
    # Clips so narrow that a small update meets them.
    "objective": ObjectiveSection("dapo", "batch", clip_low=0.02, clip_high=0.03, kl_coefficient=0.05),
    "minibatch_prompts": 4,
    "micro_batch_prompts": 2,
}


class Outcome(NamedTuple):
    """Some steps of one program: everything on the host."""

    config: Any
    metrics: list[dict[str, float]]
    samples: list[dict[str, Any]]
    parameters: list[Any]  # before each step, and after the last
    reference: Any  # after the last step
    program: str  # optimized HLO


class Bench:
    """A compiled iteration with all it takes; plain gradient descent, so that gradients can be read off."""

    def __init__(
        self,
        root: Path,
        mesh: tuple[int, int, int] = ONE,
        optimizer: Any = None,
        schedule: Any = optax.constant_schedule(RATE),  # noqa: B008
        **changes: Any,
    ) -> None:
        self.config = grpo_config(root, **changes)
        self.model = read_hf_config(root / "model")
        self.execution = execution(math.prod(mesh), *mesh, decoding_tensor=self.config.rollout.tensor)
        self.tokenizer = load_tokenizer(root / "model")
        self.bytes = token_bytes_from_tokenizer(self.tokenizer, self.model.vocab_size)
        self.rules = compile_rules(self.config.rules, self.bytes, self.model.stop_token_ids)
        self.optimizer = optimizer or optax.sgd(schedule)
        self.folder = root / "model"
        records = load_records(RlPrompt, root / "rl.jsonl").good[: self.config.candidates_per_step]
        padded = pad_prompts([prompt_tokens(self.tokenizer, r.messages, PROMPT) for r in records], 64)
        answers = np.asarray([answer_mask(record.answer) for record in records], np.int32)
        batch = {**padded, "answers": answers, "number": np.arange(len(records), dtype=np.int32)}
        self.batch = jax.device_put(batch, self.execution.sharding.named("batch"))
        self.reference = self.read() if self.config.objective.kl_coefficient else None
        self.iteration = Iteration(self.config, self.model, self.execution, self.optimizer, schedule, self.shardings())
        arguments = (self.state(self.read()), self.reference, self.rules, self.batch, jax.random.key(0))
        self.step = self.iteration.program().lower(*arguments).compile(FAST)

    def read(self) -> Any:
        return read_parameters(self.folder, self.model, self.execution.sharding, jnp.dtype("float32"))

    def state(self, parameters: Any) -> Any:
        return initial_state(self.optimizer, parameters, self.shardings())

    def shardings(self) -> Any:
        return state_shardings(self.optimizer, build(self.model)[1], self.execution.sharding)

    def run(self, steps: int, seed: int = 8, parameters: Any = None) -> Outcome:
        state = self.state(self.read() if parameters is None else parameters)
        metrics, samples, history = [], [], [jax.device_get(state.parameters)]
        for step in range(steps):
            key = jax.random.fold_in(jax.random.key(seed), step)
            state, outputs = self.step(state, self.reference, self.rules, self.batch, key)
            outputs = jax.device_get(outputs)
            metrics.append({name: float(value) for name, value in outputs["metrics"].items()})
            samples.append(outputs["samples"])
            history.append(jax.device_get(state.parameters))
        return Outcome(self.config, metrics, samples, history, jax.device_get(self.reference), self.step.as_text())


@functools.cache
def _bench(root: Path, mesh: tuple[int, int, int], several: bool) -> Bench:
    return Bench(root, mesh, **(SEVERAL if several else PLAIN))


@functools.cache
def _outcome(root: Path, mesh: tuple[int, int, int], several: bool) -> Outcome:
    return _bench(root, mesh, several).run(2)


def bench(root: Path, mesh: tuple[int, int, int] = ONE, several: bool = False) -> Bench:
    """One a session for each mesh and way: compilation is what these tests spend their time on."""
    return _bench(root, mesh, several)


def outcome(root: Path, mesh: tuple[int, int, int] = ONE, several: bool = False) -> Outcome:
    """The first two steps of that program."""
    return _outcome(root, mesh, several)


def compare(ours: Outcome, expected: Outcome, figure: Any, what: str) -> None:
    """The same tokens, and the same numbers but for the order of sums."""
    for left, right in zip(ours.samples, expected.samples, strict=True):
        assert (left["tokens"] == right["tokens"]).all(), "other tokens were sampled"
    for left, right in zip(ours.metrics, expected.metrics, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            # Where a reward is its group's mean, rounding gives the advantage either sign, and clips depend on it.
            limit = 0.03 if name.startswith("clip_ratio") else 1e-5
            assert abs(left[name] - right[name]) <= limit * max(1, abs(right[name])), name
    losses = [[line["loss"] for line in lines] for lines in (ours.metrics, expected.metrics)]
    figure(f"GRPO loss, {what}", np.abs(np.subtract(*losses)).max(), 1e-5)
    figure(f"GRPO parameters, {what}", largest_difference(ours.parameters[2], expected.parameters[2]), 1e-4)
