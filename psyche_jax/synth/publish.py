"""Records for training, as data sets on a disk or in a bucket, with a data card."""

import contextlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import psyche_jax
from psyche_jax.data.dataset import MANIFEST, open_dataset, write_dataset
from psyche_jax.data.records import BaseRecord, Dialogue, Question, SftExample, question_to_rl, question_to_sft
from psyche_jax.errors import UserError
from psyche_jax.storage.files import in_bucket
from psyche_jax.storage.store import open_store
from psyche_jax.synth.calls import Usage
from psyche_jax.synth.stages import iterate

CARD = "README.md"
CARD_JSON = "card.json"


def publish(
    out: str,
    selection: Path,
    dialogues: Path | None,
    reports: Sequence[Mapping[str, Any]],
    usage: Sequence[Usage],
    config: Mapping[str, Any],
    fingerprint: str,
) -> dict[str, int]:
    """Write `sft`, `rl` and, if there are any, `crisis` below `out`, then the card. Returns the records of each.

    What has the same `fingerprint` and is there already, since a run was killed, is left as it is.

    Questions without a rationale, which `psyche select` may meet, cannot be trained on by SFT and are left out.

    Raises:
      UserError: there are other records at `out` already, nothing is to be written, or the place cannot be used.
    """
    store = open_store(out)
    counts: Counter[str] = Counter()
    licences: Counter[str] = Counter()
    sources: Counter[str] = Counter()

    def talks(file: str) -> Iterator[Dialogue]:
        return iterate(Dialogue, dialogues / file) if dialogues else iter(())

    writers: dict[str, Callable[[], Iterator[BaseRecord]]] = {
        "sft": lambda: chain(
            (question_to_sft(one) for one in iterate(Question, selection / "sft.jsonl") if one.rationale),
            (SftExample(one.turns, one.source, one.meta) for one in talks("dialogues.jsonl")),
        ),
        "rl": lambda: map(question_to_rl, iterate(Question, selection / "rl.jsonl")),
        "crisis": lambda: talks("crisis.jsonl"),
    }
    # The card needs all counts, and a bucket should hear of an empty synthesis before anything is written.
    for name, records in writers.items():
        for record in records():
            counts[name] += 1
            sources[record.source or "unknown"] += 1
            licences[str(record.meta.get("licence") or "unknown")] += 1  # a user's may be a list
    if not counts:
        raise UserError(f"{out}: there is nothing to publish; see what was skipped in {selection.parent}")
    # A data set appears as a whole, so one that is there is either this synthesis' own or another one's.
    for name in counts:
        if store.read(f"{name}/{MANIFEST}") is None:
            write_dataset(f"{out}/{name}", writers[name](), {"synthesis": fingerprint, **config})
        elif open_dataset(f"{out}/{name}").manifest.config.get("synthesis") != fingerprint:
            raise UserError(f"{out}/{name}: holds records of another synthesis; choose another out, or remove it first")
    # The card comes last: where it is, everything is.
    card = {
        "code_version": psyche_jax.__version__,
        "records": counts,
        "sources": dict(sorted(sources.items())),
        "licences": dict(sorted(licences.items())),
        "stages": [{key: report[key] for key in ("stage", "counts", "set_aside")} for report in reports],
        "calls": [{key: value for key, value in asdict(use).items() if key != "repeated"} for use in usage],
        "seed": config["run"]["seed"],
        "config": config,
    }
    with tempfile.TemporaryDirectory() as folder:
        dumped = json.dumps(card, ensure_ascii=False, indent=2) + "\n"
        for name, text in ((CARD_JSON, dumped), (CARD, as_markdown(card))):
            path = Path(folder) / name
            path.write_text(text, encoding="utf-8")
            store.remove(name)
            store.upload(path, name)
    return counts


def check_place(out: str, run: str, seed: int) -> None:
    """Ask whether records of the run in the folder `run` can go to `out`, before anything is spent on them.

    Records of another run there are warned of: whether this one makes the same is known at its end.

    Raises:
      UserError: they cannot.
    """
    store = open_store(out)
    if in_bucket(out):
        store.objects()  # the bucket says what is wrong with it
    else:
        folder = Path(out).absolute()
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise UserError(f"out: {out}: {nearest} is not a writable folder")
    with contextlib.suppress(ValueError, KeyError, TypeError):  # a card that is none
        other = json.loads(store.read(CARD_JSON) or b"null")["config"]["run"]
        if (other["dir"], other["seed"]) != (run, seed):
            print(
                f"warning: out: {out} holds records of {other['dir']}, seed {other['seed']}; if this run makes others, "
                "it ends without publishing them: choose another out",
                file=sys.stderr,
                flush=True,
            )


def as_markdown(card: Mapping[str, Any]) -> str:
    """The card as a page."""
    tables = [
        ("Records", ("data set", "records"), card["records"].items()),
        ("Sources", ("source", "records"), card["sources"].items()),
        ("Licences of the sources", ("licence", "records"), card["licences"].items()),
        (
            "Stages",
            ("stage", "in", "out", "set aside"),
            [
                (
                    stage["stage"],
                    stage["counts"].get("in", 0),
                    ", ".join(f"{v} {k[4:]}" for k, v in stage["counts"].items() if k.startswith("out/")),
                    ", ".join(f"{v} {k}" for k, v in stage["set_aside"].items()) or "none",
                )
                for stage in card["stages"]
            ],
        ),
        (
            "Models and prompts",
            ("LLM", "model", "prompt", "calls", "tokens in", "tokens out"),
            [tuple(use.values()) for use in card["calls"]],
        ),
    ]
    lines = [
        "# Data card",
        "",
        f"Made by psyche_jax {card['code_version']}, seed {card['seed']}. Questions, rationales and replies were "
        "written by the models below and checked as docs/synthesis.md says; they may be wrong. `card.json` says the "
        "same for machines, with the whole config. `crisis`, if it is there, holds posts with signs of a crisis and "
        "the replies that they had: no LLM wrote to them, and they are not for training without an expert.",
    ]
    for title, head, rows in tables:
        lines += ["", f"## {title}", "", f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
        lines += [f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"
