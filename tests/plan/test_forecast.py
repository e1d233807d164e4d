# ruff: noqa: E501 (the compiler's lines are long)
"""The forecast, on small programs made by hand in the form of the TPU compiler's."""

import dataclasses

import pytest

from psyche_jax.plan.collectives import find_copies
from psyche_jax.plan.forecast import PHASES, UNHIDDEN, collective_seconds, forecast, group_size, phase_of
from psyche_jax.plan.hlo import Instruction, Module
from psyche_jax.plan.rollout import Loop
from psyche_jax.plan.roofline import Phase
from psyche_jax.plan.slices import CHIPS, parse_topology

SLICE = parse_topology("v5e:4x4")
CHIP = CHIPS["v5e"]
CYCLES = 'backend_config={{"window_config":{{"estimated_cycles":"{}","iteration_bounds":["1"]}}}}'


def line(name, shape, call, op_name="", cycles=None):
    metadata = f', metadata={{op_name="{op_name}" stack_frame_id=1}}' if op_name else ""
    return f"  %{name} = {shape} {call}{metadata}{'' if cycles is None else ', ' + CYCLES.format(cycles)}"


HLO = "\n".join(
    [
        "HloModule jit_step, is_scheduled=true",
        "",
        "%cond (p: (s32[])) -> pred[] {",
        "  %i = s32[] get-tuple-element(%p), index=0",
        "  %limit = s32[] constant(7)",
        "  ROOT %lt = pred[] compare(%i, %limit), direction=LT",
        "}",
        "",
        "%layer (p: (s32[])) -> (s32[]) {",
        line("fusion.1", "bf16[8]{0}", "fusion(%x), kind=kLoop, calls=%f", "jit(step)/updates/x/layer_loop/while/body/add", 100),
        line("copy.1", "bf16[8]{0}", "copy(%x)", cycles=11),  # has lost its scope: as its neighbours
        "  ROOT %t = (s32[]) tuple(%i)",
        "}",
        "",
        "%cheap (p: f32[]) -> f32[] {",
        line("fusion.2", "f32[]", "fusion(%x), kind=kLoop, calls=%f", "jit(step)/prefill/decoding_loop/while/body/cond", 10),
        "}",
        "",
        "%dear (p: f32[]) -> f32[] {",
        line("fusion.3", "f32[]", "fusion(%x), kind=kLoop, calls=%f", "jit(step)/prefill/decoding_loop/while/body/cond", 1000),
        "}",
        "",
        "%step (p: (s32[])) -> (s32[]) {",
        line("choice", "f32[]", "conditional(%i, %a, %b), branch_computations={%cheap, %dear}"),
        line("all-reduce.1", "bf16[1000]{0}", "all-reduce(%x), channel_id=1, replica_groups=[4,4]<=[16], to_apply=%sum"),
        "  ROOT %t = (s32[]) tuple(%i)",
        "}",
        "",
        "%async_start (p: bf16[8]) -> bf16[8] {",
        "  ROOT %all-gather.2 = bf16[1000000]{0} all-gather(%p), channel_id=2, replica_groups=[4,4]<=[16]",
        "}",
        "",
        "%async_collective_fusion.1 (p: bf16[8]) -> bf16[8] {",
        "  ROOT %all-gather.3 = bf16[1000000]{0} all-gather(%p), channel_id=2, replica_groups=[4,4]<=[16]",
        "}",
        "",
        "%kernels (p: (s32[])) -> (s32[]) {",
        "  %splash = bf16[8]{0} custom-call(%x), custom_call_target=\"tpu_custom_call\", frontend_attributes={kernel_metadata={",
        '"xprof_metadata":"{\\"block_q\\": 128}"',
        '}}, metadata={op_name="jit(step)/updates/log_probs/while/body/pallas_call"}',
        line("async-collective-start.1", "bf16[8]{0}", "fusion(%x), kind=kCustom, calls=%async_start"),
        line("fusion.4", "bf16[8]{0}", "fusion(%x), kind=kOutput, calls=%async_collective_fusion.1", "jit(step)/updates/log_probs/dot_general", 2000),
        "  ROOT %t = (s32[]) tuple(%i)",
        "}",
        "",
        "ENTRY %main (p: f32[4]) -> f32[4] {",
        line("fusion.5", "f32[4]{0}", "fusion(%p), kind=kLoop, calls=%f", "jit(step)/prefill/layer_loop/add", 500),
        line("while.1", "(s32[])", "while(%t), condition=%cond, body=%step", "jit(step)/prefill/decoding_loop/while"),
        line("while.2", "(s32[])", "while(%t), condition=%cond, body=%step", "jit(step)/prefill/decoding_loop/while"),
        line("while.3", "(s32[])", "while(%t), condition=%cond, body=%layer", "jit(step)/updates/transpose(jvp(layer_loop))/while"),
        line("while.4", "(s32[])", "while(%t), condition=%cond, body=%kernels", "jit(step)/updates/log_probs/while"),
        line("while.5", "(s32[])", "while(%t), condition=%cond, body=%step", "jit(step)/more_candidates/while"),
        line("fusion.6", "f32[4]{0}", "fusion(%p), kind=kLoop, calls=%f", "jit(step)/updates/while/body/optimizer/add", 300),
        "  %gather = f32[1000000]{0} gather(%p)",
        "}",
        "",
    ]
)  # fmt: skip
NOTHING = {"forward": Phase(), "decode": Phase()}


