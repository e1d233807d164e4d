"""Run a workload, time its steps, count compilations, and look for visits to the host in the compiled program."""

import re
import resource
import statistics
import time
from dataclasses import asdict
from typing import Any

import jax

from psyche_jax.bench.programs import Workload, grpo_workload, rollout_workload, sft_workload
from psyche_jax.bench.shape import GrpoShape, RolloutShape, SftShape, What
from psyche_jax.train.compilations import count_compilations

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
    what: What
    workload: Workload
    if isinstance(shape, SftShape):
        what, workload = "sft", sft_workload(shape, seed, total)
    elif isinstance(shape, GrpoShape):
        what, workload = "grpo", grpo_workload(shape, seed, total)
    else:
        what, workload = "rollout", rollout_workload(shape, seed, total)
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
    """An outcome for people."""
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
