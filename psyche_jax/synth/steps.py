"""One item through one stage: what an LLM is asked about it, how the reply is read, what becomes of the item.

In the order of the pipeline: `write_questions`, `control` (duplicates, votes), `write_rationale`, `rewrite` (of
dialogues), `select` (SFT or RL).
"""

import contextlib
import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from psyche_jax.data.records import Dialogue, Message, Passage, Question, question_text
from psyche_jax.rewards.reference import CLOSE, OPEN, extract_letters, split_thought
from psyche_jax.serve.crisis.classify import Risk, classify
from psyche_jax.serve.crisis.gate import check_output
from psyche_jax.synth.asking import Asker, FaultyReplyError, SetAsideError, read_json
from psyche_jax.synth.calls import Call
from psyche_jax.synth.clean import clean_text
from psyche_jax.synth.config import (
    CleanSection,
    ControlSection,
    DialoguesSection,
    QuestionsSection,
    RationalesSection,
    SelectionSection,
)
from psyche_jax.synth.duplicates import Duplicates, Twin
from psyche_jax.synth.stages import Outcome

_POINTS_AT_TEXT = re.compile(
    r"(?:根据|依据|按照)(?:上述|以上|本段|这段|该)?(?:材料|文段|短文|文章|段落)|上文|材料(?:中|里)提到|文中"
)
_RULES = CleanSection(duplicates=False, repetitions=False)
Score: TypeAlias = Annotated[int, Field(ge=1, le=5, strict=True)]
CRITERIA = ("correct", "clear", "options", "worth")


@dataclass(frozen=True)
class WrittenQuestion:
    """One question of a reply."""

    kind: Literal["single", "multi"]
    stem: str
    options: dict[str, str]
    answer: str


@dataclass(frozen=True)
class WrittenQuestions:
    """A reply."""

    questions: tuple[WrittenQuestion, ...]


async def write_questions(passage: Passage, asker: Asker, section: QuestionsSection) -> Outcome:
    """Several questions from one passage. Records say which passage, LLM and prompt they come from."""
    values = {
        "text": passage.text,
        "single": section.single,
        "multi": section.multi,
        "least_options": section.least_options,
    }
    questions = await asker.ask(section.llm, "questions", values, _reader(passage, asker, section))
    outcome = Outcome([("questions", question) for question in questions])
    if len(questions) < section.single + section.multi:
        outcome.counts["fewer than asked for"] += 1
    return outcome


