"""The words of reports and pages. English is what the code says, and the key of what another language says instead."""

import functools
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal, TypeAlias

from markupsafe import Markup

Language: TypeAlias = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")


@dataclass(frozen=True)
class Speaker:
    """Says a phrase in a language: `say("Done after {n} step|Done after {n} steps", n=3)`.

    Where a phrase has two forms, `n` chooses. One that the language lacks is said in English.

    Args:
      language: of what is said.
      markup: what is said is HTML, in which what is put into a phrase is escaped; else it is plain text.
    """

    language: Language = "en"
    markup: bool = False

    def __call__(self, english: str, **values: Any) -> str:
        """The phrase, with `values` put into it."""
        phrase = _phrases(self.language).get(english, english)
        if "|" in phrase:
            one, many = phrase.split("|")
            phrase = one if values["n"] == 1 else many
        shown = {name: f"{value:,}" if type(value) is int else value for name, value in values.items()}
        return Markup(phrase).format(**shown) if self.markup else phrase.format(**shown)

    def term(self, text: str) -> str:
        """What a name is called, as plain text; one that is not ours stays as it is."""
        return _phrases(self.language).get(text, text)


ENGLISH = Speaker()


@functools.cache
def _phrases(language: Language) -> dict[str, str]:
    if language == "en":
        return {}
    content = (files("psyche_jax.evaluate") / f"{language}.json").read_text(encoding="utf-8")
    phrases: dict[str, str] = json.loads(content)
    return phrases
