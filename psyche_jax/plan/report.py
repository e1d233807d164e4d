"""`psyche plan`: compile a config for a slice, or search for settings that fit, and say it as text or JSON."""

import dataclasses
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from psyche_jax.config import GrpoConfig, RolloutSection, SftConfig
from psyche_jax.config_files import load_config, read_values
from psyche_jax.errors import UserError
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.sharding import check_mesh_fits, make_mesh
from psyche_jax.plan.collectives import PLACES, Collective, find_collectives, summarize
from psyche_jax.plan.compile import (
    ARGUMENTS,
    GIB,
    WITHIN_TEMPORARIES,
    PlanConfig,
    compile_lowered,
    find_architecture,
    least_peak,
    lower,
    memory_by_kind,
)
from psyche_jax.plan.roofline import ASSUMPTIONS, Phase, count_phases
from psyche_jax.plan.slices import Slice

_MOST_TRIES = 12


@dataclass(frozen=True)
class Plan:
    """What `psyche plan` found; `as_json` is what it prints for machines."""

    config: PlanConfig
    slice_: Slice
    program: str
    mesh: dict[str, int]
    fits: bool
    peak_bytes: int | None
    limit_bytes: int
    memory_gib: dict[str, float | None]
    collectives: tuple[Collective, ...]
    phases: dict[str, Phase]
    compile_seconds: float
    assumptions: tuple[str, ...]
    advice: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """The roofline time of all phases."""
        return sum(phase.seconds(self.slice_) for phase in self.phases.values())

    def as_json(self) -> dict[str, Any]:
        """One JSON object."""
        seconds = {name: phase.seconds(self.slice_) for name, phase in self.phases.items()}
        return {
            "topology": self.slice_.name,
            "program": self.program,
            "mesh": self.mesh,
            "fits": self.fits,
            "peak_gib": _gib(self.peak_bytes),
            "limit_gib": _gib(self.limit_bytes),
            "memory_gib": {k: None if v is None else round(v, 4) for k, v in self.memory_gib.items()},
            "collectives": summarize(list(self.collectives)),
            "flops": sum(phase.flops for phase in self.phases.values()),
            "hbm_bytes": sum(phase.hbm_bytes for phase in self.phases.values()),
            "roofline_seconds": {**seconds, "total": self.seconds},
            "phases": {
                name: {**dataclasses.asdict(phase), "bound": phase.bound(self.slice_)}
                for name, phase in self.phases.items()
            },
            "compile_seconds": round(self.compile_seconds, 2),
            "assumptions": list(self.assumptions),
            "advice": list(self.advice),
        }


def load_plan_config(path: Path, overrides: list[str], program: str | None) -> PlanConfig:
    """Read a config of SFT or of GRPO; without `program`, its keys tell which.

    Raises:
      UsageError: it is broken.
    """
    if program is None:
        values = read_values(path, overrides)
        grpo = {field.name for field in dataclasses.fields(GrpoConfig)}
        grpo -= {field.name for field in dataclasses.fields(SftConfig)}
        data = values.get("data")
        is_grpo = bool(grpo & set(values)) or (isinstance(data, dict) and "max_prompt_length" in data)
        program = "grpo" if is_grpo else "sft"
    if program == "grpo":
        return load_config(GrpoConfig, path, overrides)
    return load_config(SftConfig, path, overrides)


def make_plan(config: PlanConfig, slice_: Slice) -> Plan:
    """Compile the program of `config` for `slice_` and read the result.

    Raises:
      UserError: the model is missing, libtpu is, or the mesh divides something it must not.
    """
    lowered = lower(config, slice_.devices())
    compiled = compile_lowered(lowered)
    mesh = dict(lowered.mesh.shape)
    collectives: tuple[Collective, ...] = ()
    if compiled.executable is not None:
        smallest = smallest_weight_bytes(config, lowered.model, mesh["tensor"])
        collectives = tuple(find_collectives(compiled.executable.as_text(), smallest))
    limit = compiled.limit_bytes or int(slice_.chip.hbm_gib * GIB)
    # LIBTPU_INIT_ARGS may tell the compiler of more memory than a chip has.
    fits = compiled.executable is not None and (compiled.peak_bytes or 0) <= limit
    memory_gib = memory_by_kind(lowered, config, compiled.peak_bytes)
    return Plan(
        config,
        slice_,
        lowered.program,
        mesh,
        fits,
        compiled.peak_bytes,
        limit,
        memory_gib,
        collectives,
        count_phases(config, lowered.model, mesh),
        compiled.seconds,
        (*lowered.assumptions, *ASSUMPTIONS),
        () if fits else advise(config, lowered.model, mesh, memory_gib, limit),
    )


