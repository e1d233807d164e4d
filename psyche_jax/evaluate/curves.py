"""Training curves as SVG for a web page: no fixed colours or fonts, so one drawing serves light, dark and paper.

What a reader sees at a point of a curve, and reads in the table beside it, are the rows of its chart.
"""

import bisect
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal, TypeAlias

import matplotlib
import numpy as np
from markupsafe import escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullFormatter

from psyche_jax.evaluate.formatting import change, duration, number
from psyche_jax.evaluate.language import ENGLISH, Speaker

SMOOTH_ABOVE = 30  # points; a longer curve gets a moving mean over its faint raw line
ROWS = 60  # at which the values of a chart can be read
COLORS = 6
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
# Drawn in these colours, which then become CSS variables: the page decides what they are.
TEXT, GRID = "#010001", "#010002"
SERIES = tuple(f"#0200{index:02x}" for index in range(COLORS))
_VARIABLES = {TEXT: "--chart-text", GRID: "--chart-grid"} | {
    color: f"--series-{index + 1}" for index, color in enumerate(SERIES)
}


Across: TypeAlias = Literal["step", "time"]


@dataclass(frozen=True)
class Series:
    """One curve over steps, or over the seconds spent in them.

    `low` and `high`, if given, bound a band around it; `style` is its place in the legend.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    style: int = 0
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    @property
    def color(self) -> int:
        """Number of the colour, from 1, as in the CSS variable `--series-1`."""
        return self.style % COLORS + 1

    @property
    def dash(self) -> str:
        """The dashes as SVG's `stroke-dasharray`."""
        dash = DASHES[self.style % len(DASHES)]
        return "none" if dash == "-" else " ".join(str(length * 2) for length in dash[1])

    @property
    def change(self) -> str:
        """First and last finite value; empty if there is none."""
        return change([value for value in self.values if math.isfinite(value)])


@dataclass(frozen=True)
class Metric:
    """What a chart shows: keys of `metrics.jsonl` with their names in the legend, and how to draw them."""

    title: str
    unit: str
    keys: tuple[tuple[str, str], ...]
    share: bool = False  # of something: the axis runs from 0 to 1
    log: bool = False
    band: tuple[str, str] | None = None  # keys of what bounds the curve
    if_any: bool = False  # leave the chart out where all values are zero
    exact: bool = False  # there is no noise to smooth
    about: str = ""  # one sentence on how to read it


@dataclass(frozen=True)
class Chart:
    """A drawn chart. `rows`: some of its places, what they are called, and the value of each curve there."""

    metric: Metric
    series: tuple[Series, ...]
    rows: list[tuple[float, str, list[str]]]
    summary: str  # what a screen reader says
    svg: str


SFT_METRICS = (
    Metric("Loss", "nats per token", (("loss", "training"), ("evaluation_loss", "evaluation"))),
    Metric("Gradient norm", "norm", (("grad_norm", "before clipping"),)),
    Metric("Learning rate", "rate", (("learning_rate", "learning rate"),), exact=True),
    Metric("Throughput", "tokens per second", (("tokens_per_second", "tokens per second"),)),
    Metric("Step time", "seconds", (("step_time", "step"),)),
    Metric(
        "Memory",
        "GiB, peak so far",
        (("memory/device_gib", "fullest device"), ("memory/host_gib", "host process")),
        exact=True,
    ),
)
_RULE = re.compile(r"rewards/(.+)/mean")


