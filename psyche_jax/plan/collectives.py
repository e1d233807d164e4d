"""Which collectives a compiled program runs, in which loop, how often and on how many bytes: read from its HLO text."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_OPCODES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+|f8\w+|c64|c128)\[([\d,]*)\]")
_CALLS = re.compile(r"(body|condition|calls|to_apply|branch_computations)=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_OPERANDS = re.compile(r"\((%[\w.\-]+(?:, (?:/\*.*?\*/)?%[\w.\-]+)*)\)")
PLACES = ("decoding_loop", "layer_loop", "other_loops", "once")


@dataclass(frozen=True)
class Instruction:
    """One line of HLO: what is read of it."""

    name: str
    opcode: str
    bytes: int  # of the largest part of its result; of all parts, if it is an all-reduce of several arrays
    line: str

    @property
    def op_name(self) -> str:
        """JAX's name for it, with the scopes it lies in."""
        match = _OP_NAME.search(self.line)
        return match[1] if match else ""

    def called(self, *kinds: str) -> list[str]:
        """Names of computations that it calls as any of `kinds` (body, condition, calls, ...)."""
        found = [names for kind, names in _CALLS.findall(self.line) if kind in kinds]
        return [name.strip().removeprefix("%") for names in found for name in names.split(",")]


@dataclass(frozen=True)
class Collective:
    """One collective of a program, or a ring of permutes that is one to the program.

    `bytes` is the size of the array that a chip sends or has at the end, `times` how often one run of the program
    executes it.
    """

    opcode: str
    place: str
    bytes: int
    times: int
    op_name: str
    weight_sized: bool


@dataclass
class Module:
    """The computations of an HLO text, by name, and the trip counts of its loops."""

    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    entry: str = ""

    @staticmethod
    def parse(text: str) -> "Module":
        """Read `compiled.as_text()`."""
        module = Module()
        current: list[Instruction] = []
        for line in text.splitlines():
            if match := _INSTRUCTION.match(line):
                size = _bytes(match["shape"], match["opcode"])
                current.append(Instruction(match["name"], match["opcode"], size, line))
            elif match := _COMPUTATION.match(line):
                current = module.computations.setdefault(match["name"], [])
                module.entry = match["name"] if match["entry"] else module.entry
        return module

    def trip_count(self, loop: Instruction) -> int:
        """How often a `while` runs at most: as the compiler notes it, else the constant its condition compares with."""
        if match := _TRIPS.search(loop.line):
            return int(match[1])
        condition = {i.name: i for name in loop.called("condition") for i in self.computations.get(name, ())}
        limits = []
        for instruction in list(condition.values()):
            if instruction.opcode == "compare" and "direction=LT" in instruction.line:
                operands = _OPERANDS.search(instruction.line[instruction.line.index(" compare(") :])
                for operand in operands[1].split(", ") if operands else ():
                    constant = condition.get(operand.split("%")[-1])
                    if constant is not None and (match := re.search(r" constant\((\d+)\)", constant.line)):
                        limits.append(int(match[1]))
        return max(limits, default=1)


def find_collectives(text: str, weight_bytes: int) -> list[Collective]:
    """All collectives of the program in `text`.

    Args:
      text: HLO after compilation.
      weight_bytes: size of the smallest weight matrix of a layer, as one chip computes with it.
    """
    module = Module.parse(text)
    return list(_walk(module, module.entry, "once", 1, weight_bytes, set()))


def summarize(collectives: list[Collective]) -> dict[str, dict[str, int]]:
    """By place: `instructions` in the program, `count` of them executed, `bytes` of all executions, `weight_sized`."""
    result = {}
    for place in PLACES:
        here = [collective for collective in collectives if collective.place == place]
        result[place] = {
            "instructions": len(here),
            "count": sum(collective.times for collective in here),
            "bytes": sum(collective.times * collective.bytes for collective in here),
            "weight_sized": sum(collective.weight_sized for collective in here),
        }
    return result


def _walk(
    module: Module, name: str, place: str, times: int, weight_bytes: int, seen: set[str]
) -> Iterator[Collective]:
    """Collectives of a computation and of all it calls. `seen`: channels that this turn of the loop has had."""
    rings: dict[str, list[Instruction]] = {}
    for instruction in module.computations.get(name, ()):
        opcode = instruction.opcode.removesuffix("-start")
        if instruction.opcode == "while":
            trips = times * module.trip_count(instruction)
            inside = _place(place, instruction.op_name)
            windowed = _is_windowed(instruction)
            inner = seen if windowed else set()
            for called in instruction.called("body", "condition"):
                found = list(_walk(module, called, inside, trips, weight_bytes, inner))
                yield from _as_one(found, times, weight_bytes) if windowed else found
        elif opcode in _OPCODES:
            channel = _CHANNEL.search(instruction.line)
            # An asynchronous collective stands in the fusions that begin, go on with and end it: once is enough.
            if channel is not None and channel[1] in seen:
                continue
            seen |= {channel[1]} if channel else set()
            if opcode == "collective-permute":
                rings.setdefault(instruction.op_name or instruction.name, []).append(instruction)
            else:
                yield _collective(opcode, place, instruction.bytes, times, instruction.op_name, weight_bytes)
        elif not instruction.opcode.endswith(("-done", "-update")):
            for called in instruction.called("calls", "to_apply", "branch_computations"):
                yield from _walk(module, called, place, times, weight_bytes, seen)
    for op_name, ring in rings.items():
        # The compiler passes a weight around in parts while it multiplies with them: to us that is one collective.
        size = sum(instruction.bytes for instruction in ring)
        yield _collective("collective-permute", place, size, times, op_name, weight_bytes)


def _as_one(collectives: list[Collective], times: int, weight_bytes: int) -> Iterator[Collective]:
    """What stands in a loop that the compiler made, as it is to the program: the turns of a ring are its parts, and
    any other collective there only goes on behind the products."""
    for found in collectives:
        turns = found.times // times if found.opcode == "collective-permute" else 1
        yield _collective(found.opcode, found.place, found.bytes * turns, times, found.op_name, weight_bytes)


def _collective(opcode: str, place: str, size: int, times: int, op_name: str, weight_bytes: int) -> Collective:
    # A ring moves all but a chip's own part. While decoding, what is reduced are activations, however many.
    least = weight_bytes // 2 if opcode == "collective-permute" else weight_bytes
    weight_sized = size >= least and not (place == "decoding_loop" and opcode == "all-reduce")
    return Collective(opcode, place, size, times, op_name, weight_sized)


def _place(outer: str, op_name: str) -> str:
    if outer == "decoding_loop" or "decoding_loop" in op_name:
        return "decoding_loop"
    if outer == "layer_loop" or "layer_loop" in op_name:
        return "layer_loop"
    return "other_loops"


def _is_windowed(loop: Instruction) -> bool:
    """Whether the compiler made this loop of one matrix product, to send parts while it multiplies."""
    return "windowed" in loop.line or not loop.op_name.endswith("while")


def _bytes(shape: str, opcode: str) -> int:
    sizes = [_array_bytes(dtype, dimensions) for dtype, dimensions in _SHAPE.findall(shape)]
    return (sum if opcode == "all-reduce" else max)([0, *sizes])


def _array_bytes(dtype: str, dimensions: str) -> int:
    bits = 8 if dtype == "pred" or dtype.startswith("f8") else int(re.sub(r"\D", "", dtype))
    count = 1
    for dimension in dimensions.split(","):
        count *= int(dimension) if dimension else 1
    return count * bits // 8
