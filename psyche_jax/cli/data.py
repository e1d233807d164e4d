"""Data sets: data, pack, decontaminate."""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from psyche_jax.cli.arguments import AddVerb, add_config, check_at_least
from psyche_jax.errors import UsageError


def add_verbs(add: AddVerb) -> None:
    """Put this module's verbs into the parser."""
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
        "import": "read public data (--format) or any rows (--config) at URI, write the clean records to TO",
    }
    verb.add_argument(
        "action", choices=actions, metavar="ACTION", help="; ".join(f"{name}: {text}" for name, text in actions.items())
    )
    verb.add_argument(
        "uri",
        metavar="URI",
        help="a local folder or gs://bucket/prefix; of `import` a file or folder, in a bucket with --config only, "
        "or (--config) hub:NAME[@REVISION]",
    )
    verb.add_argument("to", metavar="TO", nargs="?", help="where `copy` and `import` write")
    verb.add_argument(
        "--format",
        choices=("cpsyexam", "pceb", "smile"),
        help="of what `import` reads, as published: a JSON or JSONL file, a folder or a zip of them",
    )
    what = "which column is what, where `import` reads JSONL, CSV, Parquet or a data set on the Hugging Face hub"
    add_config(verb, f"{what}; such as import", required=False)
    verb.add_argument("--report", type=Path, metavar="FILE", help="`import` also writes what it skipped, as JSON")
    verb.add_argument("--limit", type=int, metavar="N", help="`cat` prints only the first N records")
    verb.add_argument(
        "--deadline", type=float, metavar="SECONDS", help="give up on a file in a bucket after that long (300)"
    )

    verb = add(
        "pack",
        _pack,
        "Tokenize chat records once and pack them into rows of one length, as SFT reads them fastest.",
        "psyche pack --config configs/pack.yaml --set out=gs://my-bucket/packed",
    )
    add_config(verb, "what is packed, such as pack")

    verb = add(
        "decontaminate",
        _decontaminate,
        "Take out of training data what a benchmark asks: exact and near copies, and questions on its cases.",
        "psyche decontaminate --train data/cpsyexam --eval data/pceb --out data/clean",
    )
    verb.add_argument("--train", required=True, metavar="URI", help="a data set of records of any kind")
    verb.add_argument("--eval", required=True, metavar="URI", help="questions: a data set or a JSONL file")
    verb.add_argument("--out", required=True, metavar="URI", help="where the clean data set is written")
    verb.add_argument(
        "--near", type=float, default=0.3, metavar="SHARE", help="of common text that makes a near copy (default 0.3)"
    )
    verb.add_argument("--json", action="store_true", help="print counts and examples as one JSON object")


def _data(arguments: argparse.Namespace) -> None:
    from psyche_jax.storage import buckets

    action, uri = arguments.action, arguments.uri
    if (action in ("copy", "import")) != (arguments.to is not None):
        needs_two = f"{action} needs two addresses: psyche data {action} URI TO"
        raise UsageError(needs_two if arguments.to is None else "too many addresses")
    if (action == "import") != ((arguments.format is None) != (arguments.config is None)):
        raise UsageError("import needs either --format or --config, and the others take neither")
    if arguments.format is not None and ("://" in uri or uri.startswith("hub:")):
        raise UsageError(
            f"{uri}: --format reads local files; copy them here first, or say with --config what they hold"
        )
    if arguments.overrides and arguments.config is None:
        raise UsageError("--set goes with the --config of import")
    if arguments.report is not None and action != "import":
        raise UsageError("--report goes with import")
    if arguments.deadline is not None and not 0 < arguments.deadline < math.inf:
        raise UsageError(f"--deadline must be positive, not {arguments.deadline}")
    check_at_least("limit", arguments.limit, 1)
    with buckets.deadline(arguments.deadline):
        _do(action, uri, arguments)


def _do(action: str, uri: str, arguments: argparse.Namespace) -> None:
    from psyche_jax.data import dataset

    if action == "ls":
        for address, manifest in dataset.find_datasets(uri):
            print(f"{address}: {manifest}")
    elif action == "verify":
        manifest, others = dataset.verify_dataset(uri)
        print(f"{uri}: whole: {manifest}")
        for name in others:
            print(f"{uri}: {name} is not part of it and may be removed")
    elif action == "cat":
        for content in dataset.first_records(uri, arguments.limit):
            print(content)
    elif action == "import":
        _import(arguments)
    else:
        print(f"{arguments.to}: {dataset.copy_dataset(uri, arguments.to)}")


def _import(arguments: argparse.Namespace) -> None:
    uri, to = arguments.uri, arguments.to
    from psyche_jax.data.imports import Imported, NoRecordsError
    from psyche_jax.data.mapping import ImportConfig, import_rows

    def report(found: Imported | NoRecordsError, records: int, remarks: Sequence[str] = ()) -> None:
        if arguments.report is not None:
            from psyche_jax.storage.files import write_json

            counts = {"source": uri, "records": records, "faults": dict(found.faults), "remarks": remarks}
            write_json(arguments.report, {**counts, "set_aside": found.set_aside})

    try:
        if arguments.format is not None:
            from psyche_jax.data.public import import_public

            imported = import_public(arguments.format, Path(uri), to)
        else:
            from psyche_jax.config_files import load_config

            imported = import_rows(uri, to, load_config(ImportConfig, arguments.config, arguments.overrides))
    except NoRecordsError as error:
        report(error, 0)
        raise
    print(f"{to}: {imported.manifest}")
    for line in imported.set_aside:
        print(f"skipped: {line}", file=sys.stderr)
    mended = "; faults seen, mended ones among them" if arguments.format is not None else ""
    print(f"{len(imported.set_aside)} skipped{mended}{':' if imported.faults else ''}")
    for fault, count in imported.faults.most_common():
        print(f"{count:8} {fault}")
    for remark in imported.remarks:
        print(f"look here: {remark}")
    report(imported, imported.manifest.records, imported.remarks)


def _pack(arguments: argparse.Namespace) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    from psyche_jax.config_files import load_config
    from psyche_jax.data.packing import PackConfig, pack

    config = load_config(PackConfig, arguments.config, arguments.overrides)
    manifest, set_aside = pack(config)
    for line in set_aside:
        print(f"skipped: {line}", file=sys.stderr)
    cut = f"; {manifest.packing.cut} cut" if manifest.packing is not None and manifest.packing.cut else ""
    print(f"{config.out}: {manifest}; {len(set_aside)} skipped{cut}")


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
