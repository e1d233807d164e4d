"""Checkpoints: onto another mesh, of every kind, broken ones, and what a killed save leaves behind."""

import contextlib
import dataclasses
import datetime
import itertools
import json
import shutil
import time
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.training_fixtures import PROMPT, execution

from psyche_jax.config import OptimizerSection
from psyche_jax.convert import export_model, import_model
from psyche_jax.errors import UserError
from psyche_jax.model.huggingface import read_parameters
from psyche_jax.model.qwen2 import build
from psyche_jax.train import checkpoints as checkpoints_module
from psyche_jax.train.checkpoints import Checkpoints, EverySoOften, abstract_like, checkpoint_metadata
from psyche_jax.train.state import initial_state, make_optimizer, make_schedule, state_shardings
from psyche_jax.train.stored_models import open_model, write_tokenizer

FLOAT32 = jnp.dtype("float32")
SECTION = OptimizerSection()
OPTIMIZER = make_optimizer(SECTION, make_schedule(SECTION, 10))


def state_on(root, config, here):
    """A state whose moments are not zero, and what `restore` takes to place one as this."""
    shardings = state_shardings(OPTIMIZER, build(config)[1], here.sharding)
    parameters = read_parameters(root / "model", config, here.sharding, FLOAT32)
    state = initial_state(OPTIMIZER, parameters, shardings)
    _, optimizer_state = jax.jit(OPTIMIZER.update)(parameters, state.optimizer_state, parameters)
    state = type(state)(jax.device_put(jnp.int32(4), shardings.step), parameters, optimizer_state)
    return state, abstract_like(state, shardings)


def leaves(tree):
    return [leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(tree))]


@pytest.fixture(scope="module")
def metadata(tiny_config):
    """Of a run, as `run_training` gives it."""
    config = {"optimizer": {"learning_rate": 1.0}, "mesh": {"fsdp": 1}}
    return checkpoint_metadata(tiny_config, PROMPT, seed=5, config=config)


@pytest.fixture(scope="module")
def saved(tiny_root, tiny_config, metadata, tmp_path_factory):
    """A checkpoint folder written from 8 devices at steps 2 and 4; the state that was saved last."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    state, _ = state_on(tiny_root, tiny_config, execution(8))
    with contextlib.closing(Checkpoints(folder, keep=2)) as checkpoints:
        for step in (1, 2, 4):
            checkpoints.save(state, step, metadata)
    shutil.copytree(tiny_root / "model", folder / "tokenizer")
    return folder, jax.device_get(state)


@pytest.fixture
def broken(saved, tmp_path):
    """A copy to break."""
    return shutil.copytree(saved[0], tmp_path / "checkpoints")


def test_only_the_last_ones_are_kept(saved):
    assert sorted(path.name for path in saved[0].iterdir()) == ["2", "4", "tokenizer"]


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_restored_onto_another_mesh(mesh, saved, tiny_root, tiny_config, metadata):
    here = execution(int(np.prod(mesh)), *mesh)
    _, abstract = state_on(tiny_root, tiny_config, here)
    with contextlib.closing(Checkpoints(saved[0], keep=2)) as checkpoints:
        assert checkpoints.latest == 4
        state = checkpoints.restore(abstract, metadata)
    assert leaves(state) == leaves(saved[1])
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)


def test_what_is_saved_is_the_state_at_that_time(tiny_root, tiny_config, tmp_path, metadata):
    """The step that follows takes over the state's memory while writing continues in the background."""
    state, abstract = state_on(tiny_root, tiny_config, execution(8))
    expected = leaves(state)
    scale = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        checkpoints.save(state, 4, metadata)
        state = scale(state)
        assert leaves(state) != expected
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        assert leaves(checkpoints.restore(abstract, metadata)) == expected