LOOPS = (Loop(16, 20), Loop(8, 3))


def seconds(turns=LOOPS, roofline=NOTHING, attention=None, text=HLO):
    return forecast(Module.parse(text), SLICE, roofline, attention or {}, turns)


def test_cycles_times_trips_by_phase():
    high = seconds().high
    clock = CHIP.clock
    assert clock == pytest.approx(1.5e9, rel=0.01)
    assert high["prefill"] * clock == pytest.approx(500)
    # Of two branches the costlier; each loop has the turns it is given, the constant in its condition aside.
    # What has no estimate takes as long as to write its result twice; without a scope it belongs to most of the entry.
    gather = 2 * 4e6 / CHIP.hbm_bytes_per_second
    assert high["decoding"] - gather == pytest.approx(23 * 1000 / clock, rel=1e-4)
    assert high["updates"] * clock == pytest.approx(7 * 111, rel=1e-4)
    assert high["log_probs"] * clock == pytest.approx(7 * 2000, rel=1e-4)
    assert high["optimizer"] * clock == pytest.approx(300)


def test_how_much_of_the_cache_is_looked_at():
    """Where it is known which branch how many steps take, their mean counts instead of the costliest."""
    gather = 2 * 4e6 / CHIP.hbm_bytes_per_second
    loops = (Loop(16, 20, (15, 5)), Loop(8, 3, (0, 3)))
    expected = (15 * 10 + 5 * 1000 + 3 * 1000) / CHIP.clock
    assert seconds(loops).high["decoding"] - gather == pytest.approx(expected, rel=1e-3)
    other = (Loop(16, 20, (15, 5, 0)), Loop(8, 3, (0, 3, 0)))
    assert seconds(other).high["decoding"] == pytest.approx(seconds().high["decoding"]), "other branches than expected"


def test_collectives_that_nothing_hides():
    sum_ = 2 * (2000 * 3 / 4 / 50e9 + 3e-6)
    gather = 2e6 * 3 / 4 / 50e9 + 3e-6
    # The gather runs beside a product in each of 7 turns, and is one, though it is in two fusions.
    rest = 7 * (gather - 2000 / CHIP.clock)
    assert rest > 0
    assert seconds().high[UNHIDDEN] == pytest.approx(23 * sum_ + rest)
    longer = HLO.replace('"2000"', '"2000000"')
    assert seconds(text=longer).high[UNHIDDEN] == pytest.approx(23 * sum_)