def grpo_metrics(keys: Sequence[str]) -> tuple[Metric, ...]:
    """The charts of a GRPO run whose metrics have `keys`; the rules are found among them."""
    rules = tuple((key, match[1]) for key in keys if (match := _RULE.fullmatch(key)))
    return (
        # Does it learn, and has it still something to learn from?
        Metric(
            "Reward",
            "mean reward",
            (("reward", "total"), *rules),
            about="The total is weighted; the curves of single rules are not.",
        ),
        Metric("Spread of reward in a group", "standard deviation", (("reward_std", "mean over groups"),)),
        Metric(
            "Groups without signal",
            "share of groups",
            (("frac_reward_zero_std", "all responses scored equally"),),
            share=True,
            about="Such a group has advantage 0 and teaches nothing.",
        ),
        # Does the policy stay itself: near the reference, and undecided where it should be?
        Metric("Distance from the reference policy", "KL, nats per token", (("kl", "KL (k3)"),)),
        Metric("Entropy", "nats per token", (("entropy", "policy"),)),
        # Long completions that are cut earn nothing, and clipped tokens teach nothing.
        Metric(
            "Completion length",
            "tokens",
            (("completions/mean_length", "mean (band: shortest to longest)"),),
            band=("completions/min_length", "completions/max_length"),
        ),
        Metric(
            "Truncated completions",
            "share of completions",
            (("completions/clipped_ratio", "no stop token"),),
            share=True,
        ),
        Metric(
            "Clipped tokens",
            "share of tokens",
            (("clip_ratio/low_mean", "below"), ("clip_ratio/high_mean", "above")),
            if_any=True,
        ),
        # Whether the machinery is right; the loss itself says little, it starts at zero by construction.
        Metric(
            "Sampler against trainer",
            "|Δ log-prob|, nats",
            (("sampling/logp_difference/mean", "mean"), ("sampling/logp_difference/max", "max")),
            log=True,
            about="The same tokens, scored by both; should be near 0.",
        ),
        Metric("Loss", "loss", (("loss", "training"),)),
        *SFT_METRICS[1:],
    )


def charts(
    metrics: Sequence[Metric],
    runs: Sequence[tuple[str, Sequence[dict[str, Any]]]],
    across: Across = "step",
    say: Speaker = ENGLISH,
) -> list[Chart]:
    """Draw `metrics` of one run, or of several over each other.

    One run: related metrics share a chart. Several runs: each metric has its own and every run keeps its colour.

    Args:
      metrics: what to draw; what no run has is left out.
      runs: name and lines of `metrics.jsonl` of each run.
      across: what runs from left to right: steps, or the time spent in them.
      say: in what language, as plain text.
    """
    alone = len(runs) == 1
    if not alone:
        metrics = [part for metric in metrics for part in _apart(metric, say)]
    places = {run: _places(lines, across) for run, lines in runs}
    result: list[Chart] = []
    for metric in metrics:
        title, unit, about = map(say.term, (metric.title, metric.unit, metric.about))
        metric = replace(metric, title=title, unit=unit, about=about)
        found = [
            _series(lines, places[run], key, say.term(name) if alone else run, style, metric.band if alone else None)
            for run_index, (run, lines) in enumerate(runs)
            for style, (key, name) in ((run_index + key_index, pair) for key_index, pair in enumerate(metric.keys))
        ]
        series = tuple(one for one in found if one.steps)
        if series and (not metric.if_any or any(any(one.values) for one in series)):
            salt = f"{metric.title} {len(result)} {'|'.join(run for run, _ in runs)}"
            rows = _rows(series, across, say)
            summary = _summary(metric, series, across, say)
            result.append(Chart(metric, series, rows, summary, _draw(metric, series, salt, across, say, rows)))
    return result


def _places(lines: Sequence[dict[str, Any]], across: Across) -> list[float]:
    """Where each line stands from left to right."""
    if across == "step":
        return [line["step"] for line in lines]
    times = (line.get("step_time") for line in lines)
    return list(accumulate(time if isinstance(time, int | float) and math.isfinite(time) else 0.0 for time in times))


def _summary(metric: Metric, series: Sequence[Series], across: Across, say: Speaker) -> str:
    first, last = (pick(place for one in series for place in one.steps) for pick in (min, max))
    if across == "time":
        span = say("over {time}", time=duration(last, say))
    elif first < last:
        span = say("over steps {first} to {last}", first=int(first), last=int(last))
    else:
        span = say("over step {n}", n=int(first))
    values = "; ".join(f"{one.name} {one.change or say('never finite')}" for one in series)
    return say("{title} {span}, first → last: {values}", title=metric.title, span=span, values=values)


