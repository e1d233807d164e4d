"""The real programs of SFT, GRPO and rollout on a random model, timed."""

import re
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psyche_jax.bench.shape import GrpoShape, ModelShape, RolloutShape, SftShape, What
from psyche_jax.config import (
    GrpoConfig,
    GrpoDataSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    RunSection,
)
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.decode import Sampling, generate
from psyche_jax.model.qwen2 import Execution, Parameters, initialize
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, make_mesh
from psyche_jax.rewards import AnswerSetRule, RepetitionRule, ThinkFormatRule
from psyche_jax.rewards.score import CompiledRules, compile_rules
from psyche_jax.train.grpo import Iteration
from psyche_jax.train.loop import count_compilations
from psyche_jax.train.setup import abstract_train_state, check_rows
from psyche_jax.train.sft import make_sft_step
from psyche_jax.train.state import TrainState, initial_state, make_optimizer, make_schedule


@dataclass(frozen=True)
class Workload:
    """A jitted program and how to call it again and again.

    `arguments(carry, step)` gives the program's arguments in step `step`; `split(result)` the next carry and what the
    step reports (scalars by name).
    """

    program: Any
    carry: Any
    arguments: Callable[[Any, int], tuple[Any, ...]]
    split: Callable[[Any], tuple[Any, dict[str, jax.Array]]]


def sft_workload(shape: SftShape, seed: int, steps: int) -> Workload:
    """The step of `psyche sft`; random tokens, another batch each step."""
    model, execution = _model(shape.model)
    check_rows(shape.batch, "--batch", execution.sharding)
    section = OptimizerSection()
    schedule = make_schedule(section, steps)
    optimizer = make_optimizer(section, schedule)
    shardings = abstract_train_state(model, jnp.dtype("float32"), execution.sharding, optimizer)[1]
    step = make_sft_step(model, execution, optimizer, schedule, shardings, micro_batches=1)
    size = (shape.batch, shape.length)
    place = execution.sharding.named("batch", "sequence")
    fixed = jax.device_put(
        {
            "segments": np.ones(size, np.int32),
            "positions": np.tile(np.arange(shape.length, dtype=np.int32), (shape.batch, 1)),
            "loss_mask": np.ones(size, bool),
        },
        place,
    )
    tokens = [jax.device_put(drawn, place) for drawn in _random_tokens(seed, steps, shape.model.vocab, size)]
    state = initial_state(optimizer, _parameters(model, seed, execution), shardings)
    return Workload(
        step, state, lambda state, index: (state, {**fixed, "tokens": tokens[index]}), lambda result: result
    )


def rollout_workload(shape: RolloutShape, seed: int, steps: int) -> Workload:
    """Decoding as `psyche grpo` and `psyche eval` do it, at temperature 1."""
    model, execution = _model(shape.model)
    check_rows(shape.prompts, "--prompts", execution.sharding)
    sampling = Sampling(shape.completion_length, 1.0, shape.generations)
    program = jax.jit(partial(generate, model, sampling=sampling, execution=execution))
    prompts, keys = _prompts(shape, seed, steps, execution), _keys(seed, steps)

    def arguments(parameters: Parameters, index: int) -> tuple[Any, ...]:
        return parameters, prompts[index]["tokens"], prompts[index]["mask"], keys[index]

    parameters = _parameters(model, seed, execution)
    return Workload(program, parameters, arguments, lambda _: (parameters, {}))


