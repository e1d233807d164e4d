"""`psyche plan --search`: settings of a config that fit a slice, and of those the fastest."""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator

from psyche_jax.config import GrpoConfig, SftConfig
from psyche_jax.errors import UserError
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.sharding import check_mesh_fits
from psyche_jax.plan.compile import (
    GIB,
    PlanConfig,
    batch_places,
    decoding_mesh,
    find_architecture,
    least_peak,
    sharding_of,
)
from psyche_jax.plan.report import Plan, Wishes, describe, divisors, make_plan, response_lengths
from psyche_jax.plan.roofline import count_phases, decoding_of
from psyche_jax.plan.slices import Slice

_MOST_TRIES = 12
_ENOUGH = 3  # variants that fit


def search(config: PlanConfig, slice_: Slice, wishes: Wishes) -> Plan:
    """Try micro-batches, remat policies and slots, the fastest by roofline first, until a few fit; of these the one of
    the fewest seconds by cycles is the best.

    Prints each try on stderr.

    Raises:
      UserError: none fits.
    """
    # All variants on the mesh of a run, without those that arithmetic rules out.
    lengths = response_lengths(config, wishes)
    devices = slice_.devices()
    sharding = sharding_of(config, devices)
    model, _ = find_architecture(config)
    check_mesh_fits(sharding, model)
    shape = sharding.sizes
    seconds = functools.partial(roofline_seconds, model=model, mesh=shape, slice_=slice_, lengths=lengths)
    decoding = decoding_mesh(config, shape) if isinstance(config, GrpoConfig) else shape
    candidates = list(candidates_of(config, batch_places(shape), batch_places(decoding)))
    # Of equally fast ones the largest first: what it does not compute again costs nothing where there is room.
    candidates.sort(key=lambda candidate: (seconds(candidate), [-size for size in _size(candidate)]))
    limit = slice_.chip.hbm_gib * GIB
    possible = [c for c in candidates if least_peak(c, model, shape) <= limit]
    say(f"{len(candidates)} variants, {len(candidates) - len(possible)} of them too large by arithmetic")
    # Compiled in turn.
    failed: list[PlanConfig] = []
    fitting: list[tuple[float, Plan]] = []
    for candidate in itertools.islice(not_larger(possible, failed), _MOST_TRIES):
        plan = make_plan(candidate, slice_, wishes)
        peak = "?" if plan.peak_bytes is None else f"{plan.peak_bytes / GIB:.2f}"
        result = "fits" if plan.fits else "does not fit"
        by_cycles = "" if plan.forecast is None else f" to {plan.forecast.totals[1]:.4g}"
        say(f"{describe(candidate)}: {result}, {peak} GiB, {plan.seconds:.4g}{by_cycles} s")
        if plan.fits and plan.forecast is not None:
            fitting.append((plan.forecast.totals[1], plan))
        else:
            failed.append(candidate)
        if len(fitting) == _ENOUGH:
            break
    if fitting:
        return min(fitting, key=lambda pair: pair[0])[1]
    raise UserError(
        f"nothing fits {slice_.name} within {_MOST_TRIES} tries: take a larger slice, or change mesh or lengths"
    )


def not_larger(candidates: list[PlanConfig], failed: list[PlanConfig]) -> Iterator[PlanConfig]:
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


def candidates_of(config: PlanConfig, places: int, decoding_places: int) -> Iterator[PlanConfig]:
    """All variants of a config. `places`: over how many rows are spread, while training and while decoding."""
    for remat in ("none", "dots", "full"):
        section = dataclasses.replace(config.model, remat=remat)
        if isinstance(config, SftConfig):
            for rows in divisors(config.batch_size):
                if rows % places == 0:
                    yield dataclasses.replace(config, model=section, micro_batch_size=rows)
        else:
            for prompts in divisors(config.prompts_per_update):
                for slots in _slots(config.prompts_per_step * config.generations_per_prompt, decoding_places):
                    if prompts * config.generations_per_prompt % places == 0:
                        rollout = dataclasses.replace(config.rollout, slots=slots)
                        yield dataclasses.replace(config, model=section, micro_batch_prompts=prompts, rollout=rollout)


def _slots(responses: int, places: int) -> Iterator[int]:
    """All responses at once, half of them, and so on, as far as the mesh divides them."""
    while responses and responses % places == 0:
        yield responses
        responses = responses // 2 if responses % 2 == 0 else 0


def roofline_seconds(
    config: PlanConfig, model: ModelConfig, mesh: dict[str, int], slice_: Slice, lengths: list[int] | None
) -> float:
    """Of one step; `lengths` are those of the responses, None: all as long as can be."""
    decoding = decoding_of(config, mesh, lengths) if isinstance(config, GrpoConfig) else None
    return sum(phase.seconds(slice_) for phase in count_phases(config, model, mesh, decoding).values())


def say(line: str) -> None:
    """What is going on, on stderr: a search or a table takes long."""
    print(line, file=sys.stderr, flush=True)
