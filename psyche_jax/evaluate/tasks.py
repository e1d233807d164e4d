"""What is asked of a model in an evaluation, and which records are skipped before anything is asked."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from psyche_jax.data.records import Dialogue, Message, Question, question_text
from psyche_jax.errors import UsageError

TaskKind: TypeAlias = Literal["single", "multi", "essay", "dialogue"]
CHOICE_KINDS = ("single", "multi")


@dataclass(frozen=True)
class Task:
    """One thing to ask.

    `turns`: what the model is given, with worked examples before the last turn if there are any. `text`: the last
    turn as reports show it. `gold`: the letters of a choice question, the reference text of an essay or a dialogue.
    `options`: the letters to choose from. `cell`: the part of the benchmark whose score it counts in. `group`: what
    it shares with other tasks (a case vignette), so that they are drawn together where scores are resampled.
    `question`: the record of a choice question.
    """

    id: str
    cell: str
    kind: TaskKind
    turns: tuple[Message, ...]
    text: str
    gold: str
    options: str = ""
    group: str = ""
    question: Question | None = None


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's tasks, and a line for each record that is skipped: where it is, and why.

    `leaked`: ids of tasks that training data hold too, each with what was found; None if that was not looked for.
    """

    name: str
    tasks: tuple[Task, ...]
    set_aside: tuple[str, ...] = ()
    leaked: dict[str, str] | None = None

    def __post_init__(self) -> None:
        """Tell tasks apart that ask the same: the second one with an id gets `#2` behind it."""
        seen: Counter[str] = Counter()
        tasks = []
        for task in self.tasks:
            seen[task.id] += 1
            again = seen[task.id]
            tasks.append(task if again == 1 else dataclasses.replace(task, id=f"{task.id}#{again}"))
        object.__setattr__(self, "tasks", tuple(tasks))

    @property
    def cells(self) -> list[str]:
        """The cells, in the order in which they come."""
        return list(dict.fromkeys(task.cell for task in self.tasks))

    def only(self, cells: Collection[str] | None, limit: int | None) -> "Benchmark":
        """The tasks of some cells, and of these the first `limit`; the name then says so.

        Raises:
          UsageError: a cell is unknown.
        """
        if cells is not None and (unknown := [cell for cell in cells if cell not in self.cells]):
            raise UsageError(f"--cells {unknown[0]}: {self.name} has {', '.join(self.cells)}")
        tasks = [task for task in self.tasks if cells is None or task.cell in cells]
        name = "-".join([self.name, *([] if len(tasks) == len(self.tasks) else cells or ())])
        if limit is not None and limit < len(tasks):
            name, tasks = f"{name}-first-{limit}", tasks[:limit]
        return dataclasses.replace(self, name=name, tasks=tuple(tasks))


def choice_task(question: Question, cell: str = "") -> Task:
    """A choice question; its cell is `smcq` or `mmcq` (one right answer, several) unless it is given.

    Those with the same `meta["case"]` are a group.
    """
    text = question_text(question)
    cell = cell or ("smcq" if question.kind == "single" else "mmcq")
    return Task(
        question.id,
        cell,
        question.kind,
        (Message("user", text),),
        text,
        question.answer,
        "".join(question.options),
        str(question.meta.get("case") or question.id),
        question,
    )


def dialogue_task(dialogue: Dialogue) -> Task:
    """A dialogue without its last reply, which is the reference; its cell is `single_turn` or `multi_turn`."""
    *turns, last = dialogue.turns
    asked = sum(turn.role == "user" for turn in turns)
    names = {"system": "系统", "user": "求助者", "assistant": "支持者"}
    text = "\n".join(f"{names[turn.role]}：{turn.content}" for turn in turns)
    cell = "single_turn" if asked == 1 else "multi_turn"
    return Task(dialogue.id, cell, "dialogue", tuple(turns), text, last.content)


def with_examples(task: Task, examples: Sequence[Task]) -> Task:
    """The task after worked examples: each is a question that was asked, and its letters as the answer given."""
    shown: list[Message] = []
    for example in examples:
        shown += [example.turns[-1], Message("assistant", f"答案：{example.gold}")]
    return dataclasses.replace(task, turns=(*shown, *task.turns))
