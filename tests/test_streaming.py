"""Conversion piece by piece: every bit arrives, memory stays small, plain Orbax restores it, a bucket will do too."""

import contextlib
import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, traverse_util
from safetensors import safe_open
from support.tiny import VOCAB_SIZE, save_model

from psyche_jax import cli, convert
from psyche_jax.config import MeshSection, ModelSection, OptimizerSection
from psyche_jax.errors import UserError
from psyche_jax.model import huggingface
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.qwen2 import build
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, make_mesh
from psyche_jax.storage import arrays
from psyche_jax.storage.arrays import blocks, read_ahead
from psyche_jax.storage.files import as_path
from psyche_jax.train import streaming
from psyche_jax.train.checkpoints import Checkpoints, checkpoint_metadata
from psyche_jax.train.setup import prepare
from psyche_jax.train.state import initial_state, make_optimizer, make_schedule, state_shardings
from psyche_jax.train.step_folders import write_checksums
from psyche_jax.train.stored_models import abstract_parameters, open_model
from psyche_jax.train.streaming import StoredArrays, streamed_parameters

QWEN_7B = ModelConfig(152064, 3584, 18944, 28, 28, 4, 128)


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small_pieces(monkeypatch):
    """Chunks and pieces of about a thousand bytes; files of at most 20 kB."""
    monkeypatch.setattr(streaming, "_LEAST_BYTES", 1000)
    monkeypatch.setattr(arrays, "PIECE_ELEMENTS", 300)
    monkeypatch.setattr(huggingface, "_SHARD_BYTES", 20_000)


def psyche(*arguments):
    assert cli.main([str(argument) for argument in arguments]) == 0


def tensors(folder):
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                array = file.get_tensor(name)
                found[name] = (str(array.dtype), array.shape, array.tobytes())
    return found


def sharding(*mesh):
    return Sharding(make_mesh(*mesh, devices=jax.devices()[: math.prod(mesh)]), TRAIN_RULES)


def leaf_bytes(tree):
    return [leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(tree))]


# Pieces


@pytest.mark.parametrize("limit", [1, 7, 24, 60, 1000])
@pytest.mark.parametrize(
    ("shape", "chunk"),
    [((5,), (2,)), ((4, 6), (2, 3)), ((3, 5, 7), (1, 2, 7)), ((2, 3, 4), (2, 3, 4)), ((7, 3), (1, 1))],
)
def test_blocks_cover_an_array_once_in_whole_chunks(shape, chunk, limit, monkeypatch):
    monkeypatch.setattr(arrays, "PIECE_ELEMENTS", limit)
    seen = np.zeros(shape, int)
    for block in blocks(shape, chunk):
        seen[block] += 1
        assert all(part.start % step == 0 for part, step in zip(block, chunk, strict=True))
        assert all(
            part.stop % step == 0 or part.stop == size for part, step, size in zip(block, chunk, shape, strict=True)
        )
        assert seen[block].size <= max(limit, math.prod(chunk))
    assert (seen == 1).all()


def test_blocks_of_rows_follow_each_other(monkeypatch):
    """What is written to a file from its start to its end."""
    monkeypatch.setattr(arrays, "PIECE_ELEMENTS", 10)
    array = np.arange(7 * 4).reshape(7, 4)
    assert np.concatenate([array[block].ravel() for block in blocks((7, 4), (1, 4))]).tolist() == list(range(28))


