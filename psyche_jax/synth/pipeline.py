"""The stages of synthesis in order, what each depends on, and which are done already."""

import asyncio
import shutil
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from psyche_jax.config_files import config_to_dict, dump_yaml
from psyche_jax.data.dataset import is_dataset, open_dataset
from psyche_jax.data.records import Dialogue, Passage, Question
from psyche_jax.errors import UsageError, UserError
from psyche_jax.llm.server import Names
from psyche_jax.storage.files import make_folder, write_text
from psyche_jax.storage.locks import locked
from psyche_jax.synth.asking import Asker, Prompts
from psyche_jax.synth.calls import CallStore
from psyche_jax.synth.clean import Cleaner
from psyche_jax.synth.client import Client, check_keys
from psyche_jax.synth.config import SelectConfig, SynthConfig
from psyche_jax.synth.publish import check_place, publish
from psyche_jax.synth.review import ReviewStore, reviewed
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
from psyche_jax.synth.steps import control, rewrite, select, with_twins, write_questions, write_rationale

StageName: TypeAlias = Literal["clean", "questions", "control", "rationales", "dialogues", "selection", "publish"]
STAGES: tuple[StageName, ...] = get_args(StageName)
CALLS = "calls.sqlite"
WINDOW = 4  # items under way for each call that may be under way: what bounds the memory of a stage


def run_synth(config: SynthConfig, stage: StageName | None = None) -> dict[str, Any]:
    """All stages, or one whose predecessors are there. Stages that are complete and unchanged are skipped.

    Returns:
      The reports of the stages by name.

    Raises:
      UserError: as the stages do; a run that ends so resumes when it is started again.
    """
    if stage in (None, "publish"):
        check_place(config.out, config.run.dir, config.run.seed)
    with _open_workshop(config, "synth") as shop:
        for name in STAGES if stage is None else (stage,):
            shop.do(name, _synth_stage(shop, config, name))
            if name == "clean" and stage is None:
                shop.expected = partial(_synth_calls, shop, config)
    return shop.reports


def run_select(config: SelectConfig) -> dict[str, Any]:
    """Selection and publication of questions from files; returns the reports of the stages by name."""
    check_place(config.out, config.run.dir, config.run.seed)
    with _open_workshop(config, "select") as shop:
        states = [_state_of(location) for location in config.questions]
        shop.expected = partial(_select_calls, config)
        shop.do("selection", _selection(shop, states, shop.decided(_sources(config))))
        shop.do("publish", _publication(shop, ["selection"]))
    return shop.reports


# Tokens of a request and of its reply, a character being one: guesses, until calls of this run say better. To
# `questions` comes the passage.
_GUESSED = {
    "questions": (1200, 1000), "filter": (900, 80), "twins": (1100, 60), "rationale": (600, 400), "improve": (1100, 80),
    "judge": (1500, 60), "dialogue": (900, 300), "check": (1100, 60), "answer": (500, 400),
}  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """So many calls of one prompt to one LLM, at most, with `longer` tokens beside what is guessed of each."""

    llm: str
    prompt: str
    calls: int
    longer: int = 0


@dataclass(frozen=True)
class _Stage:
    """What a stage depends on, its items, how one becomes an outcome (unless it is one already), what files it writes.

    `total`: how many items there are, if that is known. `asks`: whether LLMs are asked about them. `after` is called
    with the stage's folder, even if it was already complete.
    """

    depends_on: tuple[Any, ...]
    items: Iterable[Any]
    work: Callable[[Any, Asker], Awaitable[Outcome]]
    files: tuple[str, ...]
    total: int | None = None
    asks: bool = True
    after: Callable[[Path], None] = lambda folder: None


