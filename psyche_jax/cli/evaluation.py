"""How good a model is, how safe, and the pages about it: eval, safety, report, watch."""

import argparse
import json
import math
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from psyche_jax.cli import start
from psyche_jax.cli.arguments import AddVerb, add_thinking, check_at_least, check_seed, say_skipped, warn_of_gates
from psyche_jax.errors import UsageError

if TYPE_CHECKING:
    from psyche_jax.evaluate.endpoint import Endpoint
    from psyche_jax.evaluate.local import LocalModel
    from psyche_jax.evaluate.tasks import Benchmark


MAX_NEW_TOKENS = 512


def add_verbs(add: AddVerb) -> None:
    """Put this module's verbs into the parser."""
    verb = add(
        "eval",
        _eval,
        "Ask a model the questions of a benchmark and score its answers.",
        "psyche eval runs/demo/grpo --bench samples --limit 20",
    )
    verb.add_argument(
        "model",
        metavar="MODEL",
        help="a Hugging Face folder, a checkpoint, a run, or URL#NAME of an OpenAI-compatible endpoint "
        "(http://localhost:8000/v1#my-model; its key is OPENAI_API_KEY)",
    )
    verb.add_argument(
        "--bench",
        required=True,
        metavar="NAME|FILE",
        help="samples, dialogues, pceb:FOLDER, cpsyexam:FILE, or a JSONL file of questions or dialogues",
    )
    # Which questions.
    verb.add_argument("--label", help="the model's name in reports (default: the last part of MODEL)")
    verb.add_argument("--cells", metavar="NAME,NAME", help="only these parts of the benchmark")
    verb.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    verb.add_argument("--train", metavar="URI", help="training data: also score without the questions found in it")
    verb.add_argument("--shots", type=int, metavar="N", help="worked examples before each choice question")
    verb.add_argument(
        "--shots-from", metavar="NAME|FILE", help="where to take them from: a benchmark with the same cells"
    )
    # How they are asked.
    verb.add_argument("--samples", type=int, default=1, metavar="K", help="answers to each question (default 1)")
    verb.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"longest answer, in tokens (default: max_new_tokens of a GRPO run, else {MAX_NEW_TOKENS})",
    )
    verb.add_argument("--temperature", type=float, default=0.0, help="0 (the default) takes the most likely token")
    verb.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the top tokens with this total probability (default 1)"
    )
    verb.add_argument("--batch-size", type=int, metavar="N", help="questions at once (default 64; for an endpoint 16)")
    verb.add_argument(
        "--bare", action="store_true", help="ask without system prompt and instruction, for a model that has its own"
    )
    add_thinking(verb)
    # Who judges, and what endpoints need.
    verb.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="URL#NAME",
        help="an endpoint that judges replies to dialogues for empathy, in both orders; several may be given",
    )
    verb.add_argument(
        "--against",
        default="reference",
        metavar="FILE",
        help="compare with the replies in this evaluation (default: with the dialogues' own replies)",
    )
    verb.add_argument(
        "--parameter",
        action="append",
        default=[],
        metavar="NAME=ITS",
        help="an endpoint's own name for max_tokens, temperature, top_p or seed: max_tokens=max_completion_tokens; "
        "nothing after the = leaves it out; several may be given",
    )
    verb.add_argument(
        "--served-as",
        action="append",
        default=[],
        metavar="NAME",
        help="also accept answers under this model name, which a deployment may report; several may be given",
    )
    # How it is computed, and where the result goes.
    verb.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="float32")
    verb.add_argument("--seed", type=int, default=0, help="for sampling (default 0)")
    verb.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="also write scores and answers to a JSON file; a killed evaluation resumes from the answers beside it",
    )
    verb.add_argument("--json", action="store_true", help="print the scores as one JSON object")

    verb = add(
        "safety",
        _safety,
        "Measure the crisis gate on labelled messages, and the output filter on a run's answers.",
        "psyche safety runs/demo/grpo",
    )
    verb.add_argument(
        "run_folder",
        type=Path,
        nargs="?",
        metavar="RUN",
        help="a run: the answers in its evaluations are measured too, and the figures are kept for `psyche report`",
    )
    verb.add_argument(
        "--posts",
        type=Path,
        metavar="FILE",
        help='JSONL of {"text", "labels"}, where labels are classes of docs/crisis.md or PsyGUARD\'s '
        "(default: the package's own sentences)",
    )
    verb.add_argument(
        "--dialogues", type=Path, metavar="FILE", help="JSONL of dialogues: how often the gate interrupts ordinary talk"
    )
    verb.add_argument("--rules-alone", action="store_true", help="measure the gate without its classifier")
    verb.add_argument(
        "--second-opinion",
        metavar="URL#MODEL",
        help="ask an endpoint's model about messages that the gate lets pass, as crisis.second_opinion does in serving",
    )
    verb.add_argument("--json", action="store_true", help="print the figures as one JSON object")

    verb = add(
        "report",
        _report,
        "Write one offline HTML page about one or more runs, or Markdown for a model card.",
        "psyche report runs/demo/sft runs/demo/grpo --out report.html",
    )
    verb.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs; may be gs://…")
    verb.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="default: report.html; a name that ends with .md gets the figures as Markdown for a model card",
    )
    _add_language(verb)

    verb = add(
        "watch",
        _watch,
        "Serve a page on this machine that follows runs as they train: curves, samples, settings.",
        "psyche watch runs/demo/sft runs/demo/grpo",
    )
    verb.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, started or not; may be gs://…")
    verb.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: this machine only)")
    verb.add_argument("--port", type=int, default=0, help="default: any free port")
    _add_language(verb)


