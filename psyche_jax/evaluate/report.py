"""The report on one run or several: one HTML file that needs nothing else, made from run folders alone."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

import psyche_jax
from psyche_jax.config_files import dump_yaml
from psyche_jax.errors import UserError
from psyche_jax.evaluate.comparison import Bench, read_benches
from psyche_jax.evaluate.curves import SFT_METRICS, Chart, charts, grpo_metrics
from psyche_jax.evaluate.empathy import TITLES
from psyche_jax.evaluate.formats import brief, cell, clip, interval, percent, points, spoken
from psyche_jax.evaluate.published import COLUMNS, PaperRow, draw_sizes, our_rows, published, summary_of_sizes
from psyche_jax.evaluate.rollouts import read_rollouts
from psyche_jax.evaluate.run_records import KINDS, RunRecord, flat, read_run
from psyche_jax.files import write_text


@dataclass(frozen=True)
class PaperSection:
    """The paper's table and figure with ours among them."""

    source: str
    columns: tuple[tuple[str, str], ...]
    rows: list[PaperRow]
    figure: str
    summary: str

    @property
    def ours(self) -> list[PaperRow]:
        """The rows of evaluations here."""
        return [row for row in self.rows if row.ours]

    @property
    def without_size(self) -> list[PaperRow]:
        """Those that have no place in the figure."""
        return [row for row in self.rows if not row.parameters_billion]


@dataclass(frozen=True)
class KindSection:
    """All runs of one kind: their curves and their configs."""

    kind: str
    name: str
    runs: list[RunRecord]
    charts: list[Chart]
    settings: list[tuple[str, list[str], bool]] = field(default_factory=list)  # key, value by run, whether they differ

    @property
    def differences(self) -> list[tuple[str, list[str], bool]]:
        """The settings that are not the same in all runs."""
        return [row for row in self.settings if row[2]]


def write_report(runs: Sequence[Path], out: Path, title: str = "Training report") -> None:
    """Write one HTML file on `runs`, which also compares them. It holds all it needs and asks nothing of a network.

    If `out` ends with `.md`, it gets the figures as Markdown for a model card instead.

    Args:
      runs: folders of runs, local or in buckets, in the order in which they were trained (or are to be compared).
      out: the file; it is replaced in one step.
      title: the page's title.

    Raises:
      UserError: a folder is not a run, a file in it is broken, or `out` cannot be written.
    """
    folders = list({folder.resolve(): folder for folder in runs}.values())
    if not folders:
        raise UserError("report: no run was named; give one or more folders made by `psyche sft` or `psyche grpo`")
    if out.is_dir():
        raise UserError(f"{out}: is a folder; give the name of an HTML file")
    records = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    page = render(records, title, markdown=out.suffix == ".md")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # A model may say half a surrogate pair, which UTF-8 cannot hold.
        write_text(out, page.encode("utf-8", "replace").decode("utf-8"))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another place") from None


def render(runs: Sequence[RunRecord], title: str, markdown: bool = False) -> str:
    """The page as HTML, or its figures as Markdown for a model card.

    Raises:
      UserError: an evaluation or `safety.json` is not as `psyche eval` and `psyche safety` write it.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("psyche_jax.evaluate", ""),
        autoescape=not markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "points": points, "clip": clip, "spoken": spoken, "brief": brief}
    environment.filters |= {"dumped": dump_yaml, "cell": cell, "interval": interval}
    benches = read_benches([evaluation for run in runs for evaluation in run.evaluations])
    css = (files("psyche_jax.evaluate") / "report.css").read_text(encoding="utf-8")
    try:
        return environment.get_template("report.md.jinja" if markdown else "report.html.jinja").render(
            title=title,
            css=Markup(css),
            markup=Markup,
            judged=judged,
            dimensions=TITLES,
            runs=runs,
            benches=benches,
            paper=_paper_section(benches),
            kinds=[] if markdown else _kind_sections(runs),
            rollouts=[found for run in runs if (found := read_rollouts(run))],
            version=psyche_jax.__version__,
            written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
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


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _kind_sections(runs: Sequence[RunRecord]) -> list[KindSection]:
    sections = []
    for kind in dict.fromkeys(run.kind for run in runs):
        chosen = [run for run in runs if run.kind == kind]
        keys = list(dict.fromkeys(key for run in chosen for line in run.metrics for key in line))
        metrics = grpo_metrics(keys) if kind == "grpo" else SFT_METRICS
        drawn = charts(metrics, [(run.name, run.metrics) for run in chosen])
        sections.append(KindSection(kind, KINDS.get(kind, kind), chosen, drawn, _settings(chosen)))
    return sections


def _paper_section(benches: Sequence[Bench]) -> PaperSection:
    source, rows = published()
    ours = [
        row
        for bench in benches
        for name, evaluation in bench.named
        for row in our_rows(name, evaluation.scores, evaluation.parameters)
    ]
    every = sorted([*rows, *ours], key=lambda row: -row.values["average_strict"])
    return PaperSection(source, COLUMNS, every, draw_sizes(every), summary_of_sizes(every))


def _settings(runs: Sequence[RunRecord]) -> list[tuple[str, list[str], bool]]:
    all_values = [flat(run.config) for run in runs]
    rows = []
    for key in dict.fromkeys(key for values in all_values for key in values):
        shown = [_plain(values[key]) if key in values else "(absent)" for values in all_values]
        rows.append((key, shown, key != "run.dir" and len(set(shown)) > 1))
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    return str(yaml.safe_dump(value, allow_unicode=True, default_flow_style=True)).removesuffix("...\n").strip()
