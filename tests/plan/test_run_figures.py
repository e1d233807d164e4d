"""What a forecast means for a run: its steps, its prices, and which arrays no step of decoding may copy."""

import dataclasses

import pytest
from support.tiny_plans import MODEL, write_config

from psyche_jax.cli.training import load_plan_config
from psyche_jax.data.dataset import write_dataset
from psyche_jax.data.records import Message, RlPrompt
from psyche_jax.plan.report import count_steps, decoding_sizes
from psyche_jax.plan.rollout import Loop
from psyche_jax.plan.roofline import count_attention, count_phases, decoding_of
from psyche_jax.plan.slices import CHIPS, PRICES, parse_topology

MESH = {"data": 1, "fsdp": 2, "tensor": 2}


def config(folder, program, **changes):
    folder.mkdir()
    return load_plan_config(write_config(folder, program, **changes), [], program)


def test_steps_of_a_run(tmp_path):
    jsonl, other, dataset = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "set"
    jsonl.write_text("{}\n" * 30 + "\n")
    other.write_text("{}\n" * 3)
    write_dataset(str(dataset), [RlPrompt((Message("user", "问"),), "A", "single")] * 9)

    def steps(name, program, train, **more):
        longest = {"max_prompt_length": 128} if program == "grpo" else {"max_length": 256}
        return count_steps(config(tmp_path / name, program, data={"train": train, **longest}, **more))

    assert steps("1", "sft", str(jsonl)) == 4, "2 epochs of 30 / 16"
    assert steps("2", "sft", {str(jsonl): 1.0, str(other): 2.0}, epochs=3.0) == 7
    assert steps("3", "grpo", str(dataset)) == 3, "2 epochs of 9 / 8"
    assert steps("4", "grpo", str(jsonl), dynamic_sampling={"candidate_prompts": 24}) == 3
    # The data are elsewhere, or cannot be read: the plan is none the worse.
    for number, train in enumerate([str(tmp_path / "no.jsonl"), "gs://bucket/set", str(tmp_path), str(tmp_path / "1")]):
        assert steps(f"absent{number}", "sft", train) is None


def test_every_chip_has_a_price():
    assert set(PRICES) == set(CHIPS)
    assert all(price > 0 for price in PRICES.values())


def test_sizes_of_cache_and_weights(tmp_path):
    sizes = decoding_sizes(config(tmp_path / "a", "grpo"), MODEL, MESH, (Loop(8, 254),))
    cache = 8 * 1 * 128 * 128  # rows, heads, head_dim, places
    assert {cache, 3 * cache, 4 * 128 * 128, 3 * 256 * 256, 1024 * 256 // 2} <= sizes
    assert 8 * 256 not in sizes, "an activation"
    # A matrix of as many elements as an activation is not told from it.
    assert 256 * 128 not in decoding_sizes(config(tmp_path / "b", "grpo"), MODEL, MESH, (Loop(128, 254),))


@pytest.mark.parametrize("longest", [1, 2, 128])
def test_decoding_at_least(longest, tmp_path):
    """By arithmetic: no steps where a response is one token, and less for shorter responses."""
    plan = config(tmp_path / "a", "grpo", max_new_tokens=longest)
    slice_ = parse_topology("v5e:2x2")
    full = count_phases(plan, MODEL, MESH)
    assert (full["decode"].seconds(slice_) > 0) == (longest > 1)
    short = decoding_of(plan, MESH, [max(1, longest // 2)] * 32)
    ragged = count_phases(plan, MODEL, MESH, short)
    assert ragged["decode"].seconds(slice_) <= full["decode"].seconds(slice_)
    assert {name: phase for name, phase in full.items() if name != "decode"} == {
        name: phase for name, phase in ragged.items() if name != "decode"
    }


def test_attention_is_part_of_its_phase(tmp_path):
    plan = config(tmp_path / "a", "grpo")
    phases, attention = count_phases(plan, MODEL, MESH), count_attention(plan, MODEL, MESH)
    assert 0 < attention["prefill"].flops < phases["prefill"].flops
    assert 0 < attention["decoding"].hbm_bytes < phases["decode"].hbm_bytes
    assert 0 < attention["log_probs"].flops < phases["reference"].flops + phases["old_log_probs"].flops
    assert 0 < attention["updates"].flops < phases["forward"].flops + phases["backward"].flops
    alone = dataclasses.replace(plan, share_prompt=False)
    assert count_attention(alone, MODEL, MESH)["updates"].flops > attention["updates"].flops