def test_what_is_computed_between_start_and_end_hides_a_collective():
    """The links carry one after the other; who waits for one waits for those before it."""
    sparse = 'async_execution_thread="sparsecore", to_apply=%gather'
    text = "\n".join(
        [
            "%gather (p: bf16[8]) -> bf16[8] {",
            "  ROOT %all-gather.1 = bf16[1000000]{0} all-gather(%p), channel_id=1, replica_groups=[4,4]<=[16]",
            "}",
            "",
            "ENTRY %main (p: bf16[8]) -> bf16[8] {",
            f"  %a = ((bf16[8], token[]), bf16[1000000]{{0}}) call-start(%p), {sparse}",
            line("fusion.1", "bf16[8]{0}", "fusion(%p), kind=kLoop, calls=%f", "jit(step)/updates/x", 20000),
            f"  %b = ((bf16[8], token[]), bf16[1000000]{{0}}) call-start(%p), {sparse.replace('gather', 'second')}",
            line("fusion.2", "bf16[8]{0}", "fusion(%p), kind=kLoop, calls=%f", "jit(step)/updates/x", 40000),
            "  %b.done = bf16[1000000]{0} call-done(%b)",
            "  %a.done = bf16[1000000]{0} call-done(%a)",
            line("fusion.3", "bf16[8]{0}", "fusion(%p), kind=kLoop, calls=%f", "jit(step)/updates/x", 90000),
            "}",
            "",
            "%second (p: bf16[8]) -> bf16[8] {",
            "  ROOT %all-gather.2 = bf16[1000000]{0} all-gather(%p), channel_id=2, replica_groups=[4,4]<=[16]",
            "}",
        ]
    )
    gather = 2e6 * 3 / 4 / 50e9 + 3e-6
    found = forecast(Module.parse(text), SLICE, {"forward": Phase()}, {}, ())
    between = 60000 / CHIP.clock
    assert gather < between < 2 * gather
    assert found.high[UNHIDDEN] == pytest.approx(2 * gather - between), "nothing is left for the end of the first"
    assert found.high["updates"] == pytest.approx(150000 / CHIP.clock)


def test_kernels_take_twice_their_arithmetic():
    work = Phase(flops=16 * CHIP.bf16_flops)
    plain, with_kernels = seconds().high, seconds(attention={"log_probs": work, "updates": work}).high
    assert with_kernels["log_probs"] == pytest.approx(plain["log_probs"] + 2)
    assert with_kernels["updates"] == plain["updates"], "where there is no kernel attention has cycles"


def test_the_ends_and_their_sums():
    work = {"forward": Phase(16 * CHIP.bf16_flops), "backward": Phase(32 * CHIP.bf16_flops), "prefill": Phase(0, 1e3)}
    found = seconds(roofline=work)
    assert set(found.low) == set(found.high) == {*PHASES, UNHIDDEN}
    assert found.low["updates"] == pytest.approx(3)
    assert found.high["updates"] == pytest.approx(3), "no phase takes less than it must"
    assert all(found.low[name] <= found.high[name] for name in found.low)
    assert found.totals == (pytest.approx(sum(found.low.values())), pytest.approx(sum(found.high.values())))
    assert found.low[UNHIDDEN] == 0


def test_more_turns_cost_more():
    totals = [seconds((Loop(16, turns),)).totals[1] for turns in (0, 1, 20, 21)]
    assert totals == sorted(set(totals))


def test_all_turns_count_where_the_program_has_fewer_loops():
    merged = seconds((Loop(16, 20), Loop(8, 3), Loop(4, 5), Loop(2, 7))).high
    assert merged == seconds((Loop(16, 20), Loop(8, 15))).high


@pytest.mark.parametrize(
    ("op_name", "phase"),
    [
        ("jit(__call__)/prefill/decoding_loop/while/body/layer_loop/while", "decoding"),
        ("jit(__call__)/prefill/layer_loop/while/body/add", "prefill"),
        ("jit(__call__)/rewards/while", "decoding"),
        ("jit(__call__)/updates/log_probs/while/body/closed_call/layer_loop/while", "log_probs"),
        ("jit(step)/updates/while/body/transpose(jvp(layer_loop))/while", "updates"),
        ("jit(step)/transpose(jvp(updates))/add", "updates"),
        ("jit(step)/updates/while/body/optimizer", "optimizer"),
        ("jit(step)/my_updates/add", None),
        ("", None),
    ],
)
def test_phases_by_scope(op_name, phase):
    assert phase_of(op_name) == phase


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[2,8]<=[16]", 8),
        ("replica_groups=[4,4]<=[4,4]T(1,0)", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
        ("source_target_pairs={{0,1},{1,0}}", 2),
    ],
)
def test_how_many_devices_a_collective_joins(groups, size):
    assert group_size(f"%a = f32[8] all-gather(%x), {groups}, use_global_device_ids=true") == size