def test_every_kind_of_model_is_opened(saved, tiny_root, tiny_config, tmp_path):
    folder, state = saved
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(folder)
    import_model(tiny_root / "model", tmp_path / "imported", "float32")
    export_model(str(run), tmp_path / "exported", "float32")
    for path in (folder, folder / "2", run, tmp_path / "imported", tmp_path / "exported", tiny_root / "model"):
        model = open_model(str(path))
        assert model.config == tiny_config
        assert leaves(model.read_parameters(execution(8).sharding, FLOAT32)) == leaves(state.parameters)
        assert (model.tokenizer_folder / "tokenizer.json").is_file()
    assert open_model(str(run)).prompt == open_model(str(tmp_path / "exported")).prompt == PROMPT
    assert open_model(str(tmp_path / "imported")).prompt is None


def test_a_save_that_was_killed_is_not_taken_for_a_checkpoint(broken, tiny_root, tiny_config):
    """Orbax writes beside and renames; the leftover is neither opened nor in the way of saving that step again."""
    leftover = broken / "6.orbax-checkpoint-tmp"
    shutil.copytree(broken / "4", leftover)
    shutil.rmtree(leftover / "metadata")
    assert open_model(str(broken)).weights.name == "4"
    state, _ = state_on(tiny_root, tiny_config, execution(1))
    with contextlib.closing(Checkpoints(broken, keep=2)) as checkpoints:
        assert checkpoints.latest == 4
        checkpoints.save(state, 6, checkpoint_metadata(tiny_config, PROMPT))
    assert open_model(str(broken)).weights.name == "6"


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def break_parameters(folder):
    for path in (folder / "4" / "parameters" / "ocdbt.process_0" / "d").glob("*"):
        path.write_bytes(path.read_bytes()[:100])


BREAKS = {
    "arrays cut short": break_parameters,
    "no arrays": lambda folder: remove(largest_file(folder / "4" / "parameters")),
    "description is no JSON": lambda folder: (folder / "4" / "parameters" / "_METADATA").write_text("{"),
    "no manifest": lambda folder: [remove(path) for path in (folder / "4" / "parameters").glob("manifest.ocdbt")],
}


@pytest.mark.parametrize("what", BREAKS)
def test_broken_parameters_are_one_line(what, broken, tiny_root, tiny_config, metadata):
    BREAKS[what](broken)
    with pytest.raises(UserError, match="the checkpoint is broken") as error:
        open_model(str(broken)).read_parameters(execution(1).sharding, FLOAT32)
    assert "\n" not in str(error.value)
    _, abstract = state_on(tiny_root, tiny_config, execution(1))
    with contextlib.closing(Checkpoints(broken)) as checkpoints, pytest.raises(UserError, match="4: the checkpoint is"):
        checkpoints.restore(abstract, metadata)


def edit_metadata(folder, **changes):
    path = folder / "4" / "metadata" / "metadata"
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({name: value for name, value in values.items() if value != "remove"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "4" / "metadata" / "metadata").write_text("{"), "cannot be read as JSON"),
        (lambda folder: edit_metadata(folder, format=3), "newer version of psyche_jax"),
        (lambda folder: edit_metadata(folder, model={"vocab_size": 3}), "4"),
        (lambda folder: edit_metadata(folder, model="remove"), "4"),
        (lambda folder: edit_metadata(folder, prompt="remove"), "4"),
        (lambda folder: [remove(folder / step) for step in ("2", "4")], "neither a config.json nor a checkpoint"),
    ],
    ids=["no JSON", "newer", "not all of the model", "no model", "no prompt", "no steps"],
)
def test_broken_metadata_is_one_line(damage, message, broken):
    damage(broken)
    with pytest.raises(UserError, match=message) as error:
        open_model(str(broken))
    assert "\n" not in str(error.value)


