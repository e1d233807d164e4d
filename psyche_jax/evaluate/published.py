"""The paper's table and its Figure 1: published scores on PCEB beside those of evaluations here."""

import functools
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from psyche_jax.evaluate.curves import GRID, SERIES, TEXT, style, themed
from psyche_jax.evaluate.formats import number

SINGLE, MULTIPLE = "smcq", "mmcq"
PARTS = ("case", "moral", "theory")
CELLS = tuple(f"{part}_{kind}" for part in PARTS for kind in (SINGLE, MULTIPLE))
# Columns of the table: key, heading.
COLUMNS = (
    *(
        (f"{part}_{kind}", f"{part.capitalize()} {title}")
        for part in PARTS
        for kind, title in ((SINGLE, "SMCQ"), (MULTIPLE, "MMCQ"), (f"{MULTIPLE}_elastic", "MMCQ elastic"))
    ),
    ("average_strict", "Average"),
    ("average_elastic", "Average elastic"),
    ("essay_rouge1", "ROUGE-1"),
    ("essay_rougeL", "ROUGE-L"),
    ("essay_bleu4", "BLEU-4"),
)
_PAPERS_OWN = "Psyche-R1"


@dataclass(frozen=True)
class PaperRow:
    """A model's scores on PCEB in percent, by the keys of `COLUMNS`. `remark`: what a reader must know of ours."""

    model: str
    values: Mapping[str, float]
    parameters_billion: float | None
    ours: bool = False
    remark: str = ""


@functools.cache
def published() -> tuple[str, tuple[PaperRow, ...]]:
    """Where the published figures are from, and the figures."""
    content = json.loads((files("psyche_jax.evaluate") / "published.json").read_text(encoding="utf-8"))
    keys = [key for key, _ in COLUMNS]
    rows = [
        PaperRow(row["model"], {key: row[key] for key in keys}, row["parameters_billion"]) for row in content["rows"]
    ]
    return content["source"], tuple(rows)


def our_rows(name: str, scores: Mapping[str, Any], parameters: int | None) -> list[PaperRow]:
    """The scores of an evaluation as rows; none if it has not all six cells of PCEB.

    A second row leaves out what stands in the training data too, if that was looked for.
    """
    rows = []
    clean = scores.get("decontaminated")
    parts = [(name, scores), *([(f"{name}, decontaminated", clean)] if clean else [])]
    for title, part in parts:
        cells = part.get("cells", {})
        if not all(cells.get(cell, {}).get("count") for cell in CELLS):
            continue
        values = {cell: 100 * cells[cell]["strict"] for cell in CELLS}
        values |= {f"{one}_mmcq_elastic": 100 * cells[f"{one}_mmcq"]["elastic"] for one in PARTS}
        values["average_strict"] = sum(values[cell] for cell in CELLS) / len(CELLS)
        elastic = [values[f"{one}_{kind}"] for one in PARTS for kind in (SINGLE, f"{MULTIPLE}_elastic")]
        values["average_elastic"] = sum(elastic) / len(elastic)
        essays = part.get("essays") or {}
        values |= {f"essay_{key}": essays[key] for key in ("rouge1", "rougeL", "bleu4") if key in essays}
        asked = sum(cells[cell]["count"] for cell in CELLS)
        remark = f"{asked:,} questions" + (f", {essays['count']} essays" if essays else "")
        rows.append(PaperRow(title, values, parameters / 1e9 if parameters else None, True, remark))
    return rows


def draw_sizes(rows: Sequence[PaperRow]) -> str:
    """Average strict accuracy against size (Figure 1 of the paper) as SVG; ours are filled, the others open.

    Models whose size is not public have no place in it.
    """
    known = [row for row in rows if row.parameters_billion]
    with matplotlib.rc_context(style("sizes")):
        figure = Figure(figsize=(8.2, 4.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        sizes = [row.parameters_billion or 0 for row in known]
        axes.set_xscale("log")
        for size, row in zip(sizes, known, strict=True):
            color = SERIES[1] if row.ours else SERIES[0]
            inside = color if row.ours else "none"
            height = row.values["average_strict"]
            axes.plot(size, height, "o", color=color, markersize=9, markerfacecolor=inside, markeredgewidth=2)
        _label(axes, known)
        low, high = min(sizes), max(sizes)
        axes.set_xlim(low / 2.2, high * 4.5)
        ticks = [10**power for power in range(-3, 4) if low / 2.2 <= 10**power <= high * 4.5]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{number(value)}B"))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.margins(y=0.12)
        axes.tick_params(length=0, colors=TEXT, pad=5)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("parameters (log scale)", color=TEXT)
        axes.set_ylabel("average strict accuracy, %", color=TEXT)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(GRID)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return themed(buffer.getvalue())


def summary_of_sizes(rows: Sequence[PaperRow]) -> str:
    """What a screen reader says of the figure."""
    known = sorted((row for row in rows if row.parameters_billion), key=lambda row: row.parameters_billion or 0)
    said = [
        f"{row.model} {number(row.parameters_billion or 0)}B → {row.values['average_strict']:.1f} %" for row in known
    ]
    return f"Average strict accuracy on PCEB against parameters: {'; '.join(said)}"


def _label(axes: Any, rows: Sequence[PaperRow]) -> None:
    """Names beside the points: to the right, moved up where they would touch the one below."""
    heights = [row.values["average_strict"] for row in rows]
    apart = max(2.6, 0.07 * (max(heights) - min(heights)))  # a line of text in units of the axis
    last: dict[int, float] = {}
    for row in sorted(rows, key=lambda row: row.values["average_strict"]):
        column = round(2 * math.log10(row.parameters_billion or 1))
        height = max(row.values["average_strict"], last.get(column, -100) + apart)
        last[column] = height
        axes.annotate(
            row.model,
            (row.parameters_billion, height),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=10.5,
            color=SERIES[1] if row.ours else TEXT,
            fontweight="bold" if row.ours or row.model == _PAPERS_OWN else "normal",
        )