def grpo_workload(shape: GrpoShape, seed: int, steps: int) -> Workload:
    """The iteration of `psyche grpo`, with one update; the rewards are its own and one that differs by response."""
    model, execution = _model(shape.model)
    check_rows(shape.prompts, "--prompts", execution.sharding)
    config = GrpoConfig(
        run=RunSection("bench"),
        model=ModelSection("bench", compute_dtype=shape.model.dtype),
        data=GrpoDataSection("bench", shape.prompt_length),
        prompts_per_step=shape.prompts,
        generations_per_prompt=shape.generations,
        max_new_tokens=shape.completion_length,
        objective=ObjectiveSection(kl_coefficient=shape.beta),
        rewards=(ThinkFormatRule(weight=0.5), AnswerSetRule(), RepetitionRule(ngram=1)),
    )
    schedule = make_schedule(config.optimizer, steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    shardings = abstract_train_state(model, jnp.dtype("float32"), execution.sharding, optimizer)[1]
    program = Iteration(config, model, execution, optimizer, schedule, shardings).program()
    rules = _rules(config, model, seed)
    prompts, keys = _prompts(shape, seed, steps, execution), _keys(seed, steps)
    parameters = _parameters(model, seed, execution)
    reference = jax.tree.map(jnp.copy, parameters) if shape.beta else None
    state = initial_state(optimizer, parameters, shardings)

    def arguments(state: TrainState, index: int) -> tuple[Any, ...]:
        return state, reference, rules, prompts[index], keys[index]

    return Workload(program, state, arguments, lambda result: (result[0], result[1]["metrics"]))


_WORKLOADS: dict[type, tuple[What, Callable[[Any, int, int], Workload]]] = {
    SftShape: ("sft", sft_workload),
    GrpoShape: ("grpo", grpo_workload),
    RolloutShape: ("rollout", rollout_workload),
}


def _model(shape: ModelShape) -> tuple[ModelConfig, Execution]:
    """The architecture and how it computes. Its only stop token is beyond the vocabulary, so that it is never drawn."""
    config = ModelConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.width // shape.heads,
        tie_word_embeddings=shape.tied,
        stop_token_ids=(shape.vocab,),
    )
    return config, Execution(Sharding(make_mesh(), TRAIN_RULES), jnp.dtype(shape.dtype))


def _parameters(model: ModelConfig, seed: int, execution: Execution) -> Parameters:
    return initialize(model, jax.random.key(seed), execution.sharding, jnp.dtype("float32"))


def _random_tokens(seed: int, steps: int, vocab: int, size: tuple[int, int]) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab, size, np.int32) for _ in range(steps)]


def _prompts(shape: RolloutShape, seed: int, steps: int, execution: Execution) -> list[dict[str, jax.Array]]:
    """Prompts of full length, other ones each step."""
    size = (shape.prompts, shape.prompt_length)
    fixed = {"mask": np.ones(size, bool), "answers": np.ones(shape.prompts, np.int32)}
    drawn = _random_tokens(seed, steps, shape.model.vocab, size)
    return [jax.device_put({**fixed, "tokens": tokens}, execution.sharding.named("batch")) for tokens in drawn]


def _keys(seed: int, steps: int) -> list[jax.Array]:
    return [jax.random.fold_in(jax.random.key(seed), step) for step in range(steps)]


def _rules(config: GrpoConfig, model: ModelConfig, seed: int) -> CompiledRules:
    """Rules for a vocabulary of what they look for, all bytes, and random strings of 2 to 8 letters."""
    generator = np.random.default_rng(seed)
    looked_for = [text.encode() for text in ("<think>", "</think>", "答案：", "A")]
    vocabulary = [*looked_for, *(bytes([byte]) for byte in range(256))][: model.vocab_size]
    vocabulary += [
        bytes(generator.integers(ord("a"), ord("z") + 1, generator.integers(2, 9), np.uint8))
        for _ in range(model.vocab_size - len(vocabulary))
    ]
    return compile_rules(config.rules, [*vocabulary, None], model.stop_token_ids, cache_dir=None)


_TRANSFER = re.compile(r" (?:infeed|outfeed|send|recv)\(")
_CALLBACK = re.compile(r'custom_call_target="[^"]*(?:callback|[Hh]ost)[^"]*"')


