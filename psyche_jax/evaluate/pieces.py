"""What the report and the page of `psyche watch` share: `pieces.html.jinja`, and what is put into it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from psyche_jax.config_files import dump_yaml
from psyche_jax.evaluate.curves import SFT_METRICS, Across, charts, grpo_metrics
from psyche_jax.evaluate.formatting import brief, cell, clip, interval, percent, points, spoken
from psyche_jax.evaluate.language import Speaker
from psyche_jax.evaluate.run_records import RunRecord, flat


def environment(say: Speaker) -> jinja2.Environment:
    """Templates that speak: `say` is for phrases, `plain` for what takes a speaker, `term` for names."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("psyche_jax", ""),
        autoescape=say.markup,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plain = Speaker(say.language)
    templates.globals |= {"say": say, "plain": plain, "markup": Markup}
    templates.filters |= {"percent": percent, "points": points, "interval": interval, "brief": brief, "cell": cell}
    templates.filters |= {"spoken": spoken, "clip": lambda text: clip(text, plain), "term": say.term}
    templates.filters["dumped"] = dump_yaml
    return templates


def names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell what they lead to apart."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths), default=0) + 1):
        found = ["/".join(parts[-length:]) for parts in paths]
        if len(set(found)) == len(found):
            return found
    return [str(folder) for folder in folders]


def kind_sections(runs: Sequence[RunRecord], say: Speaker, across: Across = "step") -> list[dict[str, Any]]:
    """All runs of one kind: their curves, their settings (key, value by run, whether they differ)."""
    plain = Speaker(say.language)
    sections = []
    for kind in dict.fromkeys(run.kind for run in runs):
        chosen = [run for run in runs if run.kind == kind]
        keys = list(dict.fromkeys(key for run in chosen for line in run.metrics for key in line))
        metrics = grpo_metrics(keys) if kind == "grpo" else SFT_METRICS
        settings = _settings(chosen, plain)
        sections.append(
            {
                "name": chosen[0].kind_name(plain),
                "runs": chosen,
                "charts": charts(metrics, [(run.name, run.metrics) for run in chosen], across, plain),
                "settings": settings,
                "differences": [row for row in settings if row[2]],
            }
        )
    return sections


def _settings(runs: Sequence[RunRecord], say: Speaker) -> list[tuple[str, list[str], bool]]:
    all_values = [flat(run.config) for run in runs]
    rows = []
    for key in dict.fromkeys(key for values in all_values for key in values):
        shown = [_plain(values[key]) if key in values else say("(absent)") for values in all_values]
        rows.append((key, shown, key != "run.dir" and len(set(shown)) > 1))
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    return str(yaml.safe_dump(value, allow_unicode=True, default_flow_style=True)).removesuffix("...\n").strip()
