"""Data sets: data, pack, decontaminate."""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from psyche_jax.cli.arguments import AddVerb, add_config, check_at_least, say_skipped
from psyche_jax.errors import UsageError, UserError
from psyche_jax.storage.files import in_bucket

if TYPE_CHECKING:
    from psyche_jax.data.mapping import ImportConfig

_Parser: TypeAlias = argparse.ArgumentParser


def add_verbs(add: AddVerb) -> None:
    """Put this module's verbs into the parser."""
    verb = add(
        "data",
        _data,
        "Turn your data into data sets (folders of ArrayRecord files with a manifest); list, verify, print, copy them.",
        "psyche data import exam.csv data/exam",
    )
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add_action(name: str, text: str, example: str, what: str = "a folder or gs://bucket/prefix") -> _Parser:
        action = actions.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"Example:\n  psyche data {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        action.add_argument("uri", metavar="URI", help=what)
        return action

    rows = "a file or folder of JSONL, JSON, CSV, TSV, Excel or Parquet, local or gs://…; or hub:NAME[@REVISION]"
    action = add_action("import", "turn a table, dialogues or public data into records", "exam.csv data/exam", rows)
    action.add_argument("to", metavar="TO", help="where to write the records: a new folder or gs://bucket/prefix")
    what = "which column holds what, such as import (default: guessed from the header)"
    add_config(action, what, required=False, example="columns.answer=KEY")
    action.add_argument(
        "--hold-out",
        type=float,
        metavar="SHARE",
        help="share of questions to hold out for `psyche eval` (default 0.1; 0: none); cases are never split",
    )
    action.add_argument(
        "--format",
        choices=("cpsyexam", "pceb", "smile"),
        help="URI is this data set as published: a JSON or JSONL file, or a folder or zip of them",
    )
    action.add_argument("--report", type=Path, metavar="FILE", help="also write what was skipped and why, as JSON")
    add_action("ls", "list the data sets at or under URI", "gs://my-bucket/data")
    add_action("verify", "read every byte and compare checksums", "gs://my-bucket/data/sft")
    action = add_action("cat", "print records, one JSON object per line", "data/exam/sft --limit 3")
    action.add_argument("--limit", type=int, metavar="N", help="only the first N records")
    action = add_action("copy", "copy a data set, its manifest last", "data/exam/sft gs://my-bucket/sft")
    action.add_argument("to", metavar="TO", help="a new folder or gs://bucket/prefix")
    for action in actions.choices.values():
        action.add_argument(
            "--deadline", type=float, metavar="SECONDS", help="give up on a file in a bucket after this (default 300)"
        )

    verb = add(
        "pack",
        _pack,
        "Tokenize chat records once and pack them into rows of equal length, which SFT reads fastest.",
        "psyche pack --config configs/pack.yaml --set out=gs://my-bucket/packed",
    )
    add_config(verb, "what to pack, such as pack", example="input=data/exam/sft")

    verb = add(
        "decontaminate",
        _decontaminate,
        "Remove from training data what a benchmark asks: exact and near copies, and questions on its cases.",
        "psyche decontaminate --train data/cpsyexam --eval data/pceb --out data/clean",
    )
    verb.add_argument("--train", required=True, metavar="URI", help="records of any kind: a data set or a JSONL file")
    verb.add_argument("--eval", required=True, metavar="URI", help="questions: a data set or a JSONL file")
    verb.add_argument("--out", required=True, metavar="URI", help="where the clean data set is written")
    verb.add_argument(
        "--near", type=float, default=0.3, metavar="SHARE", help="share of common text in a near copy (default 0.3)"
    )
    verb.add_argument("--json", action="store_true", help="print counts and examples as one JSON object")


def _data(arguments: argparse.Namespace) -> None:
    from psyche_jax.storage import buckets

    if arguments.deadline is not None and not 0 < arguments.deadline < math.inf:
        raise UsageError(f"--deadline must be positive, not {arguments.deadline}")
    from psyche_jax.data import dataset

    action, uri = arguments.action, arguments.uri
    with buckets.deadline(arguments.deadline):
        if action == "ls":
            for address, manifest in dataset.find_datasets(uri):
                print(f"{address}: {manifest}")
        elif action == "verify":
            manifest, others = dataset.verify_dataset(uri)
            print(f"{uri}: whole: {manifest}")
            for name in others:
                print(f"{uri}: {name} is not part of the data set; you can remove it")
        elif action == "cat":
            check_at_least("limit", arguments.limit, 1)
            for content in dataset.first_records(uri, arguments.limit):
                print(content)
        elif action == "import":
            _import(arguments)
        else:
            print(f"{arguments.to}: {dataset.copy_dataset(uri, arguments.to)}")