def test_read_ahead():
    read = []

    def slow(job):
        read.append(job)
        return -job

    assert list(read_ahead(slow, range(5))) == [(n, -n) for n in range(5)]
    assert read == list(range(5))
    assert list(read_ahead(slow, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(lambda job: 1 // job, [1, 0, 1]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_at_7b(dtype):
    """At most 16 MiB; each of 16 devices, and of 4 × 4, reads what it keeps, but for small arrays."""
    kind = np.dtype(jnp.dtype(dtype))
    leaves = traverse_util.flatten_dict(streamed_parameters(QWEN_7B, kind, lambda *_: None), sep="/")
    shapes = traverse_util.flatten_dict(nnx.to_pure_dict(build(QWEN_7B)[1]), sep="/")
    assert {path: leaf.shape for path, leaf in leaves.items()} == {path: leaf.shape for path, leaf in shapes.items()}
    assert sum(leaf.nbytes for leaf in leaves.values()) == QWEN_7B.num_parameters * kind.itemsize
    for leaf in leaves.values():
        assert all(size % step == 0 for size, step in zip(leaf.shape, leaf.chunk, strict=True))
        assert math.prod(leaf.chunk) * kind.itemsize <= 2**24
        # One block is one layer's matrix at most, so that all layers never stand in memory.
        assert max(math.prod(s.stop - s.start for s in block) for block in blocks(leaf.shape, leaf.chunk)) <= 80 * 2**20
    assert sum(math.prod(np.divide(x.shape, x.chunk)) for x in leaves.values()) < 30_000
    for path in ("layers/gate_proj/kernel", "layers/o_proj/kernel", "layers/down_proj/kernel", "embedding", "head"):
        for fsdp, tensor in ((16, 1), (4, 4)):
            mesh = jax.sharding.AbstractMesh((1, fsdp, tensor), ("data", "fsdp", "tensor"))
            places = traverse_util.flatten_dict(Sharding(mesh, TRAIN_RULES).of_parameters(build(QWEN_7B)[1]), sep="/")
            shard = places[path].shard_shape(leaves[path].shape)
            assert all(part % step == 0 for part, step in zip(shard, leaves[path].chunk, strict=True)), path


def test_chunks_of_a_vocabulary_that_nothing_divides():
    """As small, so that import and export hold no more of it."""
    config = dataclasses.replace(QWEN_7B, vocab_size=151_669)
    leaves = streamed_parameters(config, np.dtype("float32"), lambda *_: None)
    for leaf in (leaves["embedding"], leaves["head"]):
        assert leaf.shape == (151_669, 3584)
        assert math.prod(leaf.chunk) * 4 <= 2**24
        assert leaf.chunk[0] * 3584 <= 80 * 2**20, "what export reads at once"


# Bits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("vocabulary", [VOCAB_SIZE, 4097])
def test_round_trip_in_small_pieces(vocabulary, dtype, tied, small_pieces):
    names = {"f32": "float32", "bf16": "bfloat16"}
    save_model(Path("source"), names[dtype], tie_word_embeddings=tied, num_hidden_layers=3, vocab_size=vocabulary)
    assert len(list(Path("source").glob("*.safetensors"))) > 2
    psyche("import", "source", "checkpoint", "--dtype", dtype)
    psyche("export", "checkpoint", "target", "--dtype", dtype)
    assert tensors("target") == tensors("source")
    index = "model.safetensors.index.json"
    assert json.loads(Path("target", index).read_text()) == json.loads(Path("source", index).read_text())
    psyche("export", "source", "direct", "--dtype", dtype)
    assert tensors("direct") == tensors("source")


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_plain_orbax_restores_it(mesh, small_pieces):
    save_model(Path("source"))
    psyche("import", "source", "checkpoint")
    stored = open_model("source")
    expected = leaf_bytes(stored.read_parameters(sharding(1, 1, 1), jnp.dtype("float32")))
    abstract = abstract_parameters(stored.config, sharding(*mesh), jnp.dtype("float32"))
    folder = Path("checkpoint").absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder / "0" / "parameters", abstract)
        plain = checkpointer.restore(folder / "0" / "parameters")
    with ocp.CheckpointManager(folder) as manager:
        managed = manager.restore(0, args=ocp.args.Composite(parameters=ocp.args.StandardRestore(abstract)))
    for tree in (restored, managed["parameters"]):
        assert leaf_bytes(tree) == expected
        assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, tree, abstract))
    assert leaf_bytes(plain) == expected


def test_from_a_run_on_eight_devices(small_pieces):
    """Training's checkpoints, with optimizer state, are cut by layers too, and exported from any sharding."""
    save_model(Path("source"), tie_word_embeddings=False)
    stored = open_model("source")
    here = sharding(1, 8, 1)
    section = OptimizerSection()
    optimizer = make_optimizer(section, make_schedule(section, 10))
    shardings = state_shardings(optimizer, build(stored.config)[1], here)
    state = initial_state(optimizer, stored.read_parameters(here, jnp.dtype("float32")), shardings)
    with contextlib.closing(Checkpoints(Path("run/checkpoints"))) as checkpoints:
        checkpoints.save(state, 3, checkpoint_metadata(stored.config, None))
    shutil.copytree("source", "run/checkpoints/tokenizer")
    arrays = StoredArrays(Path("run/checkpoints/3"), stored.config)
    assert arrays.chunk("layers/gate_proj/kernel") == (1, 48, 4)
    psyche("export", "run", "target")
    assert tensors("target") == tensors("source")


def test_imported_checkpoints_are_trained_from(small_pieces):
    save_model(Path("source"))
    psyche("import", "source", "checkpoint")
    setup = prepare(ModelSection("checkpoint"), MeshSection(), 16, "length")
    expected = open_model("source").read_parameters(sharding(1, 1, 1), jnp.dtype("float32"))
    assert leaf_bytes(setup.read_parameters()) == leaf_bytes(expected)


# Failures


