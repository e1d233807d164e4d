"""The gate before generation: a fixed text with the region's hotline, and an event in the log without the text."""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from psyche_jax.errors import UsageError
from psyche_jax.serve.crisis.classify import Assessment, Risk, classify

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

    `log`: a file to which each event is appended as one JSON line, besides the logger. `learned`: the classifier is
    asked where rules find no crisis.
    """

    region: str = "CN"
    log: Path | None = None
    learned: bool = True

    def __post_init__(self) -> None:
        if self.region not in (known := regions()):
            raise UsageError(f"region {self.region!r} has no hotline in the table; known: {', '.join(known)}")

    def reply(self, user_turns: Sequence[str]) -> GateReply | None:
        """The fixed answer to the last of a person's turns, or None where the model may answer.

        Earlier turns only decide whether the first text was given already.
        """
        if not user_turns:
            return None
        assessment = classify(user_turns[-1], self.learned)
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
        """What stands in place of something that the model must not say."""
        return self.fill(_texts()["withheld"][action][language], language)

    def fill(self, text: str, language: Language) -> str:
        """`text` with this region's hotline and emergency number."""
        hotline = _texts()["hotlines"][self.region]
        return text.format(hotline=hotline[language], emergency=hotline["emergency"])

    def record(self, event: str, **what: Any) -> None:
        """Log that something was answered by a fixed text or withheld: when and by what, never what was said."""
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **what})
        _LOG.warning("%s", line)
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


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
    return yaml.safe_load((files("psyche_jax.serve.crisis") / "replies.yaml").read_text(encoding="utf-8"))
