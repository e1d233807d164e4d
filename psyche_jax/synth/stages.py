"""What all stages share: items in, outcomes out in the same order, bounded memory, a folder that is whole or absent."""

import asyncio
import hashlib
import json
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import IO, Any, TypeVar

from psyche_jax.data.dataset import read_values
from psyche_jax.data.records import BaseRecord, Record, checked, fault_of, record_to_json
from psyche_jax.errors import UserError
from psyche_jax.llm.reply import NoReplyError
from psyche_jax.storage.files import new_folder, read_json, read_jsonl, write_json
from psyche_jax.synth.asking import SetAsideError
from psyche_jax.synth.client import Client

Item = TypeVar("Item")
REPORT = "report.json"  # in the folder of a stage; written last
SET_ASIDE = "set_aside.jsonl"
UNANSWERED = "unanswered"  # an item whose call got no reply, so that its stage cannot be made yet


@dataclass
class Outcome:
    """What became of one item. `records` by the file they go to; `set_aside`: (reason, what) pairs."""

    records: list[tuple[str, BaseRecord]] = field(default_factory=list)
    set_aside: list[tuple[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def keep(self, file: str, record: BaseRecord) -> "Outcome":
        """Put a record into `file`; returns the outcome."""
        self.records.append((file, record))
        return self

    def drop(self, reason: str, item: Any) -> "Outcome":
        """Skip an item (a record, or one with what was found out about it); returns the outcome.

        What comes before the first colon of the reason is counted.
        """
        if isinstance(item, tuple):
            item = item[0]
        self.set_aside.append((reason, record_to_json(item) if isinstance(item, BaseRecord) else item))
        return self


async def outcomes(
    items: Iterable[Item], work: Callable[[Item], Awaitable[Outcome]], window: int
) -> AsyncGenerator[Outcome, None]:
    """Work on `window` items at a time; outcomes come in the order of the items, which are read as they are needed.

    An item whose call got no reply has an outcome that counts as UNANSWERED; one that `work` gives up is skipped.
    """

    async def one(item: Item) -> Outcome:
        try:
            return await work(item)
        except SetAsideError as error:
            return Outcome().drop(str(error), item)
        except NoReplyError as error:
            return Outcome(counts=Counter({UNANSWERED: 1})).drop(f"{UNANSWERED}: {error}", None)

    tasks: deque[asyncio.Task[Outcome]] = deque()
    try:
        for item in items:
            tasks.append(asyncio.create_task(one(item)))
            if len(tasks) >= window:
                yield await tasks.popleft()
        while tasks:
            yield await tasks.popleft()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def write_stage(
    folder: Path, fingerprint: str, files: Iterable[str], results: AsyncIterator[Outcome], progress: "Progress"
) -> dict[str, Any]:
    """Write outcomes as JSONL into a new folder, which takes its name when it is whole; returns its report.

    Raises:
      UserError: calls of some items got no reply; started again, only those are asked.
    """
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    last = ""
    with new_folder(folder) as partial, ExitStack() as stack:
        opened: dict[str, IO[str]] = {
            name: stack.enter_context((partial / name).open("w", encoding="utf-8"))
            for name in (*(f"{file}.jsonl" for file in files), SET_ASIDE)
        }
        showing = asyncio.create_task(progress.keep_showing(counts, reasons))
        stack.callback(showing.cancel)

        # Outcomes are written as they come, so that none but those under way are in memory.
        async for outcome in results:
            counts["in"] += 1
            counts.update(outcome.counts)
            for file, record in outcome.records:
                _write_line(opened[f"{file}.jsonl"], record_to_json(record))
                counts[f"out/{file}"] += 1
            for reason, item in outcome.set_aside:
                kind = reason.partition(":")[0]
                last = reason if kind == UNANSWERED else last
                reasons[kind] += 1
                _write_line(opened[SET_ASIDE], {"reason": reason, "item": item})
            progress.show(counts, reasons)

        # Replies are stored: a stage that lacks some is made anew from them, with calls for the others alone.
        if counts[UNANSWERED]:
            raise UserError(
                f"{folder.name}: the calls of {counts[UNANSWERED]} of {counts['in']} items got no reply "
                f"({last.removeprefix(f'{UNANSWERED}: ')}); start again to ask for those"
            )
        report = {
            "stage": folder.name,
            "fingerprint": fingerprint,
            "counts": {**{f"out/{file}": 0 for file in files}, **dict(sorted(counts.items()))},
            "set_aside": dict(sorted(reasons.items())),
        }
        write_json(partial / REPORT, report)
    progress.end(counts, reasons)
    return report


def stage_report(folder: Path) -> dict[str, Any] | None:
    """The report of a whole stage, None if there is none."""
    return read_json(folder / REPORT) if (folder / REPORT).is_file() else None


def digest(*parts: Any) -> str:
    """A hash of files (paths) and values that JSON can hold."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        else:
            total.update(json.dumps(part, ensure_ascii=False, sort_keys=True).encode())
        total.update(b"\0")
    return total.hexdigest()[:32]


def iterate(kind: type[Record], path: Path) -> Iterator[Record]:
    """The records of a file that a stage wrote, one after the other."""
    for where, found in checked(kind, read_jsonl(path)):
        if isinstance(found, ValueError):
            raise UserError(f"{where}: was changed by hand; remove {path.parent} to make it again")
        yield found


def source_place(location: str) -> str:
    """Where a user's source is: as said or, where nothing is there, in the package if it begins with its name."""
    first, *rest = Path(location).parts or ("",)
    shipped = Path(str(files("psyche_jax"))).joinpath(*rest)
    return str(shipped) if first == "psyche_jax" and not Path(location).exists() and shipped.exists() else location


def iterate_source(kind: type[Record], location: str) -> Iterator[Record | Outcome]:
    """The records of a user's JSONL file or data set, one after the other; what became of a faulty one.

    Raises:
      UserError: it cannot be read, or holds records of another kind.
    """
    for where, found in checked(kind, read_values(kind, source_place(location))):
        if isinstance(found, ValueError):
            yield Outcome().drop(f"bad record: {where}: {fault_of(found)}", None)
        else:
            yield found


def _write_line(file: IO[str], value: Mapping[str, Any]) -> None:
    file.write(json.dumps(value, ensure_ascii=False) + "\n")


class Progress:
    """Says how far a stage is: a line that is written over on a terminal, plain lines elsewhere.

    `pause`: seconds between two lines. `expected_cost`: of the whole run.
    """

    def __init__(
        self, verb: str, stage: str, total: int | None, client: Client, expected_cost: float | None = None
    ) -> None:
        self._name = f"{verb}: {stage}"
        self._total = total
        self._expected_cost = expected_cost
        self._client = client
        self._terminal = sys.stderr.isatty()
        self.pause = 0.2 if self._terminal else 5.0
        self._started = self._shown = time.monotonic()
        self._sent = client.sent

    def show(self, counts: Counter[str], set_aside: Counter[str]) -> None:
        """Say it, if it is time."""
        now = time.monotonic()
        if now - self._shown >= self.pause:
            self._shown = now
            print(self._line(counts, set_aside), end="\r" if self._terminal else "\n", file=sys.stderr, flush=True)

    async def keep_showing(self, counts: Counter[str], set_aside: Counter[str]) -> None:
        """Say it also while no item is done: a server may be slow, or not there."""
        while True:
            await asyncio.sleep(self.pause)
            self.show(counts, set_aside)

    def end(self, counts: Counter[str], set_aside: Counter[str]) -> None:
        """Say how it ended."""
        print(self._line(counts, set_aside), file=sys.stderr, flush=True)

    def _line(self, counts: Counter[str], set_aside: Counter[str]) -> str:
        seconds = max(time.monotonic() - self._started, 1e-3)
        files = [key for key in sorted(counts) if key.startswith(("out/", "published/"))]
        kept = ", ".join(f"{counts[key]} {key.partition('/')[2]}" for key in files)
        total = f"/{self._total}" if self._total is not None else ""
        line = f"{self._name}: {counts['in']}{total} items; {kept or 'nothing'} kept, {set_aside.total()} skipped"
        client, sent = self._client, self._client.sent - self._sent
        line += f"; {sent} calls ({sent / seconds:.1f}/s), {client.faults} faults, {client.tokens} tokens"
        of = f" of about {self._expected_cost:.4g}" if self._expected_cost else ""
        line += f", cost {client.cost:.4g}{of}" if client.cost else ""
        line += f"; last fault: {client.last_fault}" if client.last_fault else ""
        width = shutil.get_terminal_size().columns - 1
        return f"{line[:width]:<{width}}" if self._terminal else line
