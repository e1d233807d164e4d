"""What `psyche plan` says when it is used wrongly: one line and an exit code."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_plans import ROOT, needs_libtpu, write_config

from psyche_jax import cli
from psyche_jax.errors import UsageError, UserError
from psyche_jax.model.config import ARCHITECTURES, check_architecture, hf_config
from psyche_jax.plan.compile import out_of_memory
from psyche_jax.plan.slices import CHIPS, Slice, parse_topology

SFT = str(ROOT / "configs" / "sft_7b_v5e16.yaml")


def fails(capsys, *arguments):
    """Exit code and the one line."""
    code = cli.main(["plan", *arguments])
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return code, line.removeprefix("psyche plan: ")


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ("v5e", "must be a chip and a shape, or the cloud's name; nearest: v5e:2x2 (v5litepod-4), v5e:2x4"),
        ("v5e:4xx4", "must be a chip and a shape, or the cloud's name; try v5e:4x4, v6e-8"),
        ("v5e:-1x4", "must be a chip and a shape"),
        ("16", "must be a chip and a shape"),
        ("h100:8", "the chip 'h100' is not known; known: v4, v5e, v5p, v6e, tpu7x"),
        ("v5-16", "the chip 'v5' is not known; nearest: v5p, v5e"),
        ("v5e:4x4x4", "v5e slices have 2 dimensions; nearest: v5e:4x8 (v5litepod-32), v5e:8x8 (v5litepod-64)"),
        ("v5p:4x4", "v5p slices have 3 dimensions; nearest: v5p:2x2x2 (v5p-16), v5p:2x2x4 (v5p-32)"),
        ("v5e:0x4", "v5e slices have 2 dimensions"),
        ("v5e:64x64", "the largest v5e slice has 256 chips; nearest: v5e:8x16 (v5litepod-128), v5e:16x16"),
        ("v5litepod-12", "there is no v5e slice of 12 chips; nearest: v5e:2x4 (v5litepod-8), v5e:4x4 (v5litepod-16)"),
        ("v5e:1" + "0" * 5000, "must be a chip and a shape"),
        ("v6e-0", "nearest: v6e:1x1 (v6e-1)"),
        ("v5p-9", "there is no v5p slice of 9 TensorCores, two a chip; nearest: v5p:2x2x1 (v5p-8)"),
        ("v6e-512", "there is no v6e slice of 512 chips; nearest: v6e:8x16 (v6e-128), v6e:16x16 (v6e-256)"),
    ],
)
def test_topologies(topology, said, capsys):
    code, line = fails(capsys, "--config", SFT, "--topology", topology)
    assert (code, said in line) == (2, True), line


@pytest.mark.parametrize(
    ("text", "name", "accelerator_type", "chips", "devices"),
    [
        ("v5e:4x4", "v5e:4x4", "v5litepod-16", 16, 16),
        ("v5litepod-16", "v5e:4x4", "v5litepod-16", 16, 16),
        ("v5litepod-1", "v5e:1x1", "v5litepod-1", 1, 1),
        ("v5litepod:4x4", "v5e:4x4", "v5litepod-16", 16, 16),
        ("V5E-16", "v5e:4x4", "v5litepod-16", 16, 16),
        ("TPU v5 lite 4x8", "v5e:4x8", "v5litepod-32", 32, 32),
        ("tpu-v5-lite-podslice:4×4", "v5e:4x4", "v5litepod-16", 16, 16),
        ("v6e:2x4", "v6e:2x4", "v6e-8", 8, 8),
        ("v6e-8", "v6e:2x4", "v6e-8", 8, 8),
        ("v6e-1", "v6e:1x1", "v6e-1", 1, 1),
        ("tpu-v6e-slice-2x4", "v6e:2x4", "v6e-8", 8, 8),
        ("trillium:16x16", "v6e:16x16", "v6e-256", 256, 256),
        # TensorCores are counted here, two a chip.
        ("v4-8", "v4:2x2x1", "v4-8", 4, 4),
        ("v4:2x2x2", "v4:2x2x2", "v4-16", 8, 8),
        ("v5p-8", "v5p:2x2x1", "v5p-8", 4, 4),
        ("v5p-2048", "v5p:8x8x16", "v5p-2048", 1024, 1024),
        ("v5p-64", "v5p:2x4x4", "v5p-64", 32, 32),
        ("v5p-384", "v5p:4x4x12", "v5p-384", 192, 192),
        ("v5p-7680", "v5p:12x16x20", "v5p-7680", 3840, 3840),
        ("v5p-12288", "v5p:16x16x24", "v5p-12288", 6144, 6144),
        # And each is a device.
        ("tpu7x:2x2x1", "tpu7x:2x2x1", "tpu7x-8", 4, 8),
        ("tpu7x-8", "tpu7x:2x2x1", "tpu7x-8", 4, 8),
        ("v7x-2x2x2", "tpu7x:2x2x2", "tpu7x-16", 8, 16),
        ("ironwood:4x4x4", "tpu7x:4x4x4", "tpu7x-128", 64, 128),
    ],
)
def test_topologies_that_there_are(text, name, accelerator_type, chips, devices):
    found = parse_topology(text)
    assert (found.name, found.accelerator_type) == (name, accelerator_type)
    assert (found.chips, found.device_count) == (chips, devices)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lengths", "400"], "--lengths 400: must be mean=400,p99=2048, or the folder of a GRPO run"),
        (["--lengths", "mean=4000,p99=5000"], "the mean at most max_new_tokens 1024"),
        (["--steps", "0"], "--steps must be at least 1, not 0"),
        (["--price", "-1"], "--price must be a number of dollars, not -1.0"),
        (["--price", "nan"], "--price must be a number of dollars, not nan"),
    ],
)
def test_wishes_that_cannot_be(arguments, said, capsys):
    """Before anything is compiled."""
    code, line = fails(capsys, "--config", "grpo_7b_v5e16", "--topology", "v5e:4x4", *arguments)
    assert (code, said in line) == (2, True), line


def test_sft_has_no_responses(capsys):
    code, line = fails(capsys, "--config", SFT, "--topology", "v5e:4x4", "--lengths", "mean=40,p99=50")
    assert (code, line) == (2, "--lengths is about responses, and SFT has none")


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:3x5", "v6e:5x5", "v4:1x1x7"])
def test_slices_that_do_not_exist(topology, capsys):
    code, line = fails(capsys, "--config", SFT, "--topology", topology)
    assert (code, line.startswith(f"--topology {topology}: ")) == (2, True), line
    nearest = {"v5e:3x5": "v5e:4x4 (v5litepod-16)", "v6e:5x5": "v6e:4x8 (v6e-32)", "v4:1x1x7": "v4:2x2x2 (v4-16)"}
    assert nearest[topology] in line, line


@needs_libtpu
def test_a_chip_that_the_compiler_does_not_know():
    unknown = dataclasses.replace(CHIPS["v5e"], name="zpu9")
    with pytest.raises(UserError, match=r"libtpu [\d.]+ does not know this chip; pip install .*libtpu==[\d.]+\*"):
        Slice(unknown, (2, 2)).devices()


def test_without_libtpu(monkeypatch, capsys, tmp_path):
    """How to get the one that the installed JAX wants, for people with a checkout and without."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    code, line = fails(capsys, "--config", SFT, "--topology", "v5e:4x4")
    wanted = next(need.split(";")[0] for need in importlib.metadata.requires("jax") if need.startswith("libtpu"))
    assert code == 1
    assert "`make tpu-compiler`" in line
    assert f"pip install --no-deps --upgrade --target {tmp_path}/tpu-compiler '{wanted}'" in line


