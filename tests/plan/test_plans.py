"""`psyche plan` of a tiny model on v5e:2x2, through the real TPU compiler, splash attention included."""

import json
import re

import jax
import pytest
from jax.sharding import SingleDeviceSharding
from support.tiny_plans import ROOT, needs_libtpu, write_config

from psyche_jax import cli
from psyche_jax.cli.training import load_plan_config
from psyche_jax.model import sharding
from psyche_jax.model.flops import peak_flops
from psyche_jax.model.sharding import TRAIN_RULES
from psyche_jax.plan import report, search
from psyche_jax.plan.compile import lower, out_of_memory
from psyche_jax.plan.hlo import Module
from psyche_jax.plan.slices import CHIPS, parse_topology

pytestmark = [needs_libtpu, pytest.mark.usefixtures("optimized")]
KEYS = {
    "topology",
    "program",
    "fits",
    "peak_gib",
    "limit_gib",
    "memory_gib",
    "collectives",
    "flops",
    "roofline_seconds",
    "forecast_seconds",
    "forecast_seconds_at_least",
    "forecast",
    "compile_seconds",
}
PHASES = {"prefill", "decoding", "log_probs", "updates", "optimizer", "unhidden_collectives"}
FIGURES = ("mfu", "tokens_per_second", "hours", "price")
LOOP = {"count", "bytes", "weight_sized"}


def plan(capsys, config, *arguments, topology="v5e:2x2"):
    """Exit code, the JSON object and stderr."""
    code = cli.main(["plan", "--config", str(config), "--topology", topology, "--json", *arguments])
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    return code, json.loads(line), err


def check(result, program):
    assert set(result) >= KEYS
    assert (result["program"], result["topology"], result["fits"]) == (program, "v5e:2x2", True)
    assert 0 < result["peak_gib"] < result["limit_gib"] == 15.75
    assert set(result["collectives"]) >= {"decoding_loop", "layer_loop", "once"}
    assert all(set(place) >= LOOP for place in result["collectives"].values())
    memory = result["memory_gib"]
    parts = [memory.get(name, 0) for name in ("parameters", "optimizer", "reference", "base", "batch", "temporaries")]
    assert sum(parts) == pytest.approx(memory["peak"], abs=1e-3)
    seconds = dict(result["roofline_seconds"])
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()))
    assert result["flops"] == pytest.approx(sum(phase["flops"] for phase in result["phases"].values()))
    low, high, of_run = (result[name] for name in ("forecast_seconds_at_least", "forecast_seconds", "forecast"))
    assert set(low) == set(high) == PHASES | {"total"}
    assert all(0 <= low[name] <= high[name] for name in low)
    for ends in (low, high):
        assert ends["total"] == pytest.approx(sum(ends[name] for name in PHASES))
    assert low["total"] == pytest.approx(result["roofline_seconds"]["total"])
    # Every phase of the program is found in it, and the whole is within what the compiler reckons with.
    used = PHASES if program == "grpo" else {"updates", "optimizer", "unhidden_collectives"}
    assert {name for name in PHASES if high[name] > 0} == used
    assert all(0 < of_run[name]["low"] <= of_run[name]["high"] for name in FIGURES)
    assert of_run["mfu"]["high"] < 1
    assert of_run["hours"]["high"] == pytest.approx(of_run["steps"] * high["total"] / 3600)
    assert of_run["price"]["high"] == pytest.approx(of_run["hours"]["high"] * 4 * of_run["dollars_per_chip_hour"])


def test_sft(tmp_path, capsys):
    (tmp_path / "sft.jsonl").write_text("{}\n" * 100)
    config = write_config(tmp_path, "sft", data={"train": str(tmp_path / "sft.jsonl"), "max_length": 256})
    code, result, _ = plan(capsys, config)
    assert code == 0
    check(result, "sft")
    assert (result["forecast"]["steps"], result["forecast"]["steps_are_known"]) == (13, True), "2 epochs of 100 / 16"
    assert result["forecast"]["decoding_steps"] is None
    collectives = result["collectives"]
    assert collectives["decoding_loop"]["count"] == 0
    # Seven matrices a layer, gathered in both directions, in 2 micro-batches of 3 layers.
    assert collectives["layer_loop"]["weight_sized"] >= 14
    assert collectives["layer_loop"]["count"] >= 14 * 2 * 3


