"""Runs whose folder is in a bucket: the same numbers and files as on a disk, stopped and gone on with."""

import dataclasses
import json
from types import SimpleNamespace
from unittest import mock

import pytest
from support.training_fixtures import grpo_config, metrics_of, sft_config

from psyche_jax import cli
from psyche_jax.config import CheckpointSection, LoggingSection
from psyche_jax.data.dataset import load_records, write_dataset
from psyche_jax.data.records import Question, RlPrompt, write_records
from psyche_jax.errors import UserError
from psyche_jax.evaluate import evaluation, local
from psyche_jax.model.huggingface import TOKENIZER_FILES, load_tokenizer
from psyche_jax.storage import locks
from psyche_jax.storage.files import as_path, files_under
from psyche_jax.storage.locks import locked
from psyche_jax.train.grpo_run import train_grpo
from psyche_jax.train.preemption import Stop
from psyche_jax.train.run_files import read_lines
from psyche_jax.train.runs import PreemptedError
from psyche_jax.train.setup import keep_tokenizer
from psyche_jax.train.sft import train_sft
from psyche_jax.train.step_folders import find_checkpoint, set_aside_look_alikes


def config(root, folder, **changes):
    made = sft_config(root, checkpoints=CheckpointSection(every_steps=2), **changes)
    return dataclasses.replace(made, run=dataclasses.replace(made.run, dir=str(folder)))


@pytest.mark.slow
def test_stopped_and_gone_on_with(tiny_root, bucket, tmp_path, monkeypatch):
    """As a run on a disk that was left alone: losses equal, state, config, tokenizer and checkpoints in the bucket."""
    train_sft(config(tiny_root, tmp_path / "run"))
    place = f"{bucket}/runs/sft"
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "requested", lambda _, step: step == 4)
        with pytest.raises(PreemptedError, match="after step 4"):
            train_sft(config(tiny_root, place))
    state = json.loads(as_path(f"{place}/state.json").read_text())
    assert (state["status"], state["step"]) == ("preempted", 4)
    assert [line["step"] for line in read_lines(as_path(f"{place}/metrics.jsonl"))] == [1, 2, 3, 4]
    train_sft(config(tiny_root, place))
    assert json.loads(as_path(f"{place}/state.json").read_text())["status"] == "done"
    losses = [line["loss"] for line in metrics_of(as_path(place))]
    assert losses == [line["loss"] for line in metrics_of(tmp_path / "run")]
    assert as_path(f"{place}/config.yaml").is_file()
    names = {child.name for child in as_path(f"{place}/checkpoints").iterdir()}
    assert {"tokenizer", "5"} <= names
    with pytest.raises(UserError, match="holds another run"):
        train_sft(config(tiny_root, place, epochs=3.0))
    evaluate_and_report(place, tmp_path)


