# ruff: noqa: E501 (the compiler's lines are long)
"""The reader of HLO, on small texts made by hand in the form of the TPU compiler's."""

import dataclasses

import pytest

from psyche_jax.plan.collectives import WeightBytes, find_collectives, summarize
from psyche_jax.plan.hlo import Module

HLO = """HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.9 = f32[] add(%a, %b)
}

%layer_body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%p), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%counter, %one)
  %all-gather.1 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} all-gather(%x), channel_id=1, metadata={op_name="jit(step)/layer_loop/while/body/dot_general" stack_frame_id=1}
  ROOT %t = (s32[], bf16[4,8]) tuple(%next, %y)
}

%layer_condition (p: (s32[], bf16[4,8])) -> pred[] {
  %p = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(28)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%decode_body (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %while.1 = (s32[], bf16[4,8]) while(%t0), condition=%layer_condition, body=%layer_body.2, metadata={op_name="jit(step)/decoding_loop/while/body/layer_loop/while" stack_frame_id=2}
  %all-reduce.7 = (f32[64]{0}, f32[64]{0}) all-reduce(%a, %b), channel_id=7, to_apply=%sum
  ROOT %t = (s32[]) tuple(%next)
}

%layer_body.2 (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %all-reduce.8 = bf16[256,1,3584]{2,1,0} all-reduce(%x), channel_id=8, to_apply=%sum
  %start = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  %end = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.2
  ROOT %t = (s32[], bf16[4,8]) tuple(%next, %y)
}

%async_collective_fusion.1 (q: bf16[4,8]) -> bf16[16,8] {
  ROOT %all-gather.3 = bf16[16,8]{1,0} all-gather(%q), channel_id=3
}

%async_collective_fusion.2 (q: bf16[4,8]) -> bf16[16,8] {
  ROOT %all-gather.4 = bf16[16,8]{1,0} all-gather(%q), channel_id=3
}

%decode_condition (p: (s32[])) -> pred[] {
  %p = (s32[]) parameter(0)
  %limit = s32[] constant(100)
  %i = s32[] get-tuple-element(%p), index=0
  %lt = pred[] compare(%i, %limit), direction=LT
  ROOT %and = pred[] and(%lt, %not)
}

%windowed_dot_general_body_ag (p: (bf16[8,8], u32[])) -> (bf16[8,8], u32[]) {
  %p = (bf16[8,8]{1,0}, u32[]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=1
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  %collective-permute-start.1 = (bf16[8,8]{1,0}, bf16[8,8]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=20, metadata={op_name="jit(step)/layer_loop/while/body/dot_general" stack_frame_id=4}
  %collective-permute-done.1 = bf16[8,8]{1,0} collective-permute-done(%collective-permute-start.1), metadata={op_name="jit(step)/layer_loop/while/body/dot_general" stack_frame_id=4}
  %collective-permute-start.2 = (bf16[8,8]{1,0}, bf16[8,8]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=21, metadata={op_name="jit(step)/layer_loop/while/body/dot_general" stack_frame_id=4}
  ROOT %t = (bf16[8,8]{1,0}, u32[]) tuple(%x, %next)
}

%windowed_dot_general_cond_ag (p: (bf16[8,8], u32[])) -> pred[] {
  %p = (bf16[8,8]{1,0}, u32[]) parameter(0)
  %limit = u32[] constant(8)
  %i = u32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (p0: f32[4]) -> f32[4] {
  %while.2 = (s32[], bf16[4,8]) while(%t1), condition=%layer_condition, body=%layer_body, metadata={op_name="jit(step)/layer_loop/while" stack_frame_id=3}
  %while.3 = (s32[]) while(%t2), condition=%decode_condition, body=%decode_body, metadata={op_name="jit(step)/decoding_loop/while"}
  %while.4 = (bf16[8,8]{1,0}, u32[]) while(%t3), condition=%windowed_dot_general_cond_ag, body=%windowed_dot_general_body_ag, metadata={op_name="jit(step)/layer_loop/while/body/dot_general"}
  %reduce-scatter.1 = f32[8]{0} reduce-scatter(%p0), channel_id=30, to_apply=%sum
  ROOT %r = f32[4] copy(%p0)
}
"""