def test_no_model_at_all(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "absent", tmp_path / "file", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            open_model(str(path))


def covered(folder):
    """The files of the last step that the checksums are of."""
    known = json.loads((folder / "4" / "checksums.json").read_text())["files"]
    return [folder / "4" / name for name in known]


def test_every_file_of_a_checkpoint_is_covered(saved):
    """But those that Orbax writes last, and the checksums, which have one of their own."""
    files = {path for path in (saved[0] / "4").rglob("*") if path.is_file()}
    others = {path.name for path in files - set(covered(saved[0]))}
    assert others <= {"_CHECKPOINT_METADATA", "commit_success.txt", "checksums.json"}


def flip(path, random):
    content = bytearray(path.read_bytes())
    content[random.integers(len(content))] ^= 1 << int(random.integers(8))
    path.write_bytes(content)


@pytest.mark.parametrize("seed", range(3))
def test_one_flipped_bit_in_any_file_is_found_and_named(seed, broken, tiny_root, tiny_config, metadata):
    """At a random place; also where Orbax would restore other numbers without a word."""
    random = np.random.default_rng(seed)
    _, abstract = state_on(tiny_root, tiny_config, execution(1))
    with contextlib.closing(Checkpoints(broken)) as checkpoints:
        for path in (*covered(broken), broken / "4" / "checksums.json"):
            whole = path.read_bytes()
            flip(path, random)
            with pytest.raises(UserError, match=r"broken|cannot be read as JSON|newer version") as error:
                checkpoints.restore(abstract, metadata)
            assert path.relative_to(broken / "4").as_posix() in str(error.value), path
            assert "remove this folder to resume from the one before it" in str(error.value)
            if "optimizer" not in path.parts:
                with pytest.raises(UserError):
                    open_model(str(broken)).check()
            path.write_bytes(whole)
        checkpoints.restore(abstract, metadata)


@pytest.mark.parametrize("what", ["short", "missing", "no checksums"])
def test_files_that_are_short_or_missing_are_named(what, broken, tiny_root, tiny_config, metadata):
    _, abstract = state_on(tiny_root, tiny_config, execution(1))
    path = broken / "4" / "checksums.json" if what == "no checksums" else largest_file(broken / "4")
    if what == "short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with contextlib.closing(Checkpoints(broken)) as checkpoints, pytest.raises(UserError, match=path.name) as error:
        checkpoints.restore(abstract, metadata)
    assert "bytes, and had" in str(error.value) if what == "short" else "is missing" in str(error.value)


def test_a_flipped_bit_in_a_tokenizer_is_found_and_named(broken, tiny_root):
    shutil.rmtree(broken / "tokenizer")
    (broken / "tokenizer").mkdir()
    write_tokenizer(tiny_root / "model", broken / "tokenizer")
    assert open_model(str(broken)).tokenizer_folder == broken / "tokenizer"
    random = np.random.default_rng(2)
    for path in sorted((broken / "tokenizer").iterdir()):
        whole = path.read_bytes()
        flip(path, random)
        with pytest.raises(UserError, match=f"tokenizer: the checkpoint is broken: .*{path.name}"):
            open_model(str(broken))
        path.write_bytes(whole)


def test_damage_in_the_file_that_orbax_keeps_for_itself_is_one_line_or_harmless(
    broken, tiny_root, tiny_config, metadata
):
    random = np.random.default_rng(1)
    _, abstract = state_on(tiny_root, tiny_config, execution(1))
    path = broken / "4" / "_CHECKPOINT_METADATA"
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], None, None, None, None):
        path.write_bytes(whole if content is None else content)
        if content is None:
            flip(path, random)
        try:
            with contextlib.closing(Checkpoints(broken)) as checkpoints:
                assert checkpoints.latest == 4
                assert int(checkpoints.restore(abstract, metadata).step) == 4
        except UserError as error:
            assert "\n" not in str(error)
            assert str(broken) in str(error)


