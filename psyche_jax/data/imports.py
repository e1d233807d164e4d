"""What imports of any format share: notes on what is skipped, remarks on dialogues, the data set that is written."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from psyche_jax.data.dataset import Manifest, write_dataset
from psyche_jax.data.records import BaseRecord, Dialogue, Message, SftExample, fault_of, turns_of
from psyche_jax.errors import RowError, UserError

_LABELS = {  # how transcripts call the side that must not speak in a turn of this one
    "assistant": "来访者|求助者|咨询者|当事人|患者|病人|用户|client|patient|help-?seeker|seeker|user|human",
    "user": "咨询师|治疗师|辅导员|支持者|助人者|助手|counsell?or|therapist|supporter|assistant",
}
_OTHER_SIDE = {
    role: re.compile(rf"(?<![A-Za-z])(?:{labels})\s*[】\]*]*\s*[:：]", re.IGNORECASE)
    for role, labels in _LABELS.items()
}
_REPEATED = 12  # characters: as long a turn is not said again by the other side by chance
_SHOWN = 40


@dataclass
class Notes:
    """What is said of a source while it is read: a line for each record skipped; how often each fault was seen."""

    set_aside: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)

    def leave_out(self, where: str, error: ValueError, kind: str = "") -> None:
        """Skip a row; `kind` is what is counted, unless the error says that itself."""
        if not isinstance(error, RowError):
            error = RowError(kind, fault_of(error)) if kind else RowError(fault_of(error))
        self.note(where, error.reason, str(error))

    def note(self, where: str, reason: str, line: str = "") -> None:
        """Skip a row for a reason, which is counted; the line says more, if there is more to say."""
        self.faults[reason] += 1
        self.set_aside.append(f"{where}: {line or reason}")


@dataclass(frozen=True)
class Imported:
    """What came of it: manifests by the data sets' names, a line for each row skipped, and how many for each reason.

    Where there is one data set alone its name is empty. `remarks` say what is to be known of the records.
    """

    manifests: Mapping[str, Manifest]
    set_aside: tuple[str, ...]
    faults: Counter[str]
    remarks: tuple[str, ...]


class NoRecordsError(UserError):
    """A source gives no record; why not is told as of any other import."""

    def __init__(self, message: str, notes: Notes) -> None:
        super().__init__(message)
        self.set_aside, self.faults = tuple(notes.set_aside), +notes.faults


def write_import(
    target: str, records: Iterable[BaseRecord], origin: Mapping[str, Any], notes: Notes, none: Callable[[], str]
) -> Imported:
    """Write records as a new data set, as they come; reading them fills `notes`, `none` says why there are none.

    Raises:
      NoRecordsError: there is no record.
      UserError: the source cannot be read, or the target cannot be written.
    """
    remarks = DialogueRemarks()

    def seen() -> Iterator[BaseRecord]:
        record = None
        for record in records:
            remarks.see(record)
            yield record
        if record is None:
            raise NoRecordsError(none(), notes)

    manifest = write_dataset(target, seen(), origin)
    return Imported({"": manifest}, tuple(notes.set_aside), +notes.faults, remarks.lines())


class DialogueRemarks:
    """Counts over the dialogues that it has seen."""

    def __init__(self) -> None:
        self._mixed: list[str] = []
        self._mixed_turns = 0
        self._first_turns: Counter[str] = Counter()

    def see(self, record: BaseRecord) -> None:
        """Take note of a record, if it is a conversation."""
        if not isinstance(record, Dialogue | SftExample):
            return
        turns = [turn for turn in turns_of(record) if turn.role != "system"]
        self._first_turns[turns[0].content] += 1
        if mixed := sum(_holds_other_side(turns, place) for place in range(len(turns))):
            self._mixed_turns += mixed
            self._mixed.append(record.id)

    def lines(self) -> tuple[str, ...]:
        """What there is to say, a line each."""
        found = []
        if self._mixed:
            found.append(
                f"{self._mixed_turns} turns in {len(self._mixed)} dialogues contain the other speaker's words "
                f"(a label such as 来访者： in a reply, or its turn repeated); the first is {self._mixed[0]}"
            )
        shared = {text: count for text, count in self._first_turns.items() if count > 1}
        if shared:
            text, count = max(shared.items(), key=lambda pair: pair[1])
            shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
            found.append(
                f"{sum(shared.values())} dialogues share their first turn with another, in {len(shared)} groups; "
                f"the most common, {count} times: {' '.join(shown.split())}"
            )
        return tuple(found)


def _holds_other_side(turns: Sequence[Message], place: int) -> bool:
    turn = turns[place]
    if _OTHER_SIDE[turn.role].search(turn.content):
        return True
    before = turns[place - 1].content if place else ""
    return len(before) >= _REPEATED and before in turn.content
