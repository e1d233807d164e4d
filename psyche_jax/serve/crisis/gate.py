"""The crisis gate: a fixed reply before generation, and a filter on what the model says."""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

from psyche_jax.errors import UsageError
from psyche_jax.serve.crisis.classify import Assessment, Risk, Rule, classify, normalize, read_rules, read_yaml

_LOG = logging.getLogger("psyche_jax.crisis")
Language = Literal["zh", "en"]
_EARLIER = 20_000  # characters of earlier turns that are looked at


@dataclass(frozen=True)
class GateReply:
    """A fixed answer, given in place of the model's, and why."""

    text: str
    assessment: Assessment


@dataclass(frozen=True)
class Gate:
    """The gate of one region.

    `log`: a file to which each event is appended as one JSON line, besides the logger. `learned`: with the classifier.
    """

    region: str = "CN"
    log: Path | None = None
    learned: bool = True

    def __post_init__(self) -> None:
        if self.region not in (known := regions()):
            raise UsageError(f"region {self.region!r} has no hotline in the table; known: {', '.join(known)}")

    def reply(self, user_turns: Sequence[str], opinion: Assessment | None = None) -> GateReply | None:
        """The fixed answer to the last of a person's turns, or None where the model may answer.

        Earlier turns only decide whether the first text was given already. `opinion`: of which class the last turn is,
        where somebody else was asked.
        """
        if not user_turns:
            return None
        assessment = opinion or classify(user_turns[-1], self.learned)
        if assessment.risk is Risk.NONE:
            return None
        self.record("message", risk=assessment.risk, rules=assessment.rules)
        language = language_of(user_turns[-1])
        again = assessment.risk is not Risk.EXPLORATION and any(
            classify(turn, self.learned).risk.severity > Risk.EXPLORATION.severity for turn in _latest(user_turns[:-1])
        )
        texts = _texts()
        text = (texts["again"] if again else texts["replies"][assessment.risk.value])[language]
        return GateReply(self.fill(text, language), assessment)

    def notice(self, language: Language) -> str:
        """That this is an AI and no clinician, with the hotline."""
        return self.fill(_texts()["notice"][language], language)

    def withheld(self, action: str, language: Language) -> str:
        """What replaces something that the model must not say."""
        return self.fill(_texts()["withheld"][action][language], language)

    def fill(self, text: str, language: Language) -> str:
        """`text` with this region's hotline and emergency numbers."""
        hotline = _texts()["hotlines"][self.region]
        numbers = hotline["emergency"]  # one for all, or each by what it is for
        if isinstance(numbers, str):
            numbers = {"medical": numbers, "police": numbers, "emergency": numbers}
        else:
            numbers = {**numbers, "emergency": _texts()["apart"][language].format(**numbers)}
        return text.format(hotline=hotline[language], **numbers)

    def record(self, event: str, **what: Any) -> None:
        """Log that something was answered by a fixed text or withheld: when and by what, never what was said."""
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **what})
        _LOG.warning("%s", line)
        if self.log is None:
            return
        try:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:  # a full disk, say, keeps nobody from the answer
            logging.getLogger("psyche_jax.serve").error("%s: %s; an event is missing there", self.log, error.strerror)


def _latest(turns: Sequence[str]) -> Iterator[str]:
    """The last turns, the latest first, as far as they are quickly read."""
    left = _EARLIER
    for turn in reversed(turns):
        left -= len(turn)
        if left < 0:
            return
        yield turn


def language_of(text: str) -> Language:
    """`zh` if there is a Chinese character in it, else `en`."""
    return "zh" if re.search(r"[\u3400-\u9fff]", text) else "en"


def regions() -> dict[str, str]:
    """Codes of the regions with a hotline, and the hotline in English."""
    return {code: hotline["en"] for code, hotline in _texts()["hotlines"].items()}


@cache
def _texts() -> dict[str, Any]:
    return read_yaml("replies.yaml")


_SENTENCE = re.compile(r".*?(?:[。！？!?；;\n]+[”’\"')）】]*|\.(?=\s)|$)", re.DOTALL)
_LONGEST = 400  # characters: a text without any full stop is checked in parts of this length
_CONTEXT = 60  # characters of what was said before that a part is checked with


@cache
def output_rules() -> tuple[Rule, ...]:
    """outputs.yaml, compiled once: a rule for each kind of thing not to be said."""
    data = read_yaml("outputs.yaml")
    return read_rules(({"name": kind, **entry} for kind, entry in data["kinds"].items()), data["terms"])


def check_output(text: str) -> Rule | None:
    """The first rule that `text` breaks."""
    text = normalize(text)
    return next((rule for rule in output_rules() if rule.pattern.search(text)), None)


class OutputFilter:
    """Takes a model's reply in pieces and gives back what may be shown, whole sentences at a time.

    `language`: of what is said in place of the model's words. `stopped` turns True when something unsafe was said;
    nothing more comes out then, and generation may end. `withheld` counts the sentences that were not shown as they
    were said.
    """

    def __init__(self, gate: Gate, language: Language) -> None:
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
                break  # more of it may follow
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
        self._said = ""  # what was withheld must not count against what follows
        self._gate.record("reply", kind=broken.name)
        self.stopped = broken.action == "unsafe"
        if self.stopped:
            self._waiting = ""
        text = self._gate.withheld(broken.action, self._language)
        if not self.stopped and broken.action in self._claims:
            return ""
        self._claims.add(broken.action)
        return text + sentence[len(sentence.rstrip("\n")) :]
