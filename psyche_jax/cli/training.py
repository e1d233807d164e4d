"""Models and their training: import, sft, grpo, export, plan, bench, demo."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from psyche_jax.cli import start
from psyche_jax.cli.arguments import AddVerb, add_config, check_at_least, check_seed
from psyche_jax.config import GrpoConfig, SftConfig
from psyche_jax.config_files import config_to_dict, load_config, read_values
from psyche_jax.errors import UsageError, UserError
from psyche_jax.storage.files import check_new_folder, in_bucket, make_folder, read_json, write_json
from psyche_jax.train.run_changes import CHANGES

_MOST_BENCH_STEPS = 10_000


def add_verbs(add: AddVerb) -> None:
    """Put this module's verbs into the parser."""
    verb = add(
        "import",
        _import,
        "Turn a Hugging Face folder of a Qwen or Llama model, or a peft folder of adapters, into a checkpoint.",
        "psyche import hub:Qwen/Qwen2.5-7B-Instruct models/Qwen2.5-7B-Instruct --dtype bfloat16",
    )
    verb.add_argument(
        "source", metavar="HF_DIR", help="the Hugging Face folder, or hub:NAME[@REVISION] to download from the hub"
    )
    verb.add_argument("checkpoint", metavar="CHECKPOINT", help="the new checkpoint folder; may be gs://…")
    verb.add_argument("--base", metavar="MODEL", help="base model of adapters (default: the one their folder names)")
    _add_dtype(verb, "; int8 (linear layers; the rest is bfloat16) for a base of adapters", "int8")

    # SFT and GRPO take the same options.
    for name, run, text in (
        ("sft", _sft, "Fine-tune a model on chat records."),
        ("grpo", _grpo, "Train a model with GRPO on prompts with checkable answers."),
    ):
        example = f"psyche {name} --config configs/{name}_tiny.yaml --set run.dir=runs/my_{name}"
        verb = add(name, run, text, example)
        add_config(verb, f"settings of the run, such as {name}_7b_v5e16")
        verb.add_argument(
            "--profile", type=int, default=0, metavar="STEPS", help="trace this many steps into the run's `profile`"
        )
        verb.add_argument(
            "--accept-changed",
            type=_changes,
            default=[],
            action="extend",
            metavar="WHAT[,WHAT]",
            help=f"resume a run although this has changed: {', '.join(CHANGES)}; the run records it",
        )

    verb = add(
        "export",
        _export,
        "Turn a checkpoint, or a run's latest one, into a Hugging Face folder.",
        "psyche export runs/demo/grpo models/my-model --dtype bfloat16",
    )
    verb.add_argument(
        "source", metavar="CHECKPOINT", help="a checkpoint folder, one step of it, or a run; may be gs://…"
    )
    verb.add_argument("folder", type=Path, metavar="HF_DIR", help="the new Hugging Face folder")
    verb.add_argument(
        "--push",
        metavar="NAME",
        help="also upload it to this Hugging Face repository, created as private if it is new; needs HF_TOKEN",
    )
    verb.add_argument(
        "--adapters",
        action="store_true",
        help="write only the adapters, as a folder for peft (default: merge them into the base)",
    )
    verb.add_argument(
        "--base",
        metavar="MODEL",
        help="for adapters over an int8 checkpoint: merge them into this model, from which it was imported",
    )
    _add_dtype(verb)

    verb = add(
        "plan",
        _plan,
        "Compile a training program for a TPU slice, without a TPU: does it fit, what is exchanged, how fast is it?",
        "psyche plan --config configs/sft_7b_v5e16.yaml --topology v5e:4x4",
    )
    add_config(verb, "settings of SFT or GRPO, such as sft_7b_v5e16", False)
    verb.add_argument("--topology", metavar="CHIP:SHAPE", help="v5e:4x4, v6e:2x4, v5p:2x2x2, ...")
    verb.add_argument("--program", choices=("sft", "grpo"), help="default: recognized by the config's keys")
    verb.add_argument(
        "--search", action="store_true", help="try micro-batches, remat and slots; show the fastest plan that fits"
    )
    verb.add_argument(
        "--lengths",
        metavar="LENGTHS",
        help="response lengths for the forecast: mean=400,p99=2048 (log-normal), or the folder of a run (default: all "
        "are max_new_tokens long)",
    )
    verb.add_argument("--steps", type=int, metavar="N", help="steps of the run, for its hours and price")
    verb.add_argument("--price", type=float, metavar="DOLLARS", help="price of one chip for an hour")
    verb.add_argument("--json", action="store_true", help="print the plan as one JSON object")
    verb.add_argument(
        "--table", action="store_true", help="instead of one plan: compile all common models for all common slices"
    )
    verb.add_argument(
        "--out",
        type=Path,
        metavar="FILE.jsonl",
        help="with --table: one line per cell, kept between runs; the page is beside it, as .md",
    )
    for name, example in (
        ("models", "0.5B,7B"),
        ("chips", "v5e-1,v6e-1"),
        ("modes", "adapters,int8,full"),
        ("programs", "grpo,sft"),
    ):
        verb.add_argument(f"--{name}", metavar="LIST", help=f"with --table: only these: {example} (default: all)")

    verb = add(
        "bench",
        _bench,
        "Time the real programs on a random model, by default at a size for two CPU cores: SFT, GRPO, or its rollout "
        "alone. Each has --help.",
        "psyche bench grpo --prompt-length 512 --beta 0.04 --json",
    )
    _add_bench(verb)

    verb = add(
        "demo",
        _demo,
        "Run the whole pipeline on a CPU with a tiny random model: tokenizer, SFT, GRPO, export, evaluation, report.",
        "psyche demo --out runs/demo",
    )
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, or an unfinished demo's")
    verb.add_argument("--seed", type=int, default=0, help="for everything random (default 0)")