def _reader(passage: Passage, asker: Asker, section: QuestionsSection) -> Callable[[str], list[Question]]:
    read = read_json(WrittenQuestions)
    meta: dict[str, Any] = {
        **passage.meta,
        "passage": passage.id,
        "licence": passage.licence,
        "llms": {"questions": section.llm},
        "prompts": {"questions": asker.prompts["questions"].id},
    }

    def questions(text: str) -> list[Question]:
        written = read(text).questions
        if not written:
            raise FaultyReplyError("一道题也没有")
        return [checked(question, number) for number, question in enumerate(written, start=1)]

    def checked(written: WrittenQuestion, number: int) -> Question:
        try:
            stem, _ = clean_text(written.stem, _RULES)
            options = {letter.strip(): clean_text(option, _RULES)[0] for letter, option in written.options.items()}
            letters = re.sub(r"[\s,，、]", "", written.answer).upper()
            question = Question(stem, options, letters, written.kind, None, passage.source, meta)
        except ValueError as error:
            raise FaultyReplyError(f"第{number}题：{error}") from None
        if len(options) < section.least_options:
            raise FaultyReplyError(f"第{number}题：只有 {len(options)} 个选项，至少要有 {section.least_options} 个")
        if len({re.sub(r"\W", "", option) for option in options.values()}) < len(options):
            raise FaultyReplyError(f"第{number}题：有两个选项相同")
        if written.kind == "multi" and not 2 <= len(letters) < len(options):
            raise FaultyReplyError(
                f"第{number}题：多选题须有两个或更多正确选项，也至少有一个错误选项，而答案是 {letters}"
            )
        if _POINTS_AT_TEXT.search(stem):
            raise FaultyReplyError(f"第{number}题：题干离不开材料，须能单独读懂")
        return question

    return questions


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
    """Skip duplicates; let the LLMs vote; keep, skip, or leave to a person."""
    question, twin = item
    outcome = Outcome()
    # Where the comparison of texts leaves open whether two questions are one, an LLM says so.
    if twin is not None and twin.doubtful is not None:
        same = await _same(question, twin.doubtful, asker, section)
        outcome.counts["twins/asked about"] += 1
        outcome.counts[f"twins/{'no usable reply' if same is None else 'the same' if same else 'not the same'}"] += 1
        twin = Twin(twin.id) if same else None
    if twin is not None and not twin.conflict:
        return outcome.drop(f"{'exact' if twin.exact else 'near'} duplicate: of {twin.id}", question)
    # A duplicate with another key is no reason to drop either: one of the keys is wrong, and a person sees which.
    flags = [f"another key than {twin.id}, which reads the same"] if twin is not None else []
    voters = [llm for llm in section.llms for _ in range(section.votes)]
    votes = [
        await asker.ask(llm, "filter", _values(question), read_json(Vote), number % section.votes)
        for number, llm in enumerate(voters)
    ]
    if votes:
        scores = {name: round(fmean(getattr(vote, name) for vote in votes), 3) for name in CRITERIA}
        question = _made_by(question, asker, {"filter": list(section.llms)}, ["filter"], scores=scores)
        least = section.least_score
        against = [vote.reason for vote in votes if min(getattr(vote, name) for name in CRITERIA) < least]
        ayes = len(votes) - len(against)
        summary = f"{ayes} of {len(votes)} votes for it; {next(iter(against), '')}"
        if 2 * ayes <= len(votes):
            return outcome.drop(f"filter: {summary}", question)
        if ayes < len(votes):
            flags.append(summary)
    # What is left is kept, or waits for a person.
    if section.review == "all" or (flags and section.review == "flagged"):
        said = [{"llm": llm, **dataclasses.asdict(vote)} for llm, vote in zip(voters, votes, strict=True)]
        meta = {**question.meta, "flags": flags, "votes": said, **({"conflicts_with": twin.id} if twin else {})}
        return outcome.keep("review", replace(question, meta=meta))
    if twin is not None:
        return outcome.drop(f"conflicting key: {flags[0]}", question)
    return outcome.keep("questions", question)


async def _same(question: Question, other: Question, asker: Asker, section: ControlSection) -> bool | None:
    """Whether an LLM takes both for the same question; None if it does not say."""
    assert section.twins is not None
    values = {f"{key}_{place}": value for place, one in enumerate((other, question), start=1)
              for key, value in _values(one).items()}  # fmt: skip
    try:
        return (await asker.ask(section.twins, "twins", values, read_json(Compared))).same
    except SetAsideError:
        return None


def _values(question: Question) -> dict[str, Any]:
    return {"question": question_text(question), "answer": question.answer}


def _made_by(question: Question, asker: Asker, llms: dict[str, Any], prompts: Iterable[str], **more: Any) -> Question:
    """The question with who wrote or judged it in its meta, and by which version of which prompt."""
    meta = question.meta

    def known(name: str) -> dict[str, Any]:
        return found if isinstance(found := meta.get(name), dict) else {}  # a user's may hold anything

    made = {"prompts": {**known("prompts"), **{name: asker.prompts[name].id for name in prompts}}}
    if llms:
        made["llms"] = {**known("llms"), **llms}
    return replace(question, meta={**meta, **made, **more})


_GIVES_AWAY = re.compile(r"答案|正确(?:选项|的?是)|选项?\s*[A-H]|[A-H]\s*(?:项|选项|正确)|\b[A-H]\b", re.ASCII)
_SHORTEST = 15  # characters of a rationale


@dataclass(frozen=True)
class Answered:
    """A rationale and the letters that follow it."""

    rationale: str
    answer: str


@dataclass(frozen=True)
class Instruction:
    """A candidate for the place of P's instruction."""

    instruction: Annotated[str, Field(min_length=5, max_length=400)]


@dataclass(frozen=True)
class Verdict:
    """Which of two rationales is better: 1, 2, or 0 for neither."""

    better: Annotated[int, Field(ge=0, le=2, strict=True)]
    reason: str = ""


