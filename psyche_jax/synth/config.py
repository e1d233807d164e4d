"""Typed configs of `psyche synth` and `psyche select`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from psyche_jax.config import RunSection, Section

SAMPLING = ("temperature", "top_p", "max_tokens")  # parameters of requests to LLMs: of every one,
PARAMETERS = (*SAMPLING, "stream", "stream_options")  # and of any


@dataclass(frozen=True)
class LlmSection(Section):
    """One LLM: its server, sampling, limits and prices."""

    name: str  # its name in the stages below
    model: str  # its name on the server
    base_url: str = "https://api.openai.com/v1"  # of an OpenAI-compatible server
    key_env: str | None = "OPENAI_API_KEY"  # the environment variable with its key; null: no key
    stream: bool = False  # stream replies; some servers need this for long requests
    temperature: NonNegativeFloat = 0.7  # of sampling
    top_p: PositiveFloat = 0.9  # of sampling
    max_tokens: PositiveInt = 2048  # of one reply
    parameters: Mapping[str, str | None] = field(default_factory=dict)  # the server's parameter names; null: not sent
    timeout_seconds: PositiveFloat = 180.0  # for one whole call
    requests_per_minute: PositiveFloat | None = None  # None: no limit
    tokens_per_minute: PositiveFloat | None = None  # None: no limit
    input_price: NonNegativeFloat = 0.0  # per million tokens, in any one currency
    output_price: NonNegativeFloat = 0.0  # the same

    def __post_init__(self) -> None:
        from psyche_jax.llm.server import check_url  # half a second, which whoever has an LLM to ask takes anyway

        try:
            check_url(self.base_url)
        except ValueError as error:
            raise ValueError(f"base_url: {error}") from None
        if "#" in self.base_url:
            raise ValueError("base_url must end before '#'; the model's name goes into model")
        if unknown := [name for name in self.parameters if name not in PARAMETERS]:
            raise ValueError(f"parameters: cannot send {unknown[0]!r}, only {', '.join(PARAMETERS)}")

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """What so many tokens cost."""
        return (prompt_tokens * self.input_price + completion_tokens * self.output_price) / 1e6


@dataclass(frozen=True)
class CallsSection(Section):
    """How LLMs are called."""

    concurrency: PositiveInt = 16  # calls at once, over all LLMs
    retries: NonNegativeInt = 6  # tries again of one call after temporary faults
    first_wait_seconds: PositiveFloat = 1.0  # doubled after each fault; a server's Retry-After takes precedence
    longest_wait_seconds: PositiveFloat = 60.0  # the longest such wait
    longest_rest_seconds: PositiveFloat = 600.0  # the longest Retry-After that is obeyed in full
    give_up_after: PositiveInt = 20  # stop after this many calls without a reply, or unusable replies in a row
    reasks: NonNegativeInt = 2  # how often to ask again after a malformed reply, naming its fault


@dataclass(frozen=True)
class BudgetSection(Section):
    """When to stop. Counts all stored calls, over all starts of a run; calls in flight are finished."""

    tokens: PositiveInt | None = None  # in prompts and replies; None: no limit
    cost: PositiveFloat | None = None  # by the prices of the LLMs; None: no limit


@dataclass(frozen=True)
class SourcesSection(Section):
    """JSONL files: passages `{text, source, licence, meta}`, and dialogues whose replies are rewritten."""

    passages: tuple[str, ...] = ()  # questions are made from these
    dialogues: tuple[str, ...] = ()  # the replies in these are rewritten

    def __post_init__(self) -> None:
        if not self.passages and not self.dialogues:
            raise ValueError("passages and dialogues are both empty; name at least one file")


@dataclass(frozen=True)
class CleanSection(Section):
    """Cleaning rules; each can be switched off."""

    unicode: bool = True  # NFKC, also radicals that NFKC misses
    invisible: bool = True  # zero-width and control characters
    links: bool = True  # web addresses
    personal: bool = True  # phone and identity numbers, mail, WeChat and QQ ids: masked
    advertisements: bool = True  # sentences that sell something
    injections: bool = True  # sentences that speak to an LLM
    emoji: bool = True  # removed
    emoticons: bool = True  # removed
    punctuation: bool = True  # made consistent
    repetitions: bool = True  # repeated sentences, characters repeated many times
    duplicates: bool = True  # texts that occur twice
    shortest: PositiveInt = 20  # characters of a passage; shorter ones are skipped


@dataclass(frozen=True)
class QuestionsSection(Section):
    """Questions from passages."""

    llm: str = "writer"  # the LLM that writes them
    single: NonNegativeInt = 2  # single-answer questions per passage
    multi: NonNegativeInt = 2  # multiple-answer questions per passage
    least_options: PositiveInt = 4  # the fewest options of a question

    def __post_init__(self) -> None:
        if self.single + self.multi < 1:
            raise ValueError("single and multi are both 0; ask for at least one question")


@dataclass(frozen=True)
class ControlSection(Section):
    """Near-duplicates, the filter by LLMs, and human review."""

    candidates: Annotated[float, Field(gt=0, lt=1)] = 0.4  # Jaccard similarity from which two are compared
    permutations: PositiveInt = 128  # of MinHash
    redis: str | None = None  # host:port, for tables that outgrow memory
    twins: str | None = None  # an LLM that decides in doubtful cases whether two questions ask the same
    llms: tuple[str, ...] = ("judge",)  # empty: no filter
    votes: PositiveInt = 3  # votes per LLM
    least_score: PositiveFloat = 3.5  # a vote is in favour if all its scores, from 1 to 5, are at least this
    review: Literal["none", "flagged", "all"] = "flagged"  # flagged: votes differ, or a twin has another key

    def __post_init__(self) -> None:
        if len(set(self.llms)) < len(self.llms):
            raise ValueError("llms names one twice; use votes for several votes from one LLM")


@dataclass(frozen=True)
class RationalesSection(Section):
    """Rationales by prompt optimization."""

    llm: str = "writer"  # the LLM that writes them
    rounds: NonNegativeInt = 2  # T; ours: not published
    judge: str | None = None  # an LLM that decides which of two rationales is better


@dataclass(frozen=True)
class DialoguesSection(Section):
    """Warmer replies."""

    llm: str = "writer"  # the LLM that rewrites replies
    checker: str = "judge"  # the LLM that compares the new reply with the old one


@dataclass(frozen=True)
class SelectionSection(Section):
    """Which questions go to SFT and which to RL."""

    llms: tuple[str, ...] = ("writer",)  # the LLMs that answer every question
    samples: PositiveInt = 1  # answers of each LLM to each question

    def __post_init__(self) -> None:
        if not self.llms:
            raise ValueError("llms is empty; name at least one")
        if len(set(self.llms)) < len(self.llms):
            raise ValueError("llms names one twice; use samples for several answers from one LLM")


@dataclass(frozen=True)
class SynthConfig(Section):
    """The whole pipeline."""

    run: RunSection  # the folder in which it works
    out: str  # where the records go: a new folder
    sources: SourcesSection
    llms: tuple[LlmSection, ...]
    prompts: str | None = None  # a folder with prompts that replace the package's
    calls: CallsSection = field(default_factory=CallsSection)
    budget: BudgetSection = field(default_factory=BudgetSection)
    clean: CleanSection = field(default_factory=CleanSection)
    questions: QuestionsSection = field(default_factory=QuestionsSection)
    control: ControlSection = field(default_factory=ControlSection)
    rationales: RationalesSection = field(default_factory=RationalesSection)
    dialogues: DialoguesSection = field(default_factory=DialoguesSection)
    selection: SelectionSection = field(default_factory=SelectionSection)

    def __post_init__(self) -> None:
        uses: dict[str, Sequence[str | None]] = {
            "questions.llm": [self.questions.llm],
            "control.twins": [self.control.twins],
            "control.llms": self.control.llms,
            "rationales.llm": [self.rationales.llm],
            "rationales.judge": [self.rationales.judge],
            "dialogues.llm": [self.dialogues.llm],
            "dialogues.checker": [self.dialogues.checker],
            "selection.llms": self.selection.llms,
        }
        _check(self.run, self.llms, uses)


@dataclass(frozen=True)
class SelectConfig(Section):
    """Selection alone, of questions from files."""

    run: RunSection
    out: str  # where the records go: a new folder
    questions: tuple[str, ...]  # JSONL files of `Question`
    llms: tuple[LlmSection, ...]
    prompts: str | None = None  # a folder with prompts that replace the package's
    calls: CallsSection = field(default_factory=CallsSection)
    budget: BudgetSection = field(default_factory=BudgetSection)
    selection: SelectionSection = field(default_factory=SelectionSection)

    def __post_init__(self) -> None:
        if not self.questions:
            raise ValueError("questions is empty; name at least one file")
        _check(self.run, self.llms, {"selection.llms": self.selection.llms})


def _check(run: RunSection, llms: Sequence[LlmSection], uses: Mapping[str, Sequence[str | None]]) -> None:
    """Raise ValueError unless the run is on a disk, and each LLM that a key of `uses` names is there, once."""
    if "://" in run.dir:
        raise ValueError(f"run.dir must be a folder on a disk, not {run.dir!r}")
    names = [llm.name for llm in llms]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"llms: two are named {twice[0]!r}")
    for where, used in uses.items():
        if unknown := [name for name in used if name is not None and name not in names]:
            raise ValueError(f"{where}: there is no LLM {unknown[0]!r} in llms; known: {', '.join(names) or 'none'}")
