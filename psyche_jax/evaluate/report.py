"""The report on one run or several: one HTML file that needs nothing else, made from run folders alone."""

import functools
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

import psyche_jax
from psyche_jax.errors import UserError
from psyche_jax.evaluate.comparison import DIMENSION_TITLES, Bench, read_benches
from psyche_jax.evaluate.curves import SERIES, TEXT, draw
from psyche_jax.evaluate.formatting import number
from psyche_jax.evaluate.language import ENGLISH, Language, Speaker
from psyche_jax.evaluate.pieces import environment, kind_sections, names
from psyche_jax.evaluate.run_records import RunRecord, read_rollouts, read_run
from psyche_jax.storage.files import write_text

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


def our_rows(name: str, scores: Mapping[str, Any], parameters: int | None, say: Speaker = ENGLISH) -> list[PaperRow]:
    """The scores of an evaluation as rows; none if it has not all six cells of PCEB.

    A second row leaves out what the training data hold too, if that was looked for.
    """
    rows = []
    clean = scores.get("decontaminated")
    parts = [(name, scores), *([(say("{name}, decontaminated", name=name), clean)] if clean else [])]
    for title, part in parts:
        cells = part.get("cells", {})
        if not all(cells.get(cell, {}).get("count") for cell in CELLS):
            continue
        values = {cell: 100 * cells[cell]["strict"] for cell in CELLS}
        values |= {f"{one}_mmcq_elastic": 100 * cells[f"{one}_mmcq"]["elastic"] for one in PARTS}
        values["average_strict"] = statistics.fmean(values[cell] for cell in CELLS)
        elastic = [values[f"{one}_{kind}"] for one in PARTS for kind in (SINGLE, f"{MULTIPLE}_elastic")]
        values["average_elastic"] = statistics.fmean(elastic)
        essays = part.get("essays") or {}
        values |= {f"essay_{key}": essays[key] for key in ("rouge1", "rougeL", "bleu4") if key in essays}
        asked = sum(cells[cell]["count"] for cell in CELLS)
        remark = say("{n} questions", n=asked) + (say(", {n} essays", n=essays["count"]) if essays else "")
        rows.append(PaperRow(title, values, parameters / 1e9 if parameters else None, True, remark))
    return rows


def draw_sizes(rows: Sequence[PaperRow], say: Speaker = ENGLISH) -> str:
    """Average strict accuracy against size (Figure 1 of the paper) as SVG; ours are filled, the others open.

    Models whose size is not public have no place in it.
    """
    known = [row for row in rows if row.parameters_billion]

    def plot(axes: Any) -> None:
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

    return draw((8.2, 4.2), "sizes", (say("parameters (log scale)"), say("average strict accuracy, %")), plot)


def summary_of_sizes(rows: Sequence[PaperRow], say: Speaker = ENGLISH) -> str:
    """What a screen reader says of the figure."""
    known = sorted((row for row in rows if row.parameters_billion), key=lambda row: row.parameters_billion or 0)
    said = [
        f"{row.model} {number(row.parameters_billion or 0)}B → {row.values['average_strict']:.1f} %" for row in known
    ]
    return say("Average strict accuracy on PCEB against parameters: {values}", values="; ".join(said))


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


def write_report(runs: Sequence[Path], out: Path, title: str = "", language: Language = "en") -> None:
    """Write one HTML file on `runs`, which also compares them. It holds all it needs and asks nothing of a network.

    If `out` ends with `.md`, it gets the figures as Markdown for a model card instead.

    Args:
      runs: folders of runs, local or in buckets, in the order in which they were trained (or are to be compared).
      out: the file; it is replaced in one step.
      title: the page's title, if it is to be another than usual.
      language: of the page; Markdown is English.

    Raises:
      UserError: a folder is not a run, a file in it is broken, or `out` cannot be written.
    """
    folders = list({folder.resolve(): folder for folder in runs}.values())
    if not folders:
        raise UserError("report: no run was named; give one or more folders made by `psyche sft` or `psyche grpo`")
    if out.suffix.lower() not in ("", ".html", ".htm", ".md"):
        raise UserError(f"{out}: a report is HTML or Markdown; give the name of a .html or .md file")
    if out.is_dir():
        raise UserError(f"{out}: is a folder; give the name of an HTML file")
    records = [read_run(folder, name) for folder, name in zip(folders, names(folders), strict=True)]
    page = render(records, title, markdown=out.suffix == ".md", language=language)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # A model may say half a surrogate pair, which UTF-8 cannot hold.
        write_text(out, page.encode("utf-8", "replace").decode("utf-8"))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another place") from None


def render(runs: Sequence[RunRecord], title: str = "", markdown: bool = False, language: Language = "en") -> str:
    """The page as HTML, or its figures as Markdown for a model card.

    Raises:
      UserError: an evaluation or `safety.json` is not as `psyche eval` and `psyche safety` write it.
    """
    say = Speaker(language, markup=not markdown)
    plain = Speaker(language)
    read = read_benches([evaluation for run in runs for evaluation in run.evaluations])
    ends = names([Path(bench.name) for bench in read])
    benches = [replace(bench, name=end) for bench, end in zip(read, ends, strict=True)]
    css = (files("psyche_jax.evaluate") / "report.css").read_text(encoding="utf-8")
    try:
        return (
            environment(say)
            .get_template(f"evaluate/report.{'md' if markdown else 'html'}.jinja")
            .render(
                title=title or plain("Training report"),
                css=Markup(css),
                judged=judged,
                dimensions=DIMENSION_TITLES,
                runs=runs,
                benches=benches,
                paper=_paper_section(benches, plain),
                kinds=[] if markdown else kind_sections(runs, say),
                rollouts=[found for run in runs if (found := read_rollouts(run, plain))],
                version=psyche_jax.__version__,
                written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            )
        )
    except (jinja2.UndefinedError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{', '.join(str(run.folder) for run in runs)}: evaluations or safety.json were changed ({error}); "
            "write them again with `psyche eval` or `psyche safety`"
        ) from error


def judged(benches: Sequence[Bench]) -> list[tuple[Bench, str, dict[str, Any]]]:
    """Evaluations whose replies were judged: benchmark, name and what came of it."""
    return [
        (bench, name, one.empathy)
        for bench in benches
        for name, one in bench.named
        if one.empathy and one.empathy.get("dimensions")
    ]


def _paper_section(benches: Sequence[Bench], say: Speaker) -> dict[str, Any]:
    """The paper's table and figure with ours among them."""
    source, rows = published()
    named = [(name, evaluation) for bench in benches for name, evaluation in bench.named]
    ours = [row for name, one in named for row in our_rows(name, one.scores, one.parameters, say)]
    every = sorted([*rows, *ours], key=lambda row: -row.values["average_strict"])
    return {
        "source": source,
        "columns": COLUMNS,
        "rows": every,
        "ours": [row for row in every if row.ours],
        "without_size": [row for row in every if not row.parameters_billion],
        "figure": draw_sizes(every, say),
        "summary": summary_of_sizes(every, say),
    }
