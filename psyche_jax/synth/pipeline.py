"""The stages of synthesis in order, what each depends on, and the control of its questions."""

import asyncio
import contextlib
import dataclasses
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import Field

from psyche_jax.config_files import config_to_dict, dump_yaml
from psyche_jax.data.dataset import is_dataset, open_dataset
from psyche_jax.data.records import Dialogue, Passage, Question, question_text
from psyche_jax.errors import UsageError, UserError
from psyche_jax.storage.files import write_text
from psyche_jax.storage.locks import locked
from psyche_jax.synth.asking import Asker, Prompts, SetAsideError, read_json
from psyche_jax.synth.calls import CallStore
from psyche_jax.synth.clean import Cleaner
from psyche_jax.synth.client import Client, names_of
from psyche_jax.synth.config import ControlSection, LlmSection, SelectConfig, StageName, SynthConfig
from psyche_jax.synth.duplicates import Duplicates, Twin
from psyche_jax.synth.publish import check_place, publish
from psyche_jax.synth.records import rewrite, select, write_questions, write_rationale
from psyche_jax.synth.review import Decision, ReviewStore, reviewed
from psyche_jax.synth.stages import (
    Outcome,
    Progress,
    digest,
    iterate,
    iterate_source,
    outcomes,
    source_place,
    stage_report,
    write_stage,
)

Score: TypeAlias = Annotated[int, Field(ge=1, le=5, strict=True)]
CRITERIA = ("correct", "clear", "options", "worth")


@dataclass(frozen=True)
class Vote:
    """What one LLM says of a question, once."""

    correct: Score
    clear: Score
    options: Score
    worth: Score
    reason: str = ""


@dataclass(frozen=True)
class Compared:
    """What an LLM says of two questions."""

    same: Annotated[bool, Field(strict=True)]
    reason: str = ""


def with_twins(questions: Iterable[Question], section: ControlSection) -> Iterator[tuple[Question, Twin | None]]:
    """Each question with the earlier one that it repeats."""
    with contextlib.closing(Duplicates(section)) as duplicates:
        for question in questions:
            yield question, duplicates.find(question)


async def control(item: tuple[Question, Twin | None], asker: Asker, section: ControlSection) -> Outcome:
    """Set duplicates aside; let the LLMs vote; keep, drop, or leave to a person."""
    question, twin = item
    outcome = Outcome()
    if twin is not None and twin.doubtful is not None:
        same = await _same(question, twin.doubtful, asker, section)
        outcome.counts["twins/asked about"] += 1
        outcome.counts[f"twins/{'no usable reply' if same is None else 'the same' if same else 'not the same'}"] += 1
        twin = Twin(twin.id) if same else None
    if twin is not None and not twin.conflict:
        outcome.drop(f"{'exact' if twin.exact else 'near'} duplicate: of {twin.id}", question)
        return outcome
    flags = [f"another key than {twin.id}, which reads the same"] if twin is not None else []
    votes = [
        (llm, await asker.ask(llm, "filter", _values(question), read_json(Vote), sample))
        for llm in section.llms
        for sample in range(section.votes)
    ]
    if votes:
        meta = dict(question.meta)
        meta["scores"] = {name: round(fmean(getattr(vote, name) for _, vote in votes), 3) for name in CRITERIA}
        meta["llms"] = {**meta.get("llms", {}), "filter": list(section.llms)}
        meta["prompts"] = {**meta.get("prompts", {}), "filter": asker.prompts["filter"].id}
        question = replace(question, meta=meta)
        ayes = sum(min(getattr(vote, name) for name in CRITERIA) >= section.least_score for _, vote in votes)
        against = next((vote.reason for _, vote in votes if min(_scores(vote)) < section.least_score), "")
        if 2 * ayes <= len(votes):
            outcome.drop(f"filter: {ayes} of {len(votes)} votes for it; {against}", question)
            return outcome
        if ayes < len(votes):
            flags.append(f"{ayes} of {len(votes)} votes for it; {against}")
    if section.review == "all" or (flags and section.review == "flagged"):
        outcome.keep("review", replace(question, meta={**question.meta, "flags": flags}))
    elif twin is not None:
        outcome.drop(f"conflicting key: {flags[0]}", question)
    else:
        outcome.keep("questions", question)
    return outcome


