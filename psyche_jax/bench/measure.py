"""The real programs of SFT, GRPO and rollout on a random model, timed."""

import re
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psyche_jax.bench.case import Case
from psyche_jax.bench.options import What
from psyche_jax.config import GrpoConfig, SftConfig
from psyche_jax.model.adapters import initial_adapters, joined, without_adapter
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.decode import generate_counted
from psyche_jax.model.flops import memory_bandwidth, peak_of_all_devices
from psyche_jax.model.linear import Parameters
from psyche_jax.model.qwen2 import Execution, initialize
from psyche_jax.model.sampling import Sampling
from psyche_jax.model.sharding import check_mesh_fits
from psyche_jax.plan.compile import sharding_of
from psyche_jax.plan.roofline import count_phases, decoding_of
from psyche_jax.rewards.score import CompiledRules, compile_rules
from psyche_jax.train import grpo_run, hosts, sft
from psyche_jax.train.grpo import Iteration
from psyche_jax.train.loop import count_compilations
from psyche_jax.train.setup import abstract_train_state, check_grpo_rows, check_rows
from psyche_jax.train.state import TrainState, initial_state, make_optimizer, make_schedule


@dataclass(frozen=True)
class Workload:
    """A jitted program and how to call it again and again.

    `arguments(carry, step)` gives the program's arguments in step `step`; `split(result)` the next carry and what the
    step reports (arrays by name).
    """

    program: Any
    carry: Any
    arguments: Callable[[Any, int], tuple[Any, ...]]
    split: Callable[[Any], tuple[Any, dict[str, jax.Array]]]


def sft_workload(case: Case, seed: int, steps: int) -> Workload:
    """The step of `psyche sft`; full sequences of random tokens, another batch each step."""
    config, model, execution = case.config, case.model, _execution(case)
    assert isinstance(config, SftConfig)
    rows = config.rows_per_micro_batch
    check_rows(rows, "batch_size" if config.micro_batch_size is None else "micro_batch_size", execution.sharding)
    schedule = make_schedule(config.optimizer, steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    shardings = abstract_train_state(model, jnp.dtype(config.model.dtype), execution.sharding, optimizer)[1]
    step = sft.make_sft_step(model, execution, optimizer, schedule, shardings, config.batch_size // rows)
    size = (config.batch_size, config.data.max_length)
    place = execution.sharding.named("batch", "sequence")
    fixed = hosts.place(
        {
            "segments": np.ones(size, np.int32),
            "positions": np.tile(np.arange(size[1], dtype=np.int32), (size[0], 1)),
            "loss_mask": np.ones(size, bool),
        },
        place,
    )
    tokens = [hosts.place(drawn, place) for drawn in _random_tokens(seed, steps, model, size)]
    base, trained = _parameters(case, seed, execution)
    state = initial_state(optimizer, trained, shardings)

    def arguments(state: TrainState, index: int) -> tuple[Any, ...]:
        return state, {**fixed, "tokens": tokens[index]}, base

    return Workload(step, state, arguments, lambda result: result)


def rollout_workload(case: Case, seed: int, steps: int) -> Workload:
    """Decoding as `psyche grpo` and `psyche eval` do it."""
    config, execution = case.config, _execution(case)
    assert isinstance(config, GrpoConfig)
    check_grpo_rows(config, execution.sharding)
    sampling = Sampling(config.max_new_tokens, config.temperature, config.generations_per_prompt, config.slots)
    generate = partial(generate_counted, case.model, sampling=sampling, execution=execution)
    program = jax.jit(generate, out_shardings=execution.sharding.named())
    prompts, keys = _prompts(case, seed, steps, execution), _keys(case, seed, steps, execution)
    parameters = joined(*_parameters(case, seed, execution))

    def arguments(parameters: Parameters, index: int) -> tuple[Any, ...]:
        return parameters, prompts[index]["tokens"], prompts[index]["mask"], keys[index]

    def split(result: Any) -> tuple[Parameters, dict[str, jax.Array]]:
        rollout, steps = result
        return parameters, {"mask": rollout.mask, "decoding_steps": steps}

    return Workload(program, parameters, arguments, split)


def grpo_workload(case: Case, seed: int, steps: int) -> Workload:
    """The iteration of `psyche grpo`."""
    config, model, execution = case.config, case.model, _execution(case)
    assert isinstance(config, GrpoConfig)
    check_grpo_rows(config, execution.sharding)
    schedule = make_schedule(config.optimizer, steps, config.updates_per_step)
    optimizer = make_optimizer(config.optimizer, schedule)
    shardings = abstract_train_state(model, jnp.dtype(config.model.dtype), execution.sharding, optimizer)[1]
    program = Iteration(config, model, execution, optimizer, schedule, shardings).program()
    rules = _rules(config, model, seed)
    prompts, keys = _prompts(case, seed, steps, execution), _keys(case, seed, steps, execution)
    reference, trained = _parameters(case, seed, execution)
    if reference is None and config.objective.kl_coefficient:
        dtype = jnp.dtype(config.reference_dtype)
        reference = jax.tree.map(lambda weights: jnp.array(weights, dtype, copy=True), trained)
    state = initial_state(optimizer, trained, shardings)

    def arguments(state: TrainState, index: int) -> tuple[Any, ...]:
        return state, reference, rules, prompts[index], keys[index]

    return Workload(program, state, arguments, lambda result: (result[0], result[1]["metrics"]))


_WORKLOADS: dict[What, Callable[[Case, int, int], Workload]] = {
    "sft": sft_workload,
    "grpo": grpo_workload,
    "rollout": rollout_workload,
}


def _execution(case: Case) -> Execution:
    section, sharding = case.config.model, sharding_of(case.config)
    check_mesh_fits(sharding, case.model)
    return Execution(sharding, jnp.dtype(section.compute_dtype), section.remat, section.attention)


def _parameters(case: Case, seed: int, execution: Execution) -> tuple[Parameters | None, Parameters]:
    """The base of adapters, if these are trained, and what is trained."""
    key, sharding = jax.random.key(seed), execution.sharding
    weights = initialize(without_adapter(case.model), key, sharding, jnp.dtype(case.config.model.dtype))
    return (None, weights) if case.model.adapter is None else (weights, initial_adapters(case.model, key, sharding))


def _random_tokens(seed: int, steps: int, model: ModelConfig, size: tuple[int, int]) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, model.vocab_size, size, np.int32) for _ in range(steps)]


