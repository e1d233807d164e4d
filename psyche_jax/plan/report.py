"""`psyche plan`: compile a config for a slice, and say what it takes as text or JSON."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from psyche_jax.config import GrpoConfig, SftConfig
from psyche_jax.data.dataset import open_dataset
from psyche_jax.errors import UsageError, UserError
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.flops import update_passes
from psyche_jax.plan.collectives import Collective, WeightBytes, find_collectives, find_copies, summarize
from psyche_jax.plan.compile import (
    FULL_LENGTH,
    GIB,
    PlanConfig,
    batch_places,
    compile_lowered,
    decoding_mesh,
    lower,
    memory_by_kind,
)
from psyche_jax.plan.forecast import Forecast, forecast
from psyche_jax.plan.hlo import Module
from psyche_jax.plan.rollout import Decoding, Loop, draw_lengths
from psyche_jax.plan.roofline import ASSUMPTIONS, Phase, count_attention, count_phases, decoding_of
from psyche_jax.plan.slices import PRICE_SOURCE, PRICES, Slice

_STEPS = 1000  # where it is not known how many there are


@dataclass(frozen=True)
class Wishes:
    """What `psyche plan` is told beside the config.

    `lengths`: of responses, as `draw_lengths` takes them; `steps`: of the run; `price`: dollars for a chip-hour.
    """

    lengths: str | None = None
    steps: int | None = None
    price: float | None = None


@dataclass(frozen=True)
class Plan:
    """What `psyche plan` found; `as_json` is what it prints for machines."""

    config: PlanConfig
    slice_: Slice
    mesh: dict[str, int]
    fits: bool
    peak_bytes: int | None
    limit_bytes: int
    memory_gib: dict[str, float | None]
    collectives: tuple[Collective, ...]
    copies: int  # of the cache or of weights in the decoding loop
    phases: dict[str, Phase]
    decoding: Decoding | None
    forecast: Forecast | None  # of a program that has been compiled
    wishes: Wishes
    compile_seconds: float
    assumptions: tuple[str, ...]
    advice: tuple[str, ...]

    @property
    def program(self) -> str:
        """That of which verb."""
        return "sft" if isinstance(self.config, SftConfig) else "grpo"

    @property
    def seconds(self) -> float:
        """The roofline time of all phases."""
        return sum(phase.seconds(self.slice_) for phase in self.phases.values())

    @functools.cached_property
    def run(self) -> dict[str, Any] | None:
        """What the forecast means for a run: by figure the two ends, the smaller first, as `low` and `high`."""
        if self.forecast is None:
            return None
        fast, slow = self.forecast.totals
        # What remat computes again is work that the model does not need; nor has a frozen base a gradient.
        flops = sum(phase.flops for name, phase in self.phases.items() if name != "backward")
        flops += (update_passes(self.config.adapter) - 1) * self.phases["forward"].flops
        peak = self.slice_.device_count * self.slice_.chip.bf16_flops
        if isinstance(self.config, SftConfig):
            tokens = self.config.batch_size * self.config.data.max_length
        else:
            tokens = 0 if self.decoding is None else self.decoding.tokens
        known = self.wishes.steps or count_steps(self.config)
        hours = (known or _STEPS) / 3600
        price = PRICES[self.slice_.chip.name] if self.wishes.price is None else self.wishes.price
        return {
            "mfu": {"low": flops / peak / slow, "high": flops / peak / fast},
            "tokens_per_second": {"low": tokens / slow, "high": tokens / fast},
            "hours": {"low": hours * fast, "high": hours * slow},
            "price": {end: hours * time * self.slice_.chips * price for end, time in (("low", fast), ("high", slow))},
            "steps": known or _STEPS,
            "steps_are_known": bool(known),
            "dollars_per_chip_hour": price,
            "decoding_steps": None if self.decoding is None else self.decoding.steps,
        }

    def as_json(self) -> dict[str, Any]:
        """One JSON object."""
        seconds = {name: phase.seconds(self.slice_) for name, phase in self.phases.items()}
        ends = self.forecast
        return {
            "topology": self.slice_.name,
            "program": self.program,
            "mesh": self.mesh,
            "fits": self.fits,
            "peak_gib": _gib(self.peak_bytes),
            "limit_gib": _gib(self.limit_bytes),
            "memory_gib": {k: None if v is None else round(v, 4) for k, v in self.memory_gib.items()},
            "collectives": summarize(self.collectives, self.copies),
            "flops": sum(phase.flops for phase in self.phases.values()),
            "hbm_bytes": sum(phase.hbm_bytes for phase in self.phases.values()),
            "roofline_seconds": {**seconds, "total": self.seconds},
            "phases": {
                name: {**dataclasses.asdict(phase), "bound": phase.bound(self.slice_)}
                for name, phase in self.phases.items()
            },
            "forecast_seconds": ends and ends.high | {"total": ends.totals[1]},
            "forecast_seconds_at_least": ends and ends.low | {"total": ends.totals[0]},
            "forecast": self.run,
            "compile_seconds": round(self.compile_seconds, 2),
            "assumptions": list(self.assumptions),
            "advice": list(self.advice),
        }


def make_plan(config: PlanConfig, slice_: Slice, wishes: Wishes) -> Plan:
    """Compile the program of `config` for `slice_` and read the result.

    Raises:
      UsageError: a wish cannot be.
      UserError: the model is missing, libtpu is, or the mesh divides something it must not.
    """
    lengths = response_lengths(config, wishes)
    lowered = lower(config, slice_.devices())
    mesh = lowered.mesh
    decoding = decoding_of(config, mesh, lengths) if isinstance(config, GrpoConfig) else None
    phases = count_phases(config, lowered.model, mesh, decoding)

    # What the compiler says, and what there is to read in its program.
    compiled = compile_lowered(lowered)
    collectives: tuple[Collective, ...] = ()
    copies, expected = 0, None
    if compiled.executable is not None:
        module = Module.parse(compiled.executable.as_text())
        collectives = tuple(find_collectives(module, weight_bytes(config, lowered.model, mesh)))
        loops = decoding.loops if decoding else ()
        expected = forecast(module, slice_, phases, count_attention(config, lowered.model, mesh, decoding), loops)
        if isinstance(config, GrpoConfig):
            copies = len(find_copies(module, decoding_sizes(config, lowered.model, mesh, loops)))
    limit = compiled.limit_bytes or int(slice_.chip.hbm_gib * GIB)
    # LIBTPU_INIT_ARGS may tell the compiler of more memory than a chip has.
    fits = compiled.executable is not None and (compiled.peak_bytes or 0) <= limit
    memory_gib = memory_by_kind(lowered, config, compiled.peak_bytes)
    assumed = lowered.assumptions
    if wishes.lengths is not None:
        ragged = (
            f"responses are as long as --lengths {wishes.lengths} says; learning reads them padded to max_new_tokens"
        )
        assumed = tuple(ragged if line == FULL_LENGTH else line for line in assumed)
    return Plan(
        config=config,
        slice_=slice_,
        mesh=mesh,
        fits=fits,
        peak_bytes=compiled.peak_bytes,
        limit_bytes=limit,
        memory_gib=memory_gib,
        collectives=collectives,
        copies=copies,
        phases=phases,
        decoding=decoding,
        forecast=expected,
        wishes=wishes,
        compile_seconds=compiled.seconds,
        assumptions=(*assumed, *ASSUMPTIONS),
        advice=() if fits else advise(config, lowered.model, mesh, memory_gib, limit),
    )


def response_lengths(config: PlanConfig, wishes: Wishes) -> list[int] | None:
    """Those of a step's responses; None where all are as long as can be.

    Raises:
      UsageError: a wish cannot be.
    """
    if wishes.steps is not None and wishes.steps < 1:
        raise UsageError(f"--steps must be at least 1, not {wishes.steps}")
    if wishes.price is not None and not 0 <= wishes.price < math.inf:
        raise UsageError(f"--price must be a number of dollars, not {wishes.price}")
    if wishes.lengths is None:
        return None
    if isinstance(config, SftConfig):
        raise UsageError("--lengths is about responses, and SFT has none")
    return draw_lengths(wishes.lengths, config.prompts_per_step * config.generations_per_prompt, config.max_new_tokens)


def count_steps(config: PlanConfig) -> int | None:
    """How many steps a run has, at most (what it would skip counts too). None if its data cannot be read on this
    machine."""
    places = config.data.train
    names = [places] if isinstance(places, str) else list(places)
    try:
        records = sum(len(open_dataset(name)) if Path(name).is_dir() else _lines(Path(name)) for name in names)
    except (OSError, UserError):
        return None
    return config.count_steps(records)


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(bool(line.strip()) for line in file)


def decoding_sizes(
    config: GrpoConfig, model: ModelConfig, mesh: Mapping[str, int], loops: tuple[Loop, ...]
) -> frozenset[int]:
    """How many elements the cache and the weights have on a chip, of one layer and of all: what no step may copy."""
    mesh = decoding_mesh(config, mesh)
    tensor, layers, prompts = mesh["tensor"], model.num_hidden_layers, config.prompts_per_step
    prompts = max(1, prompts // batch_places(mesh))
    width, inner = model.hidden_size, model.intermediate_size // tensor
    heads = model.num_attention_heads * model.head_dim // tensor
    kv_heads = model.num_key_value_heads * model.head_dim // tensor
    rows = [loop.rows for loop in loops]
    of_a_layer = {row * kv_heads * config.max_new_tokens for row in rows}
    of_a_layer |= {row * kv_heads * config.data.max_prompt_length for row in (*rows, prompts)}
    of_a_layer |= {width * features for features in (heads, kv_heads, inner)}
    # A matrix may have as many as activations have, or the scores of prompts.
    scores = model.num_attention_heads // tensor * config.data.max_prompt_length
    activations = {row * features for row in rows for features in (width, heads, kv_heads, inner, scores)}
    of_a_layer -= activations
    return frozenset(of_a_layer | {layers * size for size in of_a_layer} | {model.vocab_size * width // tensor})


def weight_bytes(config: PlanConfig, model: ModelConfig, mesh: Mapping[str, int]) -> WeightBytes:
    """A layer's smallest matrix (that of keys or values) and the embedding, whole but for the tensor axis."""
    tensor = (decoding_mesh(config, mesh) if isinstance(config, GrpoConfig) else mesh)["tensor"]
    of_row = model.hidden_size * jnp.dtype(config.model.compute_dtype).itemsize
    return WeightBytes(
        matrix=model.num_key_value_heads * model.head_dim // tensor * of_row,
        table=model.vocab_size // tensor * of_row,
    )


