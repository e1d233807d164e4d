"""The command `psyche`: one verb for each step of the recipe."""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psyche_jax
from psyche_jax.errors import UsageError, UserError

if TYPE_CHECKING:
    from psyche_jax.config import DistributedSection
    from psyche_jax.evaluate.endpoint import Endpoint
    from psyche_jax.evaluate.evaluation import Model
    from psyche_jax.evaluate.tasks import Benchmark

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "psyche_jax" / "xla"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 1 (it failed) or 2 (it was used wrongly)."""
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except UserError as error:
        return _failed(parsed.verb, str(error), error.exit_code)
    except KeyboardInterrupt:
        return _failed(parsed.verb, "interrupted")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _failed(parsed.verb, f"{where}{error.strerror or error}")
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _failed(parsed.verb, f"out of memory; use smaller batches or more devices ({error})")
    return 0


def _failed(verb: str, message: str, exit_code: int = 1) -> int:
    """Say in one line why a command failed."""
    print(f"psyche {verb}: {' '.join(message.split())}", file=sys.stderr)
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="psyche",
        description="Turn a Qwen2.5 base model into a domain reasoning model: SFT, GRPO, evaluation, export.",
        epilog="Start here: psyche demo --out runs/demo",
    )
    parser.add_argument("--version", action="version", version=f"psyche {psyche_jax.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str, example: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"Example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.set_defaults(run=run)
        return verb

    for name, run, text in (
        ("synth", _synth, "Make training records from source texts, with LLMs behind the OpenAI protocol."),
        ("select", _select, "Let LLMs answer questions: those that one gets right go to SFT, the others to RL."),
    ):
        verb = add(name, run, text, f"psyche {name} --config configs/{name}.yaml --set run.dir=runs/my_{name}")
        verb.add_argument("--config", type=Path, required=True, help="a YAML file; see configs/")
        _add_set(verb)
        if name == "synth":
            verb.add_argument("--stage", metavar="S", help="only this stage; those before it must be there")
        verb.add_argument("--json", action="store_true", help="print the stages' reports as one JSON object")

    verb = add(
        "review",
        _review,
        "Serve a page on this machine on which a person accepts, edits or rejects questions, by keyboard.",
        "psyche review runs/synth --who Li",
    )
    verb.add_argument(
        "store", type=Path, metavar="STORE", help="the folder of a synth or select run, or its review.sqlite"
    )
    verb.add_argument("--who", help="the reviewer's name, stored with each decision (default: the login name)")
    verb.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: this machine only)")
    verb.add_argument("--port", type=int, default=0, help="default: a free one")
    verb.add_argument(
        "--export", type=Path, metavar="FILE", help="write the queue as JSONL instead, to review elsewhere"
    )
    verb.add_argument(
        "--import", type=Path, metavar="FILE", dest="load", help="take decisions from such a file instead"
    )

    verb = add(
        "import",
        _import,
        "Write a Hugging Face folder of a Qwen2 model as a checkpoint.",
        "psyche import hub:Qwen/Qwen2.5-7B-Instruct checkpoints/qwen2.5-7b --dtype bfloat16",
    )
    verb.add_argument(
        "source", metavar="HF_DIR", help="the Hugging Face folder, or hub:NAME[@REVISION] to download from the hub"
    )
    verb.add_argument("checkpoint", metavar="CHECKPOINT", help="the new checkpoint folder; may be gs://…")
    _add_dtype(verb)

    for name, run, text in (
        ("sft", _sft, "Fine-tune a model on chat records."),
        ("grpo", _grpo, "Train a model with GRPO on prompts with checkable answers."),
    ):
        example = f"psyche {name} --config configs/{name}_tiny.yaml --set run.dir=runs/my_{name}"
        verb = add(name, run, text, example)
        verb.add_argument("--config", type=Path, required=True, help="a YAML file; see configs/")
        _add_set(verb)
        verb.add_argument(
            "--profile", type=int, default=0, metavar="STEPS", help="trace that many steps into the run's `profile`"
        )

    verb = add(
        "export",
        _export,
        "Write a checkpoint, or a run's latest one, as a Hugging Face folder.",
        "psyche export runs/demo/grpo models/my-model --dtype bfloat16",
    )
    verb.add_argument(
        "source", metavar="CHECKPOINT", help="a checkpoint folder, one step of it, or a run; may be gs://…"
    )
    verb.add_argument("folder", type=Path, metavar="HF_DIR", help="the new Hugging Face folder")
    verb.add_argument(
        "--push",
        metavar="NAME",
        help="also put it into this repository of the Hugging Face hub, made as a private one if it is new; "
        "HF_TOKEN must be set",
    )
    _add_dtype(verb)

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
    verb.add_argument("--label", help="what reports call the model (default: the last part of MODEL)")
    verb.add_argument("--cells", metavar="NAME,NAME", help="only these parts of the benchmark")
    verb.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    verb.add_argument(
        "--train", metavar="URI", help="training data: what they hold of the benchmark is scored apart, too"
    )
    verb.add_argument("--shots", type=int, metavar="N", help="worked examples before each choice question")
    verb.add_argument(
        "--shots-from", metavar="NAME|FILE", help="where they are from: a benchmark with the same cells, not scored"
    )
    verb.add_argument("--samples", type=int, default=1, metavar="K", help="answers to each question (default 1)")
    verb.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default 512)")
    verb.add_argument("--temperature", type=float, default=0.0, help="0 (the default) always takes the likeliest token")
    verb.add_argument("--batch-size", type=int, metavar="N", help="questions at once (default 64; of an endpoint 16)")
    verb.add_argument(
        "--bare", action="store_true", help="ask without system prompt and instruction, for a model that has its own"
    )
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
        help="judge against the replies in this evaluation (default: against the dialogues' own replies)",
    )
    verb.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="float32")
    verb.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    verb.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="also write scores and answers to a JSON file; what was killed goes on from what is kept beside it",
    )
    verb.add_argument("--json", action="store_true", help="print the scores as one JSON object")

    verb = add(
        "pack",
        _pack,
        "Tokenize chat records once and pack them into rows of one length, as SFT reads them fastest.",
        "psyche pack --config configs/pack.yaml --set out=gs://my-bucket/packed",
    )
    verb.add_argument("--config", type=Path, required=True, help="a YAML file; see configs/pack.yaml")
    _add_set(verb)

    verb = add(
        "data",
        _data,
        "Look at, check, print or copy data sets (folders of ArrayRecord files with a manifest), also in buckets.",
        "psyche data copy data/sft gs://my-bucket/sft",
    )
    actions = {
        "ls": "list the data sets at or under URI",
        "verify": "read every byte and compare checksums",
        "cat": "print records, one JSON object a line",
        "copy": "copy to TO, the manifest last",
        "import": "read public data (--format) at URI, write the clean records to TO",
    }
    verb.add_argument(
        "action", choices=actions, metavar="ACTION", help="; ".join(f"{name}: {text}" for name, text in actions.items())
    )
    verb.add_argument("uri", metavar="URI", help="a local folder or gs://bucket/prefix")
    verb.add_argument("to", metavar="TO", nargs="?", help="where `copy` and `import` write")
    verb.add_argument("--format", choices=("cpsyexam", "pceb", "smile"), help="of what `import` reads, as published")
    verb.add_argument("--limit", type=int, metavar="N", help="`cat` prints only the first N records")
    verb.add_argument(
        "--deadline", type=float, default=300.0, metavar="SECONDS", help="give up on a file after that long (300)"
    )

    verb = add(
        "decontaminate",
        _decontaminate,
        "Take out of training data what a benchmark asks: exact and near twins, and questions on its cases.",
        "psyche decontaminate --train data/cpsyexam --eval data/pceb --out data/clean",
    )
    verb.add_argument("--train", required=True, metavar="URI", help="a data set of records of any kind")
    verb.add_argument("--eval", required=True, metavar="URI", help="questions: a data set or a JSONL file")
    verb.add_argument("--out", required=True, metavar="URI", help="where the clean data set is written")
    verb.add_argument(
        "--near", type=float, default=0.3, metavar="SHARE", help="of common text that makes a near twin (default 0.3)"
    )
    verb.add_argument("--json", action="store_true", help="print counts and examples as one JSON object")

    verb = add(
        "report",
        _report,
        "Write one offline HTML page about one or several runs, or Markdown for a model card.",
        "psyche report runs/demo/sft runs/demo/grpo --out report.html",
    )
    verb.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    verb.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="default: report.html; one that ends with .md gets the figures as Markdown for a model card",
    )

    verb = add(
        "chat",
        _chat,
        "Talk with a model in the terminal.",
        "psyche chat runs/demo/grpo --show-reasoning",
    )
    verb.add_argument(
        "model", metavar="MODEL", help="a Hugging Face folder, a checkpoint, a run, or an endpoint: URL[#MODEL]"
    )
    verb.add_argument("--config", type=Path, help="a YAML file as for serve; see docs/serve.md")
    _add_set(verb)
    verb.add_argument("--system", default="", metavar="TEXT", help="a system prompt in place of the model's own")
    verb.add_argument("--show-reasoning", action="store_true", help="do not fold <think>…</think>")
    _add_conversation(verb)

    verb = add(
        "serve",
        _serve,
        "Serve a model behind an OpenAI-compatible endpoint, with a web page, on this machine.",
        "psyche serve runs/demo/grpo --port 8000",
    )
    verb.add_argument("model", metavar="MODEL", help="a Hugging Face folder, a checkpoint or a run")
    verb.add_argument("--config", type=Path, help="a YAML file of serving; see docs/serve.md")
    _add_set(verb)
    verb.add_argument("--host", help="default 127.0.0.1; another needs a token in PSYCHE_SERVE_TOKEN")
    verb.add_argument("--port", type=int, metavar="N", help="default 8000; 0 takes any that is free")
    verb.add_argument("--name", help="what clients call the model (default: the last part of MODEL)")
    _add_conversation(verb)

    verb = add(
        "plan",
        _plan,
        "Compile a training program for a TPU slice without having one: does it fit, what does it send, how long?",
        "psyche plan --config configs/sft_7b_v5e16.yaml --topology v5e:4x4",
    )
    verb.add_argument("--config", type=Path, required=True, help="a YAML file of SFT or GRPO; see configs/")
    verb.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="v5e:4x4, v6e:2x4, v5p:2x2x2, ...")
    verb.add_argument("--program", choices=("sft", "grpo"), help="default: by the keys of the config")
    _add_set(verb)
    verb.add_argument(
        "--search", action="store_true", help="try micro-batches, remat and waves; show the fastest plan that fits"
    )
    verb.add_argument("--json", action="store_true", help="print the plan as one JSON object")

    verb = add(
        "bench",
        _bench,
        "Time the real programs on a random model, by default at a size for two CPU cores.",
        "psyche bench grpo --prompt-length 512 --beta 0.04 --json",
    )
    _add_bench(verb)

    verb = add(
        "demo",
        _demo,
        "The whole way on a CPU with a tiny random model: tokenizer, SFT, GRPO, export, evaluation, report.",
        "psyche demo --out runs/demo",
    )
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, or an unfinished demo's")
    verb.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    return parser


def _add_set(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change one key of the config, for example optimizer.learning_rate=1e-6; may be repeated",
    )


def _add_conversation(verb: argparse.ArgumentParser) -> None:
    """Options of whatever talks with people."""
    verb.add_argument("--plain", action="store_true", help="add no system prompt and no instruction to the messages")
    verb.add_argument("--region", metavar="CODE", help="whose hotline people in a crisis are given (default CN)")
    verb.add_argument("--crisis-log", metavar="FILE", help="where crisis events are noted, without any text")
    verb.add_argument("--no-crisis-gate", action="store_true", help="answer people in a crisis by the model alone")


def _add_bench(verb: argparse.ArgumentParser) -> None:
    from psyche_jax.bench.shape import GrpoShape, ModelShape, RolloutShape, SftShape

    what = verb.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, kind, text in (
        ("sft", SftShape, "a step of SFT"),
        ("grpo", GrpoShape, "an iteration of GRPO: rollout, rewards, update; no response ends early"),
        ("rollout", RolloutShape, "the rollout alone; no response ends early"),
    ):
        parser = what.add_parser(name, help=text, description=f"Time {text}.")
        parser.set_defaults(shape=kind)
        for entry in (*dataclasses.fields(ModelShape), *dataclasses.fields(kind)):
            flag = f"--{entry.name.replace('_', '-')}"
            default = entry.default
            if entry.name == "dtype":
                choices = ("float32", "bfloat16")
                parser.add_argument(flag, choices=choices, default=default, help="that products are computed in")
            elif isinstance(default, bool):
                parser.add_argument(flag, action="store_true", help="the head is the embedding")
            elif isinstance(default, int | float):
                parser.add_argument(flag, type=type(default), default=default, metavar="N", help=f"default {default}")
        parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed steps (default 10)")
        parser.add_argument("--warmup", type=int, default=3, metavar="N", help="steps before those (default 3)")
        parser.add_argument("--seed", type=int, default=0, help="of weights and tokens (default 0)")
        parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_dtype(verb: argparse.ArgumentParser) -> None:
    short = {"f32": "float32", "bf16": "bfloat16"}
    verb.add_argument(
        "--dtype",
        type=lambda name: short.get(name, name),
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights written: float32 (f32, the default) or bfloat16 (bf16)",
    )


def _synth(arguments: argparse.Namespace) -> None:
    from psyche_jax.config import load_config
    from psyche_jax.synth.config import SynthConfig
    from psyche_jax.synth.pipeline import STAGES, run_synth

    config = load_config(SynthConfig, arguments.config, arguments.overrides)
    if arguments.stage is not None and arguments.stage not in STAGES:
        raise UsageError(f"--stage {arguments.stage}: there is no such stage; known: {', '.join(STAGES)}")
    _print_stages(run_synth(config, arguments.stage), arguments.json)


def _select(arguments: argparse.Namespace) -> None:
    from psyche_jax.config import load_config
    from psyche_jax.synth.config import SelectConfig
    from psyche_jax.synth.pipeline import run_select

    _print_stages(run_select(load_config(SelectConfig, arguments.config, arguments.overrides)), arguments.json)


def _print_stages(reports: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(reports, ensure_ascii=False))
        return
    for name, report in reports.items():
        counts = ", ".join(f"{key} {value}" for key, value in report["counts"].items())
        aside = ", ".join(f"{value} {reason}" for reason, value in report["set_aside"].items())
        print(f"{name}: {counts}{'; set aside: ' + aside if aside else ''}")


def _review(arguments: argparse.Namespace) -> None:
    import getpass

    from psyche_jax.synth.review import STORE, ReviewStore

    path = arguments.store / STORE if arguments.store.is_dir() else arguments.store
    if not path.is_file():
        raise UserError(f"{path}: there is no review queue; `psyche synth` makes one")
    who = arguments.who or getpass.getuser()
    store = ReviewStore(path)
    if arguments.export is not None:
        print(f"{arguments.export}: {store.export(arguments.export)} items")
    elif arguments.load is not None:
        taken, faults = store.load(arguments.load, who)
        for line in faults:
            print(f"set aside: {line}", file=sys.stderr)
        print(f"{path}: {taken} decisions taken, {len(faults)} set aside")
        if faults and not taken:
            raise UserError(f"{arguments.load}: holds no decision that could be taken")
    else:
        from psyche_jax.synth.review_page import serve_review

        serve_review(store, who, arguments.host, arguments.port)


def _import(arguments: argparse.Namespace) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # no device is needed, and one in use would be waited for
    from psyche_jax.convert import import_model

    conversion = import_model(arguments.source, arguments.checkpoint, arguments.dtype)
    print(f"{arguments.checkpoint}: {conversion}")


def _export(arguments: argparse.Namespace) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    from psyche_jax.convert import export_model

    conversion = export_model(arguments.source, arguments.folder, arguments.dtype, arguments.push)
    print(f"{arguments.folder}: {conversion}")


def _sft(arguments: argparse.Namespace) -> None:
    from psyche_jax.config import SftConfig, load_config

    _check_at_least("profile", arguments.profile, 0)
    config = load_config(SftConfig, arguments.config, arguments.overrides)
    _start_jax(config.distributed)
    from psyche_jax.train.sft import train_sft

    train_sft(config, arguments.profile)


def _grpo(arguments: argparse.Namespace) -> None:
    from psyche_jax.config import GrpoConfig, load_config

    _check_at_least("profile", arguments.profile, 0)
    config = load_config(GrpoConfig, arguments.config, arguments.overrides)
    _start_jax(config.distributed)
    from psyche_jax.train.grpo_run import train_grpo

    train_grpo(config, arguments.profile)


def _eval(arguments: argparse.Namespace) -> None:
    if (arguments.shots is None) != (arguments.shots_from is None):
        raise UsageError("--shots and --shots-from go together")
    for name in ("limit", "shots", "samples", "max_new_tokens", "batch_size"):
        _check_at_least(name, getattr(arguments, name), 1)
    if not 0 <= arguments.temperature < math.inf:
        raise UsageError(f"--temperature must be 0 or more, not {arguments.temperature}")
    if arguments.samples > 1 and arguments.temperature == 0:
        raise UsageError("--samples above 1 needs a --temperature above 0: greedy answers are all alike")
    _check_seed(arguments.seed)
    if arguments.out is not None:
        if arguments.out.is_dir():
            raise UsageError(f"--out {arguments.out}: is a folder; give the name of a JSON file")
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    from psyche_jax.evaluate.benchmarks import read_benchmark, with_shots
    from psyche_jax.evaluate.evaluation import evaluate, evaluation_file
    from psyche_jax.evaluate.scores import scores_table

    benchmark = read_benchmark(arguments.bench)
    for line in benchmark.set_aside:
        print(f"set aside: {line}", file=sys.stderr)
    if arguments.train:
        from psyche_jax.evaluate.leaks import look_for_leaks

        benchmark = look_for_leaks(benchmark, arguments.train)
    benchmark = benchmark.only(arguments.cells.split(",") if arguments.cells else None, arguments.limit)
    if arguments.shots:
        benchmark = with_shots(benchmark, read_benchmark(arguments.shots_from), arguments.shots)
    judges = _judges(arguments, benchmark)
    model = _model_to_evaluate(arguments)
    label = arguments.label or model.short_name
    is_run = (Path(arguments.model) / "config.yaml").is_file()
    places = [evaluation_file(Path(arguments.model), benchmark.name, label)] if is_run else []
    places += [arguments.out] if arguments.out is not None else []
    evaluation = evaluate(
        model,
        benchmark,
        label=label,
        samples=arguments.samples,
        files=places,
        judges=judges,
        against=arguments.against,
    )
    for line in evaluation["set_aside"][len(benchmark.set_aside) :]:
        print(f"set aside: {line}", file=sys.stderr)
    summary = {**evaluation["scores"], "set_aside": len(evaluation["set_aside"])}
    if judges:
        summary["empathy"] = evaluation["empathy"]
    print(json.dumps(summary) if arguments.json else scores_table(summary))


def _judges(arguments: argparse.Namespace, benchmark: "Benchmark") -> "list[Endpoint]":
    """Who judges empathy."""
    from psyche_jax.evaluate.empathy import MAX_TOKENS
    from psyche_jax.evaluate.endpoint import SCHEMES, Endpoint

    if arguments.judge and not any(task.kind == "dialogue" for task in benchmark.tasks):
        raise UsageError(f"--judge: {benchmark.name} holds no dialogues; try --bench dialogues")
    for address in arguments.judge:
        if not address.startswith(SCHEMES):
            raise UsageError(f"--judge {address}: must be URL#NAME of an endpoint; psyche serve makes one of a model")
    concurrency = arguments.batch_size or 16
    return [
        Endpoint(address, max_new_tokens=MAX_TOKENS, temperature=0.0, concurrency=concurrency)
        for address in arguments.judge
    ]


def _model_to_evaluate(arguments: argparse.Namespace) -> "Model":
    """What `psyche eval` asks."""
    from psyche_jax.config import PromptSection
    from psyche_jax.evaluate.endpoint import SCHEMES, Endpoint

    prompt = PromptSection(system="", instruction="") if arguments.bare else None
    if arguments.model.startswith(SCHEMES):
        return Endpoint(
            arguments.model,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
            concurrency=arguments.batch_size or 16,
            prompt=prompt,
        )
    _start_jax()
    from psyche_jax.evaluate.local import LocalModel
    from psyche_jax.model.sampling import Sampling

    return LocalModel(
        arguments.model,
        Sampling(arguments.max_new_tokens, arguments.temperature),
        compute_dtype=arguments.compute_dtype,
        batch_size=arguments.batch_size or 64,
        seed=arguments.seed,
        prompt=prompt,
    )


def _pack(arguments: argparse.Namespace) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    from psyche_jax.config import load_config
    from psyche_jax.data.packing import PackConfig, pack

    config = load_config(PackConfig, arguments.config, arguments.overrides)
    manifest, set_aside = pack(config)
    for line in set_aside:
        print(f"set aside: {line}", file=sys.stderr)
    cut = f"; {manifest.packing.cut} cut" if manifest.packing is not None and manifest.packing.cut else ""
    print(f"{config.out}: {manifest}; {len(set_aside)} set aside{cut}")


def _data(arguments: argparse.Namespace) -> None:
    from psyche_jax.data import dataset

    action, uri, deadline = arguments.action, arguments.uri, arguments.deadline
    if (action in ("copy", "import")) != (arguments.to is not None):
        needs_two = f"{action} needs two addresses: psyche data {action} URI TO"
        raise UsageError(needs_two if arguments.to is None else "too many addresses")
    if (action == "import") != (arguments.format is not None):
        raise UsageError("import needs --format, and the others do not take it")
    if not 0 < deadline < math.inf:
        raise UsageError(f"--deadline must be positive, not {deadline}")
    _check_at_least("limit", arguments.limit, 1)
    if action == "ls":
        for address, manifest in dataset.find_datasets(uri, deadline):
            print(f"{address}: {manifest}")
    elif action == "verify":
        manifest, others = dataset.verify_dataset(uri, deadline)
        print(f"{uri}: whole: {manifest}")
        for name in others:
            print(f"{uri}: {name} is not part of it and may be removed")
    elif action == "cat":
        for content in dataset.first_records(uri, arguments.limit, deadline):
            print(content)
    elif action == "import":
        from psyche_jax.data.public import LOADERS

        loaded = LOADERS[arguments.format](Path(uri))
        print(f"{arguments.to}: {dataset.write_dataset(arguments.to, loaded.good, {'source': uri}, deadline=deadline)}")
        for line in loaded.set_aside:
            print(f"set aside: {line}", file=sys.stderr)
        print(f"{len(loaded.set_aside)} set aside; faults seen, mended ones among them:")
        for fault, count in loaded.faults.most_common():
            print(f"{count:8} {fault}")
    else:
        print(f"{arguments.to}: {dataset.copy_dataset(uri, arguments.to, deadline)}")


def _decontaminate(arguments: argparse.Namespace) -> None:
    from psyche_jax.data.decontamination import decontaminate_places

    if not 0 < arguments.near <= 1:
        raise UsageError(f"--near must be above 0 and at most 1, not {arguments.near}")
    result = decontaminate_places(arguments.train, arguments.eval, arguments.out, arguments.near)
    summary = result.summary()
    if arguments.json:
        print(json.dumps(summary, ensure_ascii=False))
        return
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(summary["leaks"].items())) or "none"
    print(f"{arguments.out}: {summary['clean']} clean records; leaks: {counts}")
    for reason, leaks in summary["examples"].items():
        for leak in leaks:
            print(
                f"  {reason} {leak['similarity']:.2f}: {leak['train_text'][:60]!r} ~ {leak['evaluation_text'][:60]!r}"
            )


def _report(arguments: argparse.Namespace) -> None:
    from psyche_jax.evaluate.report import write_report

    write_report(arguments.runs, arguments.out)
    print(arguments.out)


def _conversation(arguments: argparse.Namespace) -> list[str]:
    """The options of `_add_conversation` as changes of a config."""
    changes = ["prompt.system=''", "prompt.instruction=''"] if arguments.plain else []
    changes += ["crisis.gate=false"] if arguments.no_crisis_gate else []
    for key, value in (("crisis.region", arguments.region), ("crisis.log", arguments.crisis_log)):
        changes += [f"{key}={json.dumps(value)}"] if value else []
    return changes


def _chat(arguments: argparse.Namespace) -> None:
    from psyche_jax.serve.config import serve_config

    changes = [*arguments.overrides, *_conversation(arguments)]
    config = serve_config(arguments.config, changes, {"model": arguments.model})
    _start_jax()
    from psyche_jax.serve.chat import chat

    chat(config, arguments.system, arguments.show_reasoning)


def _serve(arguments: argparse.Namespace) -> None:
    from psyche_jax.serve.config import serve_config

    flags = {"model": arguments.model, "host": arguments.host, "port": arguments.port, "name": arguments.name}
    config = serve_config(arguments.config, [*arguments.overrides, *_conversation(arguments)], flags)
    _start_jax()
    from psyche_jax.serve.server import announce, serve

    serve(config, lambda address: announce(config, address))


def _plan(arguments: argparse.Namespace) -> None:
    from psyche_jax.plan.slices import parse_topology, use_cpu

    slice_ = parse_topology(arguments.topology)
    use_cpu()
    from psyche_jax.plan.planning import load_plan_config, make_plan, search
    from psyche_jax.plan.text import as_text

    config = load_plan_config(arguments.config, arguments.overrides, arguments.program)
    plan = search(config, slice_) if arguments.search else make_plan(config, slice_)
    print(json.dumps(plan.as_json()) if arguments.json else as_text(plan))
    if not plan.fits:
        raise UserError(f"{arguments.config} does not fit {slice_.name}: {plan.advice[0]}")


def _bench(arguments: argparse.Namespace) -> None:
    from psyche_jax.bench.shape import ModelShape

    for name in ("steps", "warmup"):
        _check_at_least(name, getattr(arguments, name), 1)
    _check_seed(arguments.seed)
    model = ModelShape(**{entry.name: getattr(arguments, entry.name) for entry in dataclasses.fields(ModelShape)})
    names = {entry.name for entry in dataclasses.fields(arguments.shape)} - {"model"}
    shape = arguments.shape(model, **{name: getattr(arguments, name) for name in names})
    _start_jax()
    from psyche_jax.bench.measure import as_text, run_benchmark

    outcome = run_benchmark(shape, arguments.steps, arguments.warmup, arguments.seed)
    print(json.dumps(outcome) if arguments.json else as_text(outcome))


def _demo(arguments: argparse.Namespace) -> None:
    _check_seed(arguments.seed)
    _start_jax()
    from psyche_jax.demo import run_demo

    run_demo(arguments.out, arguments.seed)


def _check_at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed must be from 0 to 4294967295, not {seed}")


def _start_jax(distributed: "DistributedSection | None" = None) -> None:
    """What must come before the first computation: the persistent compilation cache, the other hosts."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # XLA's threads, else one a virtual device: collectives that wait for each other could hold all of them.
        os.environ.setdefault("NPROC", "64")
    import jax

    from psyche_jax import hosts

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(_CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if distributed is not None:
        hosts.initialize(distributed)
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        # A program from the cache may enter its collectives in another order on each virtual device, and hang.
        jax.config.update("jax_enable_compilation_cache", False)


if __name__ == "__main__":
    sys.exit(main())
