"""Measure the crisis gate while its rules are written: both halves of a file apart, errors, flagged turns.

    python scripts/measure_crisis.py --posts psyguard_valid.jsonl --dialogues smile_600.jsonl --show 50

Without `--posts` the package's own sentences are measured. `psyche safety` gives the figures alone, for a report.
Texts are only shown where `--show` or `--errors` asks for it, errors of the first half alone: the other is not read.
"""

import argparse
import random
from pathlib import Path

from psyche_jax.serve.crisis import Risk, classify, measure
from psyche_jax.serve.crisis.outputs import check_output


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posts", type=Path, help="JSONL of labelled posts")
    parser.add_argument("--dialogues", type=Path, help="JSONL of dialogues")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N flagged turns of the dialogues")
    parser.add_argument("--errors", action="store_true", help="print what the gate got wrong in the first half")
    arguments = parser.parse_args()
    posts, bad = measure.read_posts(arguments.posts) if arguments.posts else (measure.own_sentences("before"), [])
    name = arguments.posts.name if arguments.posts else "the package's sentences"
    for half in (0, 1):
        report(f"half {'AB'[half]} of {name}", [post for post in posts if post.half == half])
    report(f"all of {name}", posts)
    if not arguments.posts:
        report("those written after the rules", measure.own_sentences("after"))
    for line in bad:
        print(f"set aside: {line}")
    if arguments.errors:
        show_errors([post for post in posts if post.half == 0])
    if arguments.dialogues:
        turns, bad = measure.read_turns(arguments.dialogues)
        report_dialogues(arguments.dialogues.name, turns, arguments.show)


def report(title: str, posts: list[measure.Post]) -> None:
    """Recall, false alarms and confusion."""
    if posts:
        print(f"\n## {title}: {len(posts)} posts\n")
        print("\n".join(measure.posts_table(measure.measure_posts(posts))))


def report_dialogues(name: str, turns: list[measure.Turn], show: int) -> None:
    """How much of ordinary talk is answered by a fixed text, and how much of what counsellors say is withheld."""
    measured = measure.measure_turns(turns)
    print(f"\n## {name}: {measured['dialogues']} dialogues, {measured['turns']} turns of persons\n")
    print(f"turns answered by a fixed text: {measure.interval(measured['flagged_turns'])}")
    print(f"dialogues with such a turn:     {measure.interval(measured['flagged_dialogues'])}")
    print("by class:", measured["by_class"])
    counsellors = measured["counsellors"]
    print(f"counsellors' turns withheld:    {measure.interval(counsellors['withheld'])}", counsellors["by_kind"])
    flagged = [turn for turn in turns if turn.own and classify(turn.text).risk is not Risk.NONE]
    for turn in random.Random(0).sample(flagged, min(show, len(flagged))):
        assessment = classify(turn.text)
        print(f"- {assessment.risk.value} ({'; '.join(assessment.rules)}) {turn.dialogue}: {turn.text!r}")
    for turn in [turn for turn in turns if not turn.own and check_output(turn.text)][:show]:
        print(f"- withheld: {turn.text!r}")


def show_errors(posts: list[measure.Post]) -> None:
    """Posts of another class than labelled."""
    for post in posts:
        assessment = classify(post.text)
        if post.label != assessment.risk.value:
            print(f"- {post.label} as {assessment.risk.value} ({'; '.join(assessment.rules)}): {post.text!r}")


if __name__ == "__main__":
    main()