def advise(
    config: PlanConfig, model: ModelConfig, mesh: Mapping[str, int], memory_gib: dict[str, float | None], limit: int
) -> tuple[str, ...]:
    """What to change so that the program takes less memory: keys of the config, the most effective first."""
    places = batch_places(mesh)
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
        decoding = decoding_mesh(config, mesh)
        if smaller := _smaller(config.slots, responses, batch_places(decoding)):
            advice.append(f"rollout.slots={smaller} instead of {config.slots}: less KV cache")
        if config.objective.kl_coefficient and config.reference_dtype == "float32":
            advice.append("reference_dtype=bfloat16: halves the reference policy")
        twice = 2 * decoding["tensor"]
        if mesh["tensor"] == 1 and twice <= 4 and model.num_key_value_heads % twice == 0 and mesh["fsdp"] % twice == 0:
            advice.append(f"rollout.tensor={twice}: decoding splits weights over this many chips only")
    for moment in ("mu_dtype", "nu_dtype"):
        if getattr(config.optimizer, moment) == "float32":
            advice.append(f"optimizer.{moment}=bfloat16: halves one of AdamW's two moments")
    held = sum(memory_gib.get(name) or 0.0 for name in ("parameters", "optimizer", "reference", "base"))
    if mesh["data"] > 1:
        advice.append(f"mesh.data=1 and mesh.fsdp={places}: spread parameters and optimizer over all chips")
    larger = f"a larger slice: parameters, optimizer and reference alone take {held:.1f} GiB on each"
    return (larger, *advice) if held > 0.75 * limit / GIB else (*advice, larger)


