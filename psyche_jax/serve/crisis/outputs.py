"""The filter on what a model says: sentence by sentence, also while it is being streamed."""

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml

from psyche_jax.serve.crisis.classify import Rule, join_lines, normalize, read_rule
from psyche_jax.serve.crisis.gate import Gate, Language, language_of

_SENTENCE = re.compile(r".*?(?:[。！？!?；;\n]+[”’\"')）】]*|\.(?=\s)|$)", re.DOTALL)
_LONGEST = 400  # characters: a text without any full stop is checked in parts of this length
_CONTEXT = 60  # characters of what was said before that a part is checked with


@dataclass(frozen=True)
class OutputRule:
    """A kind of thing not to be said; `action` is `unsafe` (the reply ends) or `claim` (the sentence is replaced)."""

    kind: str
    action: str
    rule: Rule


@cache
def output_rules() -> tuple[OutputRule, ...]:
    """outputs.yaml, compiled once."""
    data = yaml.safe_load((files("psyche_jax.serve.crisis") / "outputs.yaml").read_text(encoding="utf-8"))
    terms = {name: join_lines(term) for name, term in data["terms"].items()}
    return tuple(
        OutputRule(kind, entry["action"], read_rule({"name": kind, **entry}, terms))
        for kind, entry in data["kinds"].items()
    )


def check_output(text: str) -> OutputRule | None:
    """The first rule that `text` breaks."""
    text = normalize(text)
    return next((rule for rule in output_rules() if rule.rule.pattern.search(text)), None)


class OutputFilter:
    """Takes a model's reply in pieces and gives back what may be shown, whole sentences at a time.

    `stopped` turns True when something unsafe was said; nothing more comes out then, and generation may end.
    `withheld` counts the sentences that were not shown as they were said.
    """

    def __init__(self, gate: Gate, language: Language | None = None) -> None:
        self.stopped = False
        self.withheld = 0
        self._gate = gate
        self._language = language
        self._waiting = ""
        self._said = ""
        self._claims: set[str] = set()

    @property
    def held_back(self) -> int:
        """How many of the characters it was given are not checked yet."""
        return len(self._waiting)

    def feed(self, piece: str) -> str:
        """Add `piece`; returns the checked text that it completes, often nothing."""
        self._waiting += piece
        shown = ""
        while not self.stopped:
            end = _SENTENCE.match(self._waiting).end()  # type: ignore[union-attr]
            if end == len(self._waiting) < _LONGEST:
                break  # it may go on
            shown += self._checked(end)
        return shown

    def finish(self) -> str:
        """What was held back, checked."""
        return "" if self.stopped or not self._waiting else self._checked(len(self._waiting))

    def _checked(self, end: int) -> str:
        sentence, self._waiting = self._waiting[:end], self._waiting[end:]
        broken = check_output(sentence) or check_output(self._said[-_CONTEXT:] + sentence)
        self._said += sentence
        if broken is None:
            return sentence
        self.withheld += 1
        self._said = ""  # what was withheld is no context for what follows
        self._gate.record("reply", kind=broken.kind)
        self.stopped = broken.action == "unsafe"
        if self.stopped:
            self._waiting = ""
        text = self._gate.withheld(broken.action, self._language or language_of(sentence))
        if not self.stopped and broken.action in self._claims:
            return ""
        self._claims.add(broken.action)
        return text + sentence[len(sentence.rstrip("\n")) :]
