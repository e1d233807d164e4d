"""The command: help with working examples, exit codes, and what a good run of each verb prints and leaves."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.tiny import save_model

import psyche_jax
from psyche_jax import cli
from psyche_jax.cli import start, training
from psyche_jax.config import GrpoConfig, SftConfig
from psyche_jax.config_files import load_config
from psyche_jax.data.records import Message, RlPrompt, SftExample, write_records
from psyche_jax.errors import UsageError, UserError
from psyche_jax.evaluate.benchmarks import read_benchmark
from psyche_jax.synth.config import SynthConfig

ROOT = Path(psyche_jax.__file__).parents[1]
VERBS = (
    "synth",
    "select",
    "review",
    "import",
    "sft",
    "grpo",
    "export",
    "eval",
    "pack",
    "data",
    "decontaminate",
    "report",
    "watch",
    "safety",
    "serve",
    "plan",
    "bench",
    "demo",
    "chat",
)


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """Relative paths, and no change to the settings of JAX."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start, "start_jax", lambda *_: None)


def ended(capsys, *arguments):
    """Exit code, stdout and stderr of a command that argparse ends."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return (caught.value.code, *capsys.readouterr())


def verbs():
    (action,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


def test_all_verbs_are_tested():
    assert set(verbs()) == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example_that_works(verb, capsys):
    code, out, err = ended(capsys, verb, "--help")
    assert (code, err) == (0, "")
    _, _, example = out.partition("Example:\n")
    program, *arguments = shlex.split(example)
    assert program == "psyche"
    parsed = cli.parser().parse_args(arguments)
    assert parsed.verb == verb
    if verb in ("sft", "grpo", "pack"):
        assert (ROOT / parsed.config).is_file(), f"the example names {parsed.config}, which does not exist"


@pytest.mark.parametrize("page", ["README.md", "README.zh.md", "scripts/psyche_r1.sh"])
def test_commands_that_are_written_down_are_accepted(page):
    """All of a page's; with the settings that they change, the configs they name load and read what is imported."""
    lines = (ROOT / page).read_text().splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("psyche ")]
    assert len(commands) >= 7
    for _, *arguments in commands:
        parsed = cli.parser().parse_args(arguments)
        kind = {"sft": SftConfig, "grpo": GrpoConfig, "synth": SynthConfig}.get(parsed.verb)
        if parsed.verb == "import":
            imported = parsed.checkpoint
        if kind is not None:
            config = load_config(kind, ROOT / parsed.config, parsed.overrides)
            assert kind is not SftConfig or config.model.path == str(imported)


def test_help_of_the_whole(capsys):
    code, out, _ = ended(capsys, "--help")
    assert code == 0
    for verb in VERBS:
        assert f"\n    {verb}" in out
    assert "psyche demo --out runs/demo" in out


def test_every_option_says_what_it_is():
    for name, verb in verbs().items():
        for action in verb._actions:
            assert action.help or action.choices, f"{name} {action.dest}"


def test_version(capsys):
    assert ended(capsys, "--version") == (0, f"psyche {psyche_jax.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "trian",
        "sft",
        "sft --config",
        "sft --config c.yaml --frobnicate",
        "sft --config c.yaml --profile some",
        "import a",
        "import a b c",
        "import a b --dtype float16",
        "export a b --dtype int8",
        "eval m",
        "eval --bench samples",
        "eval m --bench samples --limit some",
        "eval m --bench samples --compute-dtype float8",
        "report",
        "demo",
        "demo --out d --seed x",
    ],
)
def test_wrong_use_exits_2(arguments, capsys):
    code, out, err = ended(capsys, *arguments.split())
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("psyche")
    assert "error: " in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize("verb", ["sft", "bench sft", "pack", "synth"])
def test_an_empty_name_of_a_config(verb, capsys):
    code, _, err = ended(capsys, *verb.split(), "--config", "")
    assert code == 2 and "argument --config: is empty; name a YAML file" in err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a: b"), 1, "psyche demo: a: b"),
        (UsageError("a: b"), 2, "psyche demo: a: b"),
        (UserError("a:\n  b\nc"), 1, "psyche demo: a: b c"),
        (KeyboardInterrupt(), 1, "psyche demo: interrupted"),
        (OSError(28, "No space left on device", "x/y"), 1, "psyche demo: x/y: No space left on device"),
        (OSError(28, "No space left on device"), 1, "psyche demo: No space left on device"),
        (OSError("odd"), 1, "psyche demo: odd"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile allocating"),
            1,
            "psyche demo: out of memory; use smaller batches or more devices (RESOURCE_EXHAUSTED: Out of memory)",
        ),
    ],
)
def test_failures_are_one_line(error, code, line, monkeypatch, capsys):
    def fail(arguments):
        raise error

    monkeypatch.setattr(training, "_demo", fail)
    assert cli.main(["demo", "--out", "d"]) == code
    assert capsys.readouterr() == ("", line + "\n")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug"), AssertionError()])
