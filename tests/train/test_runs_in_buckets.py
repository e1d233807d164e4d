"""Runs whose folder is in a bucket: the same numbers and files as on a disk, stopped and gone on with."""

import dataclasses
import json

import pytest
from bucket import running_bucket
from training_fixtures import metrics_of, sft_config

from psyche_jax.config import CheckpointSection, LoggingSection
from psyche_jax.errors import UserError
from psyche_jax.files import as_path
from psyche_jax.runs import PreemptedError, read_lines
from psyche_jax.train import loop
from psyche_jax.train.sft import train_sft


@pytest.fixture(scope="module")
def bucket():
    with running_bucket() as address:
        yield address


def config(root, folder, **changes):
    made = sft_config(root, checkpoints=CheckpointSection(every_steps=2), **changes)
    return dataclasses.replace(made, run=dataclasses.replace(made.run, dir=str(folder)))


@pytest.mark.slow
def test_stopped_and_gone_on_with(tiny_root, bucket, tmp_path, monkeypatch):
    """As a run on a disk that was left alone: losses equal, state, config, tokenizer and checkpoints in the bucket."""
    train_sft(config(tiny_root, tmp_path / "run"))
    place = f"{bucket}/runs/sft"
    asked = iter([False] * 3 + [True] + [False] * 9)
    with monkeypatch.context() as patch:
        patch.setattr(loop.hosts, "on_any", lambda _: next(asked))
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


def test_what_needs_a_disk(tiny_root, bucket):
    with pytest.raises(UserError, match=r"logging.tensorboard needs a run.dir on a disk"):
        train_sft(config(tiny_root, f"{bucket}/a", logging=LoggingSection(tensorboard=True)))
    with pytest.raises(UserError, match=r"--profile needs a run.dir on a disk"):
        train_sft(config(tiny_root, f"{bucket}/b"), profile_steps=1)
    with pytest.raises(UserError, match="gs://none/run"):
        train_sft(config(tiny_root, "gs://none/run"))