def _add_bench(verb: argparse.ArgumentParser) -> None:
    from psyche_jax.bench.options import MODEL, OPTIONS, WHATS

    what = verb.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, text in WHATS.items():
        parser = what.add_parser(
            name,
            help=text,
            description=f"Time {text}, with random weights and tokens.",
            epilog="Each option sets the config key named beside it; with --config it changes the file's value. "
            "docs/measurements/benchmarks.md says what is measured and printed.",
        )
        program = "sft" if name == "sft" else "grpo"
        add_config(parser, f"settings of {program.upper()}, such as {program}_7b_v5e16", False)
        for option_name, option in {**OPTIONS[name], **MODEL}.items():
            flag = f"--{option_name.replace('_', '-')}"
            default = f"; default {'all' if option.default is None else option.default}"
            text = f"{option.meaning} ({option.key}{default})"
            if isinstance(option.default, bool):
                parser.add_argument(flag, action="store_true", default=None, help=text)
            elif option.choices:
                parser.add_argument(flag, choices=option.choices, help=text)
            else:
                kind = float if isinstance(option.default, float) else int
                parser.add_argument(flag, type=kind, metavar="N", help=text)
        if name != "sft":
            parser.add_argument(
                "--lengths",
                metavar="LENGTHS",
                help="lengths at which responses stop: mean=400,p99=2048 (log-normal), or the folder of a run "
                "(default: none stops early)",
            )
        parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed steps (default 10)")
        parser.add_argument("--warmup", type=int, default=3, metavar="N", help="steps before those (default 3)")
        parser.add_argument("--seed", type=int, default=0, help="for weights and tokens (default 0)")
        parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_dtype(verb: argparse.ArgumentParser, more_help: str = "", *more: str) -> None:
    short = {"f32": "float32", "bf16": "bfloat16"}
    verb.add_argument(
        "--dtype",
        type=lambda name: short.get(name, name),
        choices=("float32", "bfloat16", *more),
        default="float32",
        help=f"dtype of the weights written: float32 (f32, the default) or bfloat16 (bf16){more_help}",
    )


