"""Tasks of a benchmark that training data hold too."""

import dataclasses
from pathlib import Path

from psyche_jax.data.dataset import load_records
from psyche_jax.data.decontamination import decontaminate
from psyche_jax.data.public import load_cpsyexam
from psyche_jax.data.records import BaseRecord, Dialogue, Question, RlPrompt, SftExample
from psyche_jax.errors import UserError
from psyche_jax.evaluate.benchmarks import CPSYEXAM, kind_at
from psyche_jax.evaluate.tasks import Benchmark, Task

_KINDS: dict[str, type[BaseRecord]] = {kind.__name__: kind for kind in (Question, SftExample, RlPrompt, Dialogue)}


def look_for_leaks(benchmark: Benchmark, train: str) -> Benchmark:
    """The benchmark with what `data.decontamination` finds of it in training data.

    A leaked case leaks everything that is asked about it, essays too; a case on which there are essays alone is looked
    for as well.

    Args:
      benchmark: its choice questions and the cases of its essays are looked for.
      train: a data set or JSONL file of records that are not packed, or `cpsyexam:FILE`.

    Raises:
      UserError: the training data cannot be read.
    """
    questions = [(task.group, task.question) for task in benchmark.tasks if task.question is not None]
    asked = {group for group, _ in questions}
    essays = {task.group: task for task in benchmark.tasks if task.kind == "essay" and task.group not in asked}
    questions += [(group, _on_case(task)) for group, task in essays.items()]
    found = decontaminate(_read(train), [question for _, question in questions]).leaked
    on_cases = {group for group, question in questions if found.get(question.id) == "case"}
    leaked: dict[str, str] = {}
    for task in benchmark.tasks:
        reason = found.get(task.question.id) if task.question is not None else None
        if reason or task.group in on_cases:
            leaked[task.id] = reason or "case"
    return dataclasses.replace(benchmark, leaked=leaked)


def _on_case(essay: Task) -> Question:
    """A question that stands for an essay's case, since cases are looked for by the questions on them."""
    return Question(essay.text, {"A": "是", "B": "否"}, "A", "single", meta={"case": essay.group})


def _read(train: str) -> tuple[BaseRecord, ...]:
    name, _, where = train.partition(":")
    if name == CPSYEXAM and where:
        return load_cpsyexam(Path(where)).good
    kind = kind_at(train)
    if kind not in _KINDS:
        raise UserError(f"--train {train}: holds {kind} records, which cannot be compared as text")
    return load_records(_KINDS[kind], train).good
