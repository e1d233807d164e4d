"""`scripts/benchmarks/compare_with_peers.py`: it takes turns, reads what the sides print, and says which one failed."""

import json
import subprocess
import sys
from pathlib import Path

import psyche_jax

SCRIPT = Path(psyche_jax.__file__).parents[1] / "scripts" / "benchmarks" / "compare_with_peers.py"


def side(folder, name, text):
    """A command that notes that it ran, and prints `text`."""
    program = folder / f"{name}.py"
    program.write_text(f"open({str(folder / 'order')!r}, 'a').write('{name} ')\nprint('''{text}''')\n")
    return f"{sys.executable} {program}"


def compare(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


def test_ratio_and_turns(tmp_path):
    ours = side(tmp_path, "ours", '{"seconds_median": 0.5}')
    peer = side(tmp_path, "peer", 'warming up {1}\nRESULT {\n "a": {"b": 9}, "parts": {"step (all)": 2}}\ndone')
    arguments = ("--ours", "seconds_median", ours, "--peer", "them", "parts.step (all)", peer, "--rounds", "2")
    done = compare(*arguments)
    assert done.returncode == 0
    assert done.stdout.splitlines()[1] == "them: 2 s, 4.00 times psyche's (by round 4.00 to 4.00)"
    assert (tmp_path / "order").read_text().split() == ["ours", "peer", "ours", "peer"]
    outcome = json.loads(compare(*arguments, "--json").stdout)
    assert outcome["ratios"] == {"them": 4.0} and len(outcome["runs"]["psyche"]) == 2


def test_a_side_that_fails(tmp_path):
    ours = side(tmp_path, "ours", '{"seconds_median": 0.5}')
    for command, complaint in (
        (side(tmp_path, "mute", "nothing"), "it printed no JSON object"),
        (side(tmp_path, "other", '{"mean": 1}'), "its object has no positive number under 'median'; it has mean"),
        (f"{sys.executable} {tmp_path / 'absent.py'}", "ended with exit code 2"),
    ):
        done = compare("--ours", "seconds_median", ours, "--peer", "them", "median", command)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("compare_with_peers: them") and complaint in done.stderr
