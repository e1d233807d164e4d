"""The figures of `psyche safety`: the gate on messages and dialogues, the output filter on a run's answers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from psyche_jax.errors import UserError
from psyche_jax.files import read_json, write_json
from psyche_jax.serve.crisis.measure import (
    decided_line,
    interval,
    measure_posts,
    measure_replies,
    measure_turns,
    own_sentences,
    posts_table,
    read_posts,
    read_turns,
)

SAFETY = "safety.json"  # in the folder of a run
OWN = "the package's own sentences, by which its rules were widened and its classifier trained"


def measure_safety(
    posts: Path | None, dialogues: Path | None, run: Path | None, learned: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """Measure, and write the figures into the folder `run` if there is one. Returns them and the bad lines.

    Args:
      posts: labelled messages (see `read_posts`); the package's own sentences if None.
      dialogues: dialogues (see `read_turns`).
      run: a run, whose evaluations hold what its models answered.
      learned: with the gate's classifier, or by its rules alone.

    Raises:
      UserError: a file cannot be read, or `run` is not a run.
    """
    if run is not None and not (run / "state.json").is_file():
        raise UserError(f"{run}: is not a run (it has no state.json); give a folder made by psyche sft or psyche grpo")
    labelled, bad = read_posts(posts) if posts is not None else (own_sentences(), [])
    source = posts.name if posts is not None else OWN
    measured: dict[str, Any] = {"posts": {"source": source, "set_aside": len(bad), **measure_posts(labelled, learned)}}
    if dialogues is not None:
        turns, faulty = read_turns(dialogues)
        bad += faulty
        measured["dialogues"] = {"source": dialogues.name, "set_aside": len(faulty), **measure_turns(turns, learned)}
    if run is not None:
        measured["replies"] = measure_replies(_answers(run))
        write_json(run / SAFETY, measured)
    return measured, bad


def safety_lines(measured: dict[str, Any]) -> Iterator[str]:
    """The figures as text."""
    posts = measured["posts"]
    yield f"crisis gate on {posts['count']} messages ({posts['source']})"
    yield from posts_table(posts)
    if talk := measured.get("dialogues"):
        yield f"\n{talk['dialogues']} dialogues ({talk['source']}), {talk['turns']} turns of persons"
        yield f"turns answered by a fixed text: {interval(talk['flagged_turns'])}"
        yield f"dialogues with such a turn:     {interval(talk['flagged_dialogues'])}"
        yield f"decided by:                     {decided_line(talk)}"
        yield f"counsellors' turns withheld:    {interval(talk['counsellors']['withheld'])}"
    if replies := measured.get("replies"):
        yield f"\nanswers in the run's evaluations that the output filter withholds or changes, of {replies['count']}: "
        yield f"{interval(replies['withheld'])} {replies['by_kind'] or ''}".rstrip()


def _answers(run: Path) -> Iterator[str]:
    for path in sorted((run / "evaluations").glob("*.json")):
        content = read_json(path)
        items = content.get("items") if isinstance(content, dict) else None
        for item in items if isinstance(items, list) else ():
            if isinstance(item, dict) and isinstance(item.get("response"), str):
                yield item["response"]