def test_a_checkpoint_of_another_model(capsys):
    save_model(Path("source"))
    psyche("import", "source", "checkpoint")
    metadata = Path("checkpoint/0/metadata/metadata")
    values = json.loads(metadata.read_text())
    for key, value, expected in (
        ("intermediate_size", 64, "its shapes are not the model's: layers/down_proj/kernel, layers/gate_proj/kernel"),
        ("tie_word_embeddings", False, "its parameters are not the model's: head"),
    ):
        metadata.write_text(json.dumps({**values, "model": {**values["model"], key: value}}))
        write_checksums(Path("checkpoint/0"))
        capsys.readouterr()
        assert cli.main(["export", "checkpoint", "target"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"checkpoint/0: the checkpoint is broken: {expected}" in line
        assert not Path("target").exists()


def test_too_little_space(monkeypatch, capsys):
    save_model(Path("source"))
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000))
    for verb in ("import", "export"):
        assert cli.main([verb, "source", "below/target"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"psyche {verb}: below/target: needs 102kB, and only 5.00kB are left on its disk"
        assert not Path("below").exists()


def failing_after(monkeypatch, reads):
    """Reading weights fails with the disk's error after so many pieces."""
    read = huggingface.WeightFiles.read
    left = [reads]

    def failing(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise UserError("source: cannot be read")
        return read(*arguments)

    monkeypatch.setattr(huggingface.WeightFiles, "read", failing)


def test_a_source_that_fails_midway_leaves_nothing(small_pieces, monkeypatch, capsys, tmp_path):
    save_model(Path("source"))
    before = sorted(tmp_path.iterdir())
    failing_after(monkeypatch, 30)
    assert cli.main(["import", "source", "checkpoint"]) == 1
    assert capsys.readouterr().err == "psyche import: source: cannot be read\n"
    assert sorted(tmp_path.iterdir()) == before


def test_plain_lines_of_progress(monkeypatch, capsys):
    monkeypatch.setattr(convert, "_SECONDS_A_LINE", -1.0)
    save_model(Path("source"))
    capsys.readouterr()
    psyche("import", "source", "checkpoint")
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert all(re.fullmatch(r"import: [\d.]+k?B of 102kB", line) for line in lines), err
    assert lines[-1] == "import: 102kB of 102kB"
    assert out.startswith("checkpoint: 25,376 parameters as float32, 102kB in ")


# Memory

MEASURED = """
import sys, threading, time
from pathlib import Path
import psyche_jax.convert, psyche_jax.storage.arrays
from psyche_jax import cli

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

psyche_jax.storage.arrays.PIECE_ELEMENTS = 2**21
base = anonymous()
peak = [base]
threading.Thread(target=watch, daemon=True).start()
assert cli.main(sys.argv[1:]) == 0
print(peak[0] - base)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_model(figure):
    """Leaves of 134 MB, 460 MB in all, in pieces of 8 MB."""
    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    save_model(Path("source"), **size)
    total = sum(path.stat().st_size for path in Path("source").glob("*.safetensors"))
    assert total > 400e6
    for arguments in (["import", "source", "checkpoint"], ["export", "checkpoint", "target"]):
        command = [sys.executable, "-c", MEASURED, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        what = f"MiB of anonymous memory above the imports, {arguments[0]} of {total / 2**20:.0f} MiB"
        figure(what, float(done.stdout.splitlines()[-1]), 256)
    assert tensors("target") == tensors("source")


# Buckets


def test_through_a_bucket(bucket):
    save_model(Path("source"), tie_word_embeddings=False)
    address = f"{bucket}/deep/checkpoint"
    psyche("import", "source", address)
    for source in (address, f"{address}/0"):
        psyche("export", source, "target")
        assert tensors("target") == tensors("source")
        assert Path("target/tokenizer.json").read_bytes() == Path("source/tokenizer.json").read_bytes()
        shutil.rmtree("target")
    setup = prepare(ModelSection(address), MeshSection(), 16, "length")
    assert setup.tokenizer("答案").input_ids
    expected = open_model("source").read_parameters(sharding(1, 1, 1), jnp.dtype("float32"))
    assert leaf_bytes(setup.read_parameters()) == leaf_bytes(expected)


def test_only_whole_checkpoints_of_a_bucket_are_opened(bucket, monkeypatch, capsys):
    save_model(Path("source"))
    address = f"{bucket}/again"
    psyche("import", "source", address)
    capsys.readouterr()
    assert cli.main(["import", "source", address]) == 1
    assert "again: already exists" in capsys.readouterr().err
    (as_path(address) / "0" / "commit_success.txt").unlink()
    assert cli.main(["export", address, "target"]) == 1
    assert "holds neither a config.json nor a checkpoint" in capsys.readouterr().err
    failing_after(monkeypatch, 5)
    assert cli.main(["import", "source", f"{bucket}/failed"]) == 1
    assert capsys.readouterr().err == "psyche import: source: cannot be read\n"
    assert not as_path(f"{bucket}/failed").exists()


def test_a_hugging_face_folder_in_a_bucket(bucket, capsys):
    (as_path(f"{bucket}/hf") / "config.json").write_text("{}")
    for verb in ("import", "export"):
        assert cli.main([verb, f"{bucket}/hf", "target"]) == 1
        assert f"{bucket}/hf: is a Hugging Face folder in a bucket; copy it to a disk" in capsys.readouterr().err


def test_buckets_that_are_not_there(bucket, capsys):
    save_model(Path("source"))
    assert cli.main(["export", "gs://nowhere/model", "target"]) == 1
    assert "gs://nowhere/model: no such model" in capsys.readouterr().err
    assert cli.main(["import", "source", "gs://nowhere/model"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "gs://nowhere/model: " in line
    assert "bucket" in line
