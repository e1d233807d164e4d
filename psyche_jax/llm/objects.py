"""The JSON object in what an LLM said, whatever it wrote around it."""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from psyche_jax.storage.files import named_once

_MOST_STARTS = 256  # braces that begin no object
_COMMA = re.compile(r'("(?:\\.|[^"\\])*+"?)|,(?=\s*[}\]])', re.DOTALL)  # before a closing bracket; strings stay
_JSON = json.JSONDecoder(strict=False, object_pairs_hook=named_once)  # line ends within strings do no harm


def json_object(text: str, names: Collection[str]) -> dict[str, Any] | None:
    """The object in what an LLM said (without its thought): the last of those that have most of `names`.

    A code fence around it, a remark with braces of its own, a list, another object, or a comma before a closing
    bracket does not matter. None if there is none.

    Raises:
      ValueError: there is the beginning of one.
    """

    def named(value: Mapping[str, Any]) -> int:
        return sum(name in value for name in names)

    found, fault = _objects(text)
    if fault and not any(map(named, found)):
        found, _ = _objects(_COMMA.sub(lambda match: match[1] or "", text))
    if not any(map(named, found)):
        found = [inner for value in found for inner in _within(value)] or found
    most = max(map(named, found), default=0)
    if most == 0 and fault:
        raise ValueError(fault)
    return next((value for value in reversed(found) if named(value) == most), None)


def _within(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The objects in the fields of an object, and in lists there: some LLMs put a name around what they say."""
    fields = [one for field in value.values() for one in (field if isinstance(field, list) else [field])]
    return [one for one in fields if isinstance(one, dict)]


def _objects(text: str) -> tuple[list[dict[str, Any]], str]:
    """All objects in a text that are in no other, and why the first that begins as one is none."""
    found: list[dict[str, Any]] = []
    faults: list[str] = []
    start = text.find("{")
    while start >= 0 and len(faults) < _MOST_STARTS:
        try:
            value, end = _JSON.raw_decode(text, start)
            found.append(value)
        except (ValueError, RecursionError) as error:
            faults.append(str(error))
            end = start + 1
        start = text.find("{", end)
    return found, faults[0] if faults else ""