def smallest_weight_bytes(config: PlanConfig, model: ModelConfig, tensor: int) -> int:
    """Of a layer's matrices the smallest (that of keys or values), whole but for the tensor axis, as computed with."""
    rows = model.num_key_value_heads * model.head_dim // tensor
    return rows * model.hidden_size * jnp.dtype(config.model.compute_dtype).itemsize


def advise(
    config: PlanConfig, model: ModelConfig, mesh: dict[str, int], memory_gib: dict[str, float | None], limit: int
) -> tuple[str, ...]:
    """What to change so that the program takes less memory: keys of the config, the most effective first."""
    places = mesh["data"] * mesh["fsdp"]
    advice = []
    if config.model.remat != "full":
        advice.append("model.remat=full: backward computes each layer again instead of keeping its products")
    if config.model.compute_dtype == "float32":
        advice.append("model.compute_dtype=bfloat16: halves activations and caches")
    if isinstance(config, SftConfig):
        rows = config.rows_per_micro_batch
        if smaller := _smaller(rows, config.batch_size, places):
            advice.append(f"micro_batch_size={smaller} instead of {rows}: fewer activations, the same loss")
        elif config.data.max_length > 128:
            advice.append(f"data.max_length={config.data.max_length // 2}: shorter examples")
    else:
        prompts = config.prompts_per_micro_batch
        rows, whole = prompts * config.generations_per_prompt, config.prompts_per_update
        if smaller := _smaller(rows, whole * config.generations_per_prompt, places, config.generations_per_prompt):
            advice.append(f"micro_batch_prompts={smaller // config.generations_per_prompt} instead of {prompts}")
        responses = config.prompts_per_step * config.generations_per_prompt
        if smaller := _smaller(config.slots, responses, places):
            advice.append(f"rollout.slots={smaller} instead of {config.slots}: less KV cache")
        if config.objective.kl_coefficient and config.reference_dtype == "float32":
            advice.append("reference_dtype=bfloat16: halves the reference policy")
        if mesh["tensor"] < 4 and model.num_key_value_heads % (2 * mesh["tensor"]) == 0 and mesh["fsdp"] % 2 == 0:
            advice.append(
                f"mesh.tensor={2 * mesh['tensor']} and mesh.fsdp={mesh['fsdp'] // 2}: decoding splits weights over "
                "tensor only"
            )
    held = sum(memory_gib.get(name) or 0.0 for name in ("parameters", "optimizer", "reference"))
    if mesh["data"] > 1:
        advice.append(f"mesh.data=1 and mesh.fsdp={places}: spread parameters and optimizer over all chips")
    larger = f"a larger slice: parameters, optimizer and reference alone take {held:.1f} GiB on each"
    return (larger, *advice) if held > 0.75 * limit / GIB else (*advice, larger)