def _changes(text: str) -> list[str]:
    """Some of `CHANGES`, from a list with commas."""
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in CHANGES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(CHANGES)}")
    return names


def _import(arguments: argparse.Namespace) -> None:
    from psyche_jax.storage.hub import PREFIX
    from psyche_jax.train.step_folders import check_model

    if not in_bucket(arguments.checkpoint):
        check_new_folder(Path(arguments.checkpoint))
    if not arguments.source.startswith(PREFIX):
        check_model(arguments.source)
    os.environ["JAX_PLATFORMS"] = "cpu"  # no device is needed, and one in use would be waited for
    start.quiet_orbax()
    from psyche_jax.convert import import_model

    conversion = import_model(arguments.source, arguments.checkpoint, arguments.dtype, arguments.base)
    print(f"{arguments.checkpoint}: {conversion}")


def _sft(arguments: argparse.Namespace) -> None:
    check_at_least("profile", arguments.profile, 0)
    config = load_config(SftConfig, arguments.config, arguments.overrides)
    _check_places(config, arguments.accept_changed)
    start.start_jax(config.distributed)
    from psyche_jax.train.sft import train_sft

    train_sft(config, arguments.profile, arguments.accept_changed)


def _grpo(arguments: argparse.Namespace) -> None:
    check_at_least("profile", arguments.profile, 0)
    config = load_config(GrpoConfig, arguments.config, arguments.overrides)
    _check_places(config, arguments.accept_changed)
    start.start_jax(config.distributed)
    from psyche_jax.train.grpo_run import train_grpo

    train_grpo(config, arguments.profile, arguments.accept_changed)


def _check_places(config: SftConfig | GrpoConfig, accepted: Collection[str]) -> None:
    """See, before JAX starts, that model and data are there and that the run's folder may be used.

    In buckets it is not asked here.
    """
    from psyche_jax.data.dataset import check_readable
    from psyche_jax.train.run_files import check_place
    from psyche_jax.train.step_folders import check_model

    try:
        check_model(config.model.path)
    except UserError as error:
        made = "; `psyche demo --out runs/demo` makes it" if config.model.path.startswith("runs/demo/") else ""
        raise UserError(f"{error} (the config's model.path; --set model.path=FOLDER{made})") from error
    train = config.data.train
    for place in [train] if isinstance(train, str) else train:
        check_readable(place)
    if config.data.evaluation is not None:
        try:
            check_readable(config.data.evaluation)
        except UserError as error:
            how = "the config's data.evaluation; --set data.evaluation=null does without"
            raise UserError(f"{error} ({how})") from error
    if not in_bucket(config.run.dir):
        check_place(Path(config.run.dir), config_to_dict(config), None, accepted, early=True)


def _export(arguments: argparse.Namespace) -> None:
    from psyche_jax.train.step_folders import check_model

    check_model(arguments.source)
    check_new_folder(arguments.folder)
    os.environ["JAX_PLATFORMS"] = "cpu"
    start.quiet_orbax()
    from psyche_jax.convert import export_model

    options = (arguments.dtype, arguments.push, arguments.adapters, arguments.base)
    conversion = export_model(arguments.source, arguments.folder, *options)
    print(f"{arguments.folder}: {conversion}")


