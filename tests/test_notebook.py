"""The notebook of scripts/notebooks/: each cell runs with a tiny model; on TPUs its commands and settings are there."""

import ast
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from psyche_jax import cli
from psyche_jax.config import GrpoConfig, SftConfig
from psyche_jax.config_files import load_config
from psyche_jax.data.dataset import load_records
from psyche_jax.data.records import Question, RlPrompt, SftExample
from psyche_jax.model.config import ARCHITECTURES
from psyche_jax.plan.slices import parse_topology
from psyche_jax.serve.config import serve_config
from psyche_jax.train.run_files import read_state

PATH = Path(__file__).parents[1] / "scripts" / "notebooks" / "exam_to_model.ipynb"
NOTEBOOK = nbformat.read(PATH, as_version=4)
CELLS = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]
TERMS = ("条件反射", "短时记忆", "依恋", "共情", "移情", "自我效能", "从众", "系统脱敏", "信度", "韦氏量表")
WITHOUT_EXPLANATIONS = "题目,选项A,选项B,选项C,选项D,答案,题型\n" + "".join(
    f"谁提出了{term}？,{term}甲,{term}乙,{term}丙,{term}丁,A,单选题\n" for term in TERMS
)


class Rehearsal:
    """The notebook run in this process, with training and whatever is slow only noted in `commands`.

    `settings` take the place of what the notebook assigns to these names.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, chips: str, **settings: Any) -> None:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PSYCHE_CHIPS", chips)
        monkeypatch.setenv("HF_TOKEN", "none")
        monkeypatch.setattr("shutil.make_archive", lambda *_: None)
        self.commands: list[list[str]] = []
        self.names: dict[str, Any] = {}
        for statement in (statement for cell in CELLS for statement in ast.parse(cell).body):
            exec(compile(ast.Module([statement], []), str(PATH), "exec"), self.names)
            if isinstance(statement, ast.FunctionDef) and statement.name in ("run", "curves"):
                self.names[f"real_{statement.name}"] = self.names[statement.name]
                self.names[statement.name] = self._note if statement.name == "run" else lambda *_: None
            if isinstance(statement, ast.Assign) and (name := ast.unparse(statement.targets[0])) in settings:
                self.names[name] = settings.pop(name)  # the first time

    def _note(self, command: list[str], lines: str = "") -> None:
        python, *module = command[:3]
        assert python == sys.executable
        if module == ["-m", "psyche_jax.cli"]:
            self.commands.append(command[3:])
            if command[3:5] == ["data", "import"]:
                assert cli.main(command[3:]) == 0


def test_it_is_a_notebook_without_outputs():
    nbformat.validate(NOTEBOOK)
    for cell in NOTEBOOK.cells:
        assert cell.cell_type == "markdown" or (cell.outputs, cell.execution_count) == ([], None), cell.id


@pytest.mark.parametrize("chips", ["cpu 1 cpu", "tpu 1 TPU v5 lite", "tpu 8 TPU v5 lite"])
def test_verbs_options_and_settings_are_there(chips, tmp_path, monkeypatch):
    rehearsal = Rehearsal(tmp_path, monkeypatch, chips, PUSH="me/my-model", PLAN=True)
    architecture = None
    for command in rehearsal.commands[1:]:  # the first one is --version
        parsed = cli.parser().parse_args(command)
        if parsed.verb == "plan":
            assert parse_topology(parsed.topology).chip.name == "v5e"
        elif parsed.verb in ("sft", "grpo"):
            config = load_config(SftConfig if parsed.verb == "sft" else GrpoConfig, parsed.config, parsed.overrides)
            assert config.adapter.rank == 16
            architecture = config.model.architecture
            assert (architecture is None) == (chips == "cpu 1 cpu")
            assert architecture is None or f"hub:Qwen/{architecture}-Instruct" == rehearsal.names["MODEL"]
        elif parsed.verb == "chat":
            serve_config(None, parsed.overrides, {"model": parsed.model})
    assert architecture is None or architecture in ARCHITECTURES
    verbs = [command[0] for command in rehearsal.commands]
    plans = "" if chips == "cpu 1 cpu" else "plan plan"
    expected = f"--version data data import {plans} sft grpo eval eval report chat export export export"
    assert verbs == expected.split()


def test_another_model_is_taken_as_it_is(tmp_path, monkeypatch):
    rehearsal = Rehearsal(tmp_path, monkeypatch, "tpu 1 TPU v5 lite", MODEL="hub:me/mine")
    for command in rehearsal.commands:
        if command[0] in ("sft", "grpo"):
            parsed = cli.parser().parse_args(command)
            config = load_config(SftConfig if parsed.verb == "sft" else GrpoConfig, parsed.config, parsed.overrides)
            assert config.model.architecture is None


@pytest.mark.parametrize(("exam", "questions"), [("zh", 12), ("en", 5)])
def test_both_samples_become_records(exam, questions, tmp_path, monkeypatch, capfd):
    rehearsal = Rehearsal(tmp_path, monkeypatch, "cpu 1", EXAM=f"psyche/sample_{exam}.csv")
    kinds = {"sft": SftExample, "rl": RlPrompt, "held_out": Question}
    records = {name: load_records(kind, str(tmp_path / "psyche" / "data" / name)) for name, kind in kinds.items()}
    assert len(records["sft"].good) == len(records["rl"].good) == questions - len(records["held_out"].good)
    assert all(read.good and not read.set_aside for read in records.values())
    assert "skipped:" not in capfd.readouterr().err
    assert rehearsal.names["explained"]


def test_an_exam_without_explanations_begins_with_grpo(tmp_path, monkeypatch):
    (tmp_path / "mine.csv").write_text("\ufeff" + WITHOUT_EXPLANATIONS, encoding="utf-8")  # as Excel saves it
    rehearsal = Rehearsal(tmp_path, monkeypatch, "cpu 1", EXAM="mine.csv")
    assert "sft" not in [command[0] for command in rehearsal.commands]
    (grpo,) = [command for command in rehearsal.commands if command[0] == "grpo"]
    assert f"model.path={tmp_path}/psyche/base" in grpo
    assert len(load_records(RlPrompt, str(tmp_path / "psyche/data/rl")).good) == 8
    assert not [command for command in rehearsal.commands if any("runs/sft" in argument for argument in command)]


def test_a_command_that_fails_ends_its_cell(tmp_path, monkeypatch, capfd):
    run = Rehearsal(tmp_path, monkeypatch, "cpu 1").names["real_run"]
    run([sys.executable, "-c", "print(input() + input())"], lines="so\nmuch\n")
    assert "\nsomuch\n" in capfd.readouterr().out
    with pytest.raises(RuntimeError, match="failed with exit code 3; see above"):
        run([sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"])
    assert "\nwhy\n" in capfd.readouterr().out


def test_a_command_that_is_stopped_ends_before_its_cell_does(tmp_path, monkeypatch, capfd):
    """The stop button: what a training prints while it saves is still shown."""
    run = Rehearsal(tmp_path, monkeypatch, "cpu 1").names["real_run"]
    saves = "import signal, time; signal.signal(15, lambda *_: (print('saved', flush=True), exit())); time.sleep(60)"
    # As in a kernel; a shell lets what it starts in the background ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run([sys.executable, "-c", saves])
    finally:
        signal.signal(signal.SIGINT, before)
    assert "\nsaved\n" in capfd.readouterr().out


@pytest.mark.slow
def test_each_cell_runs(tmp_path, monkeypatch):
    for name in ("XLA_FLAGS", "NPROC"):  # one device, as there is on a computer
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.from_dict(NOTEBOOK)
    client = NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises CellExecutionError
    work = tmp_path / "psyche"
    for run in ("sft", "grpo"):
        assert read_state(work / "runs" / run)["status"] == "done"
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 2, "the curves of SFT and of GRPO"
    for name in ("report.html", "adapters.zip", "export/sft_adapters", "export/grpo_adapters", "export/model"):
        assert (work / name).exists(), name
    assert sorted(tmp_path.iterdir()) == [work], "all is in one folder"
