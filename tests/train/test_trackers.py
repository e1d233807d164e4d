"""W&B and TensorBoard: what they are told, by which id, and that nothing of theirs ends a run."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest

from psyche_jax.config import LoggingSection
from psyche_jax.errors import UserError
from psyche_jax.train.run_files import read_lines
from psyche_jax.train.runs import open_run

LOGGING = LoggingSection(wandb_project="psyche")


class CommError(Exception):
    """As W&B's."""


class Server:
    """A module that stands for wandb: what it is told, and where it fails."""

    def __init__(self, fails_in=""):
        self.fails_in = fails_in
        self.started = []
        self.told = []
        self.finished = 0

    def init(self, **arguments):
        self._do("init")
        self.started.append(arguments)
        return SimpleNamespace(log=self._log, finish=self._finish)

    def _log(self, metrics, step):
        self._do("log")
        self.told.append((step, metrics))

    def _finish(self):
        self._do("finish")
        self.finished += 1

    def _do(self, what):
        if what == self.fails_in:
            raise CommError("the server is away\nand more")


@pytest.fixture
def server(monkeypatch):
    made = Server()
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def log(folder, step, logging=LOGGING, **metrics):
    with open_run(folder, "sft", {"a": 1}, logging) as run:
        run.log_metrics(step, metrics)
        run.saved = step
        run.write_state("running")


def test_an_id_is_that_of_one_run(server, tmp_path):
    """Two runs whose folders have one name have two; a run that goes on keeps its own, also when its folder moved."""
    for folder in ("a/sft", "b/sft", "a/sft"):
        (tmp_path / folder).parent.mkdir(exist_ok=True)
        log(tmp_path / folder, 1, loss=1.0)
    (tmp_path / "a").rename(tmp_path / "c")
    log(tmp_path / "c/sft", 2, loss=1.0)
    first, second, *again = (arguments["id"] for arguments in server.started)
    assert first != second
    assert again == [first, first]
    assert {arguments["resume"] for arguments in server.started} == {"allow"}
    assert {arguments["name"] for arguments in server.started} == {"sft"}
    assert json.loads((tmp_path / "b/sft/state.json").read_text())["run_id"] == second


def test_a_copy_of_a_run_is_another_run(server, tmp_path):
    """What is logged of it is not mixed with the original's; a link to the original is no copy."""
    log(tmp_path / "run", 1, loss=1.0)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for folder in ("copy", "run", "link", "copy"):
        log(tmp_path / folder, 2, loss=1.0)
    original, *ids = (arguments["id"] for arguments in server.started)
    assert ids == [ids[0], original, original, ids[0]] and ids[0] != original


def test_what_is_absent_is_not_sent(server, tmp_path):
    log(tmp_path / "run", 3, loss=1.0, reward=None)
    assert server.told == [(3, {"loss": 1.0})]
    assert server.finished == 1
    assert read_lines(tmp_path / "run" / "metrics.jsonl") == [{"step": 3, "loss": 1.0, "reward": None}]


@pytest.mark.parametrize("fails_in", ["init", "log", "finish"])
def test_a_fault_is_one_line_and_the_run_goes_on(fails_in, server, tmp_path, capsys):
    server.fails_in = fails_in
    with open_run(tmp_path / "run", "sft", {"a": 1}, LOGGING) as run:
        for step in (1, 2, 3):
            run.log_metrics(step, {"loss": 1.0})
        run.write_state("done")
    said = [line for line in capsys.readouterr().err.splitlines() if "W&B" in line]
    assert said == ["W&B: the server is away; the run continues without it (metrics.jsonl has everything)"]
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    assert json.loads((tmp_path / "run" / "state.json").read_text())["status"] == "done"


def test_tensorboard_that_cannot_write(tmp_path, capsys):
    with open_run(tmp_path / "run", "sft", {"a": 1}, LoggingSection()):
        (tmp_path / "run" / "tensorboard").write_text("a file")
    log(tmp_path / "run", 1, LoggingSection(tensorboard=True), loss=1.0)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("TensorBoard: ") and "the run continues without it" in line


def test_wandb_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="needs the package wandb"):
        log(tmp_path / "run", 1)