def _import(arguments: argparse.Namespace) -> None:
    uri, to, share = arguments.uri, arguments.to, arguments.hold_out
    if arguments.format is not None and (arguments.config is not None or arguments.overrides):
        raise UsageError("--format sets the columns itself; leave out --config and --set")
    if arguments.format is not None and ("://" in uri or uri.startswith("hub:")):
        raise UsageError(f"{uri}: --format reads local files; copy them here first, or leave --format out")
    if share is not None and not 0 <= share < 1:
        raise UsageError(f"--hold-out must be at least 0 and below 1, not {share:g}")
    from psyche_jax.data.imports import Imported, NoRecordsError
    from psyche_jax.data.mapping import import_rows
    from psyche_jax.data.parts import SKIPPED, import_parts

    def report(found: Imported | NoRecordsError, records: int, remarks: Sequence[str] = ()) -> None:
        if arguments.report is not None:
            from psyche_jax.storage.files import write_json

            counts = {"source": uri, "records": records, "faults": dict(found.faults), "remarks": remarks}
            write_json(arguments.report, {**counts, "set_aside": found.set_aside})

    config = _import_config(arguments)
    if share is not None and (config is None or config.record is not None):
        raise UsageError("--hold-out splits a table into sft, rl and held_out; leave out --format and `record`")
    try:
        if config is None:
            from psyche_jax.data.public import import_public

            imported = import_public(arguments.format, Path(uri), to)
        elif config.record is not None:
            imported = import_rows(uri, to, config)
        else:
            imported = import_parts(uri, to, config, 0.1 if share is None else share)
    except NoRecordsError as error:
        report(error, 0)
        raise
    manifests, in_parts = imported.manifests, "" not in imported.manifests
    for name, manifest in manifests.items():
        print(f"{to}{name and '/'}{name}: {manifest}")
    shown = imported.set_aside[: 10 if in_parts else None]
    say_skipped(shown)
    if len(shown) < len(imported.set_aside):
        print(f"all {len(imported.set_aside)} are listed in {to}/{SKIPPED}", file=sys.stderr)
    rows = len(imported.set_aside)
    mended = "; faults, including repaired ones" if config is None else ""
    print(f"skipped {rows} row{'' if rows == 1 else 's'}{mended}{':' if imported.faults else ''}")
    for fault, count in imported.faults.most_common():
        print(f"{count:8} {fault}")
    for remark in imported.remarks:
        print(f"warning: {remark}")
    if in_parts:
        verb = "sft" if "sft" in manifests else "grpo"
        train = f"{to}/{'sft' if verb == 'sft' else 'rl'}"
        run = f"runs/{Path(to).name}_{verb}"
        own = " --set data.evaluation=null" if verb == "sft" else ""  # that of the tiny config is the demo's
        print(f"next: psyche {verb} --config {verb}_tiny --set data.train={train}{own} --set run.dir={run}")
    report(imported, sum(manifest.records for manifest in manifests.values()), imported.remarks)


def _import_config(arguments: argparse.Namespace) -> "ImportConfig | None":
    """That of `--config`, else one that is guessed and shown; None of public data."""
    if arguments.format is not None:
        return None
    from psyche_jax.config_files import load_config
    from psyche_jax.data.guessing import guess_config
    from psyche_jax.data.mapping import ImportConfig

    if arguments.config is not None:
        return load_config(ImportConfig, arguments.config, arguments.overrides)
    config, lines = guess_config(arguments.uri, arguments.overrides)
    print(f"{arguments.uri}, guessed (--set columns.PART=COLUMN changes it, null takes it out):")
    for line in lines:
        print(f"  {line}")
    return config


def _pack(arguments: argparse.Namespace) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    from psyche_jax.config import PackConfig
    from psyche_jax.config_files import load_config
    from psyche_jax.data.dataset import check_readable

    config = load_config(PackConfig, arguments.config, arguments.overrides)
    check_readable(config.input)  # before JAX is loaded
    if not in_bucket(config.tokenizer) and not Path(config.tokenizer).is_dir():
        raise UserError(f"{config.tokenizer}: no such folder")
    from psyche_jax.data.packing import pack

    manifest, set_aside = pack(config)
    say_skipped(set_aside)
    cut = f"; {manifest.packing.cut} cut" if manifest.packing is not None and manifest.packing.cut else ""
    print(f"{config.out}: {manifest}; {len(set_aside)} skipped{cut}")


def _decontaminate(arguments: argparse.Namespace) -> None:
    from psyche_jax.data.decontamination import decontaminate_places

    if not 0 < arguments.near <= 1:
        raise UsageError(f"--near must be above 0 and at most 1, not {arguments.near}")
    result = decontaminate_places(arguments.train, arguments.eval, arguments.out, arguments.near)
    say_skipped(result.set_aside)
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