def describe(config: PlanConfig) -> str:
    """What a search varies, as `--set` takes it."""
    if isinstance(config, SftConfig):
        return f"model.remat={config.model.remat} micro_batch_size={config.micro_batch_size}"
    sizes = f"micro_batch_prompts={config.micro_batch_prompts} rollout.slots={config.slots}"
    return f"model.remat={config.model.remat} {sizes}"


def _smaller(rows: int, whole: int, places: int, unit: int = 1) -> int | None:
    """The next smaller part of `whole` that can be spread over `places`, in multiples of `unit`."""
    sizes = [size for size in divisors(whole) if size < rows and size % places == 0 and size % unit == 0]
    return max(sizes, default=None)


def divisors(number: int) -> list[int]:
    """All of a number, the smallest first."""
    return [size for size in range(1, number + 1) if number % size == 0]


def _gib(size: int | None) -> float | None:
    return None if size is None else round(size / GIB, 3)


# What is there all the time, then what comes and goes within the program.
_LABELS = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "reference": "reference policy",
    "base": "base of the adapters",
    "batch": "batch and reward tables",
    "temporaries": "temporaries, at the peak",
    "gradients": "  gradients*",
    "saved_activations": "  activations kept for backward*",
    "kv_cache": "  KV cache of prompts and slots*",
    "decoding_weights": "  weights laid out for decoding*",
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
    # Memory.
    for name in _LABELS:
        if name in plan.memory_gib:
            value = plan.memory_gib[name]
            lines.append(f"{_LABELS[name]:36}{'?' if value is None else f'{value:.2f}':>6}")
    lines.append("  * by arithmetic; not all of them exist at the same time")
    # Collectives by place, and the three that move most. A program that does not fit has not been compiled to its end.
    if plan.fits:
        lines += ["", f"{'collectives':20}{'in program':>12}{'executed':>12}{'GiB':>10}{'weight-sized':>14}"]
        for place, row in summarize(plan.collectives).items():
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
    if plan.fits:
        lines += ["", *_forecast_lines(plan)]
    lines += ["", "assumed:", *(f"  {line}" for line in plan.assumptions)]
    if plan.advice:
        lines += ["", "to make it fit:", *(f"  {line}" for line in plan.advice)]
    return "\n".join(lines)


