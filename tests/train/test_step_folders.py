"""A run goes on from its last whole checkpoint or says that it has none; what only looks like one is passed over."""

import dataclasses
import json
import shutil
from unittest import mock

import pytest
from support.training_fixtures import metrics_of, sft_config, state_of

from psyche_jax import cli
from psyche_jax.config import CheckpointSection, OptimizerSection, RunSection, SftDataSection
from psyche_jax.errors import UserError
from psyche_jax.train.checkpoints import Checkpoints
from psyche_jax.train.preemption import Stop
from psyche_jax.train.runs import PreemptedError
from psyche_jax.train.sft import train_sft
from psyche_jax.train.step_folders import find_checkpoint
from psyche_jax.train.stored_models import open_model


def config(root):
    return sft_config(root, checkpoints=CheckpointSection(every_steps=2))


@pytest.fixture(scope="module")
def stopped(tiny_root, tmp_path_factory):
    """A run of 5 steps that was stopped after 4, with checkpoints of 2 and 4."""
    root = shutil.copytree(tiny_root, tmp_path_factory.mktemp("stopped") / "work")
    with mock.patch.object(Stop, "requested", lambda _, step=None: step == 4), pytest.raises(PreemptedError):
        train_sft(config(root))
    return root


def getting_worse(root):
    data = SftDataSection(str(root / "sft.jsonl"), str(root / "sft.jsonl"), max_length=96)
    optimizer = OptimizerSection(learning_rate=1.0, schedule="constant", warmup=0)
    checkpoints = CheckpointSection(every_steps=1, keep=1)
    return sft_config(root, data=data, optimizer=optimizer, checkpoints=checkpoints, evaluate_every_steps=1)


@pytest.fixture(scope="module")
def worse(tiny_root, tmp_path_factory):
    """A run whose evaluation gets worse, stopped after 4 of 5 steps."""
    root = shutil.copytree(tiny_root, tmp_path_factory.mktemp("worse") / "work")
    with mock.patch.object(Stop, "requested", lambda _, step=None: step == 4), pytest.raises(PreemptedError):
        train_sft(getting_worse(root))
    return root


@pytest.fixture
def root(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "work")


def remove_from(steps, *names):
    def damage(checkpoints):
        for step in steps:
            for name in names:
                path = checkpoints / step / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, "no step is there"),
        (remove_from("24", "checksums.json"), "2: checksums.json is missing; 4: checksums.json is missing"),
        (remove_from("24", "metadata"), "4: metadata is missing"),
        (remove_from("24", "optimizer"), "4: optimizer is missing"),
        (lambda folder: [(folder / s).rename(folder / f"{s}.orbax-checkpoint-tmp") for s in "24"], "no step is there"),
    ],
    ids=["no folder", "no checksums", "no metadata", "no optimizer", "names of unfinished ones"],
)
def test_a_run_without_a_usable_checkpoint_is_refused(damage, said, root):
    """It said that 4 steps are saved: it does not begin again, its metrics stay, what to do is said."""
    damage(root / "run" / "checkpoints")
    before = metrics_of(root / "run")
    with pytest.raises(UserError, match="the run reached step 4, but no checkpoint is complete") as error:
        train_sft(config(root))
    assert said in str(error.value)
    assert "to start over, remove the run's folder or choose another run.dir" in str(error.value)
    assert metrics_of(root / "run") == before
    assert state_of(root / "run")["step"] == 4


def copy_what_changes(folder, copy):
    """Copy a folder that another thread writes to, as it stands at one moment: anew where a file went meanwhile."""
    while True:
        try:
            return shutil.copytree(folder, copy)
        except (shutil.Error, FileNotFoundError):
            shutil.rmtree(copy, ignore_errors=True)