def _prompts(case: Case, seed: int, steps: int, execution: Execution) -> list[dict[str, jax.Array]]:
    """Prompts of full length, other ones each step."""
    config = case.config
    assert isinstance(config, GrpoConfig)
    size = (config.prompts_per_step, config.data.max_prompt_length)
    fixed = {"mask": np.ones(size, bool), "answers": np.ones(size[0], np.int32)}
    drawn = _random_tokens(seed, steps, case.model, size)
    return [hosts.place({**fixed, "tokens": tokens}, execution.sharding.named("batch")) for tokens in drawn]


def _keys(case: Case, seed: int, steps: int, execution: Execution) -> list[jax.Array]:
    """A random key for each step; where responses end at given places, the numbers that are drawn by instead.

    A token is drawn by where two numbers lie in the cumulative sum of its probabilities: the stop token, which is token
    0, where both are 0. All other numbers are 1/8 or more, beyond the share of any one token.
    """
    if case.lengths is None:
        return [jax.random.fold_in(jax.random.key(seed), step) for step in range(steps)]
    config = case.config
    assert isinstance(config, GrpoConfig)
    responses = len(case.lengths)
    random = np.random.default_rng(seed).random((2, responses, config.max_new_tokens), np.float32)
    numbers = np.float32(1 / 8) + np.float32(7 / 8) * random
    numbers[:, np.arange(responses), np.asarray(case.lengths) - 1] = 0
    return [hosts.place(numbers, execution.sharding.named())] * steps


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


def run_benchmark(case: Case, steps: int, warmup: int, seed: int) -> dict[str, Any]:
    """Time `steps` steps after `warmup` ones that do not count; the first of all compiles.

    Returns:
      What `psyche bench --json` prints. `seconds_*`: wall clock of each step, up to when its results are there;
      `cpu_seconds_all`: what this process's threads computed meanwhile, over all cores; `tokens_per_second`: trained
      (SFT) or generated (GRPO, rollout) tokens of a step by the median; `compilations`: from the first step to the
      last, `compilations_timed`: within the timed steps, where there should be none; `peak_rss_mib`: of the process.
      Further keys: see `_of_responses`, `shares_of_peaks`.
    """
    total = warmup + steps
    workload = _WORKLOADS[case.what](case, seed, total)
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
    metrics = jax.device_get(reports)
    of_responses = {} if case.what == "sft" else _of_responses(case, metrics[warmup:])
    tokens = metrics[-1]["num_tokens"] if case.what == "sft" else of_responses["mean_length"] * _responses(case)
    outcome: dict[str, Any] = {
        "what": case.what,
        "shape": case.shape,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "seconds_median": round(median, 5),
        "seconds_all": [round(value, 5) for value in timed],
        "cpu_seconds_all": [round(value, 5) for value in cpu_seconds[warmup:]],
        "first_step_seconds": round(seconds[0], 3),
        "tokens_per_second": round(float(tokens) / median, 1),
        "compilations": compilations,
        "compilations_timed": compilations_timed,
        "peak_rss_mib": round(peak, 1),
        **of_responses,
        **shares_of_peaks(case, metrics[-1], median),
    }
    # GRPO says two things more: whether sampler and trainer agree, and that the device never waits for the host.
    if case.what == "grpo":
        outcome["logp_difference"] = {
            "mean": statistics.fmean(float(report["sampling/logp_difference/mean"]) for report in metrics),
            "max": max(float(report["sampling/logp_difference/max"]) for report in metrics),
        }
        text = workload.program.lower(*workload.arguments(carry, 0)).compile().as_text()
        outcome |= host_visits(text)
    return outcome


