"""Scores of an evaluation as text for a terminal."""

from collections.abc import Mapping
from typing import Any


def scores_table(summary: Mapping[str, Any]) -> str:
    """A line for all questions, each kind and each cell; below it what else there is to say."""
    lines = []
    if summary["count"]:
        cells = summary["cells"] if len(summary["cells"]) > len(summary["by_kind"]) else {}
        rows = [("all", summary), *summary["by_kind"].items(), *cells.items()]
        width = max(len(name) for name, _ in rows) + 2
        heads = ("questions", "strict", "95 %", "chance", "elastic", "chance", "unanswered")
        lines.append(f"{'':{width}}" + "".join(f"{head:>{size}}" for head, size in zip(heads, _WIDTHS, strict=True)))
        lines += [f"{name:{width}}{_row(row)}" for name, row in rows]
        if "deviation" in summary:
            lines.append(
                f"standard deviation over samples: strict {summary['deviation']:.3f}, "
                f"elastic {summary['deviation_elastic']:.3f}"
            )
        if average := summary.get("average"):
            lines.append(
                f"mean of {len(average['cells'])} cells: strict {average['strict']:.3f} {_span(average['interval'])}, "
                f"elastic {average['elastic']:.3f} {_span(average['interval_elastic'])}"
            )
        if summary["failures"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in summary["failures"].items())
            fallback = summary["fallback"]
            lines.append(
                f"no letters by the strict rule: {reasons}; with the lenient fallback, which reads {fallback['read']} "
                f"of them: strict {fallback['strict']:.3f}, elastic {fallback['elastic']:.3f}"
            )
    if essays := summary.get("essays"):
        lines.append(
            f"{essays['count']} essays: "
            + ", ".join(f"{title} {essays[name]:.2f}" for name, title in _ESSAYS.items())
            + " (percent)"
        )
    if (clean := summary.get("decontaminated")) is not None:
        scores = f": strict {clean['strict']:.3f}, elastic {clean['elastic']:.3f}" if clean["count"] else ""
        lines.append(f"{summary['leaked']} stand in the training data; without them {clean['count']} questions{scores}")
    if summary["set_aside"]:
        lines.append(f"{summary['set_aside']} records set aside")
    return "\n".join(lines)


_WIDTHS = (10, 9, 13, 9, 9, 9, 12)
_ESSAYS = {"rouge1": "ROUGE-1", "rougeL": "ROUGE-L", "bleu4": "BLEU-4"}


def _row(row: Mapping[str, Any]) -> str:
    return (
        f"{row['count']:10}{row['strict']:9.3f}{_span(row['interval']):>13}{row['chance']:9.3f}{row['elastic']:9.3f}"
        f"{row['chance_elastic']:9.3f}{row['unanswered']:12}"
    )


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f}–{interval[1]:.3f}"