def evaluate_and_report(place, tmp_path):
    """`psyche eval` writes into the run, also what it has when it is killed; `psyche report` reads it all."""
    questions = [Question(stem, {"A": "是", "B": "否"}, "A", "single") for stem in ("梦", "忘")]
    write_records(tmp_path / "samples.jsonl", questions)
    command = ["eval", place, "--bench", str(tmp_path / "samples.jsonl"), "--max-new-tokens", "4", "--label", "mine"]

    class Killed(BaseException):
        pass

    with mock.patch.object(evaluation, "write_json", side_effect=Killed), pytest.raises(Killed):
        cli.main(command)
    folder = as_path(f"{place}/evaluations")
    (kept,) = folder.iterdir()
    assert len(read_lines(kept)) == 2
    with mock.patch.object(local, "complete", side_effect=AssertionError("asked again")):
        assert cli.main(command) == 0
    assert [path.name for path in folder.iterdir()] == ["samples-mine.json"]
    assert len(json.loads((folder / "samples-mine.json").read_text())["items"]) == 2
    assert cli.main(["report", place, "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "mine" in page
    assert "Supervised fine-tuning" in page


def test_a_profile_in_a_bucket(tiny_root, bucket):
    train_sft(config(tiny_root, f"{bucket}/profiled", epochs=0.5), profile_steps=1)
    names = [path.name for path in files_under(as_path(f"{bucket}/profiled/profile"))]
    assert any(name.endswith(".xplane.pb") for name in names), names


def test_a_tokenizer_is_whole_or_absent(tiny_root, bucket, monkeypatch):
    """Killed after any number of its files; the next start writes it whole."""
    run = SimpleNamespace(writes=True, folder=as_path(f"{bucket}/t"), checkpoints=as_path(f"{bucket}/t/checkpoints"))
    setup = SimpleNamespace(model=SimpleNamespace(tokenizer_folder=tiny_root / "model"))
    target = run.checkpoints / "tokenizer"
    write = type(target).write_bytes
    expected = load_tokenizer(tiny_root / "model")
    for count in range(len([name for name in TOKENIZER_FILES if (tiny_root / "model" / name).is_file()])):
        left = iter([True] * count)

        def until_killed(path, content, left=left):
            if not next(left, False):
                raise KeyboardInterrupt
            return write(path, content)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(type(target), "write_bytes", until_killed)
            keep_tokenizer(run, setup)
        with pytest.raises(UserError, match=r"has no tokenizer\.json"):
            load_tokenizer(target)
    keep_tokenizer(run, setup)
    loaded = load_tokenizer(target)
    assert loaded.chat_template == expected.chat_template
    assert loaded.get_vocab() == expected.get_vocab()


def test_what_needs_a_disk(tiny_root, bucket):
    with pytest.raises(UserError, match=r"logging.tensorboard needs a run.dir on a disk"):
        train_sft(config(tiny_root, f"{bucket}/a", logging=LoggingSection(tensorboard=True)))
    with pytest.raises(UserError, match="gs://none/run"):
        train_sft(config(tiny_root, "gs://none/run"))


@pytest.mark.slow
def test_grpo_with_prompts_in_the_bucket(tiny_root, bucket, tmp_path, monkeypatch):
    """As on a disk: stopped after the first of two iterations, gone on with, the same numbers and samples."""
    prompts = load_records(RlPrompt, str(tiny_root / "rl.jsonl")).good
    write_dataset(f"{bucket}/data/rl", prompts)

    def grpo(folder, train):
        made = grpo_config(tiny_root, epochs=1.0, checkpoints=CheckpointSection(every_steps=1))
        run = dataclasses.replace(made.run, dir=str(folder))
        return dataclasses.replace(made, run=run, data=dataclasses.replace(made.data, train=train))

    train_grpo(grpo(tmp_path / "run", str(tiny_root / "rl.jsonl")))
    there = grpo(f"{bucket}/runs/grpo", f"{bucket}/data/rl")
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "requested", lambda *_: True)
        with pytest.raises(PreemptedError, match="after step 1"):
            train_grpo(there)
    assert not as_path(f"{bucket}/runs/grpo/lock.json").exists()
    train_grpo(there)
    folder = as_path(f"{bucket}/runs/grpo")
    assert json.loads((folder / "state.json").read_text())["status"] == "done"
    assert metrics_of(folder) == metrics_of(tmp_path / "run")
    assert [line["step"] for line in metrics_of(folder)] == [1, 2]
    assert read_lines(folder / "samples.jsonl") == read_lines(tmp_path / "run" / "samples.jsonl")


def test_a_second_run_is_refused(tiny_root, bucket, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.1)
    place = as_path(f"{bucket}/runs/held")
    with locked(place), pytest.raises(UserError, match="another run is writing there"):
        train_sft(config(tiny_root, place))
    assert not (place / "config.yaml").exists()


def test_checkpoints_copied_without_their_marks(bucket, capsys):
    """By a tool that leaves them out: refused while none is whole, and left as they are; else passed over."""
    root = as_path(f"{bucket}/copied/checkpoints")

    def copy(step, names):
        for name in names:
            (root / str(step) / name).write_text(json.dumps({"step": 4}))

    copy(4, ["parameters/a", "optimizer/a", "metadata/metadata"])
    before = files_under(root)
    with pytest.raises(UserError, match=r"4: commit_success\.txt is missing.*to start over"):
        set_aside_look_alikes(root, 4)
    assert files_under(root) == before
    with pytest.raises(UserError, match=r"4: commit_success\.txt is missing"):
        find_checkpoint(root)
    copy(4, ["commit_success.txt"])
    copy(99, ["commit_success.txt", "optimizer/a"])
    assert find_checkpoint(root).name == "4"
    assert "99: incomplete checkpoint (parameters is missing)" in capsys.readouterr().err
    set_aside_look_alikes(root, 4)
    assert not (root / "99" / "commit_success.txt").exists()
    assert find_checkpoint(root).name == "4"
