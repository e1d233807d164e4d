"""Counts by arithmetic against XLA's own of a program without loops, and against each other."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import psyche_jax
from psyche_jax.config import AdapterSection, GrpoConfig, ObjectiveSection, RolloutSection, SftConfig
from psyche_jax.config_files import load_config
from psyche_jax.model.adapters import num_trained
from psyche_jax.model.config import ARCHITECTURES, ModelConfig, published_architecture
from psyche_jax.model.flops import head_flops, layers_flops
from psyche_jax.model.qwen2 import Execution, bind, build, initialize
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, make_mesh
from psyche_jax.plan.compile import estimated_parts, find_architecture, least_peak
from psyche_jax.plan.roofline import count_attention, count_phases, decoding_of
from psyche_jax.plan.slices import parse_topology
from psyche_jax.train.setup import abstract_train_state
from psyche_jax.train.state import make_optimizer

CONFIGS = Path(psyche_jax.__file__).parents[1] / "configs"
MESH = {"data": 1, "fsdp": 16, "tensor": 1}
SEVEN = published_architecture("Qwen2.5-7B")


def test_flops_are_those_that_xla_counts():
    model = ModelConfig(512, 256, 1024, 1, 4, 2, 64, stop_token_ids=(1,))
    sharding = Sharding(make_mesh(1, 1, 1, jax.devices()[:1]), TRAIN_RULES)
    execution = Execution(sharding, jnp.dtype("float32"), attention="xla")
    parameters = initialize(model, jax.random.key(0), sharding, jnp.float32)
    rows, length = 2, 64
    tokens = jnp.ones((rows, length), jnp.int32)

    @jax.jit
    def forward(parameters, tokens):
        bound = bind(model, parameters)
        hidden = bound(tokens, tokens, jnp.broadcast_to(jnp.arange(length), tokens.shape), execution)
        return bound.logits(hidden)

    counted = forward.lower(parameters, tokens).cost_analysis()["flops"]
    expected = layers_flops(model, rows, length) + head_flops(model, rows * length)
    # XLA also counts norms, softmax and rotary embedding, which are small beside the products.
    assert expected <= counted <= 1.03 * expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_sizes(name):
    """The parameters that the module has, which the model cards give as 0.49, 1.54, 3.09, 7.61 and 14.7 billion."""
    model = ARCHITECTURES[name]
    leaves = jax.tree.leaves(build(model)[1])
    assert sum(leaf.size for leaf in leaves) == model.num_parameters
    qwen2 = {"0.5B": 0.49, "1.5B": 1.54, "3B": 3.09, "7B": 7.61, "14B": 14.7}
    qwen3 = {"0.6B": 0.6, "1.7B": 1.72, "4B": 4.02, "8B": 8.19, "14B": 14.8, "32B": 32.8}
    llama = {"3.2-1B": 1.24, "3.2-3B": 3.21, "3.1-8B": 8.03}
    family, _, size = name.partition("-")
    published = {"Qwen2.5": qwen2, "Qwen3": qwen3, "Llama": llama}[family][size]
    assert model.num_parameters / 1e9 == pytest.approx(published, rel=0.01)


def test_adapters_take_away_the_gradient_by_the_weights():
    """Of twice the forward pass one part is left, and attention; the optimizer has little to do."""
    config = load_config(SftConfig, CONFIGS / "sft_7b_v5e16.yaml")
    adapted = dataclasses.replace(config, adapter=AdapterSection(rank=16))
    full, frozen = (count_phases(c, dataclasses.replace(SEVEN, adapter=c.adapter), MESH) for c in (config, adapted))
    assert frozen["forward"] == full["forward"]
    assert 0.6 < frozen["backward"].flops / full["backward"].flops < 0.75, "with remat 3 in place of 4 to start from"
    assert frozen["optimizer"].hbm_bytes < 0.01 * full["optimizer"].hbm_bytes
    seven = dataclasses.replace(SEVEN, adapter=AdapterSection(rank=16))
    sizes = [SEVEN.hidden_size, SEVEN.intermediate_size, 512]  # of the maps: width, inner, keys and values
    pairs = 2 * (sizes[0] + sizes[0]) + 2 * (sizes[0] + sizes[2]) + 3 * (sizes[0] + sizes[1])
    assert num_trained(seven) == 16 * SEVEN.num_hidden_layers * pairs


def test_phases_of_sft():
    config = load_config(SftConfig, CONFIGS / "sft_7b_v5e16.yaml")
    phases = count_phases(config, SEVEN, MESH)
    assert list(phases) == ["forward", "backward", "optimizer"]
    tokens = config.batch_size * config.data.max_length
    # Two FLOPs a parameter and token (but for the embedding, which is looked up), and attention.
    matrices = SEVEN.num_parameters - SEVEN.vocab_size * SEVEN.hidden_size
    assert 1.0 < phases["forward"].flops / (2 * tokens * matrices) < 1.1
    assert phases["backward"].flops == pytest.approx(3 * phases["forward"].flops)
    halved = dataclasses.replace(config, micro_batch_size=8)
    assert count_phases(halved, SEVEN, MESH)["forward"].flops == pytest.approx(phases["forward"].flops)
    assert count_phases(halved, SEVEN, MESH)["forward"].ici_bytes == pytest.approx(2 * phases["forward"].ici_bytes)
    slice_ = parse_topology("v5e:4x4")
    seconds = {name: phase.seconds(slice_) for name, phase in phases.items()}
    assert all(value > 0 for value in seconds.values())
    assert phases["forward"].bound(slice_) in ("compute", "interconnect")
    assert phases["optimizer"].bound(slice_) == "memory"
    for moment in ("mu_dtype", "nu_dtype"):
        optimizer = dataclasses.replace(config.optimizer, **{moment: "bfloat16"})
        smaller = count_phases(dataclasses.replace(config, optimizer=optimizer), SEVEN, MESH)["optimizer"]
        assert smaller.hbm_bytes == pytest.approx(28 / 32 * phases["optimizer"].hbm_bytes), "one, read and written"


def test_phases_of_grpo():
    config = load_config(GrpoConfig, CONFIGS / "grpo_7b_v5e16.yaml")
    assert config.rollout == RolloutSection(None, 4)
    mesh = {"data": 1, "fsdp": 16, "tensor": 1}
    assert "old_log_probs" not in count_phases(config, SEVEN, mesh), "they are the sampler's"
    config = dataclasses.replace(config, rollout=RolloutSection(512, 4), objective=ObjectiveSection())
    phases = count_phases(config, SEVEN, mesh)
    assert list(phases) == [
        "gather_for_decoding",
        "prefill",
        "decode",
        "reference",
        "old_log_probs",
        "forward",
        "backward",
        "optimizer",
    ]
    slice_ = parse_topology("v5e:4x4")
    assert phases["decode"].bound(slice_) == "memory"
    plain = dataclasses.replace(config, objective=ObjectiveSection(kl_coefficient=0.0), minibatch_prompts=None)
    assert not {"reference", "old_log_probs"} & set(count_phases(plain, SEVEN, mesh))
    fewer_slots = dataclasses.replace(config, rollout=RolloutSection(256, 4))
    assert count_phases(fewer_slots, SEVEN, mesh)["decode"].hbm_bytes > phases["decode"].hbm_bytes
    alone = count_phases(dataclasses.replace(config, share_prompt=False), SEVEN, mesh)
    # Eight responses of 1024 tokens after a prompt of 512: read once, it saves 7 of 8 times 512 of 1536 tokens.
    saved = 1 - phases["forward"].flops / alone["forward"].flops
    assert 0.25 < saved < 7 / 8 * 512 / 1536
    assert phases["decode"] == alone["decode"]
    parts, fewer = estimated_parts(config, SEVEN, mesh), estimated_parts(fewer_slots, SEVEN, mesh)
    # 56 KiB a token, 512 or 256 slots of 1024 tokens and 128 prompts of 512, on 16 chips.
    assert parts["kv_cache"] == pytest.approx((512 * 1024 + 128 * 512) * 56 * 1024 / 16)
    assert fewer["kv_cache"] == pytest.approx((256 * 1024 + 128 * 512) * 56 * 1024 / 16)
    assert least_peak(config, SEVEN, mesh) > least_peak(fewer_slots, SEVEN, mesh)


def test_a_mesh_for_decoding_changes_learning_and_not_decoding():
    """Beside a mesh whose groups of four share weights all the time."""
    config = load_config(GrpoConfig, CONFIGS / "grpo_7b_v5e16.yaml")
    spread = count_phases(config, SEVEN, {"data": 1, "fsdp": 16, "tensor": 1})
    same = dataclasses.replace(config, rollout=RolloutSection())
    shared = count_phases(same, SEVEN, {"data": 1, "fsdp": 4, "tensor": 4})
    for name in ("gather_for_decoding", "prefill", "decode", "optimizer"):
        assert spread[name] == shared[name], name
    for name in ("reference", "forward", "backward"):
        assert spread[name].flops == pytest.approx(shared[name].flops)
        assert spread[name].ici_bytes < shared[name].ici_bytes


def test_the_kernel_of_decoding_reads_what_each_row_has_said():
    config = load_config(GrpoConfig, CONFIGS / "grpo_7b_v5e16.yaml")
    responses = config.prompts_per_step * config.generations_per_prompt
    read = {
        length: count_attention(config, SEVEN, MESH, decoding_of(config, MESH, [length] * responses))["decoding"]
        for length in (128, 1024)
    }
    # 56 KiB a token over 16 chips, half of the places on average, and no more than a block at the ends.
    for length, phase in read.items():
        exact = responses / 16 * (length - 1) * length / 2 * 56 * 1024
        assert exact <= phase.hbm_bytes <= exact + responses / 16 * length * 256 * 56 * 1024
        assert phase.flops == phase.ici_bytes == 0


@pytest.mark.parametrize("name", ["grpo_7b_lora_v6e1", "grpo_7b_lora_int8_v5e1", "grpo_7b_lora_v5e8"])
def test_a_checkpoint_of_adapters_of_seven_billion_takes_less_than_700_mb(name):
    """It holds what is trained and the optimizer's state."""
    config = load_config(GrpoConfig, CONFIGS / f"{name}.yaml")
    assert config.adapter is not None and config.adapter.rank == 32
    model, _ = find_architecture(config)
    optimizer = make_optimizer(config.optimizer, optax.constant_schedule(1e-5))
    sharding = Sharding(make_mesh(1, 1, 1, jax.devices()[:1]), TRAIN_RULES)
    state, _ = abstract_train_state(model, jnp.dtype(config.model.dtype), sharding, optimizer)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)]
    assert sum(leaf.size for leaf in jax.tree.leaves(state.parameters)) == 80_740_352
    assert 600e6 < sum(sizes) < 700e6
