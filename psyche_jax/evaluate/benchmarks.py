"""The benchmarks: what comes with the package, and files of questions and dialogues."""

import json
from importlib.resources import files
from pathlib import Path

from psyche_jax.data.records import Dialogue, Question, read_records
from psyche_jax.evaluate.tasks import Benchmark, choice_task, dialogue_task

SAMPLES, DIALOGUES = "samples", "dialogues"  # that come with the package


def read_benchmark(bench: str) -> Benchmark:
    """A benchmark: `samples` or `dialogues`, or a JSONL file of `Question` or of `Dialogue` records.

    Raises:
      UserError: the file is missing, or holds nothing usable.
    """
    packaged = {SAMPLES: "questions.jsonl", DIALOGUES: "dialogues.jsonl"}
    path = Path(str(files("psyche_jax.data") / "samples" / packaged[bench])) if bench in packaged else Path(bench)
    if _holds_dialogues(path):
        dialogues = read_records(Dialogue, path)
        return Benchmark(bench, tuple(dialogue_task(one) for one in dialogues.good), dialogues.set_aside)
    records = read_records(Question, path)
    return Benchmark(bench, tuple(choice_task(question) for question in records.good), records.set_aside)


def _holds_dialogues(path: Path) -> bool:
    """Whether the first line of a file is an object with turns; what is wrong with a file is found on reading it."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and "turns" in first
