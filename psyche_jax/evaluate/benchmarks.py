"""The benchmarks: what comes with the package, and files of questions."""

from importlib.resources import files
from pathlib import Path

from psyche_jax.data.records import Question, read_records
from psyche_jax.evaluate.tasks import Benchmark, choice_task

SAMPLES = "samples"  # the benchmark that comes with the package


def read_benchmark(bench: str) -> Benchmark:
    """A benchmark: `samples`, or a JSONL file of `Question` records.

    Raises:
      UserError: the file is missing, or holds no usable question.
    """
    path = Path(str(files("psyche_jax.data") / "samples" / "questions.jsonl")) if bench == SAMPLES else Path(bench)
    records = read_records(Question, path)
    return Benchmark(bench, tuple(choice_task(question) for question in records.good), records.set_aside)
