"""Which collectives a compiled program runs, in which loop, how often and on how many bytes: read from its HLO text."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from psyche_jax.plan.hlo import Instruction, Module

_METADATA = re.compile(r"metadata=\{[^}]*\}")
PLACES = ("decoding_loop", "layer_loop", "other_loops", "once")


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
        if instruction.opcode == "while":
            trips = times * module.trip_count(instruction)
            inside = _place(place, instruction.op_name)
            windowed = _is_windowed(instruction)
            inner = seen if windowed else set()
            for called in instruction.called("body", "condition"):
                found = list(_walk(module, called, inside, trips, weight_bytes, inner))
                yield from _as_one(found, times, weight_bytes) if windowed else found
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
