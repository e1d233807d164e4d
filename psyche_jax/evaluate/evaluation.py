"""Evaluate a model on a benchmark and write down what it said, question by question."""

import dataclasses
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from psyche_jax.errors import UserError
from psyche_jax.evaluate.answers import Answers, Completion, Key
from psyche_jax.evaluate.choice import score_answer, summarize
from psyche_jax.evaluate.empathy import REFERENCE, as_lines, judge_pairs, pairs_of, summarize_empathy
from psyche_jax.evaluate.endpoint import Endpoint
from psyche_jax.evaluate.essays import score_essay, summarize_essays
from psyche_jax.evaluate.tasks import CHOICE_KINDS, Benchmark, Task
from psyche_jax.files import in_bucket, write_json

SECONDS_BETWEEN_LINES = 30  # of progress where there is no terminal


class Model(Protocol):
    """What an evaluation asks: `LocalModel` or `Endpoint`."""

    name: str
    parameters: int | None

    @property
    def short_name(self) -> str:
        """What reports call it."""

    @property
    def step(self) -> int:
        """The training step of a checkpoint, else 0."""

    @property
    def settings(self) -> dict[str, Any]:
        """How it is asked, for the record."""

    @property
    def identity(self) -> dict[str, Any]:
        """All that an answer depends on."""

    def answer(
        self, tasks: Mapping[Key, Task], known: Collection[Key], keep: Callable[[Key, Completion], object]
    ) -> dict[Key, str]:
        """Answer all tasks but those `known`; returns why there is none, for each that has no answer."""


def evaluate(
    model: Model,
    benchmark: Benchmark,
    *,
    label: str,
    samples: int = 1,
    files: Sequence[Path] = (),
    judges: Sequence[Endpoint] = (),
    against: str = REFERENCE,
) -> dict[str, Any]:
    """Ask everything and score the answers.

    Args:
      model: who is asked.
      benchmark: what is asked.
      label: what the report calls the model.
      samples: answers to each question.
      files: where to write the evaluation. Beside the first, answers are kept as they come until it is written; an
        evaluation that was killed, or to which some questions have no answer, goes on from them.
      judges: who compares the replies to dialogues with the references, or with another evaluation's replies.
      against: `reference`, or the file of another evaluation of the same dialogues.

    Returns:
      `label, model, parameters, bench, step, samples, sampling, scores, set_aside, no_answer, items`. `no_answer`
      counts what is set aside since no answer came, by reason (`content_filter`, say). `scores` is what
      `choice.summarize` returns, with `essays` beside it if there are any, and `decontaminated` (the scores without
      leaked tasks) and `leaked` (how many) if leaks were looked for. With judges also `empathy`, which is what
      `empathy.summarize_empathy` returns, and `judgements`.

    Raises:
      UserError: the model or a judge cannot be used, or answered nothing at all; there is nothing to judge.
    """
    if not benchmark.tasks:
        raise UserError(f"{benchmark.name}: holds nothing to ask")
    requests = {(task.id, sample): task for sample in range(samples) for task in benchmark.tasks}
    asked = [[(turn.role, turn.content) for turn in task.turns] for task in benchmark.tasks]
    identity = {**model.identity, "bench": benchmark.name, "requests": [list(key) for key in requests], "asked": asked}
    with (
        Answers(files[0] if files else None, identity) as answers,
        progress(label, len(requests), len(answers.known)) as advance,
    ):

        def keep(key: Key, completion: Completion) -> None:
            answers.keep(key, completion)
            advance()

        failed = model.answer(requests, answers.known.keys(), keep)
    unanswered = {task_id: reason for (task_id, _), reason in failed.items()}
    tasks = [task for task in benchmark.tasks if task.id not in unanswered]
    if not tasks:
        reason = next(iter(failed.values()))
        raise UserError(f"{model.name}: answered none of {len(benchmark.tasks)} questions: {reason}")
    evaluation = {
        "label": label,
        "model": model.name,
        "parameters": model.parameters,
        "bench": benchmark.name,
        "step": model.step,
        "samples": samples,
        "sampling": model.settings,
        **_scored(benchmark, tasks, answers.known, samples),
        "set_aside": [*benchmark.set_aside, *(f"{task_id}: no answer: {why}" for task_id, why in unanswered.items())],
        "no_answer": dict(Counter(re.split("[:,]", why)[0] for why in unanswered.values())),
    }
    kept = [] if failed else [answers]
    if judges:
        evaluation, judged_whole = _judged(evaluation, judges, against, files[0] if files else None)
        kept += judged_whole
    for file in files:
        if not in_bucket(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, evaluation)
    for answers in kept:
        answers.discard()
    return evaluation


