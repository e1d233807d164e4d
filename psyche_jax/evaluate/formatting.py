"""How the report writes figures and texts."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from psyche_jax.evaluate.language import ENGLISH, Speaker
from psyche_jax.rewards.reference import split_thought

LONGEST_TEXT = 8000  # characters of a response that the page shows
_STOP_TOKEN = re.compile(r"\s*<[|｜][^<>]*[|｜]>\s*$")  # `<|im_end|>`, R1-Distill's `<｜end▁of▁sentence｜>`


def number(value: float, digits: int = 3) -> str:
    """So many significant digits, without an exponent where that stays short."""
    size = abs(value)
    if value == 0 or not math.isfinite(value):
        text = f"{value:g}" if value else "0"
    elif 1e-3 <= size < 1e7:
        text = f"{value:,.0f}" if size >= 1000 else f"{value:.{digits}g}"
    else:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    return text.replace("-", "−")


def change(values: Sequence[float]) -> str:
    """The first and the last of these values, as far as there are."""
    return " → ".join(map(number, [*values[:1], *values[1:][-1:]]))


def cell(text: str) -> str:
    """A text for a cell of a Markdown table, with no markup of its own."""
    return re.sub(r"([\\`*_{}\[\]<>()#|])", r"\\\1", " ".join(str(text).split()))


def percent(value: float | None) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{100 * value:.1f} %"


def interval(one: Mapping[str, Any]) -> str:
    """A share with its interval, as percentages."""
    if one["share"] is None:
        return "–"
    return f"{100 * one['share']:.1f} [{100 * one['low']:.1f}–{100 * one['high']:.1f}]"


def points(value: float) -> str:
    """A difference of shares in percentage points, always signed."""
    return f"{100 * value:+.1f}".replace("-", "−")


def brief(value: Any) -> str:
    """A number without needless zeros; anything else as it is."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def duration(seconds: float, say: Speaker = ENGLISH) -> str:
    """A time span for people."""
    if not math.isfinite(seconds):
        return number(seconds)
    if seconds < 1:
        return say("{n} ms", n=f"{seconds * 1000:.0f}")
    if seconds < 60:
        return say("{n} s", n=f"{seconds:.1f}")
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return say("{h} h {min} min", h=hours, min=minutes) if hours else say("{min} min {s} s", min=minutes, s=rest)


def clip(text: str, say: Speaker = ENGLISH) -> str:
    """A text short enough to show."""
    left = len(text) - LONGEST_TEXT
    return text if left <= 0 else text[:LONGEST_TEXT] + say(" … ({n} more characters)", n=left)


def spoken(response: str) -> tuple[str | None, str]:
    """Reasoning and answer of a response, without the stop token that samples of a run show."""
    return split_thought(_STOP_TOKEN.sub("", response))
