"""Training curves as SVG for a web page: no fixed colours or fonts, so one drawing serves light, dark and paper."""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from psyche_jax.evaluate.formatting import number

SMOOTH_ABOVE = 30  # points; a longer curve gets a moving mean over its faint raw line
COLORS = 6
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
# Drawn in these colours, which then become CSS variables: the page decides what they are.
TEXT, GRID = "#010001", "#010002"
SERIES = tuple(f"#0200{index:02x}" for index in range(COLORS))
_VARIABLES = {TEXT: "--chart-text", GRID: "--chart-grid"} | {
    color: f"--series-{index + 1}" for index, color in enumerate(SERIES)
}


@dataclass(frozen=True)
class Series:
    """One curve. `low` and `high`, if given, bound a band around it; `style` is its place in the legend."""

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
        """First and last finite value in words."""
        finite = [value for value in self.values if math.isfinite(value)]
        if not finite:
            return "never finite"
        return number(finite[0]) if len(finite) == 1 else f"{number(finite[0])} → {number(finite[-1])}"


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
    about: str = ""  # one sentence on how to read it


@dataclass(frozen=True)
class Chart:
    """A drawn chart."""

    metric: Metric
    series: tuple[Series, ...]
    svg: str

    @property
    def summary(self) -> str:
        """What a screen reader says."""
        steps = [step for series in self.series for step in series.steps]
        span = f"steps {int(min(steps))} to {int(max(steps))}" if min(steps) < max(steps) else f"step {int(steps[0])}"
        values = "; ".join(f"{series.name} {series.change}" for series in self.series)
        return f"{self.metric.title} over {span}, first → last: {values}"


SFT_METRICS = (
    Metric("Loss", "nats per token", (("loss", "training"), ("evaluation_loss", "evaluation"))),
    Metric("Gradient norm", "norm", (("grad_norm", "before clipping"),)),
    Metric("Learning rate", "rate", (("learning_rate", "learning rate"),)),
    Metric("Throughput", "tokens per second", (("tokens_per_second", "tokens per second"),)),
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
            (("frac_reward_zero_std", "all responses scored alike"),),
            share=True,
            about="Such a group has no advantage and teaches nothing.",
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
            "Completions cut at the limit",
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
            about="The same tokens, scored by both; near 0 is right.",
        ),
        Metric("Loss", "loss", (("loss", "training"),)),
        *SFT_METRICS[1:],
    )


def charts(metrics: Sequence[Metric], runs: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> list[Chart]:
    """Draw `metrics` of one run, or of several over each other.

    One run: related metrics share a chart. Several runs: each metric has its own and every run keeps its colour.

    Args:
      metrics: what to draw; what no run has is left out.
      runs: name and lines of `metrics.jsonl` of each run.
    """
    alone = len(runs) == 1
    if not alone:
        metrics = [part for metric in metrics for part in _apart(metric)]
    result: list[Chart] = []
    for metric in metrics:
        found = [
            _series(lines, key, name if alone else run, style, metric.band if alone else None)
            for run_index, (run, lines) in enumerate(runs)
            for style, (key, name) in ((run_index + key_index, pair) for key_index, pair in enumerate(metric.keys))
        ]
        series = tuple(one for one in found if one.steps)
        if series and not (metric.if_any and not any(any(one.values) for one in series)):
            salt = f"{metric.title} {len(result)} {'|'.join(run for run, _ in runs)}"
            result.append(Chart(metric, series, _draw(metric, series, salt)))
    return result


def moving_mean(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` (odd) points, fewer at the ends; values that are not finite are left out."""
    array = np.asarray(values, float)
    finite = np.isfinite(array)
    half = window // 2
    sums, counts = (
        np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(finite, array, 0.0), finite.astype(float))
    )
    index = np.arange(len(array))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(array))
    count = counts[last] - counts[first]
    return np.where(count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), np.nan)


def window_of(points: int) -> int:
    """Points of the moving mean over a curve; 1 where it is drawn as it is."""
    return 1 if points <= SMOOTH_ABOVE else max(5, points // 15) // 2 * 2 + 1


def _apart(metric: Metric) -> list[Metric]:
    if len(metric.keys) == 1:
        return [metric]
    first, *others = metric.keys
    title = metric.title if metric.title == "Reward" else f"{metric.title}, {first[1]}"
    return [
        replace(metric, title=title, keys=(first,)),
        *(replace(metric, title=f"{metric.title}, {name}", keys=((key, name),), about="") for key, name in others),
    ]


def _series(lines: Sequence[dict[str, Any]], key: str, name: str, style: int, band: tuple[str, str] | None) -> Series:
    having = [line for line in lines if isinstance(line.get(key), int | float)]
    low, high = (
        [[float(line[bound]) for line in having] for bound in band]
        if band and having and all(isinstance(line.get(bound), int | float) for bound in band for line in having)
        else (None, None)
    )
    steps, values = [line["step"] for line in having], [float(line[key]) for line in having]
    return Series(name, steps, values, style, low, high)


def _draw(metric: Metric, series: Sequence[Series], salt: str) -> str:
    def plot(axes: Any) -> None:
        for one in series:
            _draw_series(axes, one)
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
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.margins(x=0.02)

    return draw((3.9, 2.5), salt, ("step", metric.unit), plot)


def draw(size: tuple[float, float], salt: str, labels: tuple[str, str], plot: Callable[[Any], None]) -> str:
    """A drawing in the style of the page as SVG: `plot` draws on the axes. One `salt` always gives the same names."""
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 11.5,
        "path.simplify_threshold": 0.4,
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
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
    return _themed(buffer.getvalue())


def _draw_series(axes: Any, series: Series) -> None:
    color, dash = SERIES[series.style % COLORS], DASHES[series.style % len(DASHES)]
    steps, values = np.asarray(series.steps, float), np.asarray(series.values, float)
    values = np.where(np.isfinite(values), values, np.nan)
    window = window_of(len(values))
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