async def write_rationale(question: Question, asker: Asker, section: RationalesSection) -> Outcome:
    """The question with the last rationale that came to the right answer; skipped if the first one did not.

    What waits for a person is left out until then.
    """
    outcome = Outcome()
    if "flags" in question.meta and "review" not in question.meta:
        return outcome.drop("waits for review: psyche review", question)
    text = question_text(question)
    instruction = asker.prompts["instruction"].text()
    best = await _answered(asker, section.llm, text, instruction)
    if best.answer != question.answer:
        return outcome.drop(f"wrong answer: {best.answer} where the key is {question.answer}", question)
    # Each round an LLM improves the instruction; what is written by it is taken if it comes to the right answer.
    taken = []
    for number in range(1, section.rounds + 1):
        try:
            values = {"question": text, "instruction": instruction, "rationale": best.rationale}
            candidate = await asker.ask(section.llm, "improve", values, _read_instruction, sample=number)
            found = await _answered(asker, section.llm, text, candidate)
        except SetAsideError:
            outcome.counts["rounds/no usable reply"] += 1
            continue
        if found.answer != question.answer:
            outcome.counts["rounds/reverted"] += 1
            continue
        if section.judge is not None:
            better = await _judged_better(asker, section.judge, text, best.rationale, found.rationale)
            outcome.counts["judge/asked"] += 1
            if not better:  # the paper's rule would have taken it
                outcome.counts["judge/kept the old one"] += 1
                continue
        outcome.counts["rounds/taken"] += 1
        taken.append(number)
        best, instruction = found, candidate
    prompts = ["rationale", "improve"] if section.rounds else ["rationale"]
    made = _made_by(question, asker, {"rationale": section.llm}, prompts, rounds_taken=taken)
    return outcome.keep("questions", replace(made, rationale=best.rationale))


async def _answered(asker: Asker, llm: str, question: str, instruction: str) -> Answered:
    values = {"question": question, "instruction": instruction}
    return await asker.ask(llm, "rationale", values, read_answered)


def read_answered(text: str) -> Answered:
    """The thought and the letters of a reply in the response format.

    A server whose chat template opens the thought may send what follows `<think>` alone.
    """
    rationale, _ = split_thought(text)
    if rationale is None or CLOSE not in text:
        raise FaultyReplyError("没有按格式先写<think>……</think>再写答案")
    if OPEN in rationale or CLOSE in rationale:
        raise FaultyReplyError("<think></think>只能出现一次")
    if len(rationale) < _SHORTEST:
        raise FaultyReplyError(f"推理太短，不足 {_SHORTEST} 字")
    letters = extract_letters(text)
    if not letters:
        raise FaultyReplyError("最后没有单独一行的“答案：”和选项字母")
    return Answered(rationale, "".join(sorted(letters)))


def _read_instruction(text: str) -> str:
    instruction = read_json(Instruction)(text).instruction.strip()
    if _GIVES_AWAY.search(instruction):
        raise FaultyReplyError("指令提到了答案或选项字母")
    return instruction


async def _judged_better(asker: Asker, judge: str, question: str, old: str, new: str) -> bool:
    """Whether the judge prefers `new`. Which of the two comes first is as good as random, and always the same."""
    swapped = hashlib.sha256(f"{question}{old}{new}".encode()).digest()[0] % 2 == 1
    first, second = (new, old) if swapped else (old, new)
    values = {"question": question, "first": first, "second": second}
    try:
        verdict = await asker.ask(judge, "judge", values, read_json(Verdict))
    except SetAsideError:
        return False
    return verdict.better == (1 if swapped else 2)


_REFUSAL = re.compile(r"作为(?:一个|一名)?(?:AI|人工智能|语言模型)|我无法(?:协助|帮助|回答|提供)|抱歉，我不能")


@dataclass(frozen=True)
class Rewritten:
    """A reply, rewritten."""

    reply: Annotated[str, Field(min_length=40, max_length=1000)]


@dataclass(frozen=True)
class Checked:
    """What the checker says of a rewritten reply."""

    advice_kept: bool
    safe: bool
    warmer: bool
    fault: str = ""