@contextmanager
def _open_workshop(config: SynthConfig | SelectConfig, verb: str) -> Iterator["_Workshop"]:
    """The folder of a run, locked, with its config written and its stores open; at the end what waits is said."""
    folder = Path(config.run.dir)
    if not folder.exists():
        check_keys(config.llms)  # before a folder is made
    prompts = Prompts(config.prompts)
    make_folder(folder, "run.dir")
    with locked(folder):
        for left in folder.glob(".*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        write_text(folder / "config.yaml", dump_yaml(config_to_dict(config)))
        with closing(CallStore(folder / CALLS)) as store, closing(ReviewStore(folder)) as review:
            shop = _Workshop(config, verb, prompts, store, review)
            yield shop
            shop.say_what_waits()


class _Workshop:
    """The folder of a run with its stores, and the reports of the stages as they are made."""

    def __init__(
        self, config: SynthConfig | SelectConfig, verb: str, prompts: Prompts, store: CallStore, review: ReviewStore
    ) -> None:
        self.config, self.verb, self.prompts, self.store, self.review = config, verb, prompts, store, review
        self.folder = Path(config.run.dir)
        self.llms = {llm.name: llm for llm in config.llms}
        self.reports: dict[str, Any] = {}
        self._names: dict[str, Names] = {}
        self.expected: Callable[[], list[Expected]] = list  # what this run will ask
        self.cost: float | None = None  # of all of it, as far as prices are known

    def forecast(self) -> None:
        """Say on stderr what is still to be asked, and what that costs; before the first call of this start."""
        if not (expected := self.expected()):
            return
        self.expected = list
        usage = self.store.usage()
        by_prompt: Counter[str] = Counter()
        left, tokens, to_come = 0, 0.0, 0.0
        for one in expected:
            made = [row for row in usage if row.prompt.partition("@")[0] == one.prompt]
            asked, said = (float(guess) for guess in _GUESSED[one.prompt])
            asked += one.longer
            if count := sum(row.calls for row in made):
                asked = sum(row.prompt_tokens for row in made) / count
                said = sum(row.completion_tokens for row in made) / count
            missing = max(one.calls - sum(row.calls for row in made if row.llm == one.llm), 0)
            by_prompt[one.prompt] += one.calls
            left += missing
            tokens += missing * (asked + said)
            to_come += missing * self.llms[one.llm].cost(asked, said)
        # What was spent before counts in the budget, and in the cost that progress shows.
        priced = [(self.llms[row.llm], row) for row in usage if row.llm in self.llms]
        spent = sum(llm.cost(row.prompt_tokens, row.completion_tokens) for llm, row in priced)
        used = sum(row.prompt_tokens + row.completion_tokens for row in usage)
        self.cost = spent + to_come or None
        line = f"{self.verb}: forecast: at most {by_prompt.total()} calls ("
        line += ", ".join(f"{prompt} {count}" for prompt, count in by_prompt.items()) + ")"
        line += f", {by_prompt.total() - left} of them already made" if left < by_prompt.total() else ""
        line += f"; about {tokens:,.0f} tokens to come" + ("" if usage else " (a guess)")
        line += f", which cost {to_come:.4g}" if self.cost else "; the llms have no prices, so no cost"
        budget = self.config.budget
        for name, limit, total in (("tokens", budget.tokens, used + tokens), ("cost", budget.cost, spent + to_come)):
            line += f"; budget.{name} of {limit:g} may not suffice" if limit is not None and total > limit else ""
        print(line, file=sys.stderr, flush=True)

    def say_what_waits(self) -> None:
        """Say on stderr what people are to decide; what no stage makes any more waits no longer."""
        made = (self.folder / stage / "review.jsonl" for stage in ("control", "selection"))
        self.review.keep(question for path in made if path.is_file() for question in iterate(Question, path))
        if waiting := sum(item.decision is None for item in self.review.items()):
            questions = "1 question waits" if waiting == 1 else f"{waiting} questions wait"
            print(
                f"{self.verb}: {questions} for review: psyche review {self.folder} --who NAME; "
                "then start again, with another out",
                file=sys.stderr,
            )

    def queue(self, folder: Path) -> None:
        """Add what a stage leaves to people to the review queue."""
        self.review.add(iterate(Question, folder / "review.jsonl"))

    def do(self, name: str, stage: _Stage) -> None:
        """Make a stage's folder, unless it is there and depends on the same."""
        folder = self.folder / name
        fingerprint = digest(*stage.depends_on)
        report = stage_report(folder)
        if report is None or report["fingerprint"] != fingerprint:
            if folder.exists():
                shutil.rmtree(folder)
            if stage.asks:
                self.forecast()
            report = asyncio.run(self._run(name, stage, fingerprint))
        self.reports[name] = report
        stage.after(folder)

    async def _run(self, name: str, stage: _Stage, fingerprint: str) -> dict[str, Any]:
        """Make a stage; one that asks LLMs fails where what one of them says is never of use and nothing is kept."""
        calls = self.config.calls
        client = Client(self.config.llms, calls, self.config.budget, self.store, self._names)
        asker = Asker(client, self.prompts, calls)

        async def work(item: Any) -> Outcome:
            return item if isinstance(item, Outcome) else await stage.work(item, asker)

        async def results() -> AsyncGenerator[Outcome, None]:
            kept = False
            async with aclosing(outcomes(stage.items, work, WINDOW * calls.concurrency)) as made:
                async for outcome in made:
                    kept = kept or bool(outcome.records)
                    yield outcome
            asker.check(kept)

        try:
            progress = Progress(self.verb, name, stage.total, client, self.cost)
            async with aclosing(results()) as found:
                return await write_stage(self.folder / name, fingerprint, stage.files, found, progress)
        except UserError:
            await client.finish()  # what is in flight is paid for
            raise
        finally:
            await client.close()

    def input(self, stage: str, file: str) -> Path:
        """A file that an earlier stage made.

        Raises:
          UsageError: that stage was not run.
        """
        self.report(stage)
        return self.folder / stage / f"{file}.jsonl"

    def report(self, stage: str) -> dict[str, Any]:
        """The report of an earlier stage; raises as `input`."""
        report = stage_report(self.folder / stage)
        if report is None:
            raise UsageError(f"{self.folder}: stage {stage} is missing; run it first, or all without --stage")
        return report

    def asked(self, prompts: Iterable[str], llms: Iterable[str]) -> list[Any]:
        """What replies depend on: the prompts' versions, the LLMs as they are asked, and the rule of asking again."""
        sampled = []
        for llm in (self.llms[name] for name in llms):
            left_out = sorted(name for name, known in llm.parameters.items() if known is None)
            sampled.append((llm.name, llm.model, llm.temperature, llm.top_p, llm.max_tokens, *left_out))
        return [[self.prompts[name].id for name in (*prompts, "again")], sampled, self.config.calls.reasks]

    def decided(self, questions: Iterable[Question | Outcome]) -> Iterator[Question | Outcome]:
        """Questions as the reviewers left them; what became of those rejected, and of what was skipped before.

        Of two that read the same but for their key, the one that a reviewer kept takes the place of the other.
        """
        decided = {item.question.id: (item.question, item.decision) for item in self.review.items() if item.decision}
        kept = {one.meta.get("conflicts_with"): (one.id, by) for one, by in decided.values() if by.verdict != "reject"}
        for question in questions:
            if isinstance(question, Outcome):
                yield question
                continue
            name, by = kept.get(question.id, ("", None))
            question = self.review.as_item(question)
            if by is not None and name != question.id:
                yield Outcome().drop(f"conflicting key: {by.who} kept that of {name}", question)
            elif question.id not in decided:
                yield question
            else:
                _, found = decided[question.id]
                rejected = f"rejected in review: by {found.who}; {found.note}"
                yield reviewed(question, found) or Outcome().drop(rejected, question)

    def decisions(self) -> list[Any]:
        """The decisions of reviewers, as what a stage depends on."""
        return [[d.number, d.item, d.verdict] for d in self.review.history()]


def _select_calls(config: SelectConfig) -> list[Expected]:
    count = sum(isinstance(found, Question) for found in _sources(config))
    return [Expected(llm, "answer", config.selection.samples * count) for llm in config.selection.llms]


def _synth_calls(shop: _Workshop, config: SynthConfig) -> list[Expected]:
    """What the stages after `clean` ask if those that were not run yet skip nothing, and nothing is asked again."""
    passages, dialogues = (_lines(shop.input("clean", file)) for file in ("passages", "dialogues"))
    size = shop.input("clean", "passages").stat().st_size // 3 // max(passages, 1)  # a character has three bytes

    def known(stage: str, files: Sequence[str], otherwise: int) -> int:
        done = stage_report(shop.folder / stage) is not None
        return sum(_lines(shop.input(stage, file)) for file in files) if done else otherwise

    written = known("questions", ["questions"], passages * (config.questions.single + config.questions.multi))
    count = known("control", ["questions", "review"], written)
    explained = known("rationales", ["questions"], count)
    rounds, votes = config.rationales.rounds * count, config.control.votes * written
    judges = [Expected(config.rationales.judge, "judge", rounds)] if config.rationales.judge else []
    return [
        Expected(config.questions.llm, "questions", passages, size),
        *(Expected(llm, "filter", votes) for llm in config.control.llms),
        Expected(config.rationales.llm, "rationale", count + rounds),
        Expected(config.rationales.llm, "improve", rounds),
        *judges,
        Expected(config.dialogues.llm, "dialogue", dialogues),
        Expected(config.dialogues.checker, "check", dialogues),
        *(Expected(llm, "answer", config.selection.samples * explained) for llm in config.selection.llms),
    ]


def _synth_stage(shop: _Workshop, config: SynthConfig, name: StageName) -> _Stage:
    """A stage of `psyche synth`: what it depends on, its items, what is done with each, what it writes."""
    if name == "clean":
        passages = (iterate_source(Passage, place) for place in config.sources.passages)
        dialogues = (iterate_source(Dialogue, place) for place in config.sources.dialogues)
        states = map(_state_of, (*config.sources.passages, *config.sources.dialogues))
        items, clean = chain(*passages, *dialogues), partial(_clean, cleaner=Cleaner(config.clean))
        return _Stage((asdict(config.clean), *states), items, clean, ("passages", "dialogues"), asks=False)
    if name == "questions":
        source = shop.input("clean", "passages")
        depends_on = (asdict(config.questions), *shop.asked(["questions"], [config.questions.llm]), source)
        write = partial(write_questions, section=config.questions)
        return _Stage(depends_on, iterate(Passage, source), write, ("questions",), _lines(source))
    if name == "control":
        source = shop.input("questions", "questions")
        asked = shop.asked(["filter"], config.control.llms)
        asked += shop.asked(["twins"], [config.control.twins]) if config.control.twins else []
        pairs = with_twins(iterate(Question, source), config.control)
        judge, files = partial(control, section=config.control), ("questions", "review")
        return _Stage((asdict(config.control), *asked, source), pairs, judge, files, _lines(source), after=shop.queue)
    if name == "rationales":
        sources = [shop.input("control", file) for file in ("questions", "review")]
        llms = [config.rationales.llm, *([config.rationales.judge] if config.rationales.judge else [])]
        asked = shop.asked(["instruction", "rationale", "improve", "judge"], llms)
        depends_on = (asdict(config.rationales), *asked, *sources, shop.decisions())
        questions = shop.decided(chain.from_iterable(iterate(Question, path) for path in sources))
        explain = partial(write_rationale, section=config.rationales)
        return _Stage(depends_on, questions, explain, ("questions",), sum(map(_lines, sources)))
    if name == "dialogues":
        source = shop.input("clean", "dialogues")
        asked = shop.asked(["dialogue", "check"], [config.dialogues.llm, config.dialogues.checker])
        depends_on, files = (asdict(config.dialogues), *asked, source), ("dialogues", "crisis")
        warm = partial(rewrite, section=config.dialogues)
        return _Stage(depends_on, iterate(Dialogue, source), warm, files, _lines(source))
    if name == "selection":
        source = shop.input("rationales", "questions")
        return _selection(shop, [source], iterate(Question, source), _lines(source))
    return _publication(shop, STAGES[:-1])


async def _clean(record: Passage | Dialogue, _: Asker, cleaner: Cleaner) -> Outcome:
    return cleaner.passage(record) if isinstance(record, Passage) else cleaner.dialogue(record)


def _selection(
    shop: _Workshop, states: list[Any], questions: Iterable[Question | Outcome], total: int | None = None
) -> _Stage:
    section = shop.config.selection
    depends_on = (asdict(section), *shop.asked(["answer"], section.llms), *states, shop.decisions())
    answer, files = partial(select, section=section), ("sft", "rl", "review")
    return _Stage(depends_on, questions, answer, files, total, after=shop.queue)


def _publication(shop: _Workshop, stages: Sequence[str]) -> _Stage:
    made = [shop.report(name) for name in stages]
    # Another run of the same settings may have other replies, so the records count too.
    records = [("selection", "sft"), ("selection", "rl"), ("dialogues", "dialogues"), ("dialogues", "crisis")]
    files = [shop.input(stage, file) for stage, file in records if stage in stages]
    fingerprint = digest([report["fingerprint"] for report in made], *files)
    config = config_to_dict(shop.config)

    async def write(out: str, _: Asker) -> Outcome:
        dialogues = shop.folder / "dialogues" if "dialogues" in stages else None
        counts = publish(out, shop.folder / "selection", dialogues, made, shop.store.usage(), config, fingerprint)
        return Outcome(counts=Counter({f"published/{name}": count for name, count in counts.items()}))

    return _Stage((shop.config.out, fingerprint), [shop.config.out], write, (), asks=False)


def _sources(config: SelectConfig) -> Iterator[Question | Outcome]:
    """Each question once. Reviews are kept by id, so no two questions may have the same."""
    seen: dict[str, str] = {}
    contents: set[str] = set()
    for location in config.questions:
        for question in iterate_source(Question, location):
            if isinstance(question, Outcome):
                yield question
                continue
            content = digest(question.stem, question.options)
            if content in contents:
                yield Outcome().drop("duplicate: the question was there before", question)
            elif seen.setdefault(question.id, content) != content:
                why = f"bad record: {location}: the id {question.id} is that of another question before it"
                yield Outcome().drop(why, None)
            else:
                contents.add(content)
                yield question


def _state_of(location: str) -> Any:
    """What a user's data is known by: a file by its content, a data set by its manifest."""
    location = source_place(location)
    if is_dataset(location):
        return asdict(open_dataset(location).manifest)
    if not Path(location).is_file():
        raise UserError(f"{location}: there is no such file")
    return Path(location)


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
