"""How long responses are, and how many steps it takes to decode them in slots: `model/decode.py` in plain Python."""

import bisect
import heapq
import math
import random
import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from psyche_jax.errors import UsageError, UserError
from psyche_jax.model.decode import loop_sizes
from psyche_jax.model.qwen2 import look_sizes
from psyche_jax.storage.files import read_jsonl

_EXAMPLE = "mean=400,p99=2048, or the folder of a GRPO run"


@dataclass(frozen=True)
class Loop:
    """One of the loops of decoding: its `rows` on each part of the batch axes, and the `turns` that it takes.

    `looks`: of these, how many look at each of `look_sizes`' numbers of places of the cache; empty if that was not
    asked for.
    """

    rows: int
    turns: int
    looks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Decoding:
    """What it takes to decode the responses of a step.

    `responses`: how many; `tokens`: of all of them; `attended`: how many decoded tokens all steps of all responses
    attend to together.
    """

    loops: tuple[Loop, ...]
    responses: int
    tokens: int
    attended: int

    @property
    def steps(self) -> int:
        """As the metric `decoding_steps` counts them: the first tokens are one."""
        return 1 + sum(loop.turns for loop in self.loops)


def simulate(lengths: Sequence[int], slots: int, parts: int, places: int | None = None) -> Decoding:
    """Decode responses of these lengths in `slots` slots, spread over `parts` parts of the mesh's batch axes.

    Each part has its own consecutive responses, its own slots and queue. A response's first token is drawn before
    the loops; each turn adds a token to the response of every slot, and a slot that is free takes the next one.
    `places`: of the cache's ring; with it, the turns of loops are told apart by what they look at.
    """
    share = len(lengths) // parts
    rows = min(share, slots // parts)
    ends, emptied, spans = [], 0, []
    for part in range(parts):
        waiting = [length - 1 for length in lengths[part * share : (part + 1) * share] if length > 1]
        busy = waiting[:rows]
        spans += [(0, turns) for turns in busy]
        heapq.heapify(busy)
        finished = []
        for turns in waiting[rows:]:
            finished.append(heapq.heappop(busy))
            emptied = max(emptied, finished[-1])
            heapq.heappush(busy, finished[-1] + turns)
            spans.append((finished[-1], finished[-1] + turns))
        ends.append(sorted([*finished, *busy]))

    looks = _looks(spans, places) if places else []

    # Each loop goes on until at most half of its rows are busy, the first one until nothing waits either.
    kinds = range(len(look_sizes(places)) if places else 0)
    loops, done = [], 0
    for size, following in pairwise([*loop_sizes(rows), 0]):
        last = max((part[-following - 1] for part in ends if len(part) > following), default=0)
        stop = max(done, emptied, last)
        seen = Counter(looks[done:stop])
        loops.append(Loop(size, stop - done, tuple(seen[kind] for kind in kinds)))
        done = stop
    attended = sum(length * (length - 1) // 2 for length in lengths)
    return Decoding(tuple(loops), len(lengths), sum(lengths), attended)


def _looks(spans: list[tuple[int, int]], places: int) -> list[int]:
    """Which of `look_sizes` each turn looks at: the first one that holds what the longest response has said; all, where
    that begins at the end of the ring. `spans`: from which turn to which one each response has a slot."""
    spans = sorted(spans)
    sizes, oldest, found = look_sizes(places), 0, []
    for turn in range(max((end for _, end in spans), default=0)):
        while spans[oldest][1] <= turn:
            oldest += 1
        longest = 1 + turn - spans[oldest][0]
        found.append(len(sizes) - 1 if longest > turn % places + 1 else bisect.bisect_left(sizes, longest))
    return found


def draw_lengths(text: str, count: int, longest: int) -> list[int]:
    """Lengths of `count` responses, none over `longest`, as `--lengths` describes them.

    The same ones every time: quantiles of the distribution, in an order that a fixed seed shuffles.

    Args:
      text: `mean=400,p99=2048` (log-normal; p50, p90, p95 or p99), or a run's folder, whose samples are taken.
      count: how many.
      longest: where they are cut off.

    Raises:
      UsageError: `text` is of another form, or no distribution is like that.
      UserError: the run has no samples.
    """
    shares = [(number + 0.5) / count for number in range(count)]
    if text and Path(text).is_dir():
        known = sorted(_sampled(Path(text)))
        lengths = [known[int(share * len(known))] for share in shares]
    else:
        mu, sigma = _log_normal(text, longest)
        normal = statistics.NormalDist()
        lengths = [round(math.exp(mu + sigma * normal.inv_cdf(share))) for share in shares]
    random.Random(0).shuffle(lengths)
    return [min(max(1, length), longest) for length in lengths]


def _sampled(run: Path) -> list[int]:
    path = run / "samples.jsonl"
    if not path.exists():
        raise UserError(f"--lengths {run}: holds no samples.jsonl; must be {_EXAMPLE}")
    found = [row.get("tokens") if isinstance(row, dict) else None for _, row in read_jsonl(path)]
    lengths = [tokens for tokens in found if type(tokens) is int and tokens > 0]  # true is none, though an int
    if not lengths:
        raise UserError(f"--lengths {run}: samples.jsonl holds no response with its number of tokens")
    if skipped := len(found) - len(lengths):
        print(f"plan: {path}: skipped {skipped} lines without a number of tokens", file=sys.stderr, flush=True)
    return lengths


def _log_normal(text: str, longest: int) -> tuple[float, float]:
    """Mean and standard deviation of the logarithm."""
    match = re.fullmatch(r"mean=(\d+(?:\.\d+)?),p(50|90|95|99)=(\d+(?:\.\d+)?)", text.replace(" ", ""))
    if match is None:
        raise UsageError(f"--lengths {text}: must be {_EXAMPLE}")
    mean, percentile, value = float(match[1]), int(match[2]), float(match[3])
    if not 1 <= mean <= longest or value < 1:
        raise UsageError(f"--lengths {text}: lengths are at least 1, and the mean at most max_new_tokens {longest}")
    # The quantile is mu + z sigma, and the logarithm of the mean mu + sigma² / 2.
    z = statistics.NormalDist().inv_cdf(percentile / 100)
    root = z * z - 2 * math.log(value / mean)
    sigma = z - math.sqrt(root) if percentile > 50 and root >= 0 else math.sqrt(max(root, 0))
    if root < 0 or sigma < 0:
        limit = f"from the mean to {math.exp(z * z / 2):.1f} times it" if percentile > 50 else "at most the mean"
        raise UsageError(f"--lengths {text}: no log-normal distribution has these; p{percentile} must be {limit}")
    return math.log(mean) - sigma**2 / 2, sigma
