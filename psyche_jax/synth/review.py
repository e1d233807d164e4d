"""Review by people: what waits, the decisions, and the page on which they are made."""

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import pydantic
from fastapi import FastAPI, HTTPException
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field

from psyche_jax.data.records import Kind, Passage, Question, from_json, record_to_json
from psyche_jax.errors import RowError, UserError
from psyche_jax.serve.private import private_app, serve_private
from psyche_jax.storage.files import parsed_json, read_jsonl, write_text
from psyche_jax.synth.calls import database_errors, writing
from psyche_jax.synth.stages import digest, iterate

Verdict: TypeAlias = Literal["accept", "edit", "reject", "undo"]
STORE = "review.sqlite"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS items (
  id TEXT PRIMARY KEY, number INTEGER NOT NULL, question TEXT NOT NULL, added REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS decisions (
  number INTEGER PRIMARY KEY, item TEXT NOT NULL REFERENCES items (id), verdict TEXT NOT NULL,
  edited TEXT, note TEXT NOT NULL, who TEXT NOT NULL, time REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS of_item ON decisions (item);
"""
_BLIND = "ALTER TABLE decisions ADD COLUMN blind INTEGER NOT NULL DEFAULT 0"  # stores of before lack it


@dataclass(frozen=True)
class Decision:
    """What a reviewer decided. `edited` goes with `edit`; `number` is the place in the history, from 1.

    `blind`: without seeing what others had decided.
    """

    item: str
    verdict: Verdict
    who: Annotated[str, pydantic.Field(min_length=1, max_length=100)]
    edited: Question | None = None
    note: Annotated[str, pydantic.Field(max_length=2000)] = ""
    time: Annotated[float, pydantic.Field(ge=0, lt=253_402_300_800)] = 0.0  # in seconds, before the year 10000
    number: int = 0
    blind: bool = False

    def __post_init__(self) -> None:
        if (self.verdict == "edit") != (self.edited is not None):
            raise ValueError("an edit, and nothing else, comes with the edited question")


@dataclass(frozen=True)
class Item:
    """A question in the queue and the decision that counts, if there is one."""

    question: Question
    decision: Decision | None


class ReviewConflictError(UserError):
    """Someone else decided in the meantime."""


class ReviewStore:
    """Nothing is ever overwritten: the last decision on an item counts; `undo` takes it back, see `standing`."""

    def __init__(self, path: Path) -> None:
        self.path = path / STORE if path.is_dir() else path
        with database_errors(self.path, "reviews"):
            self._database = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.executescript(_SCHEMA)
            if "blind" not in [row[1] for row in self._database.execute("PRAGMA table_info (decisions)")]:
                self._database.execute(_BLIND)
            for _ in self.items():  # so that a damaged one is found at once
                pass

    def add(self, questions: Iterable[Question]) -> int:
        """Put questions into the queue; those that are there stay as they are. Returns how many are new."""
        with writing(self._database, self.path):
            last = self._database.execute("SELECT coalesce(max(number), 0) FROM items").fetchone()[0]
            added = 0
            for question in map(self.as_item, questions):
                row = (question.id, last + added + 1, _dumped(question), time.time())
                added += self._database.execute("INSERT OR IGNORE INTO items VALUES (?, ?, ?, ?)", row).rowcount
        return added

    def as_item(self, question: Question) -> Question:
        """The question, with an id of its own where the item of its id reads otherwise or has another key, or did."""

        def text(one: Question) -> str:
            return digest(one.stem, one.options, one.answer)

        own = f"{question.id}-{text(question)[:8]}"
        sql = "SELECT id, question FROM items WHERE id IN (?, ?)"
        found = dict(self._database.execute(sql, (question.id, own)).fetchall())
        same = question.id not in found or text(_loaded(found[question.id])) == text(question)
        return question if same and own not in found else replace(question, id=own)

    def keep(self, questions: Iterable[Question]) -> None:
        """Take out of the queue what no one decided and is none of these."""
        with writing(self._database, self.path):
            made = {self.as_item(question).id for question in questions}
            undecided = [item.question.id for item in self.items() if item.decision is None]
            rows = [(name,) for name in undecided if name not in made]
            self._database.executemany("DELETE FROM items WHERE id = ?", rows)

    def items(self) -> Iterator[Item]:
        """All items in the order in which they came."""
        decisions = standing(self.history())
        for name, text in self._database.execute("SELECT id, question FROM items ORDER BY number").fetchall():
            yield Item(_loaded(text), decisions.get(name))

    def passages(self, items: Iterable[Item]) -> dict[str, str]:
        """The texts that items were made from, by id, where the store lies in the folder of its run."""
        path = self.path.parent / "clean" / "passages.jsonl"
        wanted = {item.question.meta.get("passage") for item in items}
        found = (passage for passage in iterate(Passage, path) if passage.id in wanted) if path.is_file() else ()
        return {passage.id: passage.text for passage in found}

    def history(self) -> list[Decision]:
        """All decisions in their order."""
        rows = self._database.execute(
            "SELECT item, verdict, who, edited, note, time, number, blind FROM decisions ORDER BY number"
        )
        decisions = []
        for item, verdict, who, text, note, at, number, blind in rows:
            edited = _loaded(text) if text else None
            decisions.append(Decision(item, verdict, who, edited, note, at, number, bool(blind)))
        return decisions

    def decide(self, decision: Decision, after: int | None = None) -> Decision:
        """Store a decision; returns it with its time and number.

        Args:
          after: the number of the last decision on the item that the reviewer saw, 0 for none.

        Raises:
          UserError: the item is not in the queue.
          ReviewConflictError: there is a later decision than `after`.
        """
        with writing(self._database, self.path):
            if self._database.execute("SELECT 1 FROM items WHERE id = ?", (decision.item,)).fetchone() is None:
                raise UserError(f"{self.path}: has no item {decision.item}")
            sql = "SELECT coalesce(max(number), 0) FROM decisions WHERE item = ?"
            last = self._database.execute(sql, (decision.item,)).fetchone()[0]
            if after is not None and last != after:
                raise ReviewConflictError(f"item {decision.item} was decided by someone else in the meantime")
            decided = replace(decision, time=decision.time or time.time())
            edited = _dumped(decided.edited) if decided.edited else None
            row = (decided.item, decided.verdict, edited, decided.note, decided.who, decided.time, decided.blind)
            sql = "INSERT INTO decisions (item, verdict, edited, note, who, time, blind) VALUES (?, ?, ?, ?, ?, ?, ?)"
            number = self._database.execute(sql, row).lastrowid
        return replace(decided, number=number or 0)

    def export(self, path: Path) -> int:
        """Write the queue as JSONL: one object an item, with its decision (or null) to fill in elsewhere.

        Raises:
          UserError: there is such a file already, which may hold decisions, or it cannot be written.
        """
        if path.exists():
            raise UserError(f"{path}: already exists, and may hold decisions (for --import); choose another name")
        lines = [json.dumps(record_to_json(item), ensure_ascii=False) for item in self.items()]
        write_text(path, "".join(f"{line}\n" for line in lines))
        return len(lines)

    def load(self, path: Path, who: str) -> tuple[int, list[str]]:
        """Take the decisions of such a file; those that are stored already are not stored again.

        Returns:
          How many were taken, and a line for each that was not: what is wrong with it, and where.
        """
        known = {(decision.item, decision.verdict, decision.who, decision.time) for decision in self.history()}
        taken = 0
        faults = []
        for where, value in read_jsonl(path):
            try:
                if isinstance(value, RowError):
                    raise value
                if value.get("decision") is None:
                    continue
                given = {"who": who, **value["decision"], "item": value["question"]["id"], "number": 0}
                decision = from_json(Decision, given)
                if (decision.item, decision.verdict, decision.who, decision.time) in known:
                    continue
                stored = self.decide(decision)
                known.add((stored.item, stored.verdict, stored.who, stored.time))
                taken += 1
            except pydantic.ValidationError as error:
                first = error.errors()[0]
                faults.append(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                faults.append(f"{where}: is not a decision ({error!r})")
            except UserError as error:
                faults.append(f"{where}: {error}")
        return taken, faults

    def close(self) -> None:
        """End."""
        self._database.close()


def standing(history: Iterable[Decision]) -> dict[str, Decision]:
    """The decision on each item that counts, by its id: the last one that no `undo` took back.

    Whoever decides blind sees, and takes back, only what they decided themselves.
    """
    made: dict[str, list[Decision]] = {}
    for decision in history:
        stand = made.setdefault(decision.item, [])
        seen = [one for one in stand if not decision.blind or one.who == decision.who]
        if decision.verdict != "undo":
            stand.append(decision)
        elif seen:
            stand.remove(seen[-1])
    return {item: stand[-1] for item, stand in made.items() if stand}


@dataclass(frozen=True)
class Agreement:
    """Two reviewers on the items that both decided, one of them blind. `kappa`: Cohen's; None where it has no value."""

    who: tuple[str, str]
    both: int
    same: int
    kappa: float | None


def agreement(history: Sequence[Decision]) -> list[Agreement]:
    """How each two reviewers agree on accept, edit and reject.

    Whoever sees what another decided only decides what seems wrong: that says nothing, so the later of two decisions
    must be blind. Kappa: J. Cohen, A coefficient of agreement for nominal scales, 1960.
    """
    names = sorted({decision.who for decision in history})
    own = {name: standing(decision for decision in history if decision.who == name) for name in names}
    found = []
    for pair in combinations(names, 2):
        shared = [(own[pair[0]][item], own[pair[1]][item]) for item in own[pair[0]] if item in own[pair[1]]]
        verdicts = [(a.verdict, b.verdict) for a, b in shared if max(a, b, key=lambda one: one.number).blind]
        if not verdicts:
            continue
        both, same = len(verdicts), sum(a == b for a, b in verdicts)
        first, second = (Counter(side) for side in zip(*verdicts, strict=True))
        chance = sum(first[verdict] * second[verdict] for verdict in first) / both**2
        kappa = None if chance == 1 else round((same / both - chance) / (1 - chance), 3)
        found.append(Agreement(pair, both, same, kappa))
    return found


def reviewed(question: Question, decision: Decision) -> Question | None:
    """The question as a decision leaves it, with who and when in its meta; None if it was rejected."""
    if decision.verdict == "reject":
        return None
    when = datetime.fromtimestamp(decision.time, UTC).isoformat(timespec="seconds")
    meta: dict[str, Any] = {"verdict": decision.verdict, "who": decision.who, "when": when}
    if decision.edited is None:
        return replace(question, meta={**question.meta, "review": meta})
    edited = decision.edited
    meta["of"] = question.id
    # A rationale that was not edited too argues for the old key, by the letters of the old options.
    stale = (edited.options, edited.answer) != (question.options, question.answer)
    rationale = None if stale and edited.rationale == question.rationale else edited.rationale
    return replace(edited, rationale=rationale, source=question.source, meta={**question.meta, "review": meta})


def _dumped(question: Question) -> str:
    return json.dumps(record_to_json(question), ensure_ascii=False)


def _loaded(text: str) -> Question:
    return from_json(Question, parsed_json(text))


class Edited(BaseModel):
    """The parts of a question that a reviewer can change; `kind` follows from the answer."""

    model_config = ConfigDict(extra="forbid")
    stem: str
    options: dict[str, str]
    answer: str
    rationale: str | None = None


class Decided(BaseModel):
    """What the page sends. `after`: the number of the decision that it showed, 0 for none."""

    model_config = ConfigDict(extra="forbid")
    item: str
    verdict: Verdict
    edited: Edited | None = None
    note: Annotated[str, Field(max_length=2000)] = ""
    after: int = 0


def review_app(store: ReviewStore, who: str, token: str, hosts: Sequence[str], blind: bool = False) -> FastAPI:
    """The application. The page itself is public; whatever is read or written wants the token.

    `blind`: `who` sees only what they decided themselves.
    """
    app, allowed = private_app("psyche review", token, hosts)

    # What the page reads, and what it writes.
    @app.get("/api/items", dependencies=[allowed])
    def items() -> dict[str, Any]:
        history = store.history()
        last = {decision.item: decision.number for decision in history}
        reviewers = dict.fromkeys(decision.who for decision in history)
        own = {name: standing(one for one in history if one.who == name) for name in reviewers}
        shown, queue = [], list(store.items())
        for item in queue:
            name = item.question.id
            mine = replace(item, decision=own.get(who, {}).get(name)) if blind else item
            by = [] if blind else [record_to_json(decided[name]) for decided in own.values() if name in decided]
            shown.append({**record_to_json(mine), "by": by, "after": last.get(name, 0)})
        pairs = [] if blind else [asdict(pair) for pair in agreement(history)]
        return {"who": who, "blind": blind, "items": shown, "passages": store.passages(queue), "agreement": pairs}

    @app.post("/api/decisions", dependencies=[allowed])
    def decide(decided: Decided) -> dict[str, Any]:
        try:
            edited = _edited(store, decided)
            made = Decision(decided.item, decided.verdict, who, edited, decided.note, blind=blind)
            decision = store.decide(made, None if blind else decided.after)
        except ReviewConflictError as error:
            raise HTTPException(409, str(error)) from None
        except (UserError, ValueError) as error:
            raise HTTPException(422, str(error)) from None
        return record_to_json(decision)

    app.mount("/", StaticFiles(packages=[("psyche_jax.synth", "page")], html=True))
    return app


def _edited(store: ReviewStore, decided: Decided) -> Question | None:
    """The question as it was edited: what was not, is that of the queue."""
    if decided.edited is None:
        return None
    old = next((item.question for item in store.items() if item.question.id == decided.item), None)
    if old is None:
        raise UserError(f"there is no item {decided.item}")
    new = decided.edited
    kind: Kind = "single" if len(new.answer) == 1 else "multi"
    return Question(new.stem, new.options, new.answer, kind, new.rationale or None, old.source, old.meta)


def serve_review(store: ReviewStore, who: str, host: str, port: int, blind: bool = False) -> None:
    """Serve until interrupted."""
    serve_private("review", host, port, lambda token, hosts: review_app(store, who, token, hosts, blind))
