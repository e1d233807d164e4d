"""Measure the crisis gate while its rules are written: both halves of a file apart, errors, flagged turns.

    python scripts/crisis/measure.py --posts psyguard_valid.jsonl --dialogues smile_600.jsonl --show 50
    python scripts/crisis/measure.py --posts psyguard_valid.jsonl --rules-alone
    python scripts/crisis/measure.py --posts psyguard_valid.jsonl --speed

Without `--posts` the package's own sentences are measured. `psyche safety` gives the figures alone, for a report.
Texts are only shown where `--show` or `--errors` asks for it, errors of the first half alone: the other is not read.
"""

import argparse
import hashlib
import random
import time
from pathlib import Path

from psyche_jax.serve.crisis import Risk, classify, measure
from psyche_jax.serve.crisis.gate import check_output


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posts", type=Path, help="JSONL of labelled posts")
    parser.add_argument("--dialogues", type=Path, help="JSONL of dialogues")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N flagged turns of the dialogues")
    parser.add_argument("--errors", action="store_true", help="print what the gate got wrong in the first half")
    parser.add_argument("--rules-alone", action="store_true", help="leave the classifier out")
    parser.add_argument("--speed", action="store_true", help="only time the gate on the posts")
    arguments = parser.parse_args()
    learned = not arguments.rules_alone
    posts, bad = measure.read_posts(arguments.posts) if arguments.posts else (measure.own_sentences("before"), [])
    name = arguments.posts.name if arguments.posts else "the package's sentences"
    if arguments.speed:
        show_speed(name, [post.text for post in posts])
        return
    for half in (0, 1):
        report(f"half {'AB'[half]} of {name}", [post for post in posts if half_of(post) == half], learned)
    report(f"all of {name}", posts, learned)
    if not arguments.posts:
        report("those written after the rules", measure.own_sentences("after"), learned)
    for line in bad:
        print(f"skipped: {line}")
    if arguments.errors:
        show_errors([post for post in posts if half_of(post) == 0], learned)
    if arguments.dialogues:
        turns, bad = measure.read_turns(arguments.dialogues)
        report_dialogues(arguments.dialogues.name, turns, arguments.show, learned)


def half_of(post: measure.Post) -> int:
    """0 or 1, by a hash of the id, or of the text where there is none."""
    return hashlib.sha256((post.id or post.text).encode()).digest()[-1] % 2


def report(title: str, posts: list[measure.Post], learned: bool) -> None:
    """Recall, false alarms and confusion."""
    if posts:
        print(f"\n## {title}: {len(posts)} posts\n")
        print("\n".join(measure.posts_table(measure.measure_posts(posts, learned))))


def report_dialogues(name: str, turns: list[measure.Turn], show: int, learned: bool) -> None:
    """How much of ordinary talk is answered by a fixed text, and how much of what counsellors say is withheld."""
    measured = measure.measure_turns(turns, learned)
    print(f"\n## {name}: {measured['dialogues']} dialogues, {measured['turns']} turns of persons\n")
    print(f"turns answered by a fixed text: {measure.interval(measured['flagged_turns'])}")
    print(f"dialogues with such a turn:     {measure.interval(measured['flagged_dialogues'])}")
    print("by class:", measured["by_class"])
    print("decided by:", measure.decided_line(measured))
    counsellors = measured["counsellors"]
    print(f"counsellors' turns withheld:    {measure.interval(counsellors['withheld'])}", counsellors["by_kind"])
    flagged = [turn for turn in turns if turn.own and classify(turn.text, learned).risk is not Risk.NONE]
    for turn in random.Random(0).sample(flagged, min(show, len(flagged))):
        assessment = classify(turn.text, learned)
        print(f"- {assessment.risk.value} ({'; '.join(assessment.rules)}) {turn.dialogue}: {turn.text!r}")
    for turn in [turn for turn in turns if not turn.own and check_output(turn.text)][:show]:
        print(f"- withheld: {turn.text!r}")


def show_speed(name: str, texts: list[str]) -> None:
    """Milliseconds a message, the least of five rounds; the first reads the rules and the weights."""
    for learned, title in ((False, "rules alone"), (True, "with the classifier")):
        seconds = []
        for _ in range(6):
            start = time.process_time()
            for text in texts:
                classify(text, learned)
            seconds.append(time.process_time() - start)
        print(f"{name}, {title}: {1000 * min(seconds[1:]) / len(texts):.2f} ms of CPU time a message")


def show_errors(posts: list[measure.Post], learned: bool) -> None:
    """Posts of another class than labelled."""
    for post in posts:
        assessment = classify(post.text, learned)
        if post.label != assessment.risk.value:
            print(f"- {post.label} as {assessment.risk.value} ({'; '.join(assessment.rules)}): {post.text!r}")


if __name__ == "__main__":
    main()