@pytest.mark.slow
@pytest.mark.parametrize(("program", "dtype"), [("sft", "bfloat16"), ("grpo", "int8")])
def test_adapters_over_a_small_base(program, dtype, tmp_path, capsys):
    """The base is held once, also where it is the reference; what is trained is small."""
    config = write_config(tmp_path, program, adapter={"rank": 4})
    code, result, _ = plan(capsys, config, "--set", f"model.dtype={dtype}")
    assert code == 0
    check(result, program)
    needed = result["flops"] - result["phases"]["backward"]["flops"] + result["phases"]["forward"]["flops"]
    peak, seconds = 4 * 197e12, result["forecast_seconds"]["total"]
    assert result["forecast"]["mfu"]["low"] == pytest.approx(needed / peak / seconds), "a frozen base has no gradient"
    memory = result["memory_gib"]
    assert "reference" not in memory
    assert memory["base"] > {"bfloat16": 10, "int8": 4}[dtype] * memory["parameters"] > 0
    assert result["collectives"]["decoding_loop"].get("cache_sized_copies", 0) == 0
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=0.01)


@pytest.mark.slow
def test_grpo(tmp_path, capsys, monkeypatch):
    kept, compile_lowered = [], report.compile_lowered
    monkeypatch.setattr(report, "compile_lowered", lambda lowered: kept.append(compile_lowered(lowered)) or kept[0])
    config = write_config(tmp_path, "grpo")
    code, result, _ = plan(capsys, config, "--program", "grpo")
    assert code == 0
    check(result, "grpo")
    loop = result["collectives"]["decoding_loop"]
    assert loop["weight_sized"] == 0, "no step of decoding gathers weights"
    # In each of 3 layers two sums over `tensor`, scattered by rows, and two gathers of rows; 128 steps of all responses
    # in 2 halves: at most 10 more a step.
    assert 4 * 3 * 127 * 2 <= loop["count"] <= (4 * 3 + 10) * 128 * 2
    assert {"kv_cache", "decoding_weights", "reference"} <= set(result["memory_gib"])
    assert loop["cache_sized_copies"] == 0
    assert any("single bytes" in line for line in result["assumptions"])
    assert any("as long as max_new_tokens" in line for line in result["assumptions"])
    of_run = result["forecast"]
    assert (of_run["steps"], of_run["steps_are_known"], of_run["dollars_per_chip_hour"]) == (1000, False, 1.2)
    assert of_run["decoding_steps"] == 1 + 2 * 127
    # Short responses: fewer steps, and no more tokens than there are. The program is the same.
    monkeypatch.setattr(report, "compile_lowered", lambda lowered: kept[0])
    wishes = ("--lengths", "mean=20,p90=40", "--steps", "50", "--price", "0.5")
    code, ragged, _ = plan(capsys, config, "--program", "grpo", *wishes)
    assert code == 0
    assert 40 < ragged["forecast"]["decoding_steps"] < of_run["decoding_steps"]
    assert ragged["forecast_seconds"]["decoding"] < 0.7 * result["forecast_seconds"]["decoding"]
    assert ragged["forecast_seconds"]["updates"] == pytest.approx(result["forecast_seconds"]["updates"])
    assert (ragged["forecast"]["steps"], ragged["forecast"]["dollars_per_chip_hour"]) == (50, 0.5)
    assert not any("as long as max_new_tokens" in line for line in ragged["assumptions"])
    assert any("as long as --lengths mean=20,p90=40 says" in line for line in ragged["assumptions"])


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
def test_decoding_copies_neither_cache_nor_weights(tmp_path, capsys, monkeypatch, head_dim):
    """Heads of half the lanes are those of Qwen2.5-0.5B, Llama-3.2-1B, SmolLM2: splash takes them too."""
    texts, parse = [], Module.parse
    monkeypatch.setattr(Module, "parse", lambda text: texts.append(text) or parse(text))
    config = write_config(tmp_path, "grpo", head_dim=head_dim, mesh={"fsdp": 1}, max_new_tokens=256)
    code, result, _ = plan(capsys, config, topology="v5e:1x1")
    assert code == 0
    assert result["collectives"]["decoding_loop"]["cache_sized_copies"] == 0
    assert result["forecast_seconds"]["unhidden_collectives"] == 0, "with one chip nothing is sent"
    assert all(part in texts[0] for part in ("splash_mqa_fwd", "splash_mqa_dkv"))
    # No matrix is cut out of its stack before its product; cut into heads, those of attention were.
    smallest = 2 * head_dim * 256  # that of keys or values
    instructions = [i for computation in parse(texts[0]).computations.values() for i in computation]
    within = [i for i in instructions if "decoding_loop" in i.op_name and i.op_name.endswith("dynamic_slice")]
    assert within, "norms and biases are"
    cut = [i.name for i in within if i.opcode == "fusion" and max(a.elements for a in i.arrays) >= smallest]
    assert cut == []


