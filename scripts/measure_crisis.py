"""Measure the crisis gate: recall by class and false alarms on labelled posts, rates on dialogues.

    python scripts/measure_crisis.py --posts psyguard_valid.jsonl --dialogues smile_600.jsonl --show 50

Posts are JSON lines `{"id", "text", "labels": [...]}` with PsyGUARD's labels, dialogues `{"id", "turns": [{"role",
"content"}]}` where role `client` or `user` is the person. Texts are only shown where `--show` asks for it.
"""

import argparse
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from psyche_jax.serve.crisis import Risk, classify
from psyche_jax.serve.crisis.outputs import check_output

CLASSES = {  # PsyGUARD's labels, the most urgent first; a post with several has the first of them
    "自杀未遂": "attempt",
    "自杀准备行为": "plan_or_preparation",
    "自杀计划": "plan_or_preparation",
    "主动自杀意图": "active_ideation",
    "被动自杀意图": "passive_ideation",
    "自伤行为": "self_harm",
    "自伤意图": "self_harm",
    "用户攻击行为": "harm_to_others",
    "关于自杀的探索": "exploration",
    "他人攻击行为": "harmed_by_others",  # a class that the gate does not have
    "与自杀/自伤/攻击行为无关": "none",
}
COLUMNS = [risk.value for risk in sorted(Risk, key=lambda risk: -risk.severity)]


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posts", type=Path, help="JSONL of labelled posts")
    parser.add_argument("--dialogues", type=Path, help="JSONL of dialogues")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N flagged turns of the dialogues")
    parser.add_argument("--errors", action="store_true", help="print the posts that the gate got wrong")
    arguments = parser.parse_args()
    if arguments.posts:
        posts = _read(arguments.posts)
        for half in (0, 1):
            report(f"half {'AB'[half]} of {arguments.posts.name}", [p for p in posts if half_of(p["id"]) == half])
        report(f"all of {arguments.posts.name}", posts)
        if arguments.errors:
            show_errors(posts)
    if arguments.dialogues:
        report_dialogues(arguments.dialogues.name, _read(arguments.dialogues), arguments.show)


def report(title: str, posts: Sequence[dict[str, Any]]) -> None:
    """Recall, false alarms and confusion."""
    pairs = [(gold(post), classify(post["text"]).risk.value) for post in posts]
    print(f"\n## {title}: {len(pairs)} posts\n\nShare of each class that the gate answers (95 % Wilson interval)\n")
    print(f"{'class':26}{'posts':>6}  {'answered at all':24}{'with a crisis text':24}{'of its own class':24}")
    groups: list[tuple[str, set[str]]] = [
        ("plan, preparation, attempt", {"plan_or_preparation", "attempt"}),
        *((name, {name}) for name in dict.fromkeys(CLASSES.values())),
    ]
    for name, members in groups:
        found = [risk for label, risk in pairs if label in members]
        shares = (
            sum(risk != "none" for risk in found),
            sum(risk not in ("none", "exploration") for risk in found),
            sum(risk in members for risk in found),
        )
        if found:
            print(f"{name:26}{len(found):6}  " + "".join(f"{interval(count, len(found)):24}" for count in shares))
    print("\nConfusion: rows as labelled, columns as classed\n")
    confusion = Counter(pairs)
    print(" " * 22 + "".join(f"{name[:11]:>12}" for name in COLUMNS))
    for name in dict.fromkeys(CLASSES.values()):
        print(f"{name:22}" + "".join(f"{confusion[name, column]:12}" for column in COLUMNS))


def report_dialogues(name: str, dialogues: Sequence[dict[str, Any]], show: int) -> None:
    """How much of ordinary talk is answered by a fixed text, and how much of what counsellors say is withheld."""
    turns = [
        (dialogue["id"], turn["content"], turn["role"] in ("client", "user"))
        for dialogue in dialogues
        for turn in dialogue["turns"]
    ]
    flagged = [(id_, text, assessment) for id_, text, own in turns if own and (assessment := classify(text)).rules]
    persons, others = sum(own for *_, own in turns), sum(not own for *_, own in turns)
    withheld = [(text, rule.kind) for _, text, own in turns if not own and (rule := check_output(text))]
    print(f"\n## {name}: {len(dialogues)} dialogues, {persons} turns of persons, {others} of counsellors\n")
    print(f"turns answered by a fixed text: {interval(len(flagged), persons)}")
    print(f"dialogues with such a turn:     {interval(len({id_ for id_, *_ in flagged}), len(dialogues))}")
    print("by class:", dict(Counter(assessment.risk.value for *_, assessment in flagged).most_common()))
    print(
        f"counsellors' turns withheld:    {interval(len(withheld), others)}",
        dict(Counter(kind for _, kind in withheld)),
    )
    for id_, text, assessment in random.Random(0).sample(flagged, min(show, len(flagged))):
        print(f"- {assessment.risk.value} ({'; '.join(assessment.rules)}) {id_}: {text!r}")
    for text, kind in withheld[:show]:
        print(f"- withheld, {kind}: {text!r}")


def show_errors(posts: Iterable[dict[str, Any]]) -> None:
    """Posts of another class than labelled."""
    for post in posts:
        assessment = classify(post["text"])
        if gold(post) != assessment.risk.value:
            print(f"- {gold(post)} as {assessment.risk.value} ({'; '.join(assessment.rules)}): {post['text']!r}")


def gold(post: dict[str, Any]) -> str:
    """The most urgent of a post's labels, as a class of the gate."""
    return min((CLASSES[label] for label in post["labels"]), key=list(dict.fromkeys(CLASSES.values())).index)


def half_of(id_: object) -> int:
    """0 or 1, by a hash of the id: A was read while the rules were written, B was held out (docs/crisis.md)."""
    return hashlib.sha256(str(id_).encode()).digest()[-1] % 2


def interval(count: int, of: int) -> str:
    """A share with its Wilson interval."""
    low, high = binomtest(count, of).proportion_ci(method="wilson")
    return f"{count / of:.3f} [{low:.3f}, {high:.3f}]"


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


if __name__ == "__main__":
    main()
