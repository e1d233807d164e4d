"""What `psyche plan` says when it is used wrongly: one line and an exit code."""

import importlib.util
import json
from pathlib import Path

import pytest
from tiny_plans import ROOT, needs_libtpu, write_config

from psyche_jax import cli
from psyche_jax.errors import UsageError
from psyche_jax.model.config import hf_config
from psyche_jax.model.published import ARCHITECTURES, check_architecture
from psyche_jax.plan.compile import out_of_memory
from psyche_jax.plan.slices import parse_topology

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
        ("v5e", "must be a chip and a shape"),
        ("v5e:4xx4", "must be a chip and a shape"),
        ("h100:8", "the chip 'h100' is not known; known: v4, v5e, v5p, v6e"),
        ("v5e:4x4x4", "v5e slices have 2 dimensions"),
        ("v5p:4x4", "v5p slices have 3 dimensions"),
        ("v5e:0x4", "v5e slices have 2 dimensions"),
        ("v5e:64x64", "the largest v5e slice has 256 chips"),
    ],
)
def test_topologies(topology, said, capsys):
    code, line = fails(capsys, "--config", SFT, "--topology", topology)
    assert (code, said in line) == (2, True), line


def test_topologies_that_there_are():
    for name, chips in (("v5e:4x4", 16), ("v6e:2x4", 8), ("v5p:2x2x1", 4), ("v4:2x2x2", 8)):
        assert (parse_topology(name).name, parse_topology(name).chips) == (name, chips)


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:3x5", "v6e:5x5", "v4:1x1x7"])
def test_slices_that_do_not_exist(topology, capsys):
    code, line = fails(capsys, "--config", SFT, "--topology", topology)
    assert (code, line.startswith(f"--topology {topology}: ")) == (2, True), line


def test_without_libtpu(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, line = fails(capsys, "--config", SFT, "--topology", "v5e:4x4")
    assert (code, "pip install 'psyche_jax[tpu]'" in line) == (1, True), line


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
def test_kv_heads(tmp_path, capsys):
    config = write_config(tmp_path, "sft", mesh={"fsdp": 1, "tensor": 4})
    code, line = fails(capsys, "--config", str(config), "--topology", "v5e:2x2")
    assert (code, "tensor 4 does not divide the model's num_key_value_heads 2" in line) == (2, True), line


def test_another_architecture_than_the_config_says(tmp_path):
    small = ARCHITECTURES["Qwen2.5-0.5B"]
    check_architecture("Qwen2.5-0.5B-Instruct", small, "models/x")
    check_architecture(None, small, "models/x")
    with pytest.raises(UsageError, match=r"models/x is no Qwen2.5-7B: its vocab_size is 151936, not 152064"):
        check_architecture("Qwen2.5-7B", small, "models/x")


@needs_libtpu
def test_the_model_that_is_there_counts(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(ARCHITECTURES["Qwen2.5-0.5B"], "float32")))
    arguments = ["--config", SFT, "--topology", "v5e:4x4", "--set", f"model.path={tmp_path}"]
    code, line = fails(capsys, *arguments)
    assert (code, "is no Qwen2.5-7B" in line) == (2, True), line


def test_out_of_memory_messages():
    message = "Ran out of memory in memory space hbm. Used 17.52G of 15.75G hbm. Exceeded hbm capacity by 1.77G."
    assert out_of_memory(message) == (int(17.52 * 2**30), int(15.75 * 2**30))
    message = "the total memory required for HLO temporaries (52.51G) exceeds available HBM (15.75G)."
    assert out_of_memory(message) == (int(52.51 * 2**30), int(15.75 * 2**30))
    assert out_of_memory("something else") == (None, None)


@pytest.mark.parametrize("path", sorted(Path(ROOT / "configs").glob("*_*_v*.yaml")), ids=lambda path: path.stem)
def test_ready_configs_are_short_and_valid(path):
    from psyche_jax.plan.planning import load_plan_config

    config = load_plan_config(path, [], None)
    assert path.stem.startswith("grpo" if hasattr(config, "rewards") else "sft")
    assert config.model.architecture in ARCHITECTURES
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 6, "only what differs"