def _plan(arguments: argparse.Namespace) -> None:
    from psyche_jax.plan.slices import parse_topology, use_cpu

    of_plan = ("config", "topology", "program", "lengths", "steps", "price", "overrides", "search", "json")
    of_table = ("out", "models", "chips", "modes", "programs")
    for name in of_plan if arguments.table else of_table:
        if getattr(arguments, name) not in (None, False, []):
            flag = "--set" if name == "overrides" else f"--{name}"
            raise UsageError(f"{flag} cannot be given {'with' if arguments.table else 'without'} --table")
    for name in ("out",) if arguments.table else ("config", "topology"):
        if getattr(arguments, name) is None:
            raise UsageError(f"--{name} is missing")
    if arguments.table:
        if arguments.out.suffix != ".jsonl":
            raise UsageError(f"--out {arguments.out}: must end in .jsonl")
        use_cpu()
        from psyche_jax.plan.table import FILTERS, choose, make_table

        make_table(choose({name: getattr(arguments, name) for name in FILTERS}), arguments.out)
        return
    slice_ = parse_topology(arguments.topology)
    config = load_plan_config(arguments.config, arguments.overrides, arguments.program)
    use_cpu()
    from psyche_jax.plan.report import Wishes, as_text, make_plan
    from psyche_jax.plan.search import search

    wishes = Wishes(arguments.lengths, arguments.steps, arguments.price)
    if sys.stderr.isatty():
        print(f"psyche plan: compiling for {slice_.name}; a large model takes minutes", file=sys.stderr)
    plan = (search if arguments.search else make_plan)(config, slice_, wishes)
    print(json.dumps(plan.as_json()) if arguments.json else as_text(plan))
    if not plan.fits:
        raise UserError(f"{arguments.config} does not fit {slice_.name}: {plan.advice[0]}")


def load_plan_config(path: Path, overrides: Sequence[str], program: str | None) -> SftConfig | GrpoConfig:
    """Read a config of SFT or of GRPO; without `program`, its keys tell which.

    Raises:
      UsageError: it is broken.
    """
    if program is None:
        values = read_values(path, overrides)
        grpo = {field.name for field in dataclasses.fields(GrpoConfig)}
        grpo -= {field.name for field in dataclasses.fields(SftConfig)}
        data = values.get("data")
        is_grpo = bool(grpo & set(values)) or (isinstance(data, dict) and "max_prompt_length" in data)
        program = "grpo" if is_grpo else "sft"
    if program == "grpo":
        return load_config(GrpoConfig, path, overrides)
    return load_config(SftConfig, path, overrides)


def _bench(arguments: argparse.Namespace) -> None:
    read_values(arguments.config, arguments.overrides)  # a wrong path is said before JAX is loaded
    from psyche_jax.bench.case import make_case
    from psyche_jax.bench.options import MODEL, OPTIONS

    for name in ("steps", "warmup"):
        check_at_least(name, getattr(arguments, name), 1)
    if arguments.steps + arguments.warmup > _MOST_BENCH_STEPS:
        raise UsageError(
            f"--steps and --warmup must be at most {_MOST_BENCH_STEPS} together: all batches are made before"
        )
    check_seed(arguments.seed)
    options = {**OPTIONS[arguments.what], **MODEL}
    given = {name: getattr(arguments, name) for name in options if getattr(arguments, name) is not None}
    for name, value in given.items():
        if (least := options[name].least) is not None:
            check_at_least(name, value, least)
    lengths = getattr(arguments, "lengths", None)
    case = make_case(arguments.what, given, arguments.config, arguments.overrides, lengths)
    start.start_jax(case.config.distributed)
    from psyche_jax.bench.measure import as_text, run_benchmark
    from psyche_jax.train.hosts import is_first

    outcome = run_benchmark(case, arguments.steps, arguments.warmup, arguments.seed)
    if is_first():
        print(json.dumps(outcome) if arguments.json else as_text(outcome))


def _demo(arguments: argparse.Namespace) -> None:
    check_seed(arguments.seed)
    # Two demos in one folder would mix their runs.
    out, marker = arguments.out, arguments.out / "demo.json"
    if marker.is_file():
        if (old := read_json(marker)).get("seed") != arguments.seed:
            raise UserError(f"{out}: holds a demo with seed {old.get('seed')}; choose another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not empty and holds no demo; choose another --out")
    make_folder(out, "--out")
    write_json(marker, {"seed": arguments.seed})
    start.start_jax()
    from psyche_jax.demo import run_demo

    run_demo(arguments.out, arguments.seed)