def test_seconds_of_collectives():
    def of(opcode, shape, groups="replica_groups=[4,4]<=[16]"):
        text = f"%a = {shape} {opcode}(%x), {groups}"
        return collective_seconds(Instruction("a", opcode, shape, text), CHIP)

    gather = of("all-gather", "bf16[1000000]{0}")
    assert of("all-reduce", "bf16[1000000]{0}") == pytest.approx(2 * gather)
    assert of("reduce-scatter", "bf16[250000]{0}") == pytest.approx(gather)
    assert of("all-gather", "bf16[2000000]{0}") > gather
    assert of("collective-permute-start", "(bf16[1000000]{0}, bf16[1000000]{0})") == pytest.approx(2e6 / 50e9 + 1e-6)


def test_clocks():
    """GHz, by the published peaks."""
    clocks = {name: round(chip.clock / 1e9, 2) for name, chip in CHIPS.items()}
    assert clocks == {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.2}


COPIES = """
%turn (p: bf16[64,128]) -> bf16[128,64] {
  %small = s32[] multiply(%i, %two)
  %c = bf16[64,128]{0,1} copy(%p)
  ROOT %b = bf16[128,64]{1,0} bitcast(%c)
}

%product (p: bf16[64,128]) -> bf16[128,64] {
  %c = bf16[64,128]{0,1} copy(%p)
  ROOT %m = bf16[128,64]{1,0} multiply(%c, %c)
}

%read (p: bf16[3,64,128]) -> bf16[1,64,128] {
  ROOT %d = bf16[1,64,128]{2,1,0} dynamic-slice(%p, %i)
}

%layer (p: (s32[])) -> (s32[]) {
  %turned = bf16[128,64]{1,0} fusion(%x), kind=kLoop, calls=%turn
  %computed = bf16[128,64]{1,0} fusion(%x), kind=kLoop, calls=%product
  %ahead = bf16[1,64,128]{2,1,0:T(8,128)S(1)} fusion(%x), kind=kLoop, calls=%read
  %again = bf16[1,64,128]{2,1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%read
  %copied = bf16[3,64,128]{2,1,0} copy(%x)
  %moved = (bf16[64,128]{1,0}, bf16[64,128]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %fetched = (bf16[64,128]{1,0:S(1)}, bf16[64,128]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %activation = bf16[64,100]{1,0} copy(%x)
  ROOT %t = (s32[]) tuple(%i)
}

%cond (p: (s32[])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%step (p: (s32[])) -> (s32[]) {
  ROOT %while.1 = (s32[]) while(%t), condition=%cond, body=%layer, metadata={op_name="jit(f)/decoding_loop/while/body/layer_loop/while"}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %while.2 = (s32[]) while(%t), condition=%cond, body=%step, metadata={op_name="jit(f)/decoding_loop/while"}
  %before = bf16[64,128]{0,1} copy(%x)
  ROOT %while.3 = (s32[]) while(%t), condition=%cond, body=%layer, metadata={op_name="jit(f)/layer_loop/while"}
}
"""


def test_copies_of_the_cache_while_decoding():
    found = find_copies(Module.parse(COPIES), frozenset({64 * 128, 3 * 64 * 128}))
    assert [instruction.name for instruction in found] == ["turned", "again", "copied", "moved"]
    assert find_copies(Module.parse(COPIES), frozenset()) == []


def test_lines_of_a_kernel_are_one_instruction():
    kernels = Module.parse(HLO).computations["kernels"]
    assert [instruction.name for instruction in kernels[:2]] == ["splash", "async-collective-start.1"]
    assert phase_of(kernels[0].op_name) == "log_probs"
    assert dataclasses.replace(kernels[0]).cycles is None