def _responses(case: Case) -> int:
    assert isinstance(case.config, GrpoConfig)
    return case.config.prompts_per_step * case.config.generations_per_prompt


def _of_responses(case: Case, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """`mean_length`, `max_length`: of a step's responses, in tokens; `decoding_steps`: how many it took. All of them
    by what the program returned in the timed steps, on average."""
    if case.what == "grpo":
        means = [float(report["completions/mean_length"]) for report in metrics]
        longest = [int(report["completions/max_length"]) for report in metrics]
    else:
        lengths = [report["mask"].sum(axis=1) for report in metrics]
        means, longest = [float(of_step.mean()) for of_step in lengths], [int(of_step.max()) for of_step in lengths]
    return {
        "mean_length": round(statistics.fmean(means), 3),
        "max_length": max(longest),
        "decoding_steps": round(statistics.fmean(int(report["decoding_steps"]) for report in metrics), 1),
    }


def shares_of_peaks(case: Case, metrics: dict[str, Any], seconds: float) -> dict[str, float]:
    """What share of the device's published peaks a step reaches, where these are known.

    `mfu`: of its bfloat16 FLOP/s, if that is what products are computed in. FLOPs are those of the model, as a run's
    metric `mfu` counts them: without padding and what remat computes again. `bandwidth_share`, of a rollout: the time
    in which memory could be read as decoding must read it, step by step all weights and what is filled of the cache
    (`plan/roofline.py`), over the time of the whole rollout.
    """
    config, model = case.config, case.model
    shares: dict[str, float] = {}
    decode = None
    if isinstance(config, SftConfig):
        flops = sft.step_flops(model, config.batch_size, metrics)
    elif case.what == "grpo":
        flops = grpo_run.step_flops(model, config, metrics)
    else:
        mesh = _execution(case).sharding.mesh.shape
        phases = count_phases(config, model, mesh, decoding_of(config, mesh, case.lengths))
        decode = phases["decode"]
        flops = phases["prefill"].flops + decode.flops
    peak, bandwidth = peak_of_all_devices(), memory_bandwidth(jax.devices()[0].device_kind)
    if peak is not None and config.model.compute_dtype == "bfloat16":
        shares["mfu"] = float(flops) / peak / seconds
    if bandwidth is not None and decode is not None:
        shares["bandwidth_share"] = decode.hbm_bytes / bandwidth / seconds
    return {name: round(share, 4) for name, share in shares.items()}


def as_text(outcome: dict[str, Any]) -> str:
    """An outcome as readable text."""
    lines = [
        f"{outcome['what']} on {outcome['devices']} × {outcome['device']}: "
        + ", ".join(f"{name} {value}" for name, value in outcome["shape"].items() if value is not None),
        f"{outcome['seconds_median']:.4g} s a step (median of {len(outcome['seconds_all'])}, "
        f"{min(outcome['seconds_all']):.4g} to {max(outcome['seconds_all']):.4g}), "
        f"{outcome['tokens_per_second']:.4g} tokens/s",
        f"{outcome['compilations']} compilations, {outcome['compilations_timed']} of them in timed steps; "
        f"{outcome['peak_rss_mib']:.0f} MiB",
    ]
    if "mean_length" in outcome:
        lines.append(
            f"responses of {outcome['mean_length']:.4g} tokens on average, the longest {outcome['max_length']}, in "
            f"{outcome['decoding_steps']:.5g} decoding steps"
        )
    shares = {"mfu": "MFU {:.1%} (of the published bfloat16 peak)", "bandwidth_share": "{:.1%} of the bandwidth bound"}
    if known := [text.format(outcome[name]) for name, text in shares.items() if name in outcome]:
        lines.append("; ".join(known))
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
