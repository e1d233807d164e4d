"""Seconds of a compiled TPU program by phase, from the compiler's own estimate of cycles with loops multiplied out.

It is the upper end of a bracket whose lower end is the roofline (`plan/roofline.py`). What carries no estimate:

- collectives: bytes over one link, and a microsecond a hop. Those that run beside other work count only as far as they
  take longer than that: what has a start and an end, than what is computed between them; what the compiler has fused
  with products, than all of the loop's turn.
- Pallas kernels: attention by arithmetic, at half of the peak or of the bandwidth.
- gathers, scatters and updates in place: what they write, twice, at the HBM's bandwidth.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from psyche_jax.plan.hlo import COLLECTIVES, Instruction, Module
from psyche_jax.plan.rollout import Loop
from psyche_jax.plan.roofline import Phase
from psyche_jax.plan.slices import Chip, Slice

PHASES = ("prefill", "decoding", "log_probs", "updates", "optimizer")
UNHIDDEN = "unhidden_collectives"
# `jax.named_scope`s of the program; what scores responses counts as decoding.
_SCOPES = {"prefill": "prefill", "decoding_loop": "decoding", "rewards": "decoding"} | {
    name: name for name in ("log_probs", "updates", "optimizer")
}
_SCOPE = re.compile(rf"(?:^|[/(])({'|'.join(_SCOPES)})(?=[/)]|$)")
# Of the phases of the roofline.
_OF_ROOFLINE = {
    "gather_for_decoding": "prefill",
    "prefill": "prefill",
    "decode": "decoding",
    "reference": "log_probs",
    "old_log_probs": "log_probs",
    "entropies": "log_probs",
    "forward": "updates",
    "backward": "updates",
    "optimizer": "optimizer",
}
KERNEL_EFFICIENCY = 0.5  # of a Pallas kernel, beside the peak or the bandwidth
_HOP_SECONDS = 1e-6  # from a chip to its neighbour
_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "reshape",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "add-dependency",
    "custom-call",
)


@dataclass(frozen=True)
class Forecast:
    """Seconds of one run of the program by phase and of collectives that nothing hides: at least, and by cycles."""

    low: dict[str, float]
    high: dict[str, float]

    @property
    def totals(self) -> tuple[float, float]:
        """Of all phases, at least and by cycles."""
        return sum(self.low.values()), sum(self.high.values())


def forecast(
    module: Module, slice_: Slice, roofline: Mapping[str, Phase], attention: Mapping[str, Phase], loops: Sequence[Loop]
) -> Forecast:
    """Forecast a program.

    Args:
      module: HLO after compilation.
      slice_: what it is compiled for.
      roofline: work by phase, as `count_phases` names them.
      attention: of that the attention, which may be in Pallas kernels, by the names of `PHASES`.
      loops: those of decoding, with their turns.
    """
    low = dict.fromkeys((*PHASES, UNHIDDEN), 0.0)
    for name, work in roofline.items():
        low[_OF_ROOFLINE[name]] += work.seconds(slice_)
    cost = _Reader(module, slice_.chip, loops).program()
    high = {name: cost[name] for name in low}
    for phase, work in attention.items():
        if cost[f"kernels/{phase}"]:
            high[phase] += work.seconds(slice_) / KERNEL_EFFICIENCY
    # The cycles leave out some of the waiting for memory: no phase takes less than it must.
    return Forecast(low, {name: max(low[name], seconds) for name, seconds in high.items()})


def phase_of(op_name: str) -> str | None:
    """The phase whose scope is the innermost one in JAX's name of an instruction."""
    found = _SCOPE.findall(op_name)
    return _SCOPES[found[-1]] if found else None