def search(config: PlanConfig, slice_: Slice) -> Plan:
    """Try micro-batches, remat policies and slots, the fastest by roofline first; the first that fits is the best.

    Prints each try on stderr.

    Raises:
      UserError: none fits.
    """
    devices = slice_.devices()
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    model, _ = find_architecture(config)
    check_mesh_fits(mesh, model)
    shape = dict(mesh.shape)
    seconds = functools.partial(_roofline, model=model, mesh=shape, slice_=slice_)
    candidates = list(_candidates(config, shape["data"] * shape["fsdp"]))
    # Of equally fast ones the largest first: what it does not compute again costs nothing where there is room.
    candidates.sort(key=lambda candidate: (seconds(candidate), [-size for size in _size(candidate)]))
    limit = slice_.chip.hbm_gib * GIB
    possible = [c for c in candidates if least_peak(c, model, shape) <= limit]
    _say(f"{len(candidates)} variants, {len(candidates) - len(possible)} of them too large by arithmetic")
    failed: list[PlanConfig] = []
    for number, candidate in enumerate(_not_larger(possible, failed), start=1):
        if number > _MOST_TRIES:
            break
        plan = make_plan(candidate, slice_)
        peak = "?" if plan.peak_bytes is None else f"{plan.peak_bytes / GIB:.2f}"
        result = "fits" if plan.fits else "does not fit"
        _say(f"{describe(candidate)}: {result}, {peak} GiB, roofline {plan.seconds:.2f} s")
        if plan.fits:
            return plan
        failed.append(candidate)
    raise UserError(
        f"nothing fits {slice_.name} within {_MOST_TRIES} tries: take a larger slice, or change mesh or lengths"
    )


def describe(config: PlanConfig) -> str:
    """What a search varies, as `--set` takes it."""
    keys = {"model.remat": config.model.remat}
    if isinstance(config, SftConfig):
        return " ".join(f"{k}={v}" for k, v in {**keys, "micro_batch_size": config.micro_batch_size}.items())
    more = {"micro_batch_prompts": config.micro_batch_prompts, "rollout.slots": config.slots}
    return " ".join(f"{k}={v}" for k, v in {**keys, **more}.items())


def _not_larger(candidates: list[PlanConfig], failed: list[PlanConfig]) -> Iterator[PlanConfig]:
    """Skip what needs at least as much of everything as one that has failed (a list that grows meanwhile)."""
    for candidate in candidates:
        if not any(all(a >= b for a, b in zip(_size(candidate), _size(other), strict=True)) for other in failed):
            yield candidate


def _size(config: PlanConfig) -> tuple[int, ...]:
    remat = ("full", "dots", "none").index(config.model.remat)
    if isinstance(config, SftConfig):
        return remat, config.rows_per_micro_batch
    prompts = config.prompts_per_micro_batch
    return remat, prompts, config.slots


def _candidates(config: PlanConfig, places: int) -> Iterator[PlanConfig]:
    for remat in ("none", "dots", "full"):
        section = dataclasses.replace(config.model, remat=remat)
        if isinstance(config, SftConfig):
            for rows in _divisors(config.batch_size):
                if rows % places == 0:
                    yield dataclasses.replace(config, model=section, micro_batch_size=rows)
        else:
            for prompts in _divisors(config.prompts_per_update):
                for slots in _slots(config.prompts_per_step * config.generations_per_prompt, places):
                    if prompts * config.generations_per_prompt % places == 0:
                        rollout = RolloutSection(slots)
                        yield dataclasses.replace(config, model=section, micro_batch_prompts=prompts, rollout=rollout)


def _slots(responses: int, places: int) -> Iterator[int]:
    """All responses at once, half of them, and so on, as far as the mesh divides them."""
    while responses and responses % places == 0:
        yield responses
        responses = responses // 2 if responses % 2 == 0 else 0


def _roofline(config: PlanConfig, model: ModelConfig, mesh: dict[str, int], slice_: Slice) -> float:
    return sum(phase.seconds(slice_) for phase in count_phases(config, model, mesh).values())


def _smaller(rows: int, whole: int, places: int, unit: int = 1) -> int | None:
    """The next smaller part of `whole` that can be spread over `places`, in multiples of `unit`."""
    sizes = [size for size in _divisors(whole) if size < rows and size % places == 0 and size % unit == 0]
    return max(sizes, default=None)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _gib(size: int | None) -> float | None:
    return None if size is None else round(size / GIB, 3)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_LABELS = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "reference": "reference policy",
    "batch": "batch and reward tables",
    "gradients": "gradients",
    "saved_activations": "activations kept for backward",
    "kv_cache": "KV cache of prompts and slots",
    "decoding_weights": "weights laid out for decoding",
}
_PLACES = {
    "decoding_loop": "decoding loop",
    "layer_loop": "loop over layers",
    "other_loops": "other loops",
    "once": "once",
}


