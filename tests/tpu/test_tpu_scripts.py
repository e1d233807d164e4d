"""The scripts in tpu/, run against a stand-in for gcloud (fake_gcloud.py). Nothing here sleeps or reaches a network."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TPU = HERE.parents[1] / "tpu"
NAMES = ["create", "setup", "run", "logs", "status", "babysit", "delete"]
SCRIPTS = sorted(TPU.glob("*.sh"))
SETTINGS = {
    "PROJECT": "my-project",
    "NAME": "psyche-test",
    "ACCELERATOR": "v5litepod-16",
    "CAPACITY": "spot",
    "BUCKET": "gs://my-bucket",
    "VERB": "grpo",
    "CONFIG": "configs/tiny.yaml",
}
RUN = "gs://my-bucket/runs/psyche-test"


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


class Cloud:
    """A folder with settings, a source to copy, and the stand-in on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        script(self.bin / "gcloud", f'#!/bin/sh\nexec {sys.executable} -S -E {HERE}/fake_gcloud.py "$@"\n')
        script(self.bin / "hostname", '#!/bin/sh\necho "$FAKE_HOSTNAME"\n')
        source = folder / "source"
        (source / "configs").mkdir(parents=True)
        (source / "configs/tiny.yaml").write_text("{}\n")
        (source / "requirements.lock").write_text("jax==0.10.2 \\\n    --hash=sha256:00\n")
        self.path = f"{self.bin}:{os.environ['PATH']}"
        self.settings()
        self.world()

    def settings(self, **changes: str) -> None:
        values = {**SETTINGS, "SOURCE": str(self.folder / "source"), **changes}
        (self.folder / "settings.env").write_text("".join(f"{k}={v}\n" for k, v in values.items()))

    def world(self, **world: object) -> None:
        (self.folder / "world").write_text(repr(world))

    def run(self, name: str, *arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PATH": self.path, "FAKE_GCLOUD": str(self.folder), "PSYCHE_TPU_POLL_SECONDS": "0"}
        env["PSYCHE_LOG_SECONDS"] = "0.2"
        return subprocess.run(
            [str(TPU / f"{name}.sh"), "--settings", str(self.folder / "settings.env"), *arguments],
            env=env, cwd=self.folder, input=given, stdin=None if given is not None else subprocess.DEVNULL,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def calls(self) -> list[str]:
        log = self.folder / "calls.jsonl"
        return [" ".join(json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []

    def asked(self, text: str) -> int:
        return sum(text in call for call in self.calls())

    def order(self, *texts: str) -> list[str]:
        """The given texts in the order in which commands with them came."""
        return [text for call in self.calls() for text in texts if text in call]


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def one_line_error(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and ": error: " in lines[0], done.stderr
    for word in words:
        assert word in lines[0]


# --- every script ---------------------------------------------------------------------------------


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
    ],
)
def test_bad_settings(changes: dict[str, str], word: str, cloud: Cloud) -> None:
    cloud.settings(**changes)
    done = cloud.run("create")
    one_line_error(done, 2, word)
    assert "secret" not in done.stderr and cloud.calls() == []


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


def test_gcloud_is_not_logged_in(cloud: Cloud) -> None:
    cloud.world(rules=[["auth list", {"out": ""}]])
    one_line_error(cloud.run("create"), 1, "gcloud auth login")


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
    assert ("xla_tpu_enable_async_collective_fusion" in started) == (not accelerator.startswith("v5lite"))
    assert ("xla_tpu_scoped_vmem_limit_kib" in started) == accelerator.startswith("v6e")


# --- create ---------------------------------------------------------------------------------------


def test_create(cloud: Cloud) -> None:
    cloud.world(next=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    done = cloud.run("create")
    assert done.returncode == 0, done.stderr
    assert [w for w in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE") if f"psyche-test: {w}" in done.stdout] != []
    call = next(call for call in cloud.calls() if "queued-resources create" in call)
    for flag in (
        "--node-id=psyche-test",
        "--spot",
        "--accelerator-type=v5litepod-16",
        "--project=my-project",
        "--quiet",
    ):
        assert flag in call
    assert cloud.asked("delete") == 0


@pytest.mark.parametrize(("capacity", "flag"), [("on-demand", None), ("reserved", "--reserved")])
def test_create_by_capacity(capacity: str, flag: str | None, cloud: Cloud) -> None:
    cloud.settings(CAPACITY=capacity)
    assert cloud.run("create").returncode == 0
    call = next(call for call in cloud.calls() if "queued-resources create" in call)
    assert "--spot" not in call and (flag is None or flag in call)


def test_create_goes_on_waiting_and_is_content_with_active(cloud: Cloud) -> None:
    cloud.world(queued="WAITING_FOR_RESOURCES", next=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    assert cloud.run("create").returncode == 0 and cloud.asked("queued-resources create") == 0
    assert "already" in cloud.run("create").stdout


@pytest.mark.parametrize("late", [False, True])
def test_create_out_of_quota(late: bool, cloud: Cloud) -> None:
    text = "Quota limit 'TPUV5sPreemptiblePerProjectPerRegionForTPUAPI' has been exceeded. Limit: 0 in region us-west4."
    if late:  # accepted first, then FAILED
        cloud.world(next=["WAITING_FOR_RESOURCES", "FAILED"], failure=text)
    else:
        cloud.world(
            rules=[["queued-resources create", {"err": f"ERROR: (gcloud) RESOURCE_EXHAUSTED: {text}", "rc": 1}]]
        )
    one_line_error(cloud.run("create"), 1, "out of quota", "Limit: 0", "queued-resources list")
    assert cloud.asked("queued-resources create") == 1  # asking again would not help


def test_create_preempted_while_creating(cloud: Cloud) -> None:
    cloud.world(next=["PROVISIONING", "SUSPENDING", "SUSPENDED", "ACTIVE"])
    done = cloud.run("create")
    assert done.returncode == 0, done.stderr
    assert "preempted while it was being created" in done.stdout
    create, delete = "queued-resources create", "queued-resources delete"
    assert cloud.order(create, delete) == [create, delete, create]


def test_create_no_capacity_then_capacity(cloud: Cloud) -> None:
    error = 'ERROR: (gcloud) RESOURCE_EXHAUSTED: There is no more capacity in the zone "us-west4-a"'
    cloud.world(rules=[["queued-resources create", {"err": error, "rc": 1, "times": 2}]])
    done = cloud.run("create")
    assert done.returncode == 0 and done.stdout.count("no capacity") == 2


def test_create_gives_up(cloud: Cloud) -> None:
    cloud.world(next=["FAILED"] * 50, failure="an internal error")
    one_line_error(cloud.run("create"), 1, "no TPU after 5 attempts", "an internal error")
    assert cloud.asked("queued-resources create") == 5


def test_create_not_allowed(cloud: Cloud) -> None:
    error = "ERROR: (gcloud.compute.tpus.queued-resources.create) PERMISSION_DENIED: tpu.nodes.create"
    cloud.world(rules=[["queued-resources create", {"err": error, "rc": 1}]])
    one_line_error(cloud.run("create"), 1, "PERMISSION_DENIED")


# --- setup, run, logs, status, delete -------------------------------------------------------------


def test_setup(cloud: Cloud) -> None:
    cloud.world(queued="ACTIVE")
    done = cloud.run("setup")
    assert done.returncode == 0 and "installed on 4 of 4 workers" in done.stdout, done.stderr
    assert cloud.order("tpu-vm scp", "worker.sh install") == ["tpu-vm scp", "worker.sh install"]
    assert all("--worker=all" in call for call in cloud.calls() if "tpu-vm scp" in call or "tpu-vm ssh" in call)


def test_setup_ssh_key_not_ready_then_ready(cloud: Cloud) -> None:
    refused = {"err": "me@1.2.3.4: Permission denied (publickey).", "rc": 255, "times": 2}
    cloud.world(queued="ACTIVE", rules=[["--command=echo worker", refused]])
    done = cloud.run("setup")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no answer yet") == 2 and "4 of 4 workers answer" in done.stdout


@pytest.mark.parametrize("name", ["setup", "run"])
def test_one_worker_does_not_answer(name: str, cloud: Cloud) -> None:
    cloud.world(queued="ACTIVE", unreachable=[2])
    done = cloud.run(name)
    one_line_error(done, 1, "worker 2 of 4 does not answer", "docs/tpu.md")
    assert cloud.asked("scp") == cloud.asked("worker.sh") == 0  # nothing starts on three of four


def test_setup_taken_away_meanwhile(cloud: Cloud) -> None:
    error = 'ERROR: (gcloud) This TPU has terminal state "PREEMPTED", so it cannot be used anymore.'
    cloud.world(queued="ACTIVE", rules=[["tpu-vm ssh", {"err": error, "rc": 1}]])
    one_line_error(cloud.run("setup"), 1, "taken away")


def test_setup_key_not_in_agent(cloud: Cloud) -> None:
    error = (
        'ERROR: (gcloud) SSH Key is not present in the SSH agent. Please run "ssh-add key" to add it, and try again.'
    )
    cloud.world(queued="ACTIVE", rules=[["tpu-vm scp", {"err": error, "rc": 1}]])
    one_line_error(cloud.run("setup"), 1, "ssh-add key")


def test_setup_fails_on_one_worker(cloud: Cloud) -> None:
    out = "worker 0: ok installed\nworker 1: error: pip failed\nworker 2: ok installed\nworker 3: ok installed\n"
    cloud.world(queued="ACTIVE", rules=[["worker.sh install", {"out": out, "rc": 1}]])
    one_line_error(cloud.run("setup"), 1, "not installed on worker 1 of 4")


def test_setup_packs_what_git_does_not_ignore(cloud: Cloud) -> None:
    source = cloud.folder / "source"
    for name, text in {".gitignore": "*.bin\n", "model.bin": "big", "new file.py": "1", "gone.py": "2"}.items():
        (source / name).write_text(text)
    for command in ("init -q", "add .", "rm -q -f gone.py"):
        subprocess.run(["git", "-C", str(source), *command.split()], check=True)
    (source / "uncommitted.py").write_text("3")
    cloud.world(
        queued="ACTIVE", execute=True, workers=1, rules=[["worker.sh install", {"out": "worker 0: ok installed\n"}]]
    )
    assert cloud.run("setup").returncode == 0
    packed = cloud.folder / "worker-0/psyche_upload/source.tar.gz"
    names = subprocess.run(["tar", "-tzf", str(packed)], capture_output=True, text=True, check=True).stdout.splitlines()
    assert sorted(names) == [".gitignore", "configs/tiny.yaml", "new file.py", "requirements.lock", "uncommitted.py"]


def test_setup_from_a_repository(cloud: Cloud) -> None:
    cloud.settings(SOURCE="", REPO="https://github.com/someone/psyche_jax", BRANCH="v1", CONFIG="configs/grpo.yaml")
    cloud.world(queued="ACTIVE")
    assert cloud.run("setup").returncode == 0
    assert cloud.asked("install --python python3.11 --repo https://github.com/someone/psyche_jax --branch v1") == 1


@pytest.mark.parametrize(("queued", "words"), [("NONE", "tpu/create.sh"), ("SUSPENDED", "tpu/babysit.sh")])
@pytest.mark.parametrize("name", ["setup", "run", "logs"])
def test_no_tpu(name: str, queued: str, words: str, cloud: Cloud) -> None:
    cloud.world(queued=queued)
    one_line_error(cloud.run(name), 1, words)


def test_run(cloud: Cloud) -> None:
    cloud.settings(OVERRIDES="train.steps=200 seed=7", VERB="sft")
    cloud.world(queued="ACTIVE")
    done = cloud.run("run")
    assert done.returncode == 0 and "runs on 4 of 4 workers" in done.stdout, done.stderr
    start = next(call for call in cloud.calls() if "worker.sh start" in call)
    assert "--worker=all" in start
    assert f"sft --config configs/tiny.yaml --set run.dir={RUN} --set distributed.initialize=always" in start
    assert start.endswith("--set train.steps=200 --set seed=7")
    assert cloud.asked("worker.sh stop") == 0


def test_run_says_when_there_are_fewer_workers_than_expected(cloud: Cloud) -> None:
    cloud.world(queued="ACTIVE", workers=2)
    done = cloud.run("run")
    assert "expected to have 4 workers, psyche-test has 2" in done.stdout and "2 of 2 workers" in done.stdout


def test_run_before_setup(cloud: Cloud) -> None:
    error = "bash: psyche/worker.sh: No such file or directory"
    cloud.world(queued="ACTIVE", rules=[["psyche/worker.sh", {"err": error, "rc": 127}]])
    one_line_error(cloud.run("run"), 1, "tpu/setup.sh")
    one_line_error(cloud.run("run", "--restart"), 1, "tpu/setup.sh")


def test_run_twice(cloud: Cloud) -> None:
    out = "".join(f"worker {n}: psyche runs already (process 7)\n" for n in range(4))
    cloud.world(queued="ACTIVE", rules=[["worker.sh start", {"out": out, "rc": 1}]])
    one_line_error(cloud.run("run"), 1, "runs already", "--restart")


def test_run_ends_at_once(cloud: Cloud) -> None:
    out = "worker 0: ok runs\nworker 1: ok runs\nworker 2: ok runs\nworker 3: does not run (exit code 2)\n"
    cloud.world(queued="ACTIVE", rules=[["worker.sh alive", {"out": out}]])
    done = cloud.run("run")
    assert done.returncode == 1 and "ended at once on worker 3 of 4" in done.stderr
    assert "[worker 3] the end of the log" in done.stderr


def test_logs(cloud: Cloud) -> None:
    cloud.world(queued="ACTIVE")
    assert cloud.run("logs", "--worker", "2", "--lines", "5").stdout == "[worker 2] the end of the log\n"
    assert cloud.asked("--worker=2 ") == cloud.asked("worker.sh log 5") == 1
    assert len(cloud.run("logs", "--worker", "all").stdout.splitlines()) == 4
    cloud.run("logs", "--follow")
    assert cloud.asked("worker.sh log 40 follow") == 1
    one_line_error(cloud.run("logs", "--follow", "--worker", "all"), 2, "--follow")
    one_line_error(cloud.run("logs", "--worker", "x"), 2, "--worker")
    one_line_error(cloud.run("logs", "--lines"), 2, "--lines")
    one_line_error(cloud.run("logs", "--bucket"), 1, "no log in the bucket")


def test_status(cloud: Cloud) -> None:
    cloud.world(queued="ACTIVE", state={"status": "running", "step": 120, "reason": 'a "quoted" word'})
    done = cloud.run("status")
    assert done.returncode == 0
    assert "tpu  ACTIVE (READY HEALTHY 4 workers)" in done.stdout and "run  running at step 120" in done.stdout
    cloud.world(queued="SUSPENDED", state={"status": "preempted", "step": 7, "reason": "SIGTERM"})
    done = cloud.run("status")
    assert "preempted at step 7 (SIGTERM)" in done.stdout and "tpu/babysit.sh" in done.stdout
    cloud.world(queued="ACTIVE", state={"status": "done", "step": 9, "reason": ""})
    assert "still billed" in cloud.run("status").stdout
    cloud.world()
    assert "tpu  NONE" in cloud.run("status").stdout
    cloud.world(rules=[["queued-resources describe", {"err": "ERROR: (gcloud) network", "rc": 1}]])
    assert cloud.run("status").returncode == 1


def test_delete_asks(cloud: Cloud) -> None:
    cloud.world(queued="ACTIVE")
    done = cloud.run("delete", given="n\n")
    assert done.returncode == 1 and "not deleted" in done.stderr
    one_line_error(cloud.run("delete"), 2, "--yes")
    assert cloud.asked("queued-resources delete") == 0
    assert cloud.run("delete", given="y\n").returncode == 0 and cloud.asked("delete psyche-test") == 1
    assert "there is no psyche-test" in cloud.run("delete", "--yes").stdout


def test_delete_is_refused_while_suspending(cloud: Cloud) -> None:
    refused = {"err": "ERROR: (gcloud) FAILED_PRECONDITION: it is SUSPENDING", "rc": 1, "times": 2}
    cloud.world(queued="SUSPENDING", rules=[["queued-resources delete", refused]])
    assert cloud.run("delete", "--yes").returncode == 0 and cloud.asked("queued-resources delete") == 3
    cloud.world(queued="SUSPENDING", rules=[["queued-resources delete", {**refused, "times": 99}]])
    one_line_error(cloud.run("delete", "--yes"), 1, "FAILED_PRECONDITION")


# --- babysit --------------------------------------------------------------------------------------


def running(step: int, status: str = "running", reason: str = "") -> dict[str, object]:
    return {"status": status, "step": step, "reason": reason}


def test_babysit_through_a_preemption(cloud: Cloud) -> None:
    cloud.world(
        queued="ACTIVE",
        state=running(10),
        events=[
            ["storage cat", 2, {"state": running(20)}],
            ["storage cat", 3, {"state": running(25, "preempted", "SIGTERM"), "queued": "SUSPENDED"}],
            ["worker.sh start", 1, {"state": running(25)}],
            ["storage cat", 6, {"state": running(40, "done")}],
        ],
    )
    done = cloud.run("babysit")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the TPU is SUSPENDED; recovery 1" in done.stdout and "done at step 40" in done.stdout
    way = ["queued-resources delete", "queued-resources create", "tpu-vm scp", "worker.sh install", "worker.sh start"]
    assert cloud.order(*way) == way
    assert cloud.asked(f"run.dir={RUN} ") == 1  # the same run
    assert "still billed" in done.stdout


def test_babysit_when_the_vm_is_preempted_before_its_queued_resource(cloud: Cloud) -> None:
    cloud.world(
        queued="ACTIVE",
        node="PREEMPTED",
        state=running(10),
        events=[["storage cat", 3, {"state": running(20, "done")}]],
    )
    assert cloud.run("babysit", "--delete-when-done").returncode == 0
    create, delete = "queued-resources create", "queued-resources delete"
    assert cloud.order(create, delete) == [delete, create, delete]


def test_babysit_from_nothing(cloud: Cloud) -> None:
    cloud.world(
        events=[["worker.sh start", 1, {"state": running(0)}], ["storage cat", 4, {"state": running(5, "done")}]]
    )
    done = cloud.run("babysit")
    assert done.returncode == 0 and cloud.asked("queued-resources create") == 1, done.stderr


def test_babysit_after_a_crash_keeps_the_tpu(cloud: Cloud) -> None:
    cloud.world(
        queued="ACTIVE", alive=False, state=running(10), events=[["storage cat", 9, {"state": running(20, "done")}]]
    )
    done = cloud.run("babysit")
    assert done.returncode == 0 and "psyche does not run on every worker" in done.stdout
    assert cloud.asked("queued-resources delete") == cloud.asked("queued-resources create") == 0
    assert cloud.order("worker.sh stop", "worker.sh start") == ["worker.sh stop", "worker.sh start"]


def test_babysit_leaves_a_slow_run_alone(cloud: Cloud) -> None:
    cloud.world(queued="ACTIVE", state=running(10), events=[["storage cat", 14, {"state": running(11, "done")}]])
    assert cloud.run("babysit").returncode == 0
    assert cloud.asked("worker.sh alive") == 2 and cloud.asked("worker.sh start") == 0


def test_babysit_stops_on_failed(cloud: Cloud) -> None:
    cloud.world(queued="ACTIVE", state=running(30, "failed", "loss is NaN"))
    done = cloud.run("babysit")
    assert done.returncode == 1 and "failed at step 30: loss is NaN" in done.stderr
    assert cloud.asked("create") == cloud.asked("ssh") == 0


def test_babysit_gives_up_without_progress(cloud: Cloud) -> None:
    cloud.settings(MAX_FAILURES="2")
    preempt = [["worker.sh alive", n, {"queued": "SUSPENDED"}] for n in range(1, 4)]
    cloud.world(queued="SUSPENDED", state=running(10, "preempted"), events=preempt)
    done = cloud.run("babysit")
    assert done.returncode == 1
    assert "gave up: 2 recoveries in a row without a step after 10" in done.stderr
    assert cloud.asked("worker.sh start") == 2


def test_babysit_counts_anew_after_progress(cloud: Cloud) -> None:
    cloud.settings(MAX_FAILURES="2")
    events: list[list[object]] = []
    for n in range(1, 3):  # each recovery brings some steps before the next preemption
        events.append(["worker.sh alive", n, {"queued": "SUSPENDED", "state": running(10 * n, "preempted")}])
    events.append(["worker.sh alive", 3, {"state": running(99, "done")}])
    cloud.world(queued="SUSPENDED", state=running(0, "preempted"), events=events)
    done = cloud.run("babysit")
    assert done.returncode == 0 and done.stdout.count("recovery 1 of at most 2") == 3, done.stderr


def test_babysit_gives_up_on_quota(cloud: Cloud) -> None:
    cloud.settings(MAX_FAILURES="2")
    error = "ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUs' has been exceeded"
    cloud.world(rules=[["queued-resources create", {"err": error, "rc": 1}]])
    done = cloud.run("babysit")
    assert done.returncode == 1 and "gave up: 2" in done.stderr and "out of quota" in done.stderr
    assert cloud.asked("queued-resources create") == 2


def test_babysit_survives_a_while_without_network(cloud: Cloud) -> None:
    error = {"err": "ERROR: (gcloud) Could not reach the network", "rc": 1}
    cloud.world(queued="ACTIVE", state=running(5, "done"), rules=[["queued-resources describe", {**error, "times": 3}]])
    assert cloud.run("babysit").returncode == 0
    cloud.world(queued="ACTIVE", rules=[["state.json", error]])
    done = cloud.run("babysit")
    assert done.returncode == 1 and "gave up: no answer" in done.stderr and "Could not reach" in done.stderr


# --- the whole way, with worker.sh really running in four home folders -----------------------------

PYTHON = """#!/bin/bash
if [ "$2" = venv ]; then
  mkdir -p "$3/bin"
  cat >"$3/bin/pip" <<'END'
#!/bin/bash
echo "$*" >>"$HOME/pip.log"
case $* in *--editable*) cp "$HOME/psyche/source/fake_psyche" "$(dirname "$0")/psyche" ;; esac
END
  chmod +x "$3/bin/pip"
fi
"""
PSYCHE = """#!/bin/bash
echo "arguments: $*"
echo "flags: $LIBTPU_INIT_ARGS platforms: $JAX_PLATFORMS secret: ${#WANDB_API_KEY}"
trap 'echo checkpoint written; exit 3' TERM
for i in $(seq 1000); do sleep 0.05; done
"""


def wait_for(condition: object, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_the_whole_way_on_four_workers(cloud: Cloud) -> None:
    script(cloud.bin / "python3.11", PYTHON)
    script(cloud.folder / "source/fake_psyche", PSYCHE)
    (cloud.folder / "secrets").write_text("WANDB_API_KEY=abcdefgh\n")
    cloud.settings(ENV_FILE=str(cloud.folder / "secrets"), LIBTPU_FLAGS="--xla_a=true --xla_b=1")
    cloud.world(queued="ACTIVE", execute=True)
    homes = [cloud.folder / f"worker-{n}" for n in range(4)]
    try:
        done = cloud.run("setup")
        assert done.returncode == 0, done.stdout + done.stderr
        for home in homes:
            lock, tpu, package = (home / "pip.log").read_text().splitlines()
            assert "install --require-hashes -r requirements.lock" in lock
            assert tpu.endswith("install jax[tpu]==0.10.2") and "--no-deps" in package
            assert (home / "psyche/env").stat().st_mode & 0o777 == 0o600
            assert (home / "psyche/source/configs/tiny.yaml").exists()

        # Again: only the package; the requirements did not change.
        assert cloud.run("setup").returncode == 0
        assert len((homes[0] / "pip.log").read_text().splitlines()) == 4

        done = cloud.run("run")
        assert done.returncode == 0, done.stdout + done.stderr
        one_line_error(cloud.run("run"), 1, "runs already on worker 0 1 2 3")
        bucket = cloud.folder / "bucket/my-bucket/runs/psyche-test/logs"
        wait_for(lambda: all((bucket / f"worker-{n}.log").exists() for n in range(4)))
        wait_for(lambda: "secret: 8" in (bucket / "worker-3.log").read_text())
        shown = cloud.run("logs", "--worker", "3").stdout
        assert f"[worker 3] arguments: grpo --config configs/tiny.yaml --set run.dir={RUN}" in shown
        assert "flags: --xla_a=true --xla_b=1 platforms: tpu,cpu secret: 8" in shown

        # Stopped, psyche writes its checkpoint, and the last line still reaches the bucket.
        done = cloud.run("run", "--restart")
        assert done.returncode == 0, done.stdout + done.stderr
        for home in homes:
            text = (home / "psyche/log").read_text()
            assert "checkpoint written" in text and "ended with exit code 3" in text
        shown = cloud.run("logs", "--bucket", "--worker", "1").stdout
        assert "checkpoint written" in shown
        everything = "".join(cloud.calls())
        assert "abcdefgh" not in everything
    finally:
        cloud.world(queued="ACTIVE", execute=True)
        with_gcloud = {**os.environ, "PATH": cloud.path, "FAKE_GCLOUD": str(cloud.folder)}
        stop = ["compute", "tpus", "tpu-vm", "ssh", "x", "--worker=all", "--command=bash psyche/worker.sh stop"]
        subprocess.run(["gcloud", *stop], env=with_gcloud, capture_output=True, check=False)


# --- against the real gcloud's own parser ----------------------------------------------------------


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
