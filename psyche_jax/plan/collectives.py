"""What a compiled program moves, read from its HLO text: its collectives, in which loop, how often and on how many
bytes; and copies of the cache or of weights while it decodes."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from psyche_jax.model.sharding import GATHER_ROWS
from psyche_jax.plan.hlo import Instruction, Module

_METADATA = re.compile(r"metadata=\{[^}]*\}")
_PLACES = ("decoding_loop", "layer_loop", "other_loops", "once")
_DECODING_LAYERS = "layers of the decoding loop"  # a part of "decoding_loop"


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


# What moves numbers and computes none.
_MOVES = {
    "bitcast",
    "concatenate",
    "constant",
    "convert",
    "copy",
    "dynamic-slice",
    "get-tuple-element",
    "pad",
    "parameter",
    "reshape",
    "reverse",
    "slice",
    "transpose",
    "tuple",
}


class WeightBytes(NamedTuple):
    """As one chip computes with them: `matrix`, the smallest of a layer; `table`, the head or the embedding."""

    matrix: int
    table: int


def find_collectives(module: Module, weight_bytes: WeightBytes) -> list[Collective]:
    """All collectives of a program, given as HLO after compilation."""
    return list(_walk(module, module.entry, "once", 1, weight_bytes, set()))


def find_copies(module: Module, sizes: frozenset[int]) -> list[Instruction]:
    """The instructions of the decoding loops that do nothing but copy arrays with so many elements.

    What a chip reads from its HBM into its own memory, as it is, for a product to come, is not a copy.

    Args:
      module: HLO after compilation.
      sizes: of the cache and of weights on one chip.
    """
    found = []
    for instruction in _decoding(module, module.entry, False):
        largest = max((array.elements for array in instruction.arrays), default=0)
        if largest in sizes and _only_moves(module, instruction, largest):
            found.append(instruction)
    return found


def _decoding(module: Module, name: str, inside: bool) -> Iterator[Instruction]:
    """Instructions of the decoding loops, fusions whole."""
    for instruction in module.computations.get(name, ()):
        if inside:
            yield instruction
        within = inside or (instruction.opcode == "while" and "decoding_loop" in instruction.op_name)
        for called in instruction.called("body", "to_apply", "branch_computations"):
            yield from _decoding(module, called, within)


def _only_moves(module: Module, instruction: Instruction, elements: int) -> bool:
    if instruction.opcode == "copy-start":
        return all(array.memory == 0 for array in instruction.arrays[:2])  # from HBM to HBM
    if instruction.opcode not in ("copy", "transpose", "fusion"):
        return False
    opcodes = set(_opcodes(module, instruction, elements))
    turned = opcodes & {"copy", "transpose", "convert"}
    # To the chip's own memory as it is: a read ahead.
    return opcodes <= _MOVES and (bool(turned) or all(array.memory == 0 for array in instruction.arrays))


def _opcodes(module: Module, instruction: Instruction, elements: int) -> Iterator[str]:
    """Those of an instruction, of a fusion what it holds, but for what works on much smaller arrays (indices)."""
    if instruction.opcode != "fusion":
        yield instruction.opcode
        return
    for called in instruction.called("calls"):
        for inner in module.computations.get(called, ()):
            if any(2 * array.elements >= elements for array in inner.arrays):
                yield from _opcodes(module, inner, elements)


def summarize(collectives: Sequence[Collective], copies: int = 0) -> dict[str, dict[str, int]]:
    """By place: `instructions` in the program, `count` of them executed, `bytes` of all executions, `weight_sized`; and
    in the decoding loop how many `copies` of the cache or of weights there are."""
    result = {}
    for place in _PLACES:
        here = [collective for collective in collectives if collective.place == place]
        result[place] = {
            "instructions": len(here),
            "count": sum(collective.times for collective in here),
            "bytes": sum(collective.times * collective.bytes for collective in here),
            "weight_sized": sum(collective.weight_sized for collective in here),
        }
    result["decoding_loop"]["cache_sized_copies"] = copies
    return result


def _walk(
    module: Module, name: str, place: str, times: int, weight_bytes: WeightBytes, seen: set[str]
) -> Iterator[Collective]:
    """Collectives of a computation and of all it calls. `seen`: channels that this turn of the loop has had."""
    rings: dict[str, list[Instruction]] = {}
    for instruction in module.computations.get(name, ()):
        if instruction.opcode == "while":
            trips = times * module.trip_count(instruction)
            inside = _place(place, instruction.op_name)
            windowed = _is_windowed(instruction)
            inner = seen if windowed else set()
            for called in instruction.called("body", "condition"):
                found = list(_walk(module, called, inside, trips, weight_bytes, inner))
                yield from _as_one(found, inside, times, weight_bytes) if windowed else found
        elif opcode := instruction.collective:
            # An asynchronous collective is in the fusions that begin, continue and end it: once is enough.
            if instruction.channel in seen:
                continue
            seen |= {instruction.channel} if instruction.channel else set()
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


def _as_one(collectives: list[Collective], place: str, times: int, weight_bytes: WeightBytes) -> Iterator[Collective]:
    """What is in a loop that the compiler made, as it is to the program: the turns of a ring are its parts, and
    any other collective there only runs behind the products."""
    for found in collectives:
        turns = found.times // times if found.opcode == "collective-permute" else 1
        yield _collective(found.opcode, place, found.bytes * turns, times, found.op_name, weight_bytes)


def _collective(opcode: str, place: str, size: int, times: int, op_name: str, weight_bytes: WeightBytes) -> Collective:
    # Beside its layers a step of decoding has activations of the vocabulary's size, and no weights but tables.
    least = weight_bytes.table if place == "decoding_loop" else weight_bytes.matrix
    if opcode == "collective-permute":
        least //= 2  # a ring moves all but a chip's own part
    decoding = place in ("decoding_loop", _DECODING_LAYERS)
    # So many activations are reduced, and gathered where each device has rows of its own.
    activations = decoding and (opcode == "all-reduce" or f"/{GATHER_ROWS}/" in op_name)
    weight_sized = size >= least and not activations
    return Collective(opcode, "decoding_loop" if decoding else place, size, times, op_name, weight_sized)


def _place(outer: str, op_name: str) -> str:
    in_layers = "layer_loop" in op_name
    if outer in ("decoding_loop", _DECODING_LAYERS) or "decoding_loop" in op_name:
        return _DECODING_LAYERS if in_layers or outer == _DECODING_LAYERS else "decoding_loop"
    return "layer_loop" if in_layers or outer == "layer_loop" else "other_loops"


def _is_windowed(loop: Instruction) -> bool:
    """Whether the compiler made this loop of one matrix product, to send parts while it multiplies."""
    return "windowed" in loop.line or not loop.op_name.endswith("while")
