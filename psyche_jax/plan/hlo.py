"""The HLO text of a compiled program: its computations, their instructions, and how often its loops run."""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+|f8\w+|c64|c128)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLS = re.compile(r"(body|condition|calls|to_apply|branch_computations)=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclass(frozen=True)
class Array:
    """One array of a shape. `memory`: 0 is the chip's HBM."""

    dtype: str
    dimensions: tuple[int, ...]
    memory: int

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.dimensions)

    @property
    def bytes(self) -> int:
        """What it takes, padding of its layout aside."""
        bits = 8 if self.dtype == "pred" or self.dtype.startswith("f8") else int(re.sub(r"\D", "", self.dtype))
        return self.elements * bits // 8


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape, those of a tuple in order."""
    found = []
    for dtype, dimensions, layout in _ARRAY.findall(shape):
        memory = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size) for size in dimensions.split(",") if size)
        found.append(Array(dtype, sizes, int(memory[1]) if memory else 0))
    return found


@dataclass(frozen=True)
class Instruction:
    """One instruction: what is read of it. `line` is all of its text, which may have been several lines."""

    name: str
    opcode: str
    shape: str
    line: str

    @cached_property
    def arrays(self) -> list[Array]:
        """Those of its result."""
        return arrays(self.shape)

    @property
    def bytes(self) -> int:
        """Of the largest part of its result; of all parts, if it is an all-reduce of several arrays."""
        sizes = [array.bytes for array in self.arrays]
        return (sum if self.opcode == "all-reduce" else max)([0, *sizes])

    @property
    def collective(self) -> str | None:
        """Its kind, if it is a collective or begins one."""
        opcode = self.opcode.removesuffix("-start")
        return opcode if opcode in COLLECTIVES else None

    @property
    def op_name(self) -> str:
        """JAX's name for it, with its scopes."""
        match = _OP_NAME.search(self.line)
        return match[1] if match else ""

    @property
    def channel(self) -> str | None:
        """Of a collective: what all parts of one have in common."""
        match = _CHANNEL.search(self.line)
        return match[1] if match else None

    @property
    def cycles(self) -> int | None:
        """What the TPU compiler reckons that one execution takes, if it says so."""
        match = _CYCLES.search(self.line)
        return int(match[1]) if match else None

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
        within = False
        for line in text.splitlines():
            if match := _INSTRUCTION.match(line):
                current.append(Instruction(match["name"], match["opcode"], match["shape"], line))
                within = True
            elif match := _COMPUTATION.match(line):
                current = module.computations.setdefault(match["name"], [])
                module.entry = match["name"] if match["entry"] else module.entry
            elif line.rstrip() == "}":
                within = False
            elif within and current:  # what a Pallas kernel says of itself is on lines of its own
                last = current[-1]
                current[-1] = Instruction(last.name, last.opcode, last.shape, f"{last.line}\n{line}")
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
        root = next((i for i in body.values() if i.opcode == "tuple" and i.line.lstrip().startswith("ROOT ")), None)
        if index is None or root is None or int(index[1]) >= len(root.operands()):
            return 1
        added = body.get(root.operands()[int(index[1])])
        if added is None or added.opcode != "add":
            return 1
        constants = [body[name].constant for name in added.operands() if name in body]
        return next((value for value in constants if value), 1)

    def _named(self, loop: Instruction, kind: str) -> dict[str, Instruction]:
        return {i.name: i for name in loop.called(kind) for i in self.computations.get(name, ())}