def by_opcode(collectives, place):
    return {(c.opcode, c.bytes, c.times) for c in collectives if c.place == place}


def test_places_sizes_and_counts():
    found = find_collectives(Module.parse(HLO), WeightBytes(4096, 8192))
    assert by_opcode(found, "once") == {("reduce-scatter", 8 * 4, 1)}
    # A weight that the compiler sends in a ring of parts is one collective of its whole size: 4 turns × 2 parts.
    assert by_opcode(found, "layer_loop") == {("all-gather", 64 * 32 * 2, 28), ("collective-permute", 8 * 128, 1)}
    # The asynchronous gather stands in two fusions and is one; an all-reduce of two arrays has the bytes of both.
    assert by_opcode(found, "decoding_loop") == {
        ("all-reduce", 2 * 64 * 4, 100),
        ("all-reduce", 256 * 3584 * 2, 2800),
        ("all-gather", 16 * 8 * 2, 2800),
    }


def test_summary():
    summary = summarize(find_collectives(Module.parse(HLO), WeightBytes(4096, 8192)))
    assert summary["layer_loop"] == {"instructions": 2, "count": 29, "bytes": 28 * 4096 + 1024, "weight_sized": 1}
    assert summary["decoding_loop"]["count"] == 5700
    assert summary["decoding_loop"]["weight_sized"] == 0, "what is reduced while decoding are activations"
    assert summary["other_loops"] == {"instructions": 0, "count": 0, "bytes": 0, "weight_sized": 0}


def test_a_gather_in_the_decoding_loop_is_weight_sized():
    summary = summarize(find_collectives(Module.parse(HLO), WeightBytes(256, 8192)))
    assert summary["decoding_loop"]["weight_sized"] == 1


@pytest.mark.parametrize(("scope", "found"), [("", 1), ("gather_rows/", 0)])
def test_a_gather_of_rows_in_the_decoding_loop_is_none_of_weights(scope, found):
    """The program says which it is: of devices that share weights each has rows of its own."""
    reduce = "  %all-reduce.8 = "
    name = f'metadata={{op_name="jit(step)/decoding_loop/while/body/layer_loop/{scope}sharding_constraint"}}'
    gather = f"  %rows = bf16[256,1,3584]{{2,1,0}} all-gather(%x), channel_id=78, {name}\n"
    module = Module.parse(HLO.replace(reduce, gather + reduce))
    assert summarize(find_collectives(module, WeightBytes(4096, 8192)))["decoding_loop"]["weight_sized"] == found


def test_beside_the_layers_a_step_of_decoding_has_no_matrices():
    """Block sums over the vocabulary may be larger than a small matrix; a table that is gathered is found."""
    loop = "  %while.1 = (s32[], bf16[4,8]) while(%t0)"
    gather = "  %sums = f32[128,16]{1,0} all-gather(%x), channel_id=77\n"
    module = Module.parse(HLO.replace(loop, gather + loop))
    for table, found in ((8193, 0), (8192, 1)):
        summary = summarize(find_collectives(module, WeightBytes(4096, table)))
        assert summary["decoding_loop"]["weight_sized"] == found


def test_trip_counts():
    module = Module.parse(HLO)
    loops = {i.name: i for body in module.computations.values() for i in body if i.opcode == "while"}
    assert {name: module.trip_count(loop) for name, loop in loops.items()} == {
        "while.1": 28,
        "while.2": 28,
        "while.3": 100,
        "while.4": 4,
    }
    line = loops["while.2"].line + ', backend_config={"known_trip_count":{"n":"5"}}'
    assert module.trip_count(dataclasses.replace(loops["while.2"], line=line)) == 5


def test_no_collectives():
    text = "HloModule m\n\nENTRY %main (p: f32[]) -> f32[] {\n  ROOT %p = f32[] parameter(0)\n}\n"
    assert find_collectives(Module.parse(text), WeightBytes(1, 1)) == []
