"""Benchmarks by name or file, and which of their questions the training data hold."""

import dataclasses
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from psyche_jax.data.dataset import kind_at, load_any_records, load_records
from psyche_jax.data.decontamination import decontaminate
from psyche_jax.data.imports import Notes
from psyche_jax.data.public import load_cpsyexam, load_pceb, pceb_essays
from psyche_jax.data.records import BaseRecord, Dialogue, Message, Question
from psyche_jax.errors import UsageError, UserError
from psyche_jax.evaluate.tasks import CHOICE_KINDS, Benchmark, Task, choice_task, dialogue_task, with_examples

SAMPLES, DIALOGUES = "samples", "dialogues"  # that come with the package
PCEB, CPSYEXAM = "pceb", "cpsyexam"
_PARTS = {"cases": "case", "moral": "moral", "theory": "theory"}  # folders of PCEB and what its cells are called


def read_benchmark(bench: str) -> Benchmark:
    """A benchmark by its name or file.

    `samples`, `dialogues`: come with the package. `pceb:FOLDER`: PCEB or a part of it, with cells `case_smcq` to
    `theory_mmcq` and `essay`. `cpsyexam:FILE`: a split of CPsyExam, with cells `knowledge_smcq` to `analyse_mmcq`.
    Else a JSONL file or a data set of `Question` or of `Dialogue` records.

    Raises:
      UserError: the file is missing, or holds nothing usable.
    """
    name, _, where = bench.partition(":")
    if name == PCEB and where:
        return _pceb(Path(where))
    if name == CPSYEXAM and where:
        return _cpsyexam(Path(where))
    if bench in (PCEB, CPSYEXAM):
        raise UsageError(f"--bench {bench}: its files do not come with the package; give their path: {bench}:PATH")
    packaged = {SAMPLES: "questions.jsonl", DIALOGUES: "dialogues.jsonl"}
    place = str(files("psyche_jax.data") / "samples" / packaged[bench]) if bench in packaged else bench
    if kind_at(place) == Dialogue.__name__:
        dialogues = load_records(Dialogue, place)
        return Benchmark(bench, tuple(dialogue_task(one) for one in dialogues.good), dialogues.set_aside)
    records = load_records(Question, place)
    return Benchmark(bench, tuple(choice_task(question) for question in records.good), records.set_aside)


def with_shots(benchmark: Benchmark, examples: Benchmark, shots: int) -> Benchmark:
    """The choice questions of `benchmark`, each after the first `shots` of `examples` of its cell.

    A question is never its own example, nor an example for another one on the same case.

    Raises:
      UserError: a cell has too few examples.
    """
    tasks = []
    for task in benchmark.tasks:
        if task.kind not in CHOICE_KINDS:
            tasks.append(task)
            continue
        others = [
            one for one in examples.tasks if one.cell == task.cell and one.id != task.id and one.group != task.group
        ]
        if len(others) < shots:
            raise UserError(f"{examples.name}: has {len(others)} examples of {task.cell}, not {shots}")
        tasks.append(with_examples(task, others[:shots]))
    return dataclasses.replace(benchmark, name=f"{benchmark.name}-{shots}-shot", tasks=tuple(tasks))


def _pceb(folder: Path) -> Benchmark:
    """PCEB; the questions on one case are a group."""
    tasks: list[Task] = []
    set_aside: list[str] = []
    for part, name in _PARTS.items():
        if any((folder / part).rglob("*.json")):
            loaded = load_pceb(folder / part)
            tasks += _in_cells(loaded.good, name)
            set_aside += loaded.set_aside
    if not tasks:
        raise UserError(f"{folder}: holds no PCEB questions; give the folder that contains cases, moral and theory")
    if any((folder / "cases").rglob("*.json")):
        for number, essay in enumerate(pceb_essays(folder / "cases", Notes(set_aside)), start=1):
            text = f"{essay.case}\n{essay.question}"
            turns = (Message("user", text),)
            tasks.append(Task(f"essay-{number}", "essay", "essay", turns, text, essay.reference, group=essay.case))
    return Benchmark(PCEB, tuple(tasks), tuple(set_aside))


def _cpsyexam(file: Path) -> Benchmark:
    loaded = load_cpsyexam(file)
    if not loaded.good:
        raise UserError(f"{file}: holds no usable CPsyExam question")
    return Benchmark(CPSYEXAM, tuple(_in_cells(loaded.good)), loaded.set_aside)


def _in_cells(records: Sequence[BaseRecord], part: str = "") -> list[Task]:
    """Choice questions in cells by part (else by what the record says) and kind; those on one case are a group."""
    kinds = {"single": "smcq", "multi": "mmcq"}
    tasks = []
    for record in records:
        if isinstance(record, Question):
            name = part or str(record.meta.get("part", ""))
            cell = f"{name}_{kinds[record.kind]}".lstrip("_")
            tasks.append(choice_task(record, cell))
    return tasks


def look_for_leaks(benchmark: Benchmark, train: str) -> Benchmark:
    """The benchmark with what `data.decontamination` finds of it in training data.

    A leaked case leaks everything that is asked about it, essays too; a case on which there are essays alone is looked
    for as well. Of a dialogue it is what the user says that is looked for.

    Args:
      benchmark: its choice questions, the cases of its essays and its dialogues are looked for.
      train: a data set or JSONL file of records that are not packed, or `cpsyexam:FILE`.

    Raises:
      UserError: the training data cannot be read.
    """
    questions = [(task.group, task.question) for task in benchmark.tasks if task.question is not None]
    asked = {group for group, _ in questions}
    essays = {task.group: task for task in benchmark.tasks if task.kind == "essay" and task.group not in asked}
    questions += [(group, _on_case(task)) for group, task in essays.items()]
    dialogues = {task.id: _as_dialogue(task) for task in benchmark.tasks if task.kind == "dialogue"}
    found = decontaminate(_read(train), [*(question for _, question in questions), *dialogues.values()]).leaked
    on_cases = {group for group, question in questions if found.get(question.id) == "case"}
    leaked: dict[str, str] = {}
    for task in benchmark.tasks:
        record = dialogues.get(task.id) or task.question
        reason = found.get(record.id) if record is not None else None
        if reason or task.group in on_cases:
            leaked[task.id] = reason or "case"
    return dataclasses.replace(benchmark, leaked=leaked)


def _on_case(essay: Task) -> Question:
    """A question in place of an essay's case, since cases are looked for by the questions on them."""
    return Question(essay.text, {"A": "是", "B": "否"}, "A", "single", meta={"case": essay.group})


def _as_dialogue(task: Task) -> Dialogue:
    return Dialogue((*task.turns, Message("assistant", task.gold)), id=task.id)


def _read(train: str) -> tuple[BaseRecord, ...]:
    name, _, where = train.partition(":")
    if name == CPSYEXAM and where:
        return load_cpsyexam(Path(where)).good
    return load_any_records(train).good
