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
_METADATA = re.compile(r"metadata=\{[^}]*\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
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
        """JAX's name for it, with its scopes."""
        match = _OP_NAME.search(self.line)
        return match[1] if match else ""

    def called(self, *kinds: str) -> list[str]:
        """Names of computations that it calls as any of `kinds` (body, condition, calls, ...)."""
        found = [names for kind, names in _CALLS.findall(self.line) if kind in kinds]
        return [name.strip().removeprefix("%") for names in found for name in names.split(",")]

    def operands(self) -> list[str]:
        """Names of its operands."""
        return re.findall(r"%([\w.\-]+)", self.line.partition(f" {self.opcode}(")[2].partition(")")[0])

    @property
    def constant(self) -> int | None:
        """Its value, if it is an integer constant."""
        match = re.search(r" constant\((\d+)\)", self.line)
        return int(match[1]) if match else None


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
        condition = self._named(loop, "condition")
        compared = [i for i in condition.values() if i.opcode == "compare" and "direction=LT" in i.line]
        for operands in ([condition.get(name) for name in i.operands()] for i in compared):
            limit = next((i.constant for i in operands if i is not None and i.constant is not None), None)
            counter = next((i for i in operands if i is not None and i.opcode == "get-tuple-element"), None)
            if limit is not None:
                return max(1, -(-limit // self._step(loop, counter)))
        return 1

    def _step(self, loop: Instruction, counter: Instruction | None) -> int:
        """What a turn adds to the counter: more than 1 where the compiler has unrolled the loop."""
        body = self._named(loop, "body")
        index = re.search(r"index=(\d+)", counter.line.rpartition("get-tuple-element(")[2]) if counter else None
        root = next((i for i in body.values() if i.opcode == "tuple" and i.line.lstrip().startswith("ROOT")), None)
        if index is None or root is None or int(index[1]) >= len(root.operands()):
            return 1
        added = body.get(root.operands()[int(index[1])])
        if added is None or added.opcode != "add":
            return 1
        constants = [body[name].constant for name in added.operands() if name in body]
        return next((value for value in constants if value), 1)

    def _named(self, loop: Instruction, kind: str) -> dict[str, Instruction]:
        return {i.name: i for name in loop.called(kind) for i in self.computations.get(name, ())}


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


def _walk(module: Module, name: str, place: str, times: int, weight_bytes: int, seen: set[str]) -> Iterator[Collective]:
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
            # An asynchronous collective is in the fusions that begin, continue and end it: once is enough.
            if channel is not None and channel[1] in seen:
                continue
            seen |= {channel[1]} if channel else set()
            if opcode == "collective-permute":
                metadata = _METADATA.search(instruction.line)
                rings.setdefault(metadata[0] if metadata else instruction.name, []).append(instruction)
            else:
                yield _collective(opcode, place, instruction.bytes, times, instruction.op_name, weight_bytes)
        elif not instruction.opcode.endswith(("-done", "-update")):
            for called in instruction.called("calls", "to_apply", "branch_computations"):
                yield from _walk(module, called, place, times, weight_bytes, seen)
    for ring in rings.values():
        # The compiler passes a weight around in parts while it multiplies with them: to us that is one collective.
        size = sum(instruction.bytes for instruction in ring)
        yield _collective("collective-permute", place, size, times, ring[0].op_name, weight_bytes)


def _as_one(collectives: list[Collective], times: int, weight_bytes: int) -> Iterator[Collective]:
    """What is in a loop that the compiler made, as it is to the program: the turns of a ring are its parts, and
    any other collective there only runs behind the products."""
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