@pytest.mark.parametrize("step", [2, 4])
def test_killed_while_a_checkpoint_is_written(step, root, monkeypatch):
    """By what is on the disk then: in the first one, the run begins anew; later, it resumes from the one before."""
    alone, killed = (
        dataclasses.replace(config(root), run=RunSection(str(root / name))) for name in ("alone", "killed")
    )
    seal = Checkpoints._seal

    def copy_and_seal(self):
        if self._saving == step:
            copy_what_changes(self._folder.parent, killed.run.dir)
        seal(self)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_seal", copy_and_seal)
        train_sft(alone)
    assert state_of(root / "killed")["step"] == step - 2
    train_sft(killed)
    assert metrics_of(root / "killed") == metrics_of(root / "alone")


def empty(checkpoints):
    (checkpoints / "99").mkdir()


def half_copied(*left_out):
    def make(checkpoints):
        shutil.copytree(checkpoints / "4", checkpoints / "99")
        remove_from(["99"], *left_out)(checkpoints)

    return make


LOOK_ALIKES = {
    "empty": (empty, "parameters is missing"),
    "no arrays": (half_copied("parameters"), "parameters is missing"),
    "no metadata": (half_copied("metadata"), "metadata is missing"),
    "no checksums": (half_copied("checksums.json"), "checksums.json is missing"),
    "another step's": (half_copied(), "it is a copy of step 4"),
    "another step's, in part": (half_copied("parameters/manifest.ocdbt"), "it is a copy of step 4"),
}


@pytest.mark.parametrize("what", LOOK_ALIKES)
def test_what_looks_like_a_checkpoint_is_passed_over(what, root, capsys):
    """By every verb that opens a run, with a line; the last whole one is used."""
    make, missing = LOOK_ALIKES[what]
    checkpoints = root / "run" / "checkpoints"
    make(checkpoints)
    for place in (root / "run", checkpoints):
        assert open_model(str(place)).weights == checkpoints / "4"
        assert f"{checkpoints / '99'}: incomplete checkpoint ({missing})" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"neither a config\.json nor a checkpoint") as error:
        find_checkpoint(checkpoints / "99")
    assert missing in str(error.value)
    (root / "run" / "state.json").write_text(json.dumps({**state_of(root / "run"), "best": {"step": 99}}))
    with pytest.raises(UserError, match="the best checkpoint is incomplete"):
        open_model(str(root / "run" / "best"))


@pytest.mark.parametrize("make", [empty, half_copied()], ids=["empty", "another step's"])
def test_training_goes_on_beside_what_looks_like_a_checkpoint(make, root, capsys):
    """Not "all 99 steps are done", and the real ones are not dropped as older; the look-alike is kept aside."""
    checkpoints = root / "run" / "checkpoints"
    make(checkpoints)
    train_sft(config(root))
    said = capsys.readouterr().err
    assert "99: incomplete checkpoint" in said
    assert "resuming after step 4" in said
    assert [line["step"] for line in metrics_of(root / "run")] == [1, 2, 3, 4, 5]
    names = sorted(path.name.split("-")[0] for path in checkpoints.iterdir())
    assert names == ["4", "5", "99.incomplete", "tokenizer"]


def test_a_finished_run_is_only_done_with_all_its_files(root):
    train_sft(config(root))
    whole = root / "run" / "checkpoints" / "5" / "parameters"
    max(whole.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size).unlink()
    with pytest.raises(UserError, match=r"5: the checkpoint is broken: .* is missing"):
        train_sft(config(root))


UNKNOWN_KINDS = '{"step": 4, "status": "done", "accepted": [{"step": 9, "kinds": [["data"]]}]}'


@pytest.mark.parametrize(
    "content", ["", "null", "[]", "{}", "3", UNKNOWN_KINDS, '{"step": 4', '{"step": "4", "status": "done"}']
)
def test_a_damaged_state_is_made_anew(content, root, capsys):
    """From the checkpoints, and said so; by what only reads it, it is named in one line."""
    (root / "run" / "state.json").write_text(content)
    with pytest.raises(UserError, match=r"state\.json") as error:
        open_model(str(root / "run" / "best"))
    assert "\n" not in str(error.value)
    train_sft(config(root))
    said = capsys.readouterr().err
    assert "rebuilding it from the run's checkpoints" in said
    assert "resuming after step 4" in said
    state = state_of(root / "run")
    assert (state["step"], state["status"], state["kind"]) == (5, "done", "sft")
    assert state["contents"].keys() == {"data", "tokenizer", "template", "base"}