def test_the_compiler_of_the_environment_is_found(tmp_path):
    """Where `make tpu-compiler` puts it, without PYTHONPATH."""
    (tmp_path / "tpu-compiler/libtpu").mkdir(parents=True)
    (tmp_path / "tpu-compiler/libtpu/__init__.py").touch()
    code = """
import sys
from psyche_jax.plan.slices import find_compiler
sys.prefix = {!r}
print(find_compiler())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def found(prefix):
        run = [sys.executable, "-c", code.format(str(prefix))]
        return subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout

    if importlib.util.find_spec("libtpu") is None:
        assert found(tmp_path / "empty") == "False\n"
    assert found(tmp_path) == "True\n"


@needs_libtpu
@pytest.mark.parametrize(
    ("overrides", "code", "said"),
    [
        (["mesh.tensor=8"], 2, "tensor 8 does not divide the model's num_attention_heads 28"),
        (["mesh.tensor=7"], 2, "does not divide the 16 devices"),
        (["mesh.fsdp=3"], 2, "does not divide the 16 devices"),
        (["micro_batch_size=8"], 2, "micro_batch_size: 8 rows cannot be spread over data × fsdp = 16 devices"),
        (["model.architecture=Qwen2.5-7C"], 2, "did you mean 'Qwen2.5-7B'?"),
        (["model.architecture=null"], 1, "the config names no architecture to plan without it"),
    ],
)
def test_what_does_not_divide(overrides, code, said, capsys):
    arguments = [part for override in overrides for part in ("--set", override)]
    actual, line = fails(capsys, "--config", SFT, "--topology", "v5e:4x4", *arguments)
    assert (actual, said in line) == (code, True), line


@needs_libtpu
@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "rollout.slots=6",
            "rollout.slots: 6 rows cannot be spread over data × fsdp / rollout.tensor = 4 groups of devices",
        ),
        ("rollout.slots=0", "rollout.slots must be at least 1, not 0"),
        ("rollout={slots: 64}, rollout_waves=2", "rollout_waves is the old name of rollout.slots, and both are set"),
        ("rollout.tensor=3", "rollout.tensor: 3 does not divide mesh.fsdp 16"),
        ("rollout.tensor=8", "mesh: tensor 8 does not divide the model's num_attention_heads 28"),
    ],
)
def test_slots_that_cannot_be(override, said, capsys):
    config = str(ROOT / "configs" / "grpo_7b_v5e16.yaml")
    overrides = [part for pair in override.split(", ") for part in ("--set", pair)]
    code, line = fails(capsys, "--config", config, "--topology", "v5e:4x4", *overrides)
    assert (code, said in line) == (2, True), line


@needs_libtpu
def test_kv_heads(tmp_path, capsys):
    config = write_config(tmp_path, "sft", mesh={"fsdp": 1, "tensor": 4})
    code, line = fails(capsys, "--config", str(config), "--topology", "v5e:2x2")
    assert (code, "tensor 4 does not divide the model's num_key_value_heads 2" in line) == (2, True), line


def test_another_architecture_than_the_config_says(tmp_path):
    small = ARCHITECTURES["Qwen2.5-0.5B"]
    check_architecture("Qwen2.5-0.5B-Instruct", small, "models/x")
    check_architecture(None, small, "models/x")
    with pytest.raises(UsageError, match=r"models/x is not Qwen2.5-7B: its vocab_size is 151936, not 152064"):
        check_architecture("Qwen2.5-7B", small, "models/x")


@needs_libtpu
def test_the_model_that_is_there_counts(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(ARCHITECTURES["Qwen2.5-0.5B"], "float32")))
    arguments = ["--config", SFT, "--topology", "v5e:4x4", "--set", f"model.path={tmp_path}"]
    code, line = fails(capsys, *arguments)
    assert (code, "is not Qwen2.5-7B" in line) == (2, True), line


def test_out_of_memory_messages():
    message = "Ran out of memory in memory space hbm. Used 17.52G of 15.75G hbm. Exceeded hbm capacity by 1.77G."
    assert out_of_memory(message) == (int(17.52 * 2**30), int(15.75 * 2**30))
    message = "the total memory required for HLO temporaries (52.51G) exceeds available HBM (15.75G)."
    assert out_of_memory(message) == (int(52.51 * 2**30), int(15.75 * 2**30))
    assert out_of_memory("something else") == (None, None)


@pytest.mark.parametrize("path", sorted(Path(ROOT / "configs").glob("*_*_v*.yaml")), ids=lambda path: path.stem)
def test_ready_configs_are_short_and_valid(path):
    from psyche_jax.cli.training import load_plan_config

    config = load_plan_config(path, [], None)
    assert path.stem.startswith("grpo" if hasattr(config, "rewards") else "sft")
    assert config.model.architecture in ARCHITECTURES
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 8, "only what differs"