async def _same(question: Question, other: Question, asker: Asker, section: ControlSection) -> bool | None:
    """Whether an LLM takes both for the same question; None if it does not say."""
    assert section.twins is not None
    values = {f"{key}_{place}": value for place, one in enumerate((other, question), start=1)
              for key, value in _values(one).items()}  # fmt: skip
    try:
        return (await asker.ask(section.twins, "twins", values, read_json(Compared))).same
    except SetAsideError:
        return None


def _scores(vote: Vote) -> list[int]:
    return [getattr(vote, name) for name in CRITERIA]


def _values(question: Question) -> dict[str, Any]:
    return {"question": question_text(question), "answer": question.answer}


STAGES: tuple[StageName, ...] = ("clean", "questions", "control", "rationales", "dialogues", "selection", "publish")
CALLS = "calls.sqlite"
WINDOW = 4  # items under way for each call that may be under way: what bounds the memory of a stage
Item = TypeVar("Item")


def run_synth(config: SynthConfig, stage: StageName | None = None) -> dict[str, Any]:
    """All stages, or one whose predecessors are there. What is done and unchanged is not done again.

    Returns:
      The reports of the stages by name.

    Raises:
      UserError: as the stages do; a run that ends so goes on when it is started again.
    """
    if stage in (None, "publish"):
        check_place(config.out)
    with _Workshop(config, "synth") as shop:
        for name in STAGES if stage is None else (stage,):
            shop.do(name, _synth_stage(shop, config, name))
        return shop.reports


def run_select(config: SelectConfig) -> dict[str, Any]:
    """Selection and publication of questions from files; returns the reports of the stages by name."""
    check_place(config.out)
    with _Workshop(config, "select") as shop:
        states = [_state_of(location) for location in config.questions]
        shop.do("selection", _selection(shop, states, shop.decided(_sources(config))))
        shop.do("publish", _publication(shop, ["selection"]))
        return shop.reports


@dataclasses.dataclass(frozen=True)
class _Stage:
    """What a stage depends on, the files it writes, and how: `run` gives outcomes, or is done with `publish`."""

    depends_on: tuple[Any, ...]
    files: tuple[str, ...]
    run: Callable[[], AsyncGenerator[Outcome, None]]
    total: int | None = None
    after: Callable[[Path], None] = lambda folder: None