def group_size(line: str) -> int:
    """How many devices a collective joins: `{{0,1},{2,3}}`, `[4,2]<=[8]`, or axes of a mesh by name. At least 2."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return max(2, len(match[1].split(",")))
    if match := re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", line):
        return max(2, int(match[1]))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        return max(2, prod(sizes.get(name, 1) for name in re.findall(r"'(\w+)'", match[2])))
    return 2


def collective_seconds(instruction: Instruction, chip: Chip) -> float:
    """What a collective takes alone: all that the chip at the end of a line receives comes through one link."""
    kind, size, group = instruction.collective, instruction.bytes, group_size(instruction.line)
    link = chip.ici_bytes_per_second / chip.dimensions / 2
    if kind == "collective-permute":
        return size / link + _HOP_SECONDS
    if kind == "reduce-scatter":
        size *= group  # of the whole, of which a part is left
    turns = 2 if kind == "all-reduce" else 1
    return turns * (size * (group - 1) / group / link + (group - 1) * _HOP_SECONDS)


@dataclass
class _Reader:
    """Reads one program. Costs are in seconds, by phase; `kernels/PHASE`: how often a Pallas kernel runs."""

    module: Module
    chip: Chip
    loops: Sequence[Loop]  # of decoding, in their order
    _next: int = field(default=0, init=False)
    _looks: tuple[int, ...] = field(default=(), init=False)  # in the loop of decoding that is being read

    def __post_init__(self) -> None:
        # If the program has fewer loops than are expected, its last one does what is left.
        there = sum(_is_decoding_loop(i) for body in self.module.computations.values() for i in body)
        if 0 < there < len(self.loops):
            rest = self.loops[there - 1 :]
            looks = tuple(sum(counts) for counts in zip(*(loop.looks for loop in rest), strict=True))
            self.loops = (*self.loops[: there - 1], Loop(rest[0].rows, sum(loop.turns for loop in rest), looks))

    def program(self) -> dict[str, float]:
        """All of it."""
        return self._computation(self.module.entry, None, set())

    def _computation(self, name: str, outer: str | None, seen: set[str]) -> dict[str, float]:
        """One execution of a computation and of all it calls. `outer`: the caller's phase; `seen`: channels."""
        instructions = self.module.computations.get(name, [])
        by_name = {instruction.name: instruction for instruction in instructions}
        # What has lost its scope belongs to what most of its neighbours do.
        scoped = Counter(phase for i in instructions if (phase := phase_of(i.op_name)))
        usual = scoped.most_common(1)[0][0] if scoped else outer or "updates"
        cost: dict[str, float] = defaultdict(float)
        begun: dict[str, float] = {}  # collectives with what is left of them, which the links carry in turn
        beside = 0.0
        for instruction in instructions:
            phase = phase_of(instruction.op_name) or usual
            before = _computed(cost)
            if instruction.opcode in ("while", "conditional", "call"):  # what runs other computations
                turns = self._turns(instruction, outer)
                for called in self._called(instruction, phase, seen) if turns else ():
                    _add(cost, called, turns)
            else:
                # What is sent: everything waits for a plain collective, other work for one that has been split.
                seconds = sum(self._sending(instruction, seen))
                if instruction.opcode in COLLECTIVES or _is_reduce_scatter(instruction):
                    cost[UNHIDDEN] += seconds
                elif instruction.opcode.endswith("-start"):
                    begun[instruction.name] = seconds
                else:
                    beside += seconds

                # What is computed.
                cost[phase] += self._computing(instruction, by_name)
                if "tpu_custom_call" in instruction.line:
                    cost[f"kernels/{phase}"] += 1

            # What was begun goes on meanwhile; where it ends, all waits for what is left of it.
            passed = _computed(cost) - before
            for name, left in begun.items():
                begun[name] = max(0.0, left - passed)
                passed = max(0.0, passed - left)
            ended = set(instruction.operands()) & begun.keys() if instruction.opcode.endswith("-done") else set()
            while ended:
                name = next(iter(begun))
                cost[UNHIDDEN] += begun.pop(name)
                ended.discard(name)
        cost[UNHIDDEN] += max(0.0, beside - _computed(cost))
        return cost

    def _called(self, instruction: Instruction, phase: str, seen: set[str]) -> list[dict[str, float]]:
        """What a turn of a loop, a call, or a choice among computations costs."""
        if instruction.opcode == "while":
            return [self._computation(called, phase, set()) for called in instruction.called("body", "condition")]
        found = [self._computation(c, phase, seen) for c in instruction.called("to_apply", "branch_computations")]
        if phase == "decoding" and len(found) == len(self._looks) and any(self._looks):
            # How much of the cache is looked at.
            mean: dict[str, float] = defaultdict(float)
            for cost, count in zip(found, self._looks, strict=True):
                _add(mean, cost, count / sum(self._looks))
            return [mean]
        return [max(found, key=_seconds)] if found else []

    def _turns(self, instruction: Instruction, outer: str | None) -> int:
        if instruction.opcode != "while":
            return 1
        if instruction.op_name.endswith("more_candidates/while"):
            return 0  # dynamic sampling finds all of its prompts at the first try
        if outer != "decoding" and _is_decoding_loop(instruction):
            self._next += 1
            if self._next > len(self.loops):
                return 0
            self._looks = self.loops[self._next - 1].looks
            return self.loops[self._next - 1].turns
        return self.module.trip_count(instruction)

    def _sending(self, instruction: Instruction, seen: set[str]) -> Iterator[float]:
        """Seconds of a collective, or of those within a fusion. One that is in several fusions counts once."""
        if instruction.collective:
            yield collective_seconds(instruction, self.chip)
        for called in instruction.called("calls", "to_apply") if not instruction.collective else ():
            for inner in self.module.computations.get(called, ()):
                if inner.collective and inner.channel not in seen:
                    seen |= {inner.channel} if inner.channel else set()
                    seconds = collective_seconds(inner, self.chip)
                    yield seconds / 2 if _is_reduce_scatter(instruction) else seconds
                elif inner.opcode == "fusion":
                    yield from self._sending(inner, seen)

    def _computing(self, instruction: Instruction, by_name: Mapping[str, Instruction]) -> float:
        """Seconds of what an instruction computes."""
        if instruction.cycles is not None:
            return instruction.cycles / self.chip.clock
        if (
            instruction.opcode in _FREE
            or instruction.collective
            or instruction.opcode.endswith(("-start", "-done", "-update"))
            or any("async_collective" in called for called in instruction.called("calls"))
        ):
            return 0.0
        written = instruction
        if instruction.opcode == "dynamic-update-slice":  # in place
            written = by_name.get(instruction.operands()[1], instruction)
        return 2 * sum(a.bytes for a in written.arrays if a.memory == 0) / self.chip.hbm_bytes_per_second


def _is_reduce_scatter(instruction: Instruction) -> bool:
    """Whether it is a sum of which each chip keeps a part: the compiler writes a fusion of both."""
    return any(called.startswith("all-reduce-scatter") for called in instruction.called("calls"))


def _is_decoding_loop(instruction: Instruction) -> bool:
    name = instruction.op_name
    return instruction.opcode == "while" and name.endswith("decoding_loop/while") and "more_candidates/" not in name


def _add(cost: dict[str, float], other: Mapping[str, float], times: float = 1) -> None:
    for name, value in other.items():
        cost[name] += times * value


def _computed(cost: Mapping[str, float]) -> float:
    return sum(cost[phase] for phase in PHASES)


def _seconds(cost: Mapping[str, float]) -> float:
    return sum(value for name, value in cost.items() if "/" not in name)
