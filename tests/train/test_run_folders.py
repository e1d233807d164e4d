"""What a run leaves in its folder, when it may be started, and how it ends: run in this process."""

import dataclasses
import json
import math
import os
import shutil
import time

import jax
import numpy as np
import pytest
from support.training_fixtures import (
    execution,
    grpo_config,
    metrics_of,
    sft_config,
    state_of,
    write_config,
    write_sft_data,
)

from psyche_jax import cli
from psyche_jax.cli import start
from psyche_jax.config import CheckpointSection, LoggingSection, MeshSection, OptimizerSection, SftDataSection
from psyche_jax.errors import UserError
from psyche_jax.model.huggingface import load_tokenizer
from psyche_jax.storage.files import GrowingFile
from psyche_jax.train import hosts, runs, sft
from psyche_jax.train.run_files import read_lines
from psyche_jax.train.runs import PreemptedError, Run, open_run
from psyche_jax.train.sft import tokenized
from psyche_jax.train.state import make_schedule
from psyche_jax.train.step_folders import find_checkpoint, read_checkpoint_metadata
from psyche_jax.train.stored_models import open_model

CONFIG = {"run": {"dir": "somewhere", "seed": 1}, "rewards": [{"rule": "length"}, {"rule": "pattern"}], "rate": 1e-5}
LOGGING = LoggingSection()


