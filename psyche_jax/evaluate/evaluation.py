"""Evaluate a model on a benchmark and write down what it said, question by question."""

import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from psyche_jax.data.parts import HELD_OUT
from psyche_jax.errors import UserError
from psyche_jax.evaluate.answers import Answers, Completion, Key
from psyche_jax.evaluate.empathy import REFERENCE, as_lines, judge_pairs, pairs_of, summarize_empathy
from psyche_jax.evaluate.endpoint import Endpoint
from psyche_jax.evaluate.score import answer_record, score_answer, score_essay, summarize, summarize_essays
from psyche_jax.evaluate.tasks import CHOICE_KINDS, Benchmark, Task
from psyche_jax.storage.files import in_bucket, write_json

if TYPE_CHECKING:  # JAX is loaded for a model on this machine alone
    from psyche_jax.evaluate.local import LocalModel

SECONDS_BETWEEN_LINES = 30  # of progress where there is no terminal


def evaluate(
    model: "LocalModel | Endpoint",
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
        evaluation that was killed, or to which some questions have no answer, resumes from them.
      judges: who compares the replies to dialogues with the references, or with another evaluation's replies.
      against: `reference`, or the file of another evaluation of the same dialogues.

    Returns:
      `label, model, parameters, bench, step, samples, sampling, scores, set_aside, no_answer, items`. `no_answer`
      counts what is skipped since no answer came, by reason (`content_filter`, say). `scores` is what
      `score.summarize` returns, with `essays` beside it if there are any, and `decontaminated` (the scores without
      leaked tasks) and `leaked` (how many) if leaks were looked for. With judges also `empathy`, which is what
      `empathy.summarize_empathy` returns, and `judgements`.

    Raises:
      UserError: the model or a judge cannot be used, or answered nothing at all; there is nothing to judge.
    """
    if not benchmark.tasks:
        raise UserError(f"{benchmark.name}: contains no questions")
    # The answers that are kept beside the evaluation belong to exactly these questions, asked in exactly this way.
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
    # A question without an answer is not a wrong one: it is named and left out of the scores.
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
    # Answers and judgements are kept until nothing is missing, so that the next run asks only for the rest.
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
    name = Path(bench).name.replace(".jsonl", "")  # a part of it may follow: x.jsonl-first-20
    if name.startswith(HELD_OUT):  # as every import names it
        name = "-".join(part for part in (Path(bench).parent.name, name) if part)
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
    """The scores of all that was answered, and the record of each answer."""
    score = {"essay": score_essay, "dialogue": answer_record}
    items = {
        task.id: [score.get(task.kind, score_answer)(task, known[task.id, n], n) for n in range(samples)]
        for task in tasks
    }

    def scores_of(chosen: list[Task]) -> dict[str, Any]:
        scores = summarize([task for task in chosen if task.kind in CHOICE_KINDS], items)
        if essays := [
            (item, task.group or task.id) for task in chosen if task.kind == "essay" for item in items[task.id]
        ]:
            scores["essays"] = summarize_essays([item for item, _ in essays], [group for _, group in essays])
        return scores

    scores = scores_of(tasks)
    if dialogues := sum(task.kind == "dialogue" for task in tasks):
        scores["dialogues"] = dialogues
    listed = [item for task in tasks for item in items[task.id]]
    if (leaked := benchmark.leaked) is not None:
        scores["decontaminated"] = scores_of([task for task in tasks if task.id not in leaked])
        scores["leaked"] = sum(task.id in leaked for task in tasks)
        scores["leaked_essays"] = sum(task.id in leaked for task in tasks if task.kind == "essay")
        listed = [{**item, "leaked": leaked.get(item["id"], "")} for item in listed]
    return {"scores": scores, "items": listed}


@contextmanager
def progress(label: str, total: int, done: int) -> Iterator[Callable[[], object]]:
    """A bar on a terminal; elsewhere a plain line now and then. Yields what to call after each answer."""
    if sys.stderr.isatty():
        with tqdm(total=total, initial=done, desc=f"eval {label}", unit="answer") as bar:
            yield bar.update
        return
    if done:
        print(f"eval {label}: {done} of {total} answers are already done", file=sys.stderr)
    last = time.monotonic()

    def advance() -> None:
        nonlocal done, last
        done += 1
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"eval {label}: {done} of {total}", file=sys.stderr, flush=True)

    yield advance


def scores_table(summary: Mapping[str, Any]) -> str:
    """A line for all questions, each kind and each cell; below it what else there is to say."""
    lines = []
    # Choice questions: the table, cells only where they say more than the kinds do.
    if summary["count"]:
        cells = summary["cells"] if len(summary["cells"]) > len(summary["by_kind"]) else {}
        rows = [("all", summary), *summary["by_kind"].items(), *cells.items()]
        width = max(len(name) for name, _ in rows) + 2
        heads = ("questions", "strict", "95 %", "chance", "elastic", "chance", "unanswered")
        lines.append(f"{'':{width}}" + "".join(f"{head:>{size}}" for head, size in zip(heads, _WIDTHS, strict=True)))
        lines += [f"{name:{width}}{_row(row)}" for name, row in rows]
        # What one row cannot hold: the spread over samples, the mean of the cells, answers without letters.
        if "deviation" in summary:
            lines.append(
                f"standard deviation over samples: strict {summary['deviation']:.3f}, "
                f"elastic {summary['deviation_elastic']:.3f}"
            )
        if average := summary.get("average"):
            lines.append(
                f"mean of {len(average['cells'])} cells: strict {average['strict']:.3f} {_span(average['interval'])}, "
                f"elastic {average['elastic']:.3f} {_span(average['interval_elastic'])}"
            )
        if summary["failures"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in summary["failures"].items())
            fallback = summary["fallback"]
            lines.append(
                f"no letters by the strict rule: {reasons}; with the lenient fallback, which reads {fallback['read']} "
                f"of them: strict {fallback['strict']:.3f}, elastic {fallback['elastic']:.3f}"
            )
    # Other kinds of tasks, and the scores without what the training data hold too.
    if essays := summary.get("essays"):
        lines.append(f"{essays['count']} essays: {_essays(essays)} (percent)")
    if (clean := summary.get("decontaminated")) is not None:
        scores = f": strict {clean['strict']:.3f}, elastic {clean['elastic']:.3f}" if clean["count"] else ""
        lines.append(f"{summary['leaked']} are in the training data; without them {clean['count']} questions{scores}")
        if summary.get("leaked_essays"):
            apart = _essays(clean["essays"]) if clean.get("essays") else "none is left"
            lines.append(f"{summary['leaked_essays']} of them are essays on a leaked case; the other essays: {apart}")
    if empathy := summary.get("empathy"):
        lines += _empathy(empathy)
    elif "dialogues" in summary:
        lines.append(f"{summary['dialogues']} replies to dialogues; no --judge was given, so they are not scored")
    # What is in no score must be seen, or the scores look better than they are.
    if summary["set_aside"]:
        lines.append(f"{summary['set_aside']} records skipped")
    if unanswered := summary.get("no_answer"):
        told = ", ".join(f"{count} {reason}" for reason, count in unanswered.items())
        lines.append(f"of these, unanswered and not scored: {told}")
    return "\n".join(lines)


def _essays(essays: Mapping[str, Any]) -> str:
    return ", ".join(f"{title} {essays[name]:.2f}" for name, title in _ESSAYS.items())


def _empathy(empathy: Mapping[str, Any]) -> list[str]:
    lines = [f"{empathy['count']} dialogues judged, marks from 1 to 5 beside those of {empathy['against']}:"]
    for name, marks in empathy["dimensions"].items():
        low, high = marks["interval"]
        change = f"{marks['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append(f"  {name:18}{marks['model']:6.2f}{marks['other']:6.2f}  {change}")
    for name, judge in empathy["judges"].items():
        same, first = _share(judge["same_in_both_orders"]), _share(judge["first_preferred"])
        outcomes = ", ".join(f"{judge[key]} {title}" for key, title in _OUTCOMES.items())
        orders = f"same verdict in both orders {same}, first preferred {first}"
        lines.append(f"  {name}: {outcomes} of {judge['count']}; {orders}")
    for pair in empathy["agreement"]:
        who = " and ".join(pair["judges"])
        lines.append(f"  {who} agree on {_share(pair['share'])} of {pair['count']}, kappa {_share(pair['kappa'])}")
    return lines


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


_WIDTHS = (10, 9, 13, 9, 9, 9, 12)
_OUTCOMES = {"win": "won", "tie": "tied", "lose": "lost"}
_ESSAYS = {"rouge1": "ROUGE-1", "rougeL": "ROUGE-L", "bleu4": "BLEU-4"}


def _row(row: Mapping[str, Any]) -> str:
    return (
        f"{row['count']:10}{row['strict']:9.3f}{_span(row['interval']):>13}{row['chance']:9.3f}{row['elastic']:9.3f}"
        f"{row['chance_elastic']:9.3f}{row['unanswered']:12}"
    )


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f}–{interval[1]:.3f}"
