"""Questions from passages, as an LLM writes them and a schema lets them through."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from psyche_jax.data.records import Passage, Question
from psyche_jax.synth.asking import Asker, FaultyReplyError, read_json
from psyche_jax.synth.clean import clean_text
from psyche_jax.synth.config import CleanSection, QuestionsSection
from psyche_jax.synth.stages import Outcome

_POINTS_AT_TEXT = re.compile(
    r"(?:根据|依据|按照)(?:上述|以上|本段|这段|该)?(?:材料|文段|短文|文章|段落)|上文|材料(?:中|里)提到|文中"
)
_RULES = CleanSection(duplicates=False, repetitions=False)


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
    outcome = Outcome()
    for question in questions:
        outcome.keep("questions", question)
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
        return [_checked(question, number, section.least_options) for number, question in enumerate(written, start=1)]

    def _checked(written: WrittenQuestion, number: int, least: int) -> Question:
        try:
            stem, _ = clean_text(written.stem, _RULES)
            options = {letter.strip(): clean_text(option, _RULES)[0] for letter, option in written.options.items()}
            letters = re.sub(r"[\s,，、]", "", written.answer).upper()
            question = Question(stem, options, letters, written.kind, None, passage.source, meta)
        except ValueError as error:
            raise FaultyReplyError(f"第{number}题：{error}") from None
        if len(options) < least:
            raise FaultyReplyError(f"第{number}题：只有 {len(options)} 个选项，至少要有 {least} 个")
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