def files(folder):
    """Every file of a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    """Commands that run in this process turn on no cache for the rest of the session."""
    monkeypatch.setattr(start, "start_jax", lambda *_: None)


@pytest.fixture(scope="module")
def finished(tiny_root, tmp_path_factory):
    """A whole SFT run with everything on: 5 steps, checkpoints after 3, 5 and the best evaluation."""
    root = shutil.copytree(tiny_root, tmp_path_factory.mktemp("finished") / "work")
    write_sft_data(root / "evaluation.jsonl", 11)
    data = SftDataSection(str(root / "sft.jsonl"), str(root / "evaluation.jsonl"), max_length=96)
    logging = LoggingSection(tensorboard=True)
    config = sft_config(root, data=data, evaluate_every_steps=2, logging=logging, micro_batch_size=8)
    sft.train_sft(config, profile_steps=2)
    return root / "run", config


@pytest.mark.slow
def test_a_finished_run(finished):
    run, config = finished
    start, *lines = read_lines(run / "metrics.jsonl")
    assert start.keys() == {"step", "evaluation_loss"}, "before the first step the model is evaluated"
    assert [start["step"], *(line["step"] for line in lines)] == [0, 1, 2, 3, 4, 5]
    always = {"step", "loss", "grad_norm", "learning_rate", "num_tokens", "step_time", "tokens_per_second"}
    always |= {"tokens_per_second_per_device", "compilations", "memory/host_gib"}
    assert lines[0]["compilations"] > 0
    for line in lines:
        assert always <= line.keys()
        assert all(math.isfinite(value) for value in line.values())
        assert line["tokens_per_second"] == pytest.approx(line["num_tokens"] / line["step_time"])
        assert ("evaluation_loss" in line) == (line["step"] in (2, 4, 5))
    rates = [float(make_schedule(config.optimizer, 5)(step)) for step in range(5)]
    np.testing.assert_allclose([line["learning_rate"] for line in lines], rates, rtol=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"]
    state = state_of(run)
    assert (state["status"], state["step"], state["kind"], state["reason"]) == ("done", 5, "sft", "")
    assert abs(state["time"] - time.time()) < 3600
    assert state["environment"]["versions"]["jax"] == jax.__version__
    losses = {line["step"]: line["evaluation_loss"] for line in lines if "evaluation_loss" in line}
    best = min(losses, key=losses.get)
    assert losses[best] < start["evaluation_loss"]
    assert state["best"] == {"step": best, "evaluation_loss": losses[best]}
    assert find_checkpoint(run / "best").name == str(best)
    kept = {p.name for p in (run / "checkpoints").iterdir()}
    assert {"5", str(best), "tokenizer"} <= kept
    assert len(kept) <= 4, "the latest two and the best"
    assert list(run.rglob("*.partial")) == []


def test_tensorboard_and_profile(finished):
    run, _ = finished
    events = list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert len(events) == 1
    assert events[0].stat().st_size > 500
    assert list((run / "profile").rglob("*.xplane.pb"))


def test_evaluation_loss_is_the_mean_over_all_learned_tokens(finished):
    """11 records in batches of 8: what fills up the last batch does not count."""
    run, config = finished
    model = open_model(str(run))
    here = execution(1)
    parameters = model.read_parameters(here.sharding, np.dtype("float32"))
    tokenizer = load_tokenizer(model.tokenizer_folder)
    examples, _ = tokenized(config.data.evaluation, tokenizer, config.prompt, 96)
    batch = sft.pad_examples(examples, 96)
    weights = batch["loss_mask"].astype(np.float32)
    total = sft.next_token_loss(model.config, here, parameters, {**batch, "weights": weights})[0]
    expected = float(total) / sum(int(example.loss_mask.sum()) for example in examples)
    assert read_lines(run / "metrics.jsonl")[-1]["evaluation_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_finished_run_started_again_does_nothing(finished, capsys):
    run, config = finished
    before = files(run)
    sft.train_sft(config)
    assert "sft: all 5 steps are already done" in capsys.readouterr().err
    after = files(run)
    assert state_of(run)["status"] == "done"
    changed = {name for name in before if after.get(name) != before[name]}
    assert changed <= {"state.json"}
    assert all("tensorboard" in name for name in after.keys() - before.keys())


def test_another_config_is_refused_and_nothing_is_changed(finished):
    run, config = finished
    before = files(run)
    changes = {
        "epochs": {"epochs": 3.0},
        "optimizer.learning_rate": {"optimizer": OptimizerSection(learning_rate=2e-2)},
        "run.seed": {"run": dataclasses.replace(config.run, seed=4)},
    }
    for key, change in changes.items():
        with pytest.raises(UserError) as error:
            sft.train_sft(dataclasses.replace(config, **change))
        assert f"its {key} is" in str(error.value)
        assert "\n" not in str(error.value)
    assert files(run) == before


def test_a_folder_that_is_no_run_is_refused(root):
    folder = root / "run"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not a run"):
        sft.train_sft(sft_config(root))
    assert files(folder) == {"thesis.tex": b"years of work"}
    file = root / "file"
    file.write_text("x")
    with pytest.raises(UserError, match="exists and is not a run"):
        sft.train_sft(sft_config(root, run="file"))


def test_an_empty_folder_will_do(tmp_path):
    with open_run(tmp_path, "sft", CONFIG, LOGGING) as run:
        assert state_of(run.folder)["status"] == "running"


@pytest.mark.parametrize("verb", ["sft", "grpo"])
def test_a_folder_that_cannot_be_made(verb, root, capsys):
    """Below a file, or where nothing may be written: one line, exit code 1."""
    (root / "file").write_text("x")
    make = sft_config if verb == "sft" else grpo_config
    for folder in ("file/run", "/proc/run"):
        path = write_config(make(root, run=folder), root / "config.yaml")
        assert cli.main([verb, "--config", str(path)]) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith(f"psyche {verb}: ") and lines[-1].endswith("; choose another run.dir")
        assert not any("Traceback" in line for line in lines)


def test_states_of_a_run(tmp_path):
    """running; then done, preempted or failed with the reason, at the step that was saved."""
    run = tmp_path / "run"

    def again():
        return open_run(run, "grpo", CONFIG, LOGGING)

    with again() as opened:
        assert state_of(run)["status"] == "running"
        opened.saved = 5
        opened.write_state("done")
    assert (state_of(run)["status"], state_of(run)["step"]) == ("done", 5)
    endings = {
        PreemptedError("stopped by SIGTERM"): "preempted",
        KeyboardInterrupt(): "preempted",
        UserError("the loss\nis not finite"): "failed",
        MemoryError(): "failed",
    }
    for error, status in endings.items():
        with pytest.raises(type(error)), again() as opened:
            assert (state_of(run)["status"], state_of(run)["step"], state_of(run)["reason"]) == ("running", 5, "")
            raise error
        state = state_of(run)
        assert (state["status"], state["step"], state["kind"]) == (status, 5, "grpo")
        assert state["reason"]
        assert "\n" not in state["reason"]
    assert state["environment"]["versions"]["python"]


def test_every_process_has_read_the_state_before_the_first_one_writes(tmp_path, monkeypatch):
    """Else a slow one would find another state than the first did: that of the run that just begins."""
    with open_run(tmp_path / "run", "grpo", CONFIG, LOGGING):
        pass
    order, read, write = [], runs.read_state, runs.write_text
    monkeypatch.setattr(hosts, "wait_for_all", lambda name: order.append("waits"))
    monkeypatch.setattr(runs, "read_state", lambda folder: order.append("reads") or read(folder))
    monkeypatch.setattr(runs, "write_text", lambda *what: order.append("writes") or write(*what))
    with open_run(tmp_path / "run", "grpo", CONFIG, LOGGING):
        assert order[order.index("reads") :] == ["reads", "waits", "writes"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"rate": 2e-5}, "its rate is 1e-05, not 2e-05"),
        ({"run": {"dir": "somewhere", "seed": 2}}, "its run.seed is 1, not 2"),
        ({"rewards": [{"rule": "length"}]}, "its rewards is"),
    ],
)
def test_the_difference_of_configs_is_named(change, key, tmp_path):
    with open_run(tmp_path / "run", "sft", CONFIG, LOGGING):
        pass
    before = files(tmp_path)
    with pytest.raises(UserError) as error, open_run(tmp_path / "run", "sft", {**CONFIG, **change}, LOGGING):
        raise AssertionError("opened")
    assert key in str(error.value)
    assert files(tmp_path) == before


@pytest.mark.parametrize("change", [{"rewards": [{"rule": "length"}]}, {"max_new_tokens": 9}, {"rate": 2e-5}])
def test_the_best_by_other_rewards_is_forgotten(change, tmp_path):
    """Of other weights, other rules, or longer responses: no later value could be compared with it."""
    config = {**CONFIG, "max_new_tokens": 8}
    best = {"step": 3, "evaluation_reward": 9.0}
    with open_run(tmp_path / "run", "grpo", config, LOGGING) as run:
        run.saved = 3
        run.write_state("running", best=best)
    kind = "config" if "rate" in change else "rewards"
    with open_run(tmp_path / "run", "grpo", {**config, **change}, LOGGING, accepted={kind}) as run:
        assert (run.best, run.evaluated_otherwise) == ((best, -1) if kind == "config" else (None, 3))


@pytest.mark.slow
def test_a_loss_that_stays_not_finite_ends_the_run(root, capsys):
    """With a rate that throws the parameters away: steps are skipped and counted, three in a row end the run with its
    state kept, what to do is said, exit code 1."""
    optimizer = OptimizerSection(learning_rate=1e36, warmup=0, schedule="constant")
    path = write_config(sft_config(root, optimizer=optimizer, epochs=4.0), root / "config.yaml")
    assert cli.main(["sft", "--config", str(path)]) == 1
    said = capsys.readouterr().err
    last = said.strip().splitlines()[-1]
    assert last.startswith("psyche sft: sft: the loss or gradient of steps 2 to 4 is not finite; lower optimizer")
    assert said.count("the update was skipped") == 3
    state = state_of(root / "run")
    assert (state["status"], state["step"]) == ("failed", 4)
    assert "steps 2 to 4 is not finite" in state["reason"]
    lines = metrics_of(root / "run")
    assert [(line["step"], line["skipped_updates"]) for line in lines] == [(1, 0), (2, 1), (3, 1), (4, 1)]
    assert read_checkpoint_metadata(find_checkpoint(root / "run"))["step"] == 4


@pytest.mark.slow
def test_records_that_do_not_fit_are_set_aside_by_name(root, capsys):
    with (root / "sft.jsonl").open("a", encoding="utf-8") as file:
        file.write("no json\n")
        long = [{"role": "user", "content": "长" * 90}, {"role": "assistant", "content": "是"}]
        file.write(json.dumps({"messages": long}) + "\n")
    config = sft_config(root, epochs=0.2, checkpoints=CheckpointSection(every_steps=100))
    sft.train_sft(config)
    lines = (root / "run" / "set_aside.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    assert f"{root / 'sft.jsonl'}:21: not JSON" in lines[0]
    assert "over data.max_length 96" in lines[1]
    assert "2 records skipped" in capsys.readouterr().err
    assert state_of(root / "run")["status"] == "done"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 12}, "12 rows cannot be spread over data × fsdp = 8"),
        ({"mesh": MeshSection(data=3)}, "does not divide the 8 devices"),
        ({"data": SftDataSection("absent.jsonl", max_length=64)}, "absent.jsonl: the data cannot be read"),
        ({"data": None}, "no example has at most data.max_length 5 tokens"),
    ],
)
def test_what_cannot_work_is_said_before_a_folder_is_made(change, message, root):
    if change.get("data", 0) is None:
        change = {"data": SftDataSection(str(root / "sft.jsonl"), max_length=5)}
    with pytest.raises(UserError, match=message):
        sft.train_sft(sft_config(root, **change))
    assert not (root / "run").exists()


def lines_of(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def test_going_on_drops_later_steps_and_a_line_cut_short(tmp_path):
    """Whatever a crash left at the end of a file, each step is there once in the end."""
    whole = '{"step": 3, "loss": 0.5, "text": "记忆"}\n'.encode()
    for cut in range(len(whole) + 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        run = Run(folder, "sft", LOGGING)
        for step in (1, 2):
            run.log_metrics(step, {"loss": 1.0})
        with (folder / "metrics.jsonl").open("ab") as file:
            file.write(whole[:cut])
        assert [line["step"] for line in read_lines(folder / "metrics.jsonl")][:2] == [1, 2]
        run.continue_from(2)
        for step in (3, 4):
            run.log_metrics(step, {"loss": 1.0})
        assert [line["step"] for line in lines_of(folder / "metrics.jsonl")] == [1, 2, 3, 4]


def test_every_line_is_json_also_for_readers_outside_python(tmp_path):
    """Which know no NaN and no infinity, as a skipped step has them."""
    run = Run(tmp_path, "sft", LOGGING)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n')  # of an older version
    run.continue_from(1)
    run.log_metrics(2, {"loss": math.nan, "grad_norm": math.inf, "rate": 0.1})
    run.log_sample(2, {"rewards": {"a": -math.inf}, "token_ids": [1, 2]})
    texts = [(tmp_path / name).read_text() for name in ("metrics.jsonl", "samples.jsonl")]
    assert texts == [
        '{"step": 1, "loss": null}\n{"step": 2, "loss": null, "grad_norm": null, "rate": 0.1}\n',
        '{"step": 2, "rewards": {"a": null}, "token_ids": [1, 2]}\n',
    ]


def test_what_is_measured_late_goes_to_its_own_step(tmp_path):
    run = Run(tmp_path, "sft", LOGGING)
    run.add_metrics(0, {"evaluation_loss": 4.0})
    run.log_metrics(1, {"loss": 3.0})
    run.add_metrics(1, {"evaluation_loss": 3.0})
    run.add_metrics(2, {"evaluation_loss": 2.0})  # the line of step 2 was lost
    assert lines_of(tmp_path / "metrics.jsonl") == [
        {"step": 0, "evaluation_loss": 4.0},
        {"step": 1, "loss": 3.0, "evaluation_loss": 3.0},
        {"step": 2, "evaluation_loss": 2.0},
    ]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\r", "\x00", "\ud800", "记"])
def test_any_completion_can_be_logged_and_read(character, tmp_path):
    """Line ends of Unicode are no ends of JSON lines; a random model does say such things."""
    run = Run(tmp_path, "grpo", LOGGING)
    try:
        for step in (1, 2):
            run.log_sample(step, {"completion": f"a{character}b"})
    except UnicodeEncodeError:
        assert character == "\ud800", "half a character cannot come out of a tokenizer"
        return
    run.continue_from(2)
    assert [line["completion"] for line in read_lines(tmp_path / "samples.jsonl")] == [f"a{character}b"] * 2


@pytest.mark.parametrize("line", ['{"st', f'{{"step": 2, "evaluation_loss": 1{"0" * 400}}}'])
def test_a_file_broken_in_the_middle_is_not_read_over(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: is not JSON"):
        read_lines(tmp_path / "metrics.jsonl")


def test_metadata_of_checkpoints(finished):
    run, config = finished
    for step, folder in ((5, run), (5, run / "checkpoints"), (5, run / "checkpoints" / "5")):
        metadata = read_checkpoint_metadata(find_checkpoint(folder))
        assert (metadata["step"], metadata["seed"], metadata["format"]) == (step, 3, 2)
        assert metadata["started_from"] == config.model.path
        assert open_model(str(folder)).prompt == config.prompt


@pytest.mark.parametrize("change", [{"added_by_a_newer_version": 1}, {"mesh": {"fsdp": 2}}, {"logging": {"x": 1}}])
def test_a_run_goes_on_under_another_mesh_or_a_newer_version(change, tmp_path):
    with open_run(tmp_path / "run", "sft", CONFIG, LOGGING):
        pass
    with open_run(tmp_path / "run", "sft", {**CONFIG, **change}, LOGGING) as run:
        assert run.folder == tmp_path / "run"


def test_what_is_logged_before_a_checkpoint_is_on_its_disk(tmp_path, monkeypatch):
    """A machine that ends a second later has lost none of it."""
    on_disk = set()
    monkeypatch.setattr(os, "fsync", lambda number: on_disk.add(os.fstat(number).st_ino))
    file = GrowingFile(tmp_path / "metrics.jsonl")
    file.append("{}\n")
    file.flush(every=60)
    assert not on_disk
    file.flush()
    assert on_disk == {file.path.stat().st_ino}