def run_benchmark(shape: SftShape | RolloutShape | GrpoShape, steps: int, warmup: int, seed: int) -> dict[str, Any]:
    """Time `steps` steps after `warmup` ones that do not count; the first of all compiles.

    Returns:
      What `psyche bench --json` prints. `seconds_*`: wall clock of each step, up to when its results are there;
      `cpu_seconds_all`: what this process's threads computed meanwhile, over all cores; `tokens_per_second`: trained
      (SFT) or generated (GRPO, rollout) tokens of a step by the median; `compilations`: from the first step to the
      last, `compilations_timed`: within the timed steps, where there should be none; `peak_rss_mib`: of the process.
    """
    total = warmup + steps
    what, make = _WORKLOADS[type(shape)]
    workload = make(shape, seed, total)
    # Each step is waited for, so that its time is its own; what a step is given was put on the device before.
    carry = jax.block_until_ready(workload.carry)
    seconds, cpu_seconds, reports = [], [], []
    with count_compilations() as compiled:
        compiled_before = 0
        for index in range(total):
            if index == warmup:
                compiled_before = len(compiled)
            arguments = workload.arguments(carry, index)
            wall, cpu = time.perf_counter(), time.process_time()
            result = jax.block_until_ready(workload.program(*arguments))
            seconds.append(time.perf_counter() - wall)
            cpu_seconds.append(time.process_time() - cpu)
            carry, report = workload.split(result)
            reports.append(report)
        compilations, compilations_timed = len(compiled), len(compiled) - compiled_before
    # A median, since another process may hold up any single step.
    timed = seconds[warmup:]
    median = statistics.median(timed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    outcome: dict[str, Any] = {
        "what": what,
        "shape": _flat(shape),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "seconds_median": round(median, 5),
        "seconds_all": [round(value, 5) for value in timed],
        "cpu_seconds_all": [round(value, 5) for value in cpu_seconds[warmup:]],
        "first_step_seconds": round(seconds[0], 3),
        "tokens_per_second": round(shape.tokens / median, 1),
        "compilations": compilations,
        "compilations_timed": compilations_timed,
        "peak_rss_mib": round(peak, 1),
    }
    # GRPO says two things more: whether sampler and trainer agree, and that the device never waits for the host.
    if what == "grpo":
        metrics = jax.device_get(reports)
        outcome["logp_difference"] = {
            "mean": statistics.fmean(float(report["sampling/logp_difference/mean"]) for report in metrics),
            "max": max(float(report["sampling/logp_difference/max"]) for report in metrics),
        }
        text = workload.program.lower(*workload.arguments(carry, 0)).compile().as_text()
        outcome |= host_visits(text)
    return outcome


def as_text(outcome: dict[str, Any]) -> str:
    """An outcome as readable text."""
    lines = [
        f"{outcome['what']} on {outcome['devices']} × {outcome['device']}: "
        + ", ".join(f"{name} {value}" for name, value in outcome["shape"].items()),
        f"{outcome['seconds_median']:.4g} s a step (median of {len(outcome['seconds_all'])}, "
        f"{min(outcome['seconds_all']):.4g} to {max(outcome['seconds_all']):.4g}), "
        f"{outcome['tokens_per_second']:.4g} tokens/s",
        f"{outcome['compilations']} compilations, {outcome['compilations_timed']} of them in timed steps; "
        f"{outcome['peak_rss_mib']:.0f} MiB",
    ]
    if "logp_difference" in outcome:
        difference = outcome["logp_difference"]
        lines.append(
            f"|Δlog p| sampler to trainer: mean {difference['mean']:.2g}, max {difference['max']:.2g}; "
            f"host transfers {outcome['host_transfers']}, host callbacks {outcome['host_callbacks']}"
        )
    return "\n".join(lines)


def host_visits(hlo: str) -> dict[str, int]:
    """How often a compiled program's text says that it sends to or receives from the host, or calls back into it."""
    return {"host_transfers": len(_TRANSFER.findall(hlo)), "host_callbacks": len(_CALLBACK.findall(hlo))}


def _flat(shape: Any) -> dict[str, Any]:
    values = asdict(shape)
    return {**values.pop("model"), **values}
