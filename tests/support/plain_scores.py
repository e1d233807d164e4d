"""Scores of an evaluation, recomputed from its items with nothing but Python: `python plain_scores.py FILE.json`.

It shares no code with the package: its own reading of the letters, its own sums.
"""

import json
import math
import sys


def letters(response):
    """Capitals on the line after the last marker, if it holds nothing else but separators."""
    answer = response.rsplit("</think>", 1)[-1]
    if "答案：" not in answer:
        return ""
    line = answer.rsplit("答案：", 1)[1].split("\n", 1)[0]
    line = line.translate({ord("Ａ") + i: chr(ord("A") + i) for i in range(26)})
    found = [character for character in line if "A" <= character <= "Z"]
    rest = [character for character in line if not "A" <= character <= "Z" and character not in "、，, 和。*"]
    return "" if rest else "".join(sorted(set(found)))


def scores(items):
    strict = unanswered = 0
    elastic = []
    for item in items:
        said, gold = letters(item["response"]), item["gold"]
        unanswered += not said
        strict += said == gold
        if said and not [letter for letter in said if letter not in gold]:
            elastic.append(len(said) / len(gold))
    return {"strict": strict / len(items), "elastic": math.fsum(elastic) / len(items), "unanswered": unanswered}


def main(path):
    with open(path, encoding="utf-8") as file:  # noqa: PTH123
        items = [item for item in json.load(file)["items"] if item["kind"] in ("single", "multi")]
    cells = {}
    for item in items:
        cells.setdefault(item["cell"], []).append(item)
    result = {**scores(items), "cells": {cell: scores(some) for cell, some in cells.items()}}
    for name in ("strict", "elastic"):
        result[f"average_{name}"] = math.fsum(result["cells"][cell][name] for cell in cells) / len(cells)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