def _add_language(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--language", choices=("en", "zh"), default="en", help="language of the page (default: en)")


def _eval(arguments: argparse.Namespace) -> None:
    # Refused before anything is read: what cannot be asked for together.
    if (arguments.shots is None) != (arguments.shots_from is None):
        raise UsageError("--shots and --shots-from go together")
    for name in ("limit", "shots", "samples", "max_new_tokens", "batch_size"):
        check_at_least(name, getattr(arguments, name), 1)
    if not 0 <= arguments.temperature < math.inf:
        raise UsageError(f"--temperature must be 0 or more, not {arguments.temperature}")
    if not 0 < arguments.top_p <= 1:
        raise UsageError(f"--top-p must be above 0 and at most 1, not {arguments.top_p}")
    if arguments.samples > 1 and arguments.temperature == 0:
        raise UsageError("--samples above 1 needs a --temperature above 0: greedy answers are all the same")
    check_seed(arguments.seed)
    if arguments.out is not None and arguments.out.is_dir():
        raise UsageError(f"--out {arguments.out}: is a folder; give the name of a JSON file")
    from psyche_jax.data.dataset import check_readable
    from psyche_jax.evaluate.benchmarks import look_for_leaks, read_benchmark, with_shots
    from psyche_jax.storage.files import as_path, bucket_errors, make_folder
    from psyche_jax.train.step_folders import check_model

    # A wrong path is said before anything is loaded that takes time.
    check_model(arguments.model)
    if arguments.train and ":" not in arguments.train:  # else in a bucket, or cpsyexam:FILE
        check_readable(arguments.train)
    if arguments.against != "reference" and not Path(arguments.against).is_file():
        raise UsageError(f"--against {arguments.against}: no such file")
    if arguments.out is not None:
        make_folder(arguments.out.parent, "--out")

    # The questions: read, compared with training data, cut down, given examples.
    benchmark = read_benchmark(arguments.bench)
    say_skipped(benchmark.set_aside)
    if arguments.train:
        benchmark = look_for_leaks(benchmark, arguments.train)
    benchmark = benchmark.only(arguments.cells.split(",") if arguments.cells else None, arguments.limit)
    if arguments.shots:
        benchmark = with_shots(benchmark, read_benchmark(arguments.shots_from), arguments.shots)
    from psyche_jax.evaluate.evaluation import evaluate, evaluation_file, scores_table

    # Who answers and who judges. An endpoint that is asked by name is reached only now.
    judges = _judges(arguments, benchmark)
    model = _model_to_evaluate(arguments)
    label = arguments.label or model.short_name
    addresses = [arguments.model, *arguments.judge]
    warn_of_gates({address.partition("#")[0]: os.environ.get("OPENAI_API_KEY") for address in addresses})
    # A run keeps its own evaluations, which the report reads; --out writes one more file.
    folder = as_path(arguments.model)
    with bucket_errors(folder):
        is_run = (folder / "config.yaml").is_file()
    places = [evaluation_file(folder, benchmark.name, label)] if is_run else []
    places += [arguments.out] if arguments.out is not None else []
    size = f", {model.parameters:,} parameters" if model.parameters else ""
    step = f", step {model.step}" if model.step else ""
    longest = model.settings["max_new_tokens"]
    print(
        f"eval: {model.name}{step}{size}: {len(benchmark.tasks)} questions of {benchmark.name}, answers of at most "
        f"{longest} tokens",
        file=sys.stderr,
        flush=True,
    )
    evaluation = evaluate(
        model,
        benchmark,
        label=label,
        samples=arguments.samples,
        files=places,
        judges=judges,
        against=arguments.against,
    )
    say_skipped(evaluation["set_aside"][len(benchmark.set_aside) :])
    summary = {**evaluation["scores"], "set_aside": len(evaluation["set_aside"]), "no_answer": evaluation["no_answer"]}
    if judges:
        summary["empathy"] = evaluation["empathy"]
    print(json.dumps(summary) if arguments.json else scores_table(summary), flush=True)
    if places:
        print(f"eval: {model.name}: scores and answers are in {' and '.join(map(str, places))}", file=sys.stderr)
    if is_run:
        print(f"eval: next: psyche report {shlex.quote(arguments.model)}", file=sys.stderr)


def _judges(arguments: argparse.Namespace, benchmark: "Benchmark") -> "list[Endpoint]":
    """Who judges empathy."""
    from psyche_jax.evaluate.empathy import MAX_TOKENS
    from psyche_jax.evaluate.endpoint import Endpoint
    from psyche_jax.llm.server import SCHEMES

    if arguments.judge and not any(task.kind == "dialogue" for task in benchmark.tasks):
        raise UsageError(f"--judge: {arguments.bench} holds no dialogues; try --bench dialogues")
    for address in arguments.judge:
        if not address.startswith(SCHEMES):
            raise UsageError(f"--judge {address}: must be URL#NAME of an endpoint; `psyche serve` makes one")
    return [
        Endpoint(
            address,
            max_new_tokens=MAX_TOKENS,
            temperature=0.0,
            concurrency=arguments.batch_size or 16,
            names=_parameters(arguments),
            served_as=arguments.served_as,
        )
        for address in arguments.judge
    ]


def _parameters(arguments: argparse.Namespace) -> dict[str, str | None]:
    """What endpoints call our parameters."""
    names = {}
    for given in arguments.parameter:
        ours, equals, its = given.partition("=")
        if not equals or ours not in ("max_tokens", "temperature", "top_p", "seed"):
            raise UsageError(
                f"--parameter {given}: must be NAME=ITS or NAME=, where NAME is max_tokens, temperature, top_p or seed"
            )
        names[ours] = its or None
    return names


def _model_to_evaluate(arguments: argparse.Namespace) -> "LocalModel | Endpoint":
    """What `psyche eval` asks."""
    from psyche_jax.config import PromptSection
    from psyche_jax.evaluate.endpoint import Endpoint
    from psyche_jax.llm.server import SCHEMES

    prompt = PromptSection(system="", instruction="") if arguments.bare else None
    if arguments.model.startswith(SCHEMES):
        if arguments.thinking is not None:
            raise UsageError("--thinking: the endpoint's server sets this; leave it out")
        return Endpoint(
            arguments.model,
            max_new_tokens=arguments.max_new_tokens or MAX_NEW_TOKENS,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
            concurrency=arguments.batch_size or 16,
            prompt=prompt,
            names=_parameters(arguments),
            served_as=arguments.served_as,
        )
    start.start_jax()
    from psyche_jax.evaluate.local import LocalModel
    from psyche_jax.model.sampling import Sampling

    return LocalModel(
        arguments.model,
        Sampling(arguments.max_new_tokens or MAX_NEW_TOKENS, arguments.temperature, top_p=arguments.top_p),
        compute_dtype=arguments.compute_dtype,
        batch_size=arguments.batch_size or 64,
        seed=arguments.seed,
        prompt=prompt,
        thinking=None if arguments.thinking is None else arguments.thinking == "on",
        as_trained=arguments.max_new_tokens is None,
    )


def _safety(arguments: argparse.Namespace) -> None:
    from psyche_jax.serve.config import CrisisSection
    from psyche_jax.serve.crisis.measure import measure_safety, safety_lines

    if (endpoint := CrisisSection(second_opinion=arguments.second_opinion).second_opinion) == "served":
        raise UsageError("--second-opinion: `served` works only in psyche serve; give URL#MODEL")
    if endpoint:
        warn_of_gates({endpoint.partition("#")[0]: os.environ.get("OPENAI_API_KEY")})
    measured, bad = measure_safety(
        arguments.posts, arguments.dialogues, arguments.run_folder, not arguments.rules_alone, endpoint
    )
    say_skipped(bad)
    print(json.dumps(measured, ensure_ascii=False) if arguments.json else "\n".join(safety_lines(measured)))


def _report(arguments: argparse.Namespace) -> None:
    from psyche_jax.storage.files import as_path, in_bucket
    from psyche_jax.train.run_files import check_run

    for run in arguments.runs:
        if not in_bucket(run):
            check_run(Path(run))
    from psyche_jax.evaluate.report import write_report

    if arguments.language != "en" and arguments.out.suffix == ".md":
        raise UsageError("--language: Markdown for a model card is in English only; leave it out, or write .html")
    replaced = arguments.out.is_file()
    write_report([as_path(run) for run in arguments.runs], arguments.out, language=arguments.language)
    if replaced:
        print("report: replaced the one that was there", file=sys.stderr)
    print(arguments.out)


def _watch(arguments: argparse.Namespace) -> None:
    from psyche_jax.storage.files import as_path
    from psyche_jax.watch.server import serve_watch

    serve_watch([as_path(run) for run in arguments.runs], arguments.host, arguments.port, arguments.language)