def as_text(plan: Plan) -> str:
    """Some forty lines: verdict, memory, collectives, time, assumptions, advice."""
    # Verdict.
    limit, peak = plan.limit_bytes / GIB, None if plan.peak_bytes is None else plan.peak_bytes / GIB
    chip = plan.slice_.chip
    unit = "chip" if chip.devices == 1 else "device"
    axes = [" × ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1)]
    devices = [f"{plan.slice_.device_count} devices"] if chip.devices > 1 else []
    chips = "one chip" if plan.slice_.chips == 1 else f"{plan.slice_.chips} chips"
    size = ", ".join(filter(None, [chips, *devices, *axes]))
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    figure = "?" if peak is None else f"{peak:.2f}"
    lines = [
        f"{plan.program} on {plan.slice_.name} ({size}), {describe(plan.config)}",
        f"{verdict}: peak {figure} of {limit:.2f} GiB a {unit} (compiled in {plan.compile_seconds:.0f} s)",
        "",
        f"{f'memory a {unit}':37}GiB",
    ]
    # Memory: what is there all the time, then what comes and goes within the program.
    for name in ARGUMENTS:
        if name in plan.memory_gib:
            lines.append(_gib_line(_LABELS[name], plan.memory_gib[name]))
    lines.append(_gib_line("temporaries, at the peak", plan.memory_gib["temporaries"]))
    for name in WITHIN_TEMPORARIES:
        if name in plan.memory_gib:
            lines.append(_gib_line(f"  {_LABELS[name]}*", plan.memory_gib[name]))
    lines.append("  * by arithmetic; not all of them exist at the same time")
    # Collectives by place, and the three that move most. A program that does not fit has not been compiled to its end.
    if plan.fits:
        lines += ["", f"{'collectives':20}{'in program':>12}{'executed':>12}{'GiB':>10}{'weight-sized':>14}"]
        summary = summarize(list(plan.collectives))
        for place in PLACES:
            row = summary[place]
            lines.append(
                f"{_PLACES[place]:20}{row['instructions']:12}{row['count']:12}{row['bytes'] / GIB:10.2f}"
                f"{row['weight_sized']:14}"
            )
        for found in sorted(plan.collectives, key=lambda c: -c.bytes * c.times)[:3]:
            lines.append(
                f"  {found.opcode} of {found.bytes / 2**20:.1f} MiB × {found.times} ({_PLACES[found.place]}): "
                f"{found.op_name[-60:]}"
            )
    # Time, at best: by FLOPs, bytes and links, phase by phase.
    lines += ["", f"{'roofline':22}{'PFLOP':>10}{'HBM GiB':>10}{'ICI GiB':>10}{'seconds':>10}  bound"]
    for name, phase in plan.phases.items():
        lines.append(
            f"{name.replace('_', ' '):22}{phase.flops / 1e15:10.2f}{phase.hbm_bytes / GIB:10.1f}"
            f"{phase.ici_bytes / GIB:10.1f}{phase.seconds(plan.slice_):10.2f}  {phase.bound(plan.slice_)}"
        )
    flops = sum(phase.flops for phase in plan.phases.values())
    lines.append(f"{'total':22}{flops / 1e15:10.2f}{'':20}{plan.seconds:10.2f}")
    lines.append(
        f"a {unit}: {chip.bf16_flops / 1e12:.0f} bf16 TFLOP/s, {chip.hbm_bytes_per_second / 1e9:.0f} GB/s of HBM, "
        f"{chip.ici_bytes_per_second / 1e9:.0f} GB/s to its neighbours"
    )
    lines += ["", "assumed:", *(f"  {line}" for line in plan.assumptions)]
    if plan.advice:
        lines += ["", "to make it fit:", *(f"  {line}" for line in plan.advice)]
    return "\n".join(lines)


def _gib_line(label: str, value: float | None) -> str:
    return f"{label:36}{'?' if value is None else f'{value:.2f}':>6}"