@pytest.mark.slow
def test_weights_gathered_while_decoding_are_found(tmp_path, capsys, monkeypatch):
    """Decoding with the rules of training, as one mistake would have it."""
    monkeypatch.setattr(sharding, "DECODE_RULES", TRAIN_RULES)
    _, result, _ = plan(
        capsys, write_config(tmp_path, "grpo", rollout={"slots": None}, objective={"kl_coefficient": 0.0})
    )
    loop = result["collectives"]["decoding_loop"]
    assert loop["weight_sized"] >= 7, "each matrix of a layer is gathered in each step"
    assert loop["bytes"] > 128 * 3 * 256 * 512 * 3 * 2 / 2


def test_too_large(tmp_path, capsys):
    """What the compiler refuses is a plan too, with what to change."""
    config = write_config(tmp_path, "sft")
    large = json.loads((tmp_path / "model" / "config.json").read_text())
    large["intermediate_size"] = 2**22
    (tmp_path / "model" / "config.json").write_text(json.dumps(large))
    code, result, err = plan(capsys, config)
    assert (code, result["fits"]) == (1, False)
    assert result["forecast_seconds"] is result["forecast"] is None
    assert result["peak_gib"] > 27 > result["limit_gib"] == 15.75
    assert "a larger slice" in result["advice"][0]
    (line,) = err.splitlines()
    assert line.startswith(f"psyche plan: {config} does not fit v5e:2x2: a larger slice")


@pytest.mark.slow
def test_search(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(search, "_ENOUGH", 2)
    config = write_config(tmp_path, "sft")
    code = cli.main(["plan", "--config", str(config), "--topology", "v5e:2x2", "--search"])
    out, err = capsys.readouterr()
    assert code == 0
    # The whole batch at once and nothing computed again is tried first; of what fits the fastest by cycles is shown.
    first, *_ = tries = [line for line in err.splitlines() if " fits, " in line]
    assert first.startswith("model.remat=none micro_batch_size=16: fits, ")
    best = min(tries, key=lambda line: float(line.split(" to ")[1].split()[0])).split(": ")[0]
    assert out.startswith(f"sft on v5e:2x2 (4 chips, fsdp 2 × tensor 2), {best}\nfits: peak ")
    assert "forecast, seconds" in out


@pytest.mark.parametrize(
    "topology",
    ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "v6e:2x4", "v5e:1x1", "v6e:1x1", "v5p:1x1x1", "tpu7x:2x2x1", "v4-8"],
)
def test_devices_of_other_chips(topology):
    slice_ = parse_topology(topology)
    devices = slice_.devices()
    assert len(devices) == slice_.device_count == slice_.chips * (2 if slice_.chip.name == "tpu7x" else 1)
    assert {device.platform for device in devices} == {"tpu"}
    assert peak_flops(devices[0].device_kind) == slice_.chip.bf16_flops


@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1", "tpu7x:2x2x1"])
def test_memory_of_other_chips(topology):
    """The limit that we know is the compiler's own."""
    slice_ = parse_topology(topology)
    array = jax.ShapeDtypeStruct((2**17, 2**18), "float32", sharding=SingleDeviceSharding(slice_.devices()[0]))
    with pytest.raises(jax.errors.JaxRuntimeError) as refused:
        jax.jit(lambda x: x + 1).lower(array).compile()
    _, limit = out_of_memory(str(refused.value))
    assert limit / 2**30 == pytest.approx(slice_.chip.hbm_gib, abs=0.02)


@pytest.mark.slow
def test_a_plan_of_two_devices_a_chip(tmp_path, capsys):
    """Each has its own memory and half of the peak."""
    config = write_config(tmp_path, "sft", mesh={"fsdp": -1})
    code, result, _ = plan(capsys, config, topology="tpu7x:2x2x1")
    assert (code, result["fits"], result["mesh"]["fsdp"]) == (0, True, 8)
    assert 0 < result["peak_gib"] < result["limit_gib"] == CHIPS["tpu7x"].hbm_gib
    assert sum(place["count"] for place in result["collectives"].values()) > 0
    high = result["forecast_seconds"]
    assert high["total"] == pytest.approx(sum(high[name] for name in PHASES))
    assert high["unhidden_collectives"] > 0
    assert result["roofline_seconds"]["forward"] >= result["phases"]["forward"]["flops"] / (4 * 2307e12)


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "offloaded"), [(None, True), ("", False)])
def test_sparse_cores_of_v6e_gather_weights(flags, offloaded, tmp_path, monkeypatch):
    """As part of the program's own options, since flags are given before it is known what chips there are."""
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    if flags is not None:
        monkeypatch.setenv("LIBTPU_INIT_ARGS", flags)
    config = load_plan_config(write_config(tmp_path, "sft", mesh={"fsdp": 4}), [], None)
    text = lower(config, parse_topology("v6e:2x2").devices()).lowered.compile().as_text()
    assert ('execution_thread="sparsecore"' in text) == offloaded


