"""A plan for people."""

from psyche_jax.plan.collectives import PLACES, summarize
from psyche_jax.plan.compile import GIB
from psyche_jax.plan.memory import ARGUMENTS, WITHIN_TEMPORARIES
from psyche_jax.plan.planning import Plan, describe

_LABELS = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "reference": "reference policy",
    "batch": "batch and reward tables",
    "gradients": "gradients",
    "saved_activations": "activations kept for backward",
    "kv_cache": "KV cache of a wave",
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
    for name in ARGUMENTS:
        if name in plan.memory_gib:
            lines.append(_gib_line(_LABELS[name], plan.memory_gib[name]))
    lines.append(_gib_line("temporaries, at the peak", plan.memory_gib["temporaries"]))
    for name in WITHIN_TEMPORARIES:
        if name in plan.memory_gib:
            lines.append(_gib_line(f"  {_LABELS[name]}*", plan.memory_gib[name]))
    lines.append("  * by arithmetic; not all of them stand at the same time")
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
