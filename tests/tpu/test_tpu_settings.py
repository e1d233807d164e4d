"""What every script in tpu/ does with its arguments and settings."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from support.cloud import NAMES, RUN, SETTINGS, TPU, Cloud, one_line_error

SCRIPTS = sorted(TPU.glob("*.sh"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_bash_reads_it(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    done = subprocess.run(["shellcheck", "-x", *map(str, SCRIPTS)], cwd=TPU, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_help_has_an_example(name: str, cloud: Cloud) -> None:
    done = cloud.run(name, "--help")
    assert done.returncode == 0 and f"Example:  tpu/{name}.sh" in done.stdout and "Exit codes:" in done.stdout
    assert "shellcheck" not in done.stdout and cloud.calls() == []


@pytest.mark.parametrize("name", NAMES)
def test_dry_run_prints_and_runs_nothing(name: str, cloud: Cloud) -> None:
    before = {path: path.stat().st_mtime_ns for path in cloud.folder.rglob("*")}
    done = cloud.run(name, "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("+ gcloud ") for line in lines)
    assert all(line.startswith(("+ ", "# ")) for line in lines)
    assert cloud.calls() == []
    assert {path: path.stat().st_mtime_ns for path in cloud.folder.rglob("*")} == before


def test_dry_run_needs_no_gcloud_and_quotes_for_a_shell(cloud: Cloud) -> None:
    (cloud.bin / "gcloud").unlink()
    cloud.path = hidden_gcloud(cloud)
    done = cloud.run("run", "--dry-run")
    line = next(line for line in done.stdout.splitlines() if "worker.sh start" in line)
    told = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {line.removeprefix('+ ')}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    command = next(word for word in told if word.startswith("--command="))
    assert command.endswith(
        f"-- grpo --config configs/tiny.yaml --set run.dir={RUN} --set distributed.initialize=always"
    )


@pytest.mark.parametrize("name", NAMES)
def test_wrong_argument(name: str, cloud: Cloud) -> None:
    one_line_error(cloud.run(name, "--nonsense"), 2, "--nonsense")


def test_no_settings(cloud: Cloud) -> None:
    done = cloud.run("status", "--settings", "nowhere.env")
    one_line_error(done, 2, "nowhere.env", "settings.env.example")


def test_the_example_settings_are_complete(cloud: Cloud) -> None:
    example = (TPU / "settings.env.example").read_text()
    for key in SETTINGS:
        assert f"\n{key}=" in example
    text = example.replace("SOURCE=\n", f"SOURCE={cloud.folder}/source\n").replace(
        "configs/grpo_7b_v5e16.yaml", "configs/tiny.yaml"
    )
    (cloud.folder / "settings.env").write_text(text)
    assert cloud.run("run", "--dry-run").returncode == 0


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"PROJECT": ""}, "PROJECT is missing"),
        ({"NAME": "Bad_Name"}, "NAME is malformed"),
        ({"ACCELERATOR": "v7-8"}, "ACCELERATOR is malformed"),
        ({"ACCELERATOR": "v5litepod"}, "ACCELERATOR is malformed"),
        ({"CAPACITY": "cheap"}, "CAPACITY is malformed"),
        ({"BUCKET": "my-bucket"}, "BUCKET is malformed"),
        ({"RUN_DIR": "runs/x"}, "RUN_DIR is malformed"),
        ({"VERB": "train"}, "VERB is malformed"),
        ({"CONFIG": "configs/none.yaml"}, "no file"),
        ({"CONFIG": "x.yaml; rm -rf /"}, "CONFIG is malformed"),
        ({"ZONE": "europe"}, "ZONE is malformed"),
        ({"OVERRIDES": "train.steps"}, "OVERRIDES is malformed"),
        ({"SOURCE": "", "REPO": "https://me:secret@example.com/x"}, "REPO is malformed"),
        ({"REPO": "https://example.com/x"}, "not both"),
        ({"ENV_FILE": "/nowhere"}, "ENV_FILE"),
        ({"PROYECT": "x"}, "unknown setting PROYECT"),
        ({"MAX_FAILURES": "many"}, "MAX_FAILURES is malformed"),
        ({"MAX_FAILURES": "99999999999999999999"}, "MAX_FAILURES is malformed"),
        ({"ACCELERATOR": "v5litepod-99999999999999999999"}, "ACCELERATOR is malformed"),
        ({"CONFIG": "../source/configs/tiny.yaml"}, "outside the source"),
        ({"OVERRIDES": "run.dir=gs://other/run"}, "RUN_DIR"),
        ({"ENV_FILE": "/tmp"}, "ENV_FILE"),
        ({"ZONE": "us-east5-a\nZONE="}, "line 10: ZONE stands twice"),
    ],
)
def test_bad_settings(changes: dict[str, str], word: str, cloud: Cloud) -> None:
    cloud.settings(**changes)
    done = cloud.run("create")
    one_line_error(done, 2, word)
    assert "secret" not in done.stderr and cloud.calls() == []


def test_settings_are_no_folder(cloud: Cloud) -> None:
    one_line_error(cloud.run("status", "--settings", str(cloud.folder)), 2, "no settings")


def test_a_config_that_git_ignores_would_not_be_copied(cloud: Cloud) -> None:
    subprocess.run(["git", "init", "-q", str(cloud.folder / "source")], check=True)
    assert cloud.run("create", "--dry-run").returncode == 0
    (cloud.folder / "source/.gitignore").write_text("tiny.yaml\n")
    one_line_error(cloud.run("create", "--dry-run"), 2, "configs/tiny.yaml", "ignored by git")


def test_a_note_behind_quotes(cloud: Cloud) -> None:
    cloud.settings(LIBTPU_FLAGS='"--xla=1 --b=2"  # of "today"', OVERRIDES="'epochs=1' # one")
    made = cloud.run("run", "--dry-run").stdout
    line = next(line for line in made.splitlines() if "worker.sh start" in line)
    started = shlex.split(shlex.split(line)[-1])
    assert started[started.index("--libtpu") + 1] == "--xla=1 --b=2" and started[-1] == "epochs=1"


def test_settings_are_read_not_executed(cloud: Cloud) -> None:
    (cloud.folder / "a.b=xy").touch()
    cloud.settings(OVERRIDES="'a.b=$(touch${IFS}hacked) a.b=x*'")
    cloud.world(queued="ACTIVE")
    assert cloud.run("run").returncode == 0
    # Quoted for the worker's shell, with neither $ nor * at work on the way.
    assert cloud.asked("--set 'a.b=$(touch${IFS}hacked)' --set 'a.b=x*'") == 1
    assert not (cloud.folder / "hacked").exists()


def hidden_gcloud(cloud: Cloud) -> str:
    """A PATH with the tools that the scripts use, and no gcloud."""
    tools = cloud.folder / "tools"
    tools.mkdir()
    needed = ["bash", "dirname", "basename", "sed", "grep", "awk", "mktemp", "rm", "tail", "mkdir", "chmod", "wc"]
    for tool in needed:
        (tools / tool).symlink_to(str(shutil.which(tool)))
    return str(tools)


def test_gcloud_is_missing(cloud: Cloud) -> None:
    cloud.path = hidden_gcloud(cloud)
    one_line_error(cloud.run("create"), 1, "gcloud is missing")


def test_gcloud_is_not_logged_in_or_broken(cloud: Cloud) -> None:
    cloud.world(rules=[["auth list", {"out": ""}]])
    one_line_error(cloud.run("create"), 1, "gcloud auth login")
    cloud.world(rules=[["auth list", {"err": "ERROR: gcloud failed to load: No module named 'grpc'", "rc": 1}]])
    one_line_error(cloud.run("create"), 1, "gcloud does not work: gcloud failed to load")


@pytest.mark.parametrize(
    ("accelerator", "zone", "runtime", "workers"),
    [
        ("v5litepod-8", "us-west4-a", "v2-alpha-tpuv5-lite", 1),
        ("v5litepod-16", "us-west4-a", "v2-alpha-tpuv5-lite", 4),
        ("v6e-8", "us-east5-b", "v2-alpha-tpuv6e", 1),
        ("v6e-32", "us-east5-b", "v2-alpha-tpuv6e", 8),
        ("v5p-8", "us-east5-a", "v2-alpha-tpuv5", 1),
        ("v4-32", "us-central2-b", "tpu-ubuntu2204-base", 4),
    ],
)
def test_defaults_by_accelerator(accelerator: str, zone: str, runtime: str, workers: int, cloud: Cloud) -> None:
    cloud.settings(ACCELERATOR=accelerator)
    assert (
        f"--zone={zone}" in (made := cloud.run("create", "--dry-run").stdout) and f"--runtime-version={runtime}" in made
    )
    started = cloud.run("setup", "--dry-run").stdout
    assert f"installing on {workers} workers" in started
    started = cloud.run("run", "--dry-run").stdout
    assert ("distributed.initialize=always" in started) == (workers > 1)


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
def test_gcloud_knows_every_flag(cloud: Cloud) -> None:
    """`gcloud meta lint-gcloud-commands` parses commands without running them (no login, no network)."""
    cloud.settings(SERVICE_ACCOUNT="tpu@my-project.iam.gserviceaccount.com")
    lines = {line.removeprefix("+ ") for name in NAMES for line in cloud.run(name, "--dry-run").stdout.splitlines()}
    lines |= {f"gcloud storage cat {RUN}/logs/worker-0.log --display-url --quiet"}
    lines |= {f"gcloud storage cp psyche/log {RUN}/logs/worker-0.log --quiet"}
    lines |= set((TPU.parent / "docs/tpu.md").read_text().replace("\\\n", "").splitlines())
    commands = [{"command_string": line} for line in sorted(lines) if line.startswith("gcloud ")]
    assert len(commands) > 10
    (cloud.folder / "commands.json").write_text(json.dumps(commands))
    done = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={cloud.folder}/commands.json"],
        capture_output=True, text=True, timeout=60, env={**os.environ, "CLOUDSDK_CONFIG": str(cloud.folder / "config")},
    )  # fmt: skip
    try:
        answers = json.loads(done.stdout)
    except ValueError:
        pytest.skip("this gcloud has no lint-gcloud-commands")
    wrong = {a["command_string"]: a["error_message"] for a in answers if not a["success"]}
    assert len(answers) == len(commands) and wrong == {}