def _rows(series: Sequence[Series], across: Across, say: Speaker) -> list[tuple[float, str, list[str]]]:
    """At most `ROWS` places of each curve, and the values there: by step those of the step, by time the latest."""
    chosen: set[float] = set()
    for one in series:
        count = len(one.steps)
        rows = min(ROWS, count)
        chosen |= {one.steps[round(row * (count - 1) / max(1, rows - 1))] for row in range(rows)}

    def value(one: Series, place: float) -> str:
        index = bisect.bisect_right(one.steps, place) - 1
        if index < 0 or place > one.steps[-1] or (across == "step" and one.steps[index] != place):
            return "–"
        return number(one.values[index])

    def name(place: float) -> str:
        return say("step {n}", n=int(place)) if across == "step" else duration(place, say)

    return [(place, name(place), [value(one, place) for one in series]) for place in sorted(chosen)]


def moving_mean(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` (odd) points, fewer at the ends; values that are not finite are left out."""
    array = np.asarray(values, float)
    finite = np.isfinite(array)
    half = window // 2
    # Sums of distances from a value: of one that never changes all are 0, and its mean is drawn as straight as it is.
    base = array[finite][0] if finite.any() else 0.0
    sums, counts = (
        np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(finite, array - base, 0.0), finite.astype(float))
    )
    index = np.arange(len(array))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(array))
    count = counts[last] - counts[first]
    return np.where(count > 0, base + (sums[last] - sums[first]) / np.maximum(count, 1), np.nan)


def window_of(points: int) -> int:
    """Points of the moving mean over a curve; 1 where it is drawn as it is."""
    return 1 if points <= SMOOTH_ABOVE else max(5, points // 15) // 2 * 2 + 1


def _apart(metric: Metric, say: Speaker) -> list[Metric]:
    if len(metric.keys) == 1:
        return [metric]
    first, *others = metric.keys
    whole = say.term(metric.title)
    title = whole if metric.title == "Reward" else f"{whole}, {say.term(first[1])}"
    return [
        replace(metric, title=title, keys=(first,)),
        *(replace(metric, title=f"{whole}, {say.term(name)}", keys=((key, name),), about="") for key, name in others),
    ]


def _series(
    lines: Sequence[dict[str, Any]],
    places: Sequence[float],
    key: str,
    name: str,
    style: int,
    band: tuple[str, str] | None,
) -> Series:
    having = [
        (place, line) for place, line in zip(places, lines, strict=True) if isinstance(line.get(key), int | float)
    ]
    low, high = (
        [[float(line[bound]) for _, line in having] for bound in band]
        if band and having and all(isinstance(line.get(bound), int | float) for bound in band for _, line in having)
        else (None, None)
    )
    return Series(name, [place for place, _ in having], [float(line[key]) for _, line in having], style, low, high)


class _Ticks(Formatter):
    """Labels of an axis, of as many digits as tell them apart."""

    def __init__(self, unit: float) -> None:
        self._unit = unit

    def __call__(self, value: float, pos: int | None = None) -> str:
        return number(value / self._unit)

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        texts: list[str] = []
        for digits in range(3, 10):
            texts = [number(value / self._unit, digits) for value in values]
            if len({*texts}) == len(texts):
                break
        return texts


def _draw(
    metric: Metric,
    series: Sequence[Series],
    salt: str,
    across: Across,
    say: Speaker,
    rows: Sequence[tuple[float, str, list[str]]],
) -> str:
    def plot(axes: Any) -> None:
        for one in series:
            _draw_series(axes, one, 1 if metric.exact else window_of(len(one.values)))
        # A logarithmic axis only where the values span more than a linear one can show.
        values = [value for one in series for value in one.values if math.isfinite(value)]
        if metric.log and values and min(values) > 0 and max(values) / min(values) > 30:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(numticks=5))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.tick_params(which="minor", length=0)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4))
        if metric.share:
            axes.set_ylim(-0.03, 1.03)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=across == "step"))
        axes.yaxis.set_major_formatter(_Ticks(1))
        axes.xaxis.set_major_formatter(_Ticks(unit))
        axes.margins(x=0.02)

    # Steps, or seconds told in the unit that suits them.
    last = max(one.steps[-1] for one in series)
    unit, name = (
        next((known for known in _UNITS if last >= 3 * known[0]), _UNITS[-1]) if across == "time" else (1, "step")
    )
    return draw((3.9, 2.5), salt, (say.term(name), metric.unit), plot, lambda axes: _readings(axes, series, rows))


_UNITS = ((3600, "hours in steps"), (60, "minutes in steps"), (1, "seconds in steps"))


def draw(
    size: tuple[float, float],
    salt: str,
    labels: tuple[str, str],
    plot: Callable[[Any], None],
    over: Callable[[Any], str] = lambda _: "",
) -> str:
    """A drawing in the style of the page as SVG: `plot` draws on the axes, `over` is SVG laid over them.

    One `salt` always gives the same names.
    """
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 11.5,
        "path.simplify_threshold": 0.4,
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Labels are measured in a font without Chinese, and shown in one of the page.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = Figure(figsize=size, dpi=72, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        plot(axes)
        # Only the bottom of the frame and faint lines across remain.
        axes.tick_params(length=0, colors=TEXT, pad=5)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel(labels[0], color=TEXT)
        axes.set_ylabel(labels[1], color=TEXT)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(GRID)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _themed(buffer.getvalue()).replace("</svg>", f"{over(axes)}</svg>")


def _readings(axes: Any, series: Sequence[Series], rows: Sequence[tuple[float, str, list[str]]]) -> str:
    """The values at each place, shown while a pointer is there."""
    box, height = axes.bbox, axes.figure.bbox.height
    places = [float(axes.transData.transform((place, 1.0))[0]) for place, _, _ in rows]
    top, bottom = height - box.y1, height - box.y0
    parts = []
    for index, (x, (_, place, values)) in enumerate(zip(places, rows, strict=True)):
        left = (places[index - 1] + x) / 2 if index else box.x0
        right = (places[index + 1] + x) / 2 if index + 1 < len(places) else box.x1
        side, anchor = (x + 5, "start") if x < (box.x0 + box.x1) / 2 else (x - 5, "end")
        lines = [
            (place, "--ink"),
            *((value, f"--series-{one.color}") for one, value in zip(series, values, strict=True)),
        ]
        words = "".join(
            f'<tspan x="{side:.1f}" dy="12" style="fill: var({color})">{escape(text)}</tspan>'
            for text, color in lines
            if text != "–"
        )
        parts.append(
            f'<g class="reading"><rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
            f'height="{bottom - top:.1f}"/><line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
            f'<text y="{top - 4:.1f}" text-anchor="{anchor}">{words}</text></g>'
        )
    return "".join(parts)


def _draw_series(axes: Any, series: Series, window: int) -> None:
    color, dash = SERIES[series.style % COLORS], DASHES[series.style % len(DASHES)]
    steps, values = np.asarray(series.steps, float), np.asarray(series.values, float)
    values = np.where(np.isfinite(values), values, np.nan)
    if series.low is not None and series.high is not None:
        axes.fill_between(steps, series.low, series.high, color=color, alpha=0.13, linewidth=0)
    few = np.isfinite(values).sum() <= 12
    if window > 1:
        axes.plot(steps, values, color=color, alpha=0.35, linewidth=0.9, solid_joinstyle="round")
        values = moving_mean(values, window)
    marker: dict[str, Any] = {"marker": "o", "markersize": 4, "markeredgewidth": 0} if few else {}
    axes.plot(steps, values, color=color, linewidth=2, linestyle=dash, **marker)


def _themed(svg: str) -> str:
    """Only the drawing: no prologue, size or names of its own; colours by variable and the page's font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1))
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