def _forecast_lines(plan: Plan) -> list[str]:
    """Both ends by phase, and what they mean for a run."""
    assert plan.forecast is not None and plan.run is not None
    low, high, run = plan.forecast.low, plan.forecast.high, plan.run
    lines = [f"{'forecast, seconds':28}{'at least':>12}{'by cycles':>12}"]
    for name in low:
        if high[name]:
            lines.append(f"{name.replace('_', ' '):28}{low[name]:12.2f}{high[name]:12.2f}")
    fast, slow = plan.forecast.totals
    lines.append(f"{'total':28}{fast:12.2f}{slow:12.2f}")
    if plan.decoding is not None:
        lines.append(
            f"decoding: {plan.decoding.steps} steps for {plan.decoding.responses} responses of "
            f"{plan.decoding.tokens / plan.decoding.responses:.0f} tokens on average; "
            f"{plan.copies} copies of the cache or of weights in a step"
        )
    mfu, tokens, hours, price = (run[name] for name in ("mfu", "tokens_per_second", "hours", "price"))
    lines.append(
        f"MFU {100 * mfu['low']:.0f} to {100 * mfu['high']:.0f} %, "
        f"{tokens['low']:,.0f} to {tokens['high']:,.0f} tokens/s"
    )
    lines.append(
        f"{run['steps']:,} steps{'' if run['steps_are_known'] else ' (the data are not here: --steps)'}: "
        f"{hours['low']:.1f} to {hours['high']:.1f} hours, ${price['low']:,.0f} to ${price['high']:,.0f} "
        f"at ${run['dollars_per_chip_hour']:.2f} a chip-hour"
        + ("" if plan.wishes.price is not None else f" ({PRICE_SOURCE})")
    )
    return lines
