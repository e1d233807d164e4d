"""Write docs/config.md: every key of every config, from the dataclasses and the comments beside their fields.

python scripts/config_page.py
"""

import argparse
import ast
import dataclasses
import inspect
import textwrap
import tokenize
import types
import typing
from collections import Counter
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from psyche_jax.config import GrpoConfig, SftConfig
from psyche_jax.data.mapping import ImportConfig
from psyche_jax.data.packing import PackConfig
from psyche_jax.serve.config import ServeConfig
from psyche_jax.synth.config import SelectConfig, SynthConfig

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
CONFIGS = {
    "psyche sft": SftConfig,
    "psyche grpo": GrpoConfig,
    "psyche pack": PackConfig,
    "psyche data import": ImportConfig,
    "psyche synth": SynthConfig,
    "psyche select": SelectConfig,
    "psyche serve": ServeConfig,
}
HEAD = """# Every config key

Written by `scripts/config_page.py` from the dataclasses that check the configs; a test keeps the page up to date.

A config is YAML. `extends: sft_7b` starts from another config and changes some keys; `--set a.b=c` on the command line
sets one key, and `a.0.b=c` a key in the first entry of a list. An unknown key is an error that names the nearest valid
one. *required*: there is no default. `null` is YAML's word for none; the explanations call it None. A section has the
defaults of its own table, except for those beside its name. What may change when a run resumes:
[checkpoints](checkpoints.md#what-may-change).
"""
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
WORDS = {str: "text", int: "integer", float: "number", bool: "`true` or `false`", type(None): "`null`"}


def comments(kind: type) -> dict[str, str]:
    """What stands beside each field of a class: a string below it, or comments on its lines or right above it."""
    source = textwrap.dedent(inspect.getsource(kind))
    said = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT and "noqa" not in token.string
    }
    found: dict[str, str] = {}
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    for node, below in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        first = node.lineno
        while first - 1 in said and said[first - 1][1]:
            first -= 1
        lines = [said[line][0] for line in range(first, (node.end_lineno or first) + 1) if line in said]
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            lines = [inspect.cleandoc(below.value.value)]
        found[node.target.id] = " ".join(lines)
    return found


def all_comments(kind: type) -> dict[str, str]:
    """`comments` of a class; of a field about which it says nothing, those of the class that it comes from."""
    said: dict[str, str] = {}
    for base in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        said |= {name: text for name, text in comments(base).items() if text or name not in said}
    return said


def sections_of(hint: Any) -> list[type]:
    """The dataclasses that a field leads to: none, one, or (the rewards) one for each kind of entry."""
    if dataclasses.is_dataclass(hint):
        return [typing.cast(type, hint)]
    parts = get_args(hint)[:1] if get_origin(hint) is typing.Annotated else get_args(hint)
    return [section for part in parts for section in sections_of(part)]


def types_of(kind: type) -> dict[str, Any]:
    """The type of each field, with its bounds."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(kind)}


def words(hint: Any, titles: Mapping[type, str]) -> str:
    """A type as a reader of YAML calls it; `titles` are those of sections."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        metadata = [bound for part in parts[1:] for bound in getattr(part, "metadata", [part])]
        limits = [
            f"{word} {getattr(bound, name):,}"
            for bound in metadata
            for name, word in BOUNDS.items()
            if hasattr(bound, name)
        ]
        return " ".join([words(parts[0], titles), " and ".join(limits)]).strip()
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(words(part, titles) for part in parts)
    if origin is tuple:
        return f"list of {words(parts[0], titles)}"
    if origin in (dict, Mapping):
        return f"mapping of {words(parts[0], titles)} to {words(parts[1], titles)}"
    return f"[{titles[hint]}](#{slug(titles[hint])})" if dataclasses.is_dataclass(hint) else WORDS[hint]


def set_apart(value: Any) -> Any:
    """A section as a mapping of what differs from the defaults of its class; other values as they are."""
    if isinstance(value, tuple):
        return [set_apart(part) for part in value]
    if not dataclasses.is_dataclass(value):
        return value
    return {
        entry.name: set_apart(own)
        for entry in dataclasses.fields(value)
        if (own := getattr(value, entry.name)) != usual(entry) or entry.name == "rule"
    }


def usual(entry: dataclasses.Field) -> Any:
    """The default of a field."""
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


def default_of(entry: dataclasses.Field) -> str:
    """A field's default as one line of YAML; nothing for a section that is as its class has it."""
    value = usual(entry)
    if value is dataclasses.MISSING:
        return "*required*"
    text = yaml.safe_dump(
        set_apart(value),
        default_style='"' if isinstance(value, str) and "\n" in value else None,
        default_flow_style=True,
        width=10_000,
        sort_keys=False,
        allow_unicode=True,
    )
    text = text.removesuffix("...\n").strip()
    return "" if text == "{}" and dataclasses.is_dataclass(value) else f"`{text}`"


def slug(title: str) -> str:
    """The anchor that GitHub and MkDocs give a heading of letters, blanks and underscores."""
    return title.lower().replace(" ", "-")


def table(kind: type, titles: Mapping[type, str], prefix: str = "") -> str:
    """A row for each key of a config or section."""
    said, hints = all_comments(kind), types_of(kind)
    rows = ["| key | type | default | what it is |", "| --- | --- | --- | --- |"]
    for entry in dataclasses.fields(kind):
        cells = [f"`{prefix}{entry.name}`", words(hints[entry.name], titles), default_of(entry), said[entry.name]]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def page() -> str:
    """The text of docs/config.md."""
    uses: dict[type, list[tuple[str, str]]] = {}  # of each section: verbs and keys
    for verb, kind in CONFIGS.items():
        for key, hint in types_of(kind).items():
            for section in sections_of(hint):
                uses.setdefault(section, []).append((verb, f"{key}.0" if get_origin(hint) is tuple else key))
    names = Counter(places[0][1] for places in uses.values())
    titles = {}
    for section, ((verb, key), *_) in uses.items():
        name = key.removesuffix(".0")
        titles[section] = name if names[key] == 1 else f"{name} {getattr(section, 'rule', verb.split()[-1])}"
    parts = [HEAD]
    parts += [f"## {verb}\n\n{inspect.getdoc(kind)}\n\n{table(kind, titles)}" for verb, kind in CONFIGS.items()]
    parts.append("## Sections\n")
    for section, places in uses.items():
        verbs = ", ".join(f"`{verb}`" for verb, _ in places)
        head = f"### {titles[section]}\n\n{inspect.getdoc(section)}\nOf {verbs}.\n"
        parts.append(f"{head}\n{table(section, titles, places[0][1] + '.')}")
    return "\n".join(parts)


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
