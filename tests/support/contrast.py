"""How well the colours of a page stand out from each other."""

from collections.abc import Sequence
from typing import Any

_SCRIPT = """pairs => Math.min(...pairs.map(([over, under]) => {
    const root = getComputedStyle(document.documentElement)
    const light = name => {
        const hex = root.getPropertyValue(name).trim().slice(1)
        const parts = [0, 2, 4].map(at => parseInt(hex.slice(at, at + 2), 16) / 255)
            .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
    }
    const [low, high] = [light(over), light(under)].sort((a, b) => a - b)
    return (high + 0.05) / (low + 0.05)
}))"""


def lowest_contrast(page: Any, over: Sequence[str], under: Sequence[str]) -> float:
    """The lowest contrast ratio (WCAG 2.2) of colours, named by their CSS properties, each `over` on each `under`."""
    return page.evaluate(_SCRIPT, [[one, other] for one in over for other in under])