async def rewrite(dialogue: Dialogue, asker: Asker, section: DialoguesSection) -> Outcome:
    """The dialogue with a warmer reply, or the post on the track of crises, or skipped with the checker's reason."""
    outcome = Outcome()
    post, reply = (turn.content for turn in dialogue.turns)
    found = classify(post)
    if found.risk is not Risk.NONE:
        outcome.counts[f"risk/{found.risk}"] += 1
        meta = {**dialogue.meta, "risk": found.risk, "rules": list(found.rules)}
        return outcome.keep("crisis", replace(dialogue, meta=meta))
    values = {"post": post, "reply": reply}
    warmer = await asker.ask(section.llm, "dialogue", values, _read_reply)
    verdict = await asker.ask(section.checker, "check", {**values, "rewritten": warmer}, read_json(Checked))
    for name, what in (("safe", "unsafe"), ("advice_kept", "advice lost"), ("warmer", "not warmer")):
        if not getattr(verdict, name):
            raise SetAsideError(f"{what}: {verdict.fault}")
    meta = {
        **dialogue.meta,
        "llms": {"dialogue": section.llm, "check": section.checker},
        "prompts": {name: asker.prompts[name].id for name in ("dialogue", "check")},
        "rewritten_from": dialogue.id,
    }
    turns = (dialogue.turns[0], Message("assistant", warmer))
    return outcome.keep("dialogues", Dialogue(turns, dialogue.source, meta))


def _read_reply(text: str) -> str:
    reply = read_json(Rewritten)(text).reply.strip()
    if _REFUSAL.search(reply):
        raise FaultyReplyError("这是拒绝，不是改写后的回复")
    if (broken := check_output(reply)) is not None:
        raise FaultyReplyError(f"改写里有不安全的内容（{broken.name}）")
    return reply


async def select(question: Question, asker: Asker, section: SelectionSection) -> Outcome:
    """At least one sample of one LLM right: SFT; all wrong: RL; all LLMs agree on another answer: a person looks.

    `meta.selection` says of each LLM how many of its samples were right and which letters each gave (the rewards'
    strict rule; "" for none), and how difficult the question is: the share of wrong samples.
    """
    template = asker.prompts["answer"]
    messages = template.messages(question=question_text(question))
    answers = {
        llm: [
            await _letters(asker, asker.client.request(llm, template.id, messages, sample))
            for sample in range(section.samples)
        ]
        for llm in section.llms
    }
    right = {llm: sum(answer == question.answer for answer in given) for llm, given in answers.items()}
    total = len(section.llms) * section.samples
    selection: dict[str, Any] = {
        "right": right,
        "answers": answers,
        "samples": section.samples,
        "difficulty": round(1 - sum(right.values()) / total, 4),
    }
    # Where all agree on another answer the key may be wrong: a person looks, once.
    track = "sft" if any(right.values()) else "rl"
    other = agreed_answer(answers)
    if track == "rl" and other is not None and "review" not in question.meta:
        track = "review"
        selection["agreed"] = other
    flags = {"flags": [f"all LLMs answer {other}, the key is {question.answer}"]} if track == "review" else {}
    outcome = Outcome()
    outcome.counts.update({f"right/{llm}": count for llm, count in right.items()})
    outcome.counts["samples without letters"] += sum(not answer for given in answers.values() for answer in given)
    outcome.counts[f"difficulty/{selection['difficulty']:.1f}"] += 1
    return outcome.keep(track, _made_by(question, asker, {}, ["answer"], selection=selection, **flags))


async def _letters(asker: Asker, asked: Call) -> str:
    """What an LLM answers; what does not come to an answer at all sets the question aside, since it is not wrong."""
    reply = await asker.reply(asked)
    letters = "".join(sorted(extract_letters(reply.text) or ()))
    if letters:
        asker.count(asked, reply)
    else:
        asker.count_unusable(asked, reply, "no letters after the marker")
    return letters


def agreed_answer(answers: dict[str, list[str]]) -> str | None:
    """The answer that most samples of each of several LLMs give, if it is the same for all."""
    favourites = set()
    for given in answers.values():
        (favourite, count), *_ = Counter(given).most_common(1)
        if not favourite or 2 * count <= len(given):
            return None
        favourites.add(favourite)
    return favourites.pop() if len(answers) > 1 and len(favourites) == 1 else None
