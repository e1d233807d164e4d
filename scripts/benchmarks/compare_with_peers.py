#!/usr/bin/env python3
"""Time psyche beside other programs, taking turns, and print the ratios of their medians.

    python scripts/benchmarks/compare_with_peers.py --rounds 3 \\
        --ours seconds_median "psyche bench sft --json" \\
        --peer TRL median "PEERS/trl/bin/python trl_sft_bench.py" \\
        --peer Tunix trainer_s_per_step "PEERS/tunix/bin/python tunix_sft_bench.py"

Each command is run once in every round, one after the other, and must print a JSON object, the last of which holds
its seconds a step under the key that is named (dots go deeper: breakdown_s.generate). Taking turns spreads a busy
neighbour over all sides; the load beside each figure says how many processes wanted a core when its run began and
ended. The shape flags are each command's own: give the same sizes to all.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from typing import Any


def last_object(text: str) -> dict[str, Any]:
    """The last JSON object that stands in a text of anything.

    Raises:
      ValueError: there is none.
    """
    decoder, found, place = json.JSONDecoder(), None, text.find("{")
    while place >= 0:
        try:
            value, place = decoder.raw_decode(text, place)
            found = value
        except ValueError:
            place += 1
        place = text.find("{", place)
    if found is None:
        raise ValueError("it printed no JSON object")
    return found


def value_at(outcome: dict[str, Any], key: str) -> float:
    """The number under a dotted key.

    Raises:
      ValueError: there is none.
    """
    value: Any = outcome
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"its object has no positive number under {key!r}; it has {', '.join(outcome)}")
    return float(value)


def run(name: str, key: str, command: str) -> dict[str, Any]:
    """One run: `seconds` under `key`, all that the command reported, and the load before and after."""
    before = os.getloadavg()[0]
    done = subprocess.run(shlex.split(command), capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        sys.exit(f"compare_with_peers: {name} ended with exit code {done.returncode}: {last}")
    try:
        outcome = last_object(done.stdout)
        seconds = value_at(outcome, key)
    except ValueError as error:
        sys.exit(f"compare_with_peers: {name}: {error}")
    return {"seconds": seconds, "load": [before, os.getloadavg()[0]], "outcome": outcome}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", nargs=2, metavar=("KEY", "COMMAND"), required=True)
    parser.add_argument("--peer", nargs=3, metavar=("NAME", "KEY", "COMMAND"), action="append", required=True)
    parser.add_argument("--rounds", type=int, default=3, help="how often each is run (default 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object with all that the runs reported")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    sides = [("psyche", *arguments.ours), *arguments.peer]
    if len({name for name, _, _ in sides}) < len(sides):
        parser.error("two sides have one name")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in sides}
    for number in range(1, arguments.rounds + 1):
        for name, key, command in sides:
            result = run(name, key, command)
            runs[name].append(result)
            load = " to ".join(f"{value:.1f}" for value in result["load"])
            print(f"round {number}: {name} {result['seconds']:.4g} s (load {load})", file=sys.stderr, flush=True)
    medians = {name: statistics.median(result["seconds"] for result in results) for name, results in runs.items()}
    ratios = {name: medians[name] / medians["psyche"] for name in runs if name != "psyche"}
    by_round = {
        name: [theirs["seconds"] / ours["seconds"] for theirs, ours in zip(runs[name], runs["psyche"], strict=True)]
        for name in ratios
    }
    if arguments.json:
        print(json.dumps({"medians": medians, "ratios": ratios, "ratios_by_round": by_round, "runs": runs}))
        return
    print(f"psyche: {medians['psyche']:.4g} s (median of {arguments.rounds} runs)")
    for name, ratio in ratios.items():
        low, high = min(by_round[name]), max(by_round[name])
        print(f"{name}: {medians[name]:.4g} s, {ratio:.2f} times psyche's (by round {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
