"""The prompts: Jinja files in Chinese, one a stage, with a version in their first line."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from psyche_jax.errors import UsageError

_VERSION = re.compile(r"^\{#-?\s*version:\s*(\S+)\s*-?#\}")
_PACKAGED = Path(str(files("psyche_jax.synth") / "prompts"))


@dataclass(frozen=True)
class Prompt:
    """A prompt file. `id` is its name, its version and a hash of its text: `questions@1-3f2a9c04`."""

    id: str
    template: jinja2.Template

    def text(self, **values: Any) -> str:
        """The user's turn."""
        return self._block("user", values)

    def messages(self, **values: Any) -> tuple[dict[str, str], ...]:
        """System and user turns."""
        turns = (("system", self._block("system", values)), ("user", self._block("user", values)))
        return tuple({"role": role, "content": content} for role, content in turns if content)

    def _block(self, name: str, values: Mapping[str, Any]) -> str:
        if name not in self.template.blocks:
            return ""
        try:
            return "".join(self.template.blocks[name](self.template.new_context(dict(values)))).strip()
        except jinja2.TemplateError as error:
            raise UsageError(f"prompt {self.id}: {error}") from None


class Prompts:
    """The package's prompts, or those of a folder where it has a file of that name."""

    def __init__(self, folder: str | None = None) -> None:
        self._folders = [Path(folder)] if folder else []
        if folder and not Path(folder).is_dir():
            raise UsageError(f"prompts: there is no folder {folder}")
        known = sorted(path.stem for path in _PACKAGED.glob("*.jinja"))
        for path in sorted(Path(folder).glob("*.jinja")) if folder else ():
            if path.stem not in known:
                raise UsageError(f"{path}: no stage has a prompt of that name; known: {', '.join(known)}")
        self._folders.append(_PACKAGED)
        self._environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False)
        self._environment.filters["fenced"] = fenced
        self._prompts: dict[str, Prompt] = {}

    def __getitem__(self, name: str) -> Prompt:
        """The prompt `name`.

        Raises:
          UsageError: its file is broken or lacks the version or the block `user`.
        """
        if name not in self._prompts:
            path = next(path for folder in self._folders if (path := folder / f"{name}.jinja").is_file())
            text = path.read_text(encoding="utf-8")
            version = _VERSION.match(text)
            if version is None:
                raise UsageError(f"{path}: must begin with a version, for example {{#- version: 1 -#}}")
            try:
                template = self._environment.from_string(text)
            except jinja2.TemplateError as error:
                raise UsageError(f"{path}: {error}") from None
            if "user" not in template.blocks:
                raise UsageError(f"{path}: lacks the block `user`")
            digest = hashlib.sha256(text.encode()).hexdigest()[:8]
            self._prompts[name] = Prompt(f"{name}@{version[1]}-{digest}", template)
        return self._prompts[name]


def fenced(text: str, name: str) -> str:
    """Text between marks that it cannot close: they hold a hash of it."""
    mark = hashlib.sha256(text.encode()).hexdigest()[:16]  # so long that no text holds its own
    return f"<{name} {mark}>\n{text}\n</{name} {mark}>"
