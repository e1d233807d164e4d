"""`psyche plan --table`: which model is trained how on which slice, compiled cell by cell into a file, and its page."""

import dataclasses
import datetime
import difflib
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jax
import pydantic
from pydantic import FiniteFloat

from psyche_jax import __version__
from psyche_jax.config import GrpoConfig, SftConfig
from psyche_jax.config_files import config_to_dict, load_config
from psyche_jax.errors import RowError, UsageError, first_reason
from psyche_jax.model.config import published_architecture
from psyche_jax.plan.compile import GIB, PlanConfig, batch_places, decoding_mesh, find_architecture, least_peak
from psyche_jax.plan.report import Plan, Wishes, describe, make_plan
from psyche_jax.plan.search import candidates_of, not_larger, roofline_seconds, say
from psyche_jax.plan.slices import PRICE_SOURCE, PRICES, Slice, find_compiler, parse_topology
from psyche_jax.storage.files import read_jsonl, write_text

MODELS = {
    **{size: f"Qwen2.5-{size}" for size in ("0.5B", "1.5B", "3B", "7B")},
    "8B": "Qwen3-8B",
    "14B": "Qwen2.5-14B",
}
CHIPS = ("v5e-1", "v5e-4", "v5e-8", "v6e-1", "v6e-8", "v5e-16", "v4-8", "v5p-8")
# By mode: in which dtype weights are kept, with adapters or without.
MODES = {"adapters": "bfloat16", "int8": "int8", "full": "float32"}
PROGRAMS = ("grpo", "sft")
FILTERS = {"models": tuple(MODELS), "chips": CHIPS, "modes": tuple(MODES), "programs": PROGRAMS}
_TITLES = {"adapters": "adapters of rank 32", "int8": "adapters of rank 32 over int8", "full": "all weights"}

# The paper's data: 75,000 questions and 73,000 dialogues. How many of them GRPO had is not published.
_RECORDS = {"sft": 148_000, "grpo": 10_000}
_PROMPTS = (128, 32, 8)  # a step of GRPO; fewer where more do not fit
_TRIES = 3  # and then the least setting
_ROWS = {"sft": 4, "grpo": 8}  # at most so many of a micro-batch on a device
_LEAST_SLOTS = 32  # of the responses at least this part is decoded at once
_FREE = 0.1  # of the memory is left by the first try, by arithmetic

Record: TypeAlias = dict[str, Any]
_Ends: TypeAlias = tuple[FiniteFloat, FiniteFloat]


@dataclass(frozen=True)
class _Figures:
    """What a line of the file must hold beside the names of its cell."""

    key: str
    fits: bool
    compiled: bool
    peak_gib: FiniteFloat | None
    date: str
    compiler: str
    jax: str
    seconds: _Ends | None = None
    hours: _Ends | None = None
    price: _Ends | None = None
    prompts: int = 0
    reason: str = ""

    def __post_init__(self) -> None:
        if self.fits and not (self.compiled and self.seconds and self.hours and self.price):
            raise ValueError("a cell that fits has been compiled, and has figures")


@dataclass(frozen=True)
class Cell:
    """One of the table: names out of `FILTERS`."""

    program: str
    mode: str
    chip: str
    model: str

    @property
    def slice_(self) -> Slice:
        """What it is compiled for."""
        return parse_topology(self.chip)

    @property
    def prompts(self) -> tuple[int, ...]:
        """Of a step, in the order in which they are tried; SFT has none, which one entry stands for."""
        return _PROMPTS if self.program == "grpo" else _PROMPTS[:1]

    def config(self, prompts: int = _PROMPTS[0]) -> PlanConfig:
        """The paper's run with the mesh of the slice; micro-batch and slots are tried. `prompts`: a step of GRPO."""
        architecture, chips = published_architecture(MODELS[self.model]), self.slice_.device_count
        values = [
            f"model.architecture={MODELS[self.model]}",
            f"model.path=models/{MODELS[self.model]}",
            f"model.dtype={MODES[self.mode]}",
            f"mesh.fsdp={chips}",
        ]
        if self.mode != "full":
            values += ["adapter.rank=32", "adapter.alpha=64"]
        if self.program == "sft":
            return load_config(SftConfig, Path("sft_7b"), values)
        # Weights for decoding are split over as few devices as leave three quarters of the memory to the rest.
        possible = [n for n in (1, 2, 4, 8) if chips % n == 0 and architecture.num_key_value_heads % n == 0]
        share = 2 * architecture.num_parameters / (self.slice_.chip.hbm_gib * GIB / 4)
        tensor = next((n for n in possible if n >= share), possible[-1])
        step = [f"prompts_per_step={prompts}", f"minibatch_prompts={min(prompts, 32)}"]
        return load_config(
            GrpoConfig,
            Path("grpo_7b"),
            [*values, f"rollout.tensor={tensor}", "reference_dtype=bfloat16", *step],
        )

    def key(self) -> str:
        """Of what decides its figures: config, compiler, version of the package."""
        what = [config_to_dict(self.config()), self.slice_.name, _compiler(), jax.__version__, __version__]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def choose(filters: Mapping[str, str | None]) -> list[Cell]:
    """The cells that `filters` (lists with commas, by the names of `FILTERS`; None: all) leave, in their order.

    Raises:
      UsageError: a name is not known; with the nearest that is.
    """
    chosen = {}
    for name, known in FILTERS.items():
        given = filters.get(name)
        chosen[name] = known if given is None else tuple(_find(name, part.strip()) for part in given.split(","))
    return [
        Cell(program, mode, chip, model)
        for mode in chosen["modes"]
        for chip in chosen["chips"]
        for model in chosen["models"]
        for program in chosen["programs"]
    ]