@pytest.mark.slow
def test_no_adapter_is_filled_up_to_a_tile(tmp_path):
    """Of B of all layers there is no array whose rank lies along the 128 lanes."""
    changes = {"adapter": {"rank": 32, "alpha": 64}, "mesh": {}}
    config = load_plan_config(write_config(tmp_path, "sft", **changes), ["model.dtype=int8"], None)
    text = lower(config, parse_topology("v5e:1x1").devices()).lowered.compile().as_text()
    of_all_layers = re.findall(r"(?:f32|bf16)\[3,(?:256|512),32\]\{(\d),", text)
    assert of_all_layers and "2" not in of_all_layers


@pytest.mark.slow
def test_a_vocabulary_that_the_mesh_does_not_divide(tmp_path, capsys):
    """No step of decoding gathers the weights of all tokens for its draw."""
    config = write_config(tmp_path, "grpo", rollout={"slots": None})
    model = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**model, "vocab_size": 1023}))
    code, result, err = plan(capsys, config)
    assert (code, err) == (0, "")
    check(result, "grpo")
    assert result["collectives"]["decoding_loop"]["weight_sized"] == 0


def test_the_program_is_known_by_its_keys(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert type(load_plan_config(write_config(tmp_path / "a", "sft"), [], None)).__name__ == "SftConfig"
    assert type(load_plan_config(write_config(tmp_path / "b", "grpo"), [], None)).__name__ == "GrpoConfig"


def check_peak(capsys, config, topology, overrides, limit):
    code, result, _ = plan(capsys, ROOT / "configs" / f"{config}.yaml", *overrides, topology=topology)
    assert (code, result["fits"]) == (0, True)
    assert result["peak_gib"] <= limit
    assert result["collectives"]["decoding_loop"]["weight_sized"] == 0
    return result


@pytest.mark.slow
@pytest.mark.tpu7b
def test_sft_of_7b_on_v5e_16(capsys):
    result = check_peak(capsys, "sft_7b_v5e16", "v5e:4x4", [], 8.5)
    # By the compiler's cycles; 14.3 where its products compute the norms and SiLU that they read for every tile.
    assert result["forecast_seconds"]["updates"] < 13.5


@pytest.mark.slow
@pytest.mark.tpu7b
@pytest.mark.parametrize(
    ("config", "topology", "peak", "decoding", "learning", "unhidden"),
    [("grpo_7b_v5e16", "v5e:4x4", 13.6, 16.0, 36.0, 12.4), ("grpo_7b_v6e8", "v6e:2x4", 31.0, 11.0, 24.0, 9.7)],
)
def test_grpo_of_7b(config, topology, peak, decoding, learning, unhidden, capsys):
    """By the compiler's cycles, of 1,024 responses of full length."""
    seconds = check_peak(capsys, config, topology, [], peak)["forecast_seconds"]
    assert seconds["decoding"] <= decoding
    assert seconds["log_probs"] + seconds["updates"] <= learning
    assert seconds["unhidden_collectives"] <= unhidden


@pytest.mark.slow
@pytest.mark.tpu7b
@pytest.mark.parametrize(
    ("config", "topology", "overrides", "limit"),
    [
        ("sft_7b_v6e8", "v6e:2x4", [], 19.0),
        ("grpo_7b_v5e16", "v5e:4x4", ["--set", "max_new_tokens=2048", "--set", "rollout.slots=512"], 15.5),
        ("sft_7b_v5p8", "v5p:2x2x1", [], 95.0),
        ("grpo_7b_v5p8", "v5p:2x2x1", [], 95.0),
        ("sft_1_5b_v5e8", "v5e:2x4", [], 15.5),
        ("grpo_0_5b_v5e1", "v5e:1x1", [], 15.5),
        ("grpo_7b_lora_int8_v5e1", "v5e:1x1", [], 13.2),
    ],
)
def test_the_other_ready_configs_fit(config, topology, overrides, limit, capsys):
    check_peak(capsys, config, topology, overrides, limit)