@pytest.mark.parametrize(
    "metrics", [None, "", '{"step": 2, "evaluation_loss": "low"}\n'], ids=["gone", "empty", "text"]
)
def test_the_best_checkpoint_is_kept_without_metrics(metrics, worse, tmp_path):
    """`state.json` knows it too."""
    root = shutil.copytree(worse, tmp_path / "worse")
    path = root / "run" / "metrics.jsonl"
    path.unlink() if metrics is None else path.write_text(metrics)
    best = state_of(root / "run")["best"]
    assert best["step"] < 3, "training goes wrong"
    train_sft(getting_worse(root))
    assert state_of(root / "run")["best"] == best
    assert find_checkpoint(root / "run" / "best").name == str(best["step"])


@pytest.mark.parametrize("damage", [remove_from("24", "checksums.json"), shutil.rmtree], ids=["in part", "at all"])
@pytest.mark.parametrize("state", [None, "null"])
def test_neither_a_state_nor_a_checkpoint(state, damage, root):
    """That steps were saved cannot be known; that some were done can."""
    path = root / "run" / "state.json"
    path.unlink() if state is None else path.write_text(state)
    damage(root / "run" / "checkpoints")
    with pytest.raises(UserError, match="the run reached step 4, but no checkpoint is complete"):
        train_sft(config(root))
    assert len(metrics_of(root / "run")) == 4


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.jsonl", "[]\n{}\n", r"metrics\.jsonl:1: is not a JSON object"),
        ("metrics.jsonl", '{"loss": 1}\n', r"metrics\.jsonl:1: has no step"),
        ("metrics.jsonl", '{"step": "1"}\n', r"metrics\.jsonl:1: has no step"),
        ("samples.jsonl", "3\n3\n", r"samples\.jsonl:1: is not a JSON object"),
        ("config.yaml", "[]", r"config\.yaml: a config must be a mapping"),
        ("config.yaml", "", r"config\.yaml: a config must be a mapping"),
        ("config.yaml", "a: {", r"config\.yaml: is not valid YAML"),
    ],
)
def test_other_damaged_files_are_one_line(name, content, said, root):
    (root / "run" / name).write_text(content)
    with pytest.raises(UserError, match=said) as error:
        train_sft(config(root))
    assert "\n" not in str(error.value)
    assert str(root / "run" / name) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("state.json", content) for content in ("null", "[]", "{}", "{", "\x00", '{"status": 1, "step": 2}')),
        *(("metrics.jsonl", content) for content in ("null\nnull\n", '{"loss": 2}\n', "[" * 100_000 + "\n{}\n")),
        *(("config.yaml", content) for content in ("", "[]", "- a")),
        ("samples.jsonl", '"a"\n'),
    ],
)
def test_the_report_of_damaged_files_is_one_line(name, content, root, capsys):
    (root / "run" / name).write_text(content)
    assert cli.main(["report", str(root / "run"), "--out", str(root / "report.html")]) == 1 + (name == "config.yaml")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("psyche report: ")
    assert name in line


@pytest.mark.parametrize("content", ["null", "[]", "3", "{", '{"system": 1}', '{"sytem": "a"}', "[" * 100_000])
def test_a_damaged_prompt_beside_a_model_is_one_line(content, root):
    (root / "model" / "psyche_prompt.json").write_text(content)
    with pytest.raises(UserError, match=r"psyche_prompt\.json") as error:
        open_model(str(root / "model"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["null", "[]", "{}", '{"format": "2"}', "[" * 100_000])
def test_damaged_metadata_of_a_checkpoint_are_one_line(content, root):
    """Of the latest one, which has all of its files: it is not passed over, but named."""
    (root / "run" / "checkpoints" / "4" / "metadata" / "metadata").write_text(content)
    for use in (lambda: open_model(str(root / "run")), lambda: train_sft(config(root))):
        with pytest.raises(UserError, match="4") as error:
            use()
        assert "\n" not in str(error.value)
