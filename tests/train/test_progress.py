"""What a run says of its progress where there is no terminal."""

import re

from psyche_jax.train.progress import Progress


def test_lines_tell_time_pace_and_what_is_left(capsys):
    """Steps of 2 s, and one of a minute (an evaluation, say), after a first one that compiles for ten."""
    now = 0.0
    progress = Progress("sft", 40, 100, ("loss", "kl"), clock=lambda: now)
    for step in range(41, 101):
        now += 600.0 if step == 41 else 60.0 if step == 45 else 2.0
        progress.update(step, {"loss": 1 / step, "kl": None, "other": 1.0})
    progress.close()
    lines = [re.sub(r" at \d\d:\d\d:\d\d", " at NOW", line) for line in capsys.readouterr().err.splitlines()]
    assert lines[:3] == [
        "sft: step 41/100 at NOW: loss 0.02439",
        "sft: step 45/100 at NOW, 16.50 s a step, 15:07 left: loss 0.02222",
        "sft: step 50/100 at NOW, 8.44 s a step, 07:02 left: loss 0.02",
    ]
    assert lines[-1] == "sft: step 100/100 at NOW, 2.00 s a step, 00:00 left: loss 0.01"
    assert progress.took == "12:56" and progress.shown == {"loss": "0.01"}
    assert len(lines) == 8
