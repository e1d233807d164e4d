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
        lines.append(f"{essays['count']} essays: {_essays(essays)} (percent)")
    if (clean := summary.get("decontaminated")) is not None:
        scores = f": strict {clean['strict']:.3f}, elastic {clean['elastic']:.3f}" if clean["count"] else ""
        lines.append(f"{summary['leaked']} stand in the training data; without them {clean['count']} questions{scores}")
        if summary.get("leaked_essays"):
            apart = _essays(clean["essays"]) if clean.get("essays") else "none is left"
            lines.append(f"{summary['leaked_essays']} of them are essays on a leaked case; the other essays: {apart}")
    if empathy := summary.get("empathy"):
        lines += _empathy(empathy)
    elif "dialogues" in summary:
        lines.append(f"{summary['dialogues']} replies to dialogues; no --judge was given, so they have no marks")
    if summary["set_aside"]:
        lines.append(f"{summary['set_aside']} records set aside")
    if unanswered := summary.get("no_answer"):
        told = ", ".join(f"{count} {reason}" for reason, count in unanswered.items())
        lines.append(f"of these without an answer, which is not scored: {told}")
    return "\n".join(lines)


def _essays(essays: Mapping[str, Any]) -> str:
    return ", ".join(f"{title} {essays[name]:.2f}" for name, title in _ESSAYS.items())


def _empathy(empathy: Mapping[str, Any]) -> list[str]:
    lines = [f"{empathy['count']} dialogues judged, marks from 1 to 5 beside those of {empathy['against']}:"]
    for name, marks in empathy["dimensions"].items():
        low, high = marks["interval"]
        change = f"{marks['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append(f"  {name:18}{marks['model']:6.2f}{marks['other']:6.2f}  {change}")
    for name, judge in empathy["judges"].items():
        same, first = _share(judge["same_in_both_orders"]), _share(judge["first_preferred"])
        outcomes = ", ".join(f"{judge[key]} {title}" for key, title in _OUTCOMES.items())
        lines.append(f"  {name}: {outcomes} of {judge['count']}; alike in both orders {same}, first preferred {first}")
    for pair in empathy["agreement"]:
        who = " and ".join(pair["judges"])
        lines.append(f"  {who} agree on {_share(pair['share'])} of {pair['count']}, kappa {_share(pair['kappa'])}")
    return lines


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


_WIDTHS = (10, 9, 13, 9, 9, 9, 12)
_OUTCOMES = {"win": "won", "tie": "tied", "lose": "lost"}
_ESSAYS = {"rouge1": "ROUGE-1", "rougeL": "ROUGE-L", "bleu4": "BLEU-4"}


def _row(row: Mapping[str, Any]) -> str:
    return (
        f"{row['count']:10}{row['strict']:9.3f}{_span(row['interval']):>13}{row['chance']:9.3f}{row['elastic']:9.3f}"
        f"{row['chance_elastic']:9.3f}{row['unanswered']:12}"
    )


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f}–{interval[1]:.3f}"