def make_table(cells: Sequence[Cell], out: Path) -> None:
    """Compile the cells that `out` (JSONL, a line a cell) lacks, and write all it holds as a page beside it (.md).

    A cell is appended when it is done, so the command may be stopped at any time and given again.

    Raises:
      UserError: libtpu is missing, or `out` cannot be read.
    """
    if not find_compiler():
        cells[0].slice_.devices()  # says what to do
    done = {record["key"] for record in read_records(out)}
    missing = [cell for cell in cells if cell.key() not in done]
    missing.sort(key=_is_possible)  # first what arithmetic decides, in no time
    say(f"{len(cells)} cells, {len(cells) - len(missing)} of them in {out}")
    write_text(out.with_suffix(".md"), page(read_records(out), out))
    for cell in missing:
        record = {**dataclasses.asdict(cell), "key": cell.key(), **compile_cell(cell)}
        record |= {"date": f"{datetime.date.today()}", "compiler": _compiler(), "jax": jax.__version__}
        append(out, record)
        write_text(out.with_suffix(".md"), page(read_records(out), out))
        say(f"{cell.model} {cell.mode} {cell.program} on {cell.chip}: {_shown(record).replace('<br>', ', ')}")


def compile_cell(cell: Cell) -> Record:
    """What is known of a cell, after as many compilations as it needs: where the paper's step does not fit, of fewer
    prompts."""
    slice_ = cell.slice_
    plan: Plan | None = None
    try:
        for prompts in cell.prompts:
            config = cell.config(prompts)
            failed: list[PlanConfig] = []
            for tried in not_larger(settings(config, slice_), failed):
                plan = make_plan(tried, slice_, Wishes(steps=count_steps(config)))
                if plan.fits:
                    return _as_record(plan) | ({"prompts": prompts} if cell.program == "grpo" else {})
                failed.append(tried)
                say(f"  {describe(tried)} does not fit {slice_.name}")
        return by_arithmetic(cell) if plan is None else _as_record(plan)
    except (UsageError, jax.errors.JaxRuntimeError) as error:  # the mesh divides something it must not; a compiler bug
        return {"fits": False, "compiled": False, "peak_gib": None, "reason": first_reason(error)}


@functools.cache
def by_arithmetic(cell: Cell) -> Record:
    """Lower bounds of a cell, without a compiler: of the first setting that would be tried.

    `fits` is None where it may fit, and False where it cannot.
    """
    slice_ = cell.slice_
    for prompts in cell.prompts:
        config = cell.config(prompts)
        if tries := settings(config, slice_):
            model, _ = find_architecture(config)
            seconds = roofline_seconds(tries[0], model, _mesh(slice_), slice_, None)
            hours = seconds * count_steps(config) / 3600
            return {
                "fits": None,
                "compiled": False,
                "peak_gib": round(least_peak(tries[0], model, _mesh(slice_)) / GIB, 2),
                "seconds": seconds,
                "hours": hours,
                "price": hours * slice_.chips * PRICES[slice_.chip.name],
                **({"prompts": prompts} if cell.program == "grpo" else {}),
            }
    least = min(peak for peak, _ in _variants(config, slice_))
    return {"fits": False, "compiled": False, "peak_gib": round(least / GIB, 2)}