def evaluation_file(run: Path, bench: str, label: str) -> Path:
    """Where `report` looks for an evaluation of a run."""
    name = Path(bench).name.replace(".jsonl", "")  # behind it may stand which part it is: x.jsonl-first-20
    return run / "evaluations" / f"{name}-{label}.json".replace("/", "-")


def _judged(
    evaluation: dict[str, Any], judges: Sequence[Endpoint], against: str, file: Path | None
) -> tuple[dict[str, Any], list[Answers]]:
    """The evaluation with judgements, and where those are kept that are whole."""
    pairs = pairs_of(evaluation, against)
    if not pairs:
        raise UserError(f"{evaluation['bench']}: holds no dialogues, so there is nothing to judge")
    judged, kept, missing = {}, [], {}
    for judge in judges:
        judgements, failed, answers = judge_pairs(judge, pairs, file)
        judged[judge.name] = judgements
        kept += [] if failed else [answers]
        missing[judge.name] = [f"{pair}, order {order}: {reason}" for (pair, order), reason in failed.items()]
    empathy = {"against": against, **summarize_empathy(pairs, judged), "not_judged": missing}
    return {**evaluation, "empathy": empathy, "judgements": as_lines(judged)}, kept


def _scored(benchmark: Benchmark, tasks: list[Task], known: Mapping[Key, Completion], samples: int) -> dict[str, Any]:
    choices = [task for task in tasks if task.kind in CHOICE_KINDS]
    items = {task.id: [score_answer(task, known[task.id, n], n) for n in range(samples)] for task in choices}
    essays = [score_essay(task, known[task.id, n], n) for task in tasks if task.kind == "essay" for n in range(samples)]
    scores = summarize(choices, items)
    if essays:
        scores["essays"] = summarize_essays(essays)
    if dialogues := sum(task.kind == "dialogue" for task in tasks):
        scores["dialogues"] = dialogues
    if benchmark.leaked is not None:
        clean = [task for task in choices if task.id not in benchmark.leaked]
        scores["decontaminated"] = summarize(clean, items)
        clean_essays = [item for item in essays if item.id not in benchmark.leaked]
        if clean_essays:
            scores["decontaminated"]["essays"] = summarize_essays(clean_essays)
        scores["leaked"] = sum(task.id in benchmark.leaked for task in tasks)
        scores["leaked_essays"] = sum(task.id in benchmark.leaked for task in tasks if task.kind == "essay")
    listed = [dataclasses.asdict(item) for task in choices for item in items[task.id]]
    listed += [dataclasses.asdict(item) for item in essays]
    listed += [
        {
            "id": task.id,
            "cell": task.cell,
            "kind": task.kind,
            "sample": sample,
            "question": task.text,
            "gold": task.gold,
            "response": known[task.id, sample].text,
        }
        for task in tasks
        if task.kind == "dialogue"
        for sample in range(samples)
    ]
    if benchmark.leaked is not None:
        listed = [{**item, "leaked": benchmark.leaked.get(item["id"], "")} for item in listed]
    return {"scores": scores, "items": listed}


@contextmanager
def progress(label: str, total: int, done: int) -> Iterator[Callable[[], object]]:
    """A bar on a terminal; elsewhere a plain line now and then. Yields what to call after each answer."""
    if sys.stderr.isatty():
        with tqdm(total=total, initial=done, desc=f"eval {label}", unit="answer") as bar:
            yield bar.update
        return
    if done:
        print(f"eval {label}: {done} of {total} answers are there already", file=sys.stderr)
    last = time.monotonic()

    def advance() -> None:
        nonlocal done, last
        done += 1
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"eval {label}: {done} of {total}", file=sys.stderr, flush=True)

    yield advance
