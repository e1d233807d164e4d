"""Checkpoints: onto another mesh, of every kind, broken ones, and what a killed save leaves behind."""

import contextlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_fixtures import PROMPT, execution

from psyche_jax.config import OptimizerSection
from psyche_jax.convert import export_model, import_model
from psyche_jax.errors import UserError
from psyche_jax.model.huggingface import read_parameters
from psyche_jax.model.qwen2 import build
from psyche_jax.train.checkpoints import Checkpoints, abstract_like, checkpoint_metadata, open_model
from psyche_jax.train.state import initial_state, make_optimizer, make_schedule, state_shardings

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
def saved(tiny_root, tiny_config, tmp_path_factory):
    """A checkpoint folder written from 8 devices at steps 2 and 4; the state that was saved last."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    state, _ = state_on(tiny_root, tiny_config, execution(8))
    metadata = checkpoint_metadata(tiny_config, PROMPT, seed=5)
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
def test_restored_onto_another_mesh(mesh, saved, tiny_root, tiny_config):
    here = execution(int(np.prod(mesh)), *mesh)
    _, abstract = state_on(tiny_root, tiny_config, here)
    with contextlib.closing(Checkpoints(saved[0], keep=2)) as checkpoints:
        assert checkpoints.latest == 4
        state = checkpoints.restore(abstract)
    assert leaves(state) == leaves(saved[1])
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)


def test_what_is_saved_is_the_state_at_that_time(tiny_root, tiny_config, tmp_path):
    """The step that follows takes over the state's memory while writing goes on in the background."""
    state, abstract = state_on(tiny_root, tiny_config, execution(8))
    expected = leaves(state)
    scale = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        checkpoints.save(state, 4, {})
        state = scale(state)
        assert leaves(state) != expected
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        assert leaves(checkpoints.restore(abstract)) == expected


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
def test_broken_parameters_are_one_line(what, broken, tiny_root, tiny_config):
    BREAKS[what](broken)
    with pytest.raises(UserError, match="the checkpoint is broken") as error:
        open_model(str(broken)).read_parameters(execution(1).sharding, FLOAT32)
    assert "\n" not in str(error.value)
    _, abstract = state_on(tiny_root, tiny_config, execution(1))
    with contextlib.closing(Checkpoints(broken)) as checkpoints, pytest.raises(UserError, match="4: the checkpoint is"):
        checkpoints.restore(abstract)


def edit_metadata(folder, **changes):
    path = folder / "4" / "metadata" / "metadata"
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({name: value for name, value in values.items() if value != "remove"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: remove(folder / "4" / "metadata"), "cannot be read as JSON"),
        (lambda folder: (folder / "4" / "metadata" / "metadata").write_text("{"), "cannot be read as JSON"),
        (lambda folder: edit_metadata(folder, format=2), "newer version of psyche_jax"),
        (lambda folder: edit_metadata(folder, model={"vocab_size": 3}), "4"),
        (lambda folder: edit_metadata(folder, model="remove"), "4"),
        (lambda folder: edit_metadata(folder, prompt="remove"), "4"),
        (lambda folder: [remove(folder / step) for step in ("2", "4")], "neither a config.json nor a checkpoint"),
    ],
    ids=["no metadata", "no JSON", "newer", "not all of the model", "no model", "no prompt", "no steps"],
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