def settings(config: PlanConfig, slice_: Slice) -> list[PlanConfig]:
    """What is tried in turn: the fastest variant by roofline that leaves a tenth of the memory by arithmetic, each next
    one a tenth more, at last the least of all. Nothing, if not even that fits by arithmetic."""
    variants, limit = _variants(config, slice_), slice_.chip.hbm_gib * GIB
    least, smallest = min(variants, key=lambda pair: pair[0])
    if least > limit:
        return []
    model, _ = find_architecture(config)
    most = (1 - _FREE) * limit
    room = [(peak, variant) for peak, variant in variants if peak <= most]
    room.sort(key=lambda pair: roofline_seconds(pair[1], model, _mesh(slice_), slice_, None))
    tries: list[PlanConfig] = []
    for peak, variant in room:
        if len(tries) < _TRIES and peak <= most:
            tries.append(variant)
            most = peak - _FREE * limit
    return tries if smallest in tries else [*tries, smallest]


def _variants(config: PlanConfig, slice_: Slice) -> list[tuple[float, PlanConfig]]:
    """Remat full, small micro-batches, not too few slots; each with the bytes a device that it takes at least."""
    model, _ = find_architecture(config)
    mesh = _mesh(slice_)
    places = batch_places(mesh)
    decoding = decoding_mesh(config, mesh) if isinstance(config, GrpoConfig) else mesh
    found = []
    for variant in candidates_of(config, places, batch_places(decoding)):
        if isinstance(variant, SftConfig):
            small = variant.rows_per_micro_batch <= _ROWS["sft"] * places
        else:
            rows = variant.prompts_per_micro_batch * variant.generations_per_prompt
            small = rows <= _ROWS["grpo"] * places
            small &= variant.slots * _LEAST_SLOTS >= variant.prompts_per_step * variant.generations_per_prompt
        if small and variant.model.remat == "full":
            found.append((least_peak(variant, model, mesh), variant))
    return found


def count_steps(config: PlanConfig) -> int:
    """Of the paper's run; GRPO's by 10,000 prompts, since how many it had is not published."""
    return config.count_steps(_RECORDS["sft" if isinstance(config, SftConfig) else "grpo"])


