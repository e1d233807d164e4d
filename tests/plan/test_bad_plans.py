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
from tiny_plans import ROOT, needs_libtpu, write_config

from psyche_jax import cli
from psyche_jax.errors import UsageError, UserError
from psyche_jax.model.config import hf_config
from psyche_jax.model.published import ARCHITECTURES, check_architecture
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
        ("v5e", "must be a chip and a shape"),
        ("v5e:4xx4", "must be a chip and a shape"),
        ("h100:8", "the chip 'h100' is not known; known: v4, v5e, v5p, v6e, tpu7x"),
        ("v7x:2x2x1", "the chip 'v7x' is not known; did you mean tpu7x?"),
        ("v5e-", "must be a chip and a shape"),
        ("v5e:1" + "0" * 5000, "must be a chip and a shape"),
        ("v5e:4x4x4", "v5e slices have 2 dimensions"),
        ("v5p:4x4", "v5p slices have 3 dimensions"),
        ("v5e:0x4", "v5e slices have 2 dimensions"),
        ("v5e:64x64", "the largest v5e slice has 256 chips"),
        ("v5litepod-17", "17 (chips) is no usual size; the nearest is v5litepod-16 (v5e:4x4)"),
        ("v5p-12", "12 (TensorCores, two a chip) is no usual size; the nearest is v5p-16 (v5p:2x2x2)"),
        ("v4-1", "the nearest is v4-2 (v4:1x1x1)"),
        ("v6e-0", "the nearest is v6e-1 (v6e:1x1)"),
        ("v6e-512", "the nearest is v6e-256 (v6e:16x16)"),
    ],
)
def test_topologies(topology, said, capsys):
    code, line = fails(capsys, "--config", SFT, "--topology", topology)
    assert (code, said in line) == (2, True), line


@pytest.mark.parametrize(
    ("given", "name", "chips"),
    [
        ("v5e:4x4", "v5e:4x4", 16),
        ("v6e:2x4", "v6e:2x4", 8),
        ("v5p:2x2x1", "v5p:2x2x1", 4),
        ("v4:2x2x2", "v4:2x2x2", 8),
        # As cloud.google.com/tpu/docs/{v5e,v6e,v5p,v4} have them: chips of the first two, else TensorCores.
        ("v5litepod-1", "v5e:1x1", 1),
        ("v5litepod-16", "v5e:4x4", 16),
        ("v5litepod-32", "v5e:4x8", 32),
        ("v5e-16", "v5e:4x4", 16),
        ("v5litepod:4x4", "v5e:4x4", 16),
        ("v6e-1", "v6e:1x1", 1),
        ("v6e-8", "v6e:2x4", 8),
        ("v6e-256", "v6e:16x16", 256),
        ("v4-8", "v4:2x2x1", 4),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-32", "v5p:2x2x4", 16),
        ("v5p-2048", "v5p:8x8x16", 1024),
        ("tpu7x-8", "tpu7x:2x2x1", 4),
        ("tpu7x-16", "tpu7x:2x2x2", 8),
    ],
)
def test_topologies_that_there_are(given, name, chips):
    slice_ = parse_topology(given)
    assert (slice_.name, slice_.chips) == (name, chips)


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:3x5", "v6e:5x5", "v4:1x1x7"])
def test_slices_that_do_not_exist(topology, capsys):
    code, line = fails(capsys, "--config", SFT, "--topology", topology)
    assert (code, line.startswith(f"--topology {topology}: ")) == (2, True), line
    nearest = {"v5e:3x5": "v5e:4x4", "v6e:5x5": "v6e:4x8", "v4:1x1x7": "v4:2x2x2"}[topology]
    assert line.endswith(f"the nearest is {nearest}"), line


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