def test_every_mismatch_is_named(saved, tiny_root, tiny_config, metadata):
    """Another shape, another dtype, an array too many and one too few; another model and other settings."""
    _, abstract = state_on(tiny_root, tiny_config, execution(1))
    parameters = dict(abstract.parameters)
    head = parameters.pop("head")
    parameters["extra"] = head
    parameters["embedding"] = jax.ShapeDtypeStruct((304, 64), jnp.float32, sharding=head.sharding)
    norm = parameters["final_norm"]
    parameters["final_norm"] = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), norm
    )
    wanted = dataclasses.replace(abstract, parameters=parameters)
    model = {**metadata["model"], "hidden_size": 64, "rope_theta": 5.0}
    config = {"optimizer": {"learning_rate": 0.5}, "mesh": {"fsdp": 3}}
    with contextlib.closing(Checkpoints(saved[0], keep=2)) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.restore(wanted, {**metadata, "model": model, "config": config})
    assert (
        str(error.value)
        == f"{saved[0] / '4'}: the checkpoint does not belong to this run; {len(error.value.details)} differences:"
    )
    details = "\n".join(error.value.details)
    for line in (
        "its model.hidden_size is 32, not 64",
        f"its model.rope_theta is {metadata['model']['rope_theta']}, not 5.0",
        "its optimizer.learning_rate is 1.0, not 0.5",
        "parameters/embedding: float32[304, 32] in the checkpoint, float32[304, 64] in this run",
        "parameters/extra: float32[304, 32] in this run, missing in the checkpoint",
        "parameters/head: float32[304, 32] in the checkpoint, missing in this run",
        "float32[32] in the checkpoint, bfloat16[32] in this run",
    ):
        assert line in details, details
    assert len(error.value.details) == 7
    assert "fsdp" not in details


class Info(NamedTuple):
    """What Orbax knows of a checkpoint."""

    step: int
    time: datetime.datetime


def kept_by_time(hours, interval=1.0):
    """Which of the checkpoints written at these times of the clock are kept when one of every hour is."""
    policy = EverySoOften(datetime.timedelta(hours=interval))
    start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    kept = []
    for step, hour in enumerate(hours):
        kept.append(Info(step, start + datetime.timedelta(hours=hour)))
        kept = [info for info, keep in zip(kept, policy.should_preserve(kept, context=None), strict=True) if keep]
    return [info.step for info in kept]


def test_one_of_every_hour_is_kept():
    assert kept_by_time([0.0, 0.5, 1.0, 1.5, 2.1, 2.9, 3.2]) == [0, 2, 4, 6]


@given(jump=st.floats(-1e4, 1e4), at=st.integers(1, 39))
@example(jump=-1.125, at=2)
@example(jump=-1.85, at=9)  # set back just before one was due, by nearly two hours
def test_a_clock_that_jumps_keeps_no_less(jump, at):
    """One checkpoint every six minutes: however the clock is set, within any three hours of work one is kept."""
    kept = kept_by_time([0.1 * step + (jump if step >= at else 0.0) for step in range(40)])
    assert kept[0] == 0
    assert all(after - before <= 30 for before, after in itertools.pairwise([*kept, 39]))
    assert len(kept) <= 6


def test_a_clock_that_jumps_loses_none_of_the_latest_and_the_best(tiny_root, tiny_config, tmp_path, metadata):
    state, abstract = state_on(tiny_root, tiny_config, execution(1))
    now = time.time_ns
    for step, days in ((1, 0), (2, 300), (3, -300), (4, -3000)):
        with (
            mock.patch.object(time, "time_ns", lambda days=days: now() + days * 86400 * 10**9),
            contextlib.closing(Checkpoints(tmp_path / "checkpoints", 2, keep_every_hours=1e6)) as checkpoints,
        ):
            assert checkpoints.latest == (step - 1 or None)
            checkpoints.bests = (2,)
            checkpoints.save(state, step, metadata)
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints", 2)) as checkpoints:
        assert checkpoints.latest == 4
        assert leaves(checkpoints.restore(abstract, metadata)) == leaves(state)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"1", "2", "3", "4"}, "the first by time, the best, the latest two"


def test_what_cannot_be_written_is_one_line(tiny_root, tiny_config, tmp_path, metadata):
    """An error in the background comes out at the next save, or at the end."""
    state, _ = state_on(tiny_root, tiny_config, execution(1))
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    with mock.patch.object(checkpoints_module, "write_checksums", side_effect=OSError("No space left on device")):
        checkpoints.save(state, 1, metadata)
        with pytest.raises(UserError, match=r"1: the checkpoint cannot be written: No space left on device"):
            checkpoints.close()
    assert open_folder(tmp_path / "checkpoints").latest is None


def open_folder(folder):
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        return checkpoints