class _Workshop:
    """The folder of a run with its stores, and the reports of the stages as they are made."""

    def __init__(self, config: SynthConfig | SelectConfig, verb: str) -> None:
        self.config = config
        self.verb = verb
        self.folder = Path(config.run.dir)
        self.reports: dict[str, Any] = {}
        self.prompts = Prompts(config.prompts)
        self._names = names_of(config.llms)
        self._stack = ExitStack()
        self.asker: Asker | None = None

    def __enter__(self) -> "_Workshop":
        with ExitStack() as stack:
            self.folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(self.folder))
            for left in self.folder.glob(".*.partial"):
                shutil.rmtree(left, ignore_errors=True)
            write_text(self.folder / "config.yaml", dump_yaml(config_to_dict(self.config)))
            self.store = CallStore(self.folder / CALLS)
            stack.callback(self.store.close)
            self.review = ReviewStore(self.folder)
            stack.callback(self.review.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def do(self, name: str, stage: _Stage) -> None:
        """Make a stage's folder, unless it is there and depends on the same."""
        folder = self.folder / name
        fingerprint = digest(*stage.depends_on)
        report = stage_report(folder)
        if report is None or report["fingerprint"] != fingerprint:
            if folder.exists():
                shutil.rmtree(folder)
            report = asyncio.run(self._run(name, stage, fingerprint))
        self.reports[name] = report
        stage.after(folder)

    async def _run(self, name: str, stage: _Stage, fingerprint: str) -> dict[str, Any]:
        client = Client(self.config.llms, self.config.calls, self.config.budget, self.store, self._names)
        self.asker = Asker(client, self.prompts, self.config.calls.reasks, self.config.calls.give_up_after)
        try:
            progress = Progress(self.verb, name, stage.total, self.asker)
            async with contextlib.aclosing(stage.run()) as results:
                return await write_stage(self.folder / name, fingerprint, stage.files, results, progress)
        except UserError:
            await client.finish()  # what is in flight is paid for
            raise
        finally:
            await client.close()

    def over(
        self, items: Iterable[Item], work: Callable[[Item, Asker], Awaitable[Outcome]]
    ) -> Callable[[], AsyncGenerator[Outcome, None]]:
        """A stage's `run` that asks LLMs about each item; one that gets nothing of use ends in an error."""

        async def run() -> AsyncGenerator[Outcome, None]:
            assert self.asker is not None
            window = WINDOW * self.config.calls.concurrency
            kept = False
            async with contextlib.aclosing(outcomes(items, partial(_second, work, self.asker), window)) as results:
                async for outcome in results:
                    kept = kept or bool(outcome.records)
                    yield outcome
            await self.asker.check(kept)

        return run

    def input(self, stage: str, file: str) -> Path:
        """A file that an earlier stage made.

        Raises:
          UsageError: that stage was not run.
        """
        path = self.folder / stage / f"{file}.jsonl"
        if stage_report(self.folder / stage) is None:
            raise UsageError(f"{self.folder}: stage {stage} is missing; run it first, or all without --stage")
        return path

    def asked(self, prompts: Iterable[str], llms: Iterable[str]) -> list[Any]:
        """What replies depend on: the prompts' versions, the LLMs as they are asked, and the rule of asking again."""
        by_name = {llm.name: llm for llm in self.config.llms}
        sampled = [(by_name[name].name, by_name[name].model, by_name[name].temperature, by_name[name].top_p,
                    by_name[name].max_tokens, *_left_out(by_name[name])) for name in llms]  # fmt: skip
        return [[self.prompts[name].id for name in (*prompts, "again")], sampled, self.config.calls.reasks]

    def decided(self, questions: Iterable[Question | Outcome]) -> Iterator[Question | Outcome]:
        """Questions as the reviewers left them; what became of those rejected, and of what was set aside before."""
        decisions = {item.question.id: item.decision for item in self.review.items()}
        for question in questions:
            found = decisions.get(question.id) if isinstance(question, Question) else None
            if isinstance(question, Outcome) or found is None:
                yield question
            else:
                yield reviewed(question, found) or _rejected(question, found)

    def decisions(self) -> list[Any]:
        """What of the reviews a stage depends on."""
        return [[d.number, d.item, d.verdict] for d in self.review.history()]


def _left_out(llm: LlmSection) -> list[str]:
    return sorted(name for name, known in llm.parameters.items() if known is None)


async def _second(work: Callable[[Item, Asker], Awaitable[Outcome]], asker: Asker, item: Item) -> Outcome:
    return await work(item, asker)


def _synth_stage(shop: _Workshop, config: SynthConfig, name: StageName) -> _Stage:
    if name == "clean":
        sources = (*config.sources.passages, *config.sources.dialogues)
        depends = (dataclasses.asdict(config.clean), *map(_state_of, sources))
        return _Stage(depends, ("passages", "dialogues"), partial(_clean, config))
    if name == "questions":
        source = shop.input("clean", "passages")
        section = config.questions
        depends = (dataclasses.asdict(section), *shop.asked(["questions"], [section.llm]), source)
        work = partial(_write_questions, section=section)
        return _Stage(depends, ("questions",), shop.over(iterate(Passage, source), work), _lines(source))
    if name == "control":
        source = shop.input("questions", "questions")
        checks = config.control
        asked = shop.asked(["filter"], checks.llms)
        if checks.twins:
            asked += shop.asked(["twins"], [checks.twins])
        depends = (dataclasses.asdict(checks), *asked, source)
        twins = with_twins(iterate(Question, source), checks)
        run = shop.over(twins, lambda item, asker: control(item, asker, checks))
        return _Stage(depends, ("questions", "review"), run, _lines(source), partial(_queue, shop))
    if name == "rationales":
        inputs = [shop.input("control", file) for file in ("questions", "review")]
        rounds = config.rationales
        llms = [rounds.llm, *([rounds.judge] if rounds.judge else [])]
        asked = shop.asked(["instruction", "rationale", "improve", "judge"], llms)
        depends = (dataclasses.asdict(rounds), *asked, *inputs, shop.decisions())
        items = shop.decided(question for path in inputs for question in iterate(Question, path))
        run = shop.over(items, lambda item, asker: _rationale(item, asker, config))
        return _Stage(depends, ("questions",), run, sum(map(_lines, inputs)))
    if name == "dialogues":
        source = shop.input("clean", "dialogues")
        warmth = config.dialogues
        asked = shop.asked(["dialogue", "check"], [warmth.llm, warmth.checker])
        run = shop.over(iterate(Dialogue, source), lambda item, asker: rewrite(item, asker, warmth))
        return _Stage((dataclasses.asdict(warmth), *asked, source), ("dialogues", "crisis"), run, _lines(source))
    if name == "selection":
        source = shop.input("rationales", "questions")
        return _selection(shop, [source], iterate(Question, source), _lines(source))
    return _publication(shop, ["clean", "questions", "control", "rationales", "dialogues", "selection"])


def _selection(
    shop: _Workshop, states: list[Any], questions: Iterable[Question | Outcome], total: int | None = None
) -> _Stage:
    section = shop.config.selection
    asked = shop.asked(["answer"], section.llms)
    depends = (dataclasses.asdict(section), *asked, *states, shop.decisions())

    async def work(item: Question | Outcome, asker: Asker) -> Outcome:
        return item if isinstance(item, Outcome) else await select(item, asker, section)

    return _Stage(depends, ("sft", "rl", "review"), shop.over(questions, work), total, partial(_queue, shop))


def _publication(shop: _Workshop, stages: list[str]) -> _Stage:
    for name in stages:
        shop.input(name, "")
    reports = [stage_report(shop.folder / name) for name in stages]
    fingerprint = digest([report["fingerprint"] for report in reports if report is not None])
    config = config_to_dict(shop.config)

    async def run() -> AsyncGenerator[Outcome, None]:
        dialogues = shop.folder / "dialogues" if "dialogues" in stages else None
        made = [report for report in reports if report is not None]
        selection = shop.folder / "selection"
        counts = publish(shop.config.out, selection, dialogues, made, shop.store.usage(), config, fingerprint)
        outcome = Outcome()
        outcome.counts.update({f"published/{name}": count for name, count in counts.items()})
        yield outcome

    return _Stage((shop.config.out, fingerprint), (), run)


async def _clean(config: SynthConfig) -> AsyncGenerator[Outcome, None]:
    cleaner = Cleaner(config.clean)
    for location in config.sources.passages:
        for passage in iterate_source(Passage, location):
            yield _faulty(passage) if isinstance(passage, str) else cleaner.passage(passage)
    for location in config.sources.dialogues:
        for dialogue in iterate_source(Dialogue, location):
            yield _faulty(dialogue) if isinstance(dialogue, str) else cleaner.dialogue(dialogue)


async def _write_questions(passage: Passage, asker: Asker, section: Any) -> Outcome:
    return await write_questions(passage, asker, section)


async def _rationale(item: Question | Outcome, asker: Asker, config: SynthConfig) -> Outcome:
    if isinstance(item, Outcome):
        return item
    if "flags" in item.meta and "review" not in item.meta:
        outcome = Outcome()
        outcome.drop("waits for review: psyche review", item)
        return outcome
    return await write_rationale(item, asker, config.rationales)


def _faulty(line: str) -> Outcome:
    outcome = Outcome()
    outcome.drop(f"bad record: {line}", None)
    return outcome


def _rejected(question: Question, decision: Decision) -> Outcome:
    outcome = Outcome()
    outcome.drop(f"rejected in review: by {decision.who}; {decision.note}", question)
    return outcome


def _queue(shop: _Workshop, folder: Path) -> None:
    """Put what a stage leaves to people into their queue."""
    shop.review.add(iterate(Question, folder / "review.jsonl"))


def _sources(config: SelectConfig) -> Iterator[Question | Outcome]:
    """Each question once. Reviews are kept by id, so no two questions may have the same."""
    seen: dict[str, str] = {}
    contents: set[str] = set()
    for location in config.questions:
        for question in iterate_source(Question, location):
            if isinstance(question, str):
                yield _faulty(question)
                continue
            content = digest(question.stem, question.options)
            if content in contents:
                outcome = Outcome()
                outcome.drop("duplicate: the question was there before", question)
                yield outcome
            elif seen.setdefault(question.id, content) != content:
                yield _faulty(f"{location}: the id {question.id} is that of another question before it")
            else:
                contents.add(content)
                yield question


def _state_of(location: str) -> Any:
    """What a user's data is known by: a file by its content, a data set by its manifest."""
    location = source_place(location)
    if is_dataset(location):
        return dataclasses.asdict(open_dataset(location).manifest)
    if not Path(location).is_file():
        raise UserError(f"{location}: there is no such file")
    return Path(location)


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(partial(file.read, 1 << 20), b""))
