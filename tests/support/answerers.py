"""Models that answer by rule, for scores that are known beforehand."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from psyche_jax.data.records import Message, Question
from psyche_jax.evaluate.answers import Completion, Key
from psyche_jax.evaluate.tasks import Benchmark, Task, choice_task


@dataclass
class Answerer:
    """Says `say(task, sample)` to everything."""

    say: Callable[[Task, int], str]
    name: str = "rule"
    short_name: str = "rule"
    step: int = 0
    parameters: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    asked: list[Sequence[Message]] = field(default_factory=list)

    def answer(
        self, tasks: Mapping[Key, Task], known: Collection[Key], keep: Callable[[Key, Completion], object]
    ) -> dict[Key, str]:
        for key, task in tasks.items():
            if key not in known:
                self.asked.append(task.turns)
                keep(key, Completion(self.say(task, key[1]), 1, True))
        return {}


def questions(count: int, options: int = 4) -> list[Question]:
    """As many single- as multiple-answer questions, with every key about as often."""
    letters = "ABCDEFG"[:options]
    keys = ["".join(letter for bit, letter in enumerate(letters) if mask >> bit & 1) for mask in range(1, 2**options)]
    several = [key for key in keys if len(key) > 1]
    result = []
    for index in range(count):
        kind = ("single", "multi")[index % 2]
        key = letters[index // 2 % options] if kind == "single" else several[index // 2 % len(several)]
        result.append(Question(f"问题{index}", {letter: f"{index}之{letter}" for letter in letters}, key, kind))
    return result


def six_cells(count: int) -> Benchmark:
    """A benchmark with the cells of PCEB; the questions of a case belong together."""
    tasks = []
    for index, question in enumerate(questions(count)):
        part = ("case", "moral", "theory")[index // 2 % 3]
        cell = f"{part}_{'smcq' if question.kind == 'single' else 'mmcq'}"
        case = {"case": f"case {index // 12}"} if part == "case" else {}
        tasks.append(choice_task(replace(question, meta=case), cell))
    return Benchmark("six", tuple(tasks))