def append(out: Path, record: Record) -> None:
    """Add a line in one write; after half a line, which a crash may have left, on a line of its own."""
    line = json.dumps(record).encode() + b"\n"
    with out.open("a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        os.fsync(file.fileno())


def read_records(out: Path) -> list[Record]:
    """The cells in the file; lines that are none are skipped and named on stderr.

    Raises:
      UserError: it cannot be read.
    """
    if not out.exists():
        return []
    records = []
    for place, value in read_jsonl(out):
        if isinstance(value, RowError) or not _is_record(value):
            say(f"{place}: is no cell of a table, skipped")
        else:
            records.append(value)
    return records


def page(records: Sequence[Record], out: Path) -> str:
    """Markdown of all cells; of one that is there twice the later counts."""
    by_cell = {Cell(*(record[field.name] for field in dataclasses.fields(Cell))): record for record in records}
    cells = choose({})
    compiled = [cell for cell in cells if cell in by_cell and by_cell[cell].get("compiled")]
    dates = sorted({record["date"] for record in by_cell.values()})
    compilers = sorted({f"libtpu {record['compiler']}, JAX {record['jax']}" for record in by_cell.values()})
    made = f", {' to '.join(sorted({dates[0], dates[-1]}))}, by the compiler of {'; '.join(compilers)}" if dates else ""
    name = out.name if out.is_absolute() else out
    lines = [
        "# Which TPU do I need?",
        "",
        f"Written by `psyche plan --table --out {name}`: {len(compiled)} of {len(cells)} cells are compiled{made}.",
        "No figure was measured on a TPU; [plan.md](plan.md) says what a plan is worth and what it leaves out.",
        "",
        "A cell: peak memory of a device; seconds a step, at least and by the compiler's cycles; hours and dollars of",
        "the paper's run. **no**: it does not fit, and would take this much. With ≥: not compiled; it may fit by",
        "arithmetic, but the figures are lower bounds, and the compiler may still reject it.",
        "",
        "- SFT: 256 examples of 2,048 tokens a step, 2 epochs of 148,000 (the paper's 75,000 questions and 73,000",
        f"  dialogues, as if all were for SFT): {count_steps(Cell('sft', 'full', 'v6e-8', '7B').config()):,} steps.",
        "- GRPO: 128 prompts × 8 responses a step, 512 + 1,024 tokens, all of full length, 2 epochs of 10,000 prompts",
        "  (how many the paper had is not published): "
        f"{count_steps(Cell('grpo', 'full', 'v6e-8', '7B').config()):,} steps. Where that does not fit, more steps of",
        "  32 or 8 prompts, as the cell says.",
        f"- Prices: {PRICE_SOURCE}.",
        "- Settings, by one rule: `model.remat: full`; `mesh.fsdp` over all devices; weights for decoding split over",
        "  as few devices as keep them under a quarter of the memory. Of micro-batches (GRPO: at most 8 rows a device,",
        "  SFT 4) and `rollout.slots` (all, half, … a 32nd) the fastest by roofline that leave a tenth of the",
        "  memory free by arithmetic; if they do not fit, smaller ones, down to the smallest. The file has each",
        "  cell's settings; `psyche plan --search` may find better ones.",
    ]
    for program in PROGRAMS:
        for mode in MODES:
            lines += ["", f"## {program.upper()}, {_TITLES[mode]}", "", f"| | {' | '.join(CHIPS)} |"]
            lines.append("| --- " * (len(CHIPS) + 1) + "|")
            for model, architecture in MODELS.items():
                row = (Cell(program, mode, chip, model) for chip in CHIPS)
                shown = (_shown(by_cell[cell] if cell in by_cell else by_arithmetic(cell)) for cell in row)
                lines.append(f"| {architecture} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def _shown(record: Record) -> str:
    if "reason" in record:
        return f"no: {record['reason'].replace('|', '/')}"
    peak = "" if record["peak_gib"] is None else f"{record['peak_gib']:.1f} GiB"
    if record["fits"] is False:
        return f"**no**, {peak}" if record["compiled"] else f"**no**, ≥ {peak}"
    fewer = f"{record['prompts']} prompts<br>" if record.get("prompts", _PROMPTS[0]) != _PROMPTS[0] else ""
    if not record["compiled"]:
        bounds = (peak, f"{record['seconds']:.3g} s", f"{_hours(record['hours'])} h", f"${record['price']:,.0f}")
        return fewer + "<br>".join(f"≥ {bound}" for bound in bounds)
    (fast, slow), hours, price = record["seconds"], record["hours"], record["price"]
    return (
        f"{fewer}{peak}<br>{fast:.3g} to {slow:.3g} s<br>{_hours(hours[0])} to {_hours(hours[1])} h"
        f"<br>${price[0]:,.0f} to ${price[1]:,.0f}"
    )


def _hours(hours: float) -> str:
    return f"{hours:.1f}" if hours < 10 else f"{hours:,.0f}"


def _as_record(plan: Plan) -> Record:
    record: Record = {
        "fits": plan.fits,
        "compiled": True,
        "peak_gib": None if plan.peak_bytes is None else round(plan.peak_bytes / GIB, 3),
        "settings": describe(plan.config),
        "mesh": plan.mesh,
        "compile_seconds": round(plan.compile_seconds),
    }
    if plan.fits and plan.forecast is not None and plan.run is not None:
        ends = {name: [round(plan.run[name][end], 2) for end in ("low", "high")] for name in ("hours", "price")}
        record |= {"seconds": [round(end, 3) for end in plan.forecast.totals], "steps": plan.run["steps"], **ends}
    return record


def _is_record(value: Any) -> bool:
    names = {"program": PROGRAMS, "mode": tuple(MODES), "chip": CHIPS, "model": tuple(MODELS)}
    if not isinstance(value, dict) or any(value.get(name) not in known for name, known in names.items()):
        return False
    try:
        pydantic.TypeAdapter(_Figures).validate_json(json.dumps(value), strict=True)
    except pydantic.ValidationError:
        return False
    return True


def _is_possible(cell: Cell) -> bool:
    config = cell.config(_PROMPTS[-1])
    return min(peak for peak, _ in _variants(config, cell.slice_)) <= cell.slice_.chip.hbm_gib * GIB


def _mesh(slice_: Slice) -> dict[str, int]:
    return {"data": 1, "fsdp": slice_.device_count, "tensor": 1}


def _find(name: str, text: str) -> str:
    for known in FILTERS[name]:
        if known.lower() == text.lower():
            return known
    nearest = difflib.get_close_matches(text, FILTERS[name], 2, 0.5)
    hint = f"nearest: {', '.join(nearest)}" if nearest else f"known: {', '.join(FILTERS[name])}"
    raise UsageError(f"--{name}: {text!r} is not in the table; {hint}")


def _compiler() -> str:
    return importlib.metadata.version("libtpu")