def test_bugs_are_not_hidden(error, monkeypatch):
    def fail(arguments):
        raise error

    monkeypatch.setattr(training, "_demo", fail)
    with pytest.raises(type(error)):
        cli.main(["demo", "--out", "d"])


@pytest.fixture
def model(tmp_path):
    """A folder whose answers are short."""
    return save_model(tmp_path / "model")


def test_eval(model, capsys):
    arguments = ["eval", "model", "--bench", "samples", "--limit", "5", "--max-new-tokens", "2", "--out", "new/e.json"]
    assert cli.main([*arguments, "--json", "--label", "mine"]) == 0
    out, err = capsys.readouterr()
    told = err.splitlines()
    assert told[0].startswith("eval: model, ") and told[0].endswith(
        "5 questions of samples-first-5, answers of at most 2 tokens"
    )
    assert told[1:] == ["eval: model: scores and answers are in new/e.json"]
    (line,) = out.splitlines()
    summary = json.loads(line)
    assert (summary["count"], summary["set_aside"]) == (5, 0)
    written = json.loads(Path("new/e.json").read_text())
    assert written["label"] == "mine"
    assert {**written["scores"], "set_aside": 0, "no_answer": {}} == summary
    assert [item["id"] for item in written["items"]] == [task.id for task in read_benchmark("samples").tasks[:5]]
    assert not (model / "evaluations").exists(), "a model folder is no run"

    assert cli.main([*arguments]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["questions", "strict", "95", "%", "chance", "elastic", "chance", "unanswered"]
    assert table[1].split() == [
        "all",
        "5",
        f"{summary['strict']:.3f}",
        "–".join(f"{bound:.3f}" for bound in summary["interval"]),
        *(f"{summary[name]:.3f}" for name in ("chance", "elastic", "chance_elastic")),
        str(summary["unanswered"]),
    ]
    assert {line.split()[0] for line in table[2:4]} == set(summary["by_kind"])
    assert json.loads(Path("new/e.json").read_text())["label"] == "model"


@pytest.mark.slow
def test_from_a_model_folder_to_a_report(model, capsys):
    """import, sft, grpo from it, eval and export of the runs, report: what each leaves."""
    assert cli.main(["import", "model", "checkpoint"]) == 0
    assert capsys.readouterr().out.startswith("checkpoint: 25,")
    turns = [(Message("user", f"问{n}"), Message("assistant", "<think>想</think>\n答案：A")) for n in range(8)]
    write_records(Path("sft.jsonl"), [SftExample(turn) for turn in turns])
    write_records(Path("rl.jsonl"), [RlPrompt(turn[:1], "A", "single") for turn in turns])
    common = {
        "epochs": 2,
        "prompt": {"system": "你", "instruction": "想\n", "thinking": None},
        "mesh": {"data": 1, "fsdp": 8},
    }
    sft = {
        **common,
        "run": {"dir": "sft"},
        "model": {"path": "checkpoint"},
        "data": {"train": "sft.jsonl", "max_length": 512},
        "batch_size": 8,
    }
    grpo = {
        **common,
        "run": {"dir": "grpo"},
        "model": {"path": "sft"},
        "data": {"train": "rl.jsonl", "max_prompt_length": 512},
        "prompts_per_step": 8,
        "generations_per_prompt": 2,
        "max_new_tokens": 4,
    }
    Path("sft.yaml").write_text(yaml.safe_dump(sft))
    Path("grpo.yaml").write_text(yaml.safe_dump(grpo))
    for verb in ("sft", "grpo"):
        assert cli.main([verb, "--config", f"{verb}.yaml", "--set", "optimizer.learning_rate=1e-4"]) == 0
        out, err = capsys.readouterr()
        assert out == ""
        said = err.splitlines()
        assert all(line.startswith(f"{verb}: ") for line in said)
        about = [line.split()[1] for line in said[:6]]
        assert about == ["model:", "devices:", "data:", "steps:", "folder:", "compiling"]
        assert "devices: 8 × cpu, processes: 1, mesh: data 1, fsdp 8, tensor 1" in said[1]
        assert f"data: 8 {'examples' if verb == 'sft' else 'prompts'}, " in said[2]
        assert said[-1].endswith(f"; {verb}; next: psyche eval {verb} --bench samples")
        config = yaml.safe_load(Path(verb, "config.yaml").read_text())
        assert config["optimizer"]["learning_rate"] == 1e-4
        assert config["logging"]["samples_every_steps"] == 10, "the config is kept with all its defaults"
        assert json.loads(Path(verb, "state.json").read_text())["status"] == "done"
        assert len(Path(verb, "metrics.jsonl").read_text().splitlines()) == 2
    # The same command again has nothing to do.
    assert cli.main(["sft", "--config", "sft.yaml", "--set", "optimizer.learning_rate=1e-4"]) == 0
    # Another config is not let into the same folder.
    capsys.readouterr()
    assert cli.main(["sft", "--config", "sft.yaml"]) == 1
    line = capsys.readouterr().err
    assert "sft: holds another run (its optimizer.learning_rate is 0.0001, not 1e-05)" in line

    assert cli.main(["eval", "grpo", "--bench", "samples", "--limit", "2"]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "eval: next: psyche report grpo"
    (stored,) = Path("grpo/evaluations").iterdir()
    assert stored.name == "samples-first-2-grpo.json"
    evaluation = json.loads(stored.read_text())
    assert evaluation["step"] == 2
    assert evaluation["sampling"]["max_new_tokens"] == 4, "as GRPO trained it with"
    assert cli.main(["export", "grpo", "exported"]) == 0
    assert json.loads(Path("exported/psyche_prompt.json").read_text()) == common["prompt"]
    capsys.readouterr()
    assert cli.main(["report", "sft", "grpo", "--out", "new/report.html"]) == 0
    assert capsys.readouterr() == ("new/report.html\n", "")
    assert "<html" in Path("new/report.html").read_text()
    assert not [path for path in Path().rglob("*") if "partial" in path.name]


def test_the_installed_command(tmp_path):
    """In a process of its own, as a user runs it: a mistake is one line and an exit code, and nothing else."""
    command = Path(sys.executable).with_name("psyche")
    start = [str(command)] if command.exists() else [sys.executable, "-m", "psyche_jax.cli"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}

    def run(*arguments):
        result = subprocess.run([*start, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment)
        return result.returncode, result.stdout, result.stderr

    code, out, err = run("eval", "nomodel", "--bench", "samples")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert err.startswith(
        "psyche eval: nomodel: no such model: neither a Hugging Face folder nor a checkpoint nor a run"
    )
    code, out, err = run("sft", "--config", "none.yaml")
    assert (code, out, len(err.splitlines())) == (2, "", 1)


def test_wrong_paths_are_said_before_jax_is_loaded(tmp_path):
    """So of each verb in a second or two: JAX and what is built on it take several."""
    commands = [
        "import nowhere new",
        "import . full",
        "sft --config sft_tiny --set model.path=nowhere",
        "sft --config sft_tiny --set model.path=hub:Qwen/Qwen2.5-0.5B",
        "sft --config sft_tiny --set model.path=hf",
        "sft --config sft_tiny --set model.path=hf --set data.train=full/x --set run.dir=full",
        "grpo --config grpo_tiny --set model.path=hf --set data.train=nowhere",
        "eval nowhere --bench samples",
        "eval hf --bench nowhere.jsonl",
        "eval hf --bench samples --train nowhere",
        "export nowhere new",
        "export hf full",
        "chat nowhere",
        "serve nowhere",
        "report nowhere",
        "safety nowhere",
        "data ls nowhere",
        "data import nowhere new --format pceb",
        "pack --config pack",
        "decontaminate --train nowhere --eval nowhere --out new",
        "synth --config nowhere",
        "select --config nowhere",
        "review nowhere",
        "plan --config nowhere --topology v5e:4x4",
        "bench sft --config nowhere",
        "demo --out full",
    ]
    for folder in ("full", "hf"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "x").write_text("{}\n")
    (tmp_path / "hf" / "config.json").write_text("{}")
    code = (
        "import json, sys; from psyche_jax import cli\n"
        "print(json.dumps([[cli.main(one.split()), 'jax' in sys.modules] for one in json.loads(sys.argv[1])]))"
    )
    command = [sys.executable, "-c", code, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    found = dict(zip(commands, json.loads(done.stdout), strict=True))
    assert {one: jax for one, (_, jax) in found.items() if jax} == {}
    assert {code for code, _ in found.values()} <= {1, 2}
    said = done.stderr.splitlines()
    assert len(said) == len(commands), done.stderr
    assert "first fetch it: psyche import hub:Qwen/Qwen2.5-0.5B checkpoints/Qwen2.5-0.5B" in said[3]
