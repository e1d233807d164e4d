"""tpu/setup.sh, run.sh, logs.sh, status.sh and delete.sh, and all of them with worker.sh really running."""

import os
import subprocess
import time

import pytest
from support.cloud import RUN, Cloud, one_line_error, script


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


def test_setup_brings_the_environment_of_now(cloud: Cloud) -> None:
    secrets = cloud.folder / "secrets"
    secrets.write_text("# keys\r\n\nexport A='it is $HOME'\r\nB=one two; touch hacked\nC=\"it's\" # note\nD=")
    cloud.world(
        queued="ACTIVE", execute=True, workers=1, rules=[["worker.sh install", {"out": "worker 0: ok installed\n"}]]
    )
    cloud.settings(ENV_FILE=str(secrets))
    assert cloud.run("setup").returncode == 0
    sent = cloud.folder / "worker-0/psyche_upload/env"
    told = ["bash", "-euc", '. "$1"; env -0', "-", str(sent)]
    done = subprocess.run(told, capture_output=True, text=True, check=True, cwd=cloud.folder)
    values = dict(line.split("=", 1) for line in done.stdout.split("\0") if line)
    assert [values[key] for key in "ABCD"] == ["it is $HOME", "one two; touch hacked", "it's", ""]
    assert done.stderr == "" and not (cloud.folder / "hacked").exists()

    cloud.settings()  # no ENV_FILE any more: what it set ends
    assert cloud.run("setup").returncode == 0 and sent.read_text().strip() == ""

    secrets.write_text("A=1\nsk-very-secret\n")
    cloud.settings(ENV_FILE=str(secrets))
    done = cloud.run("setup")
    one_line_error(done, 2, "secrets line 2 is not KEY=value")
    assert "very-secret" not in done.stderr


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
    one_line_error(cloud.run("logs", "--lines", "9" * 20), 2, "--lines")
    one_line_error(cloud.run("logs", "--follow", "--bucket"), 2, "--follow", "--bucket")
    one_line_error(cloud.run("logs", "--bucket"), 1, "no log in the bucket")


def test_logs_of_all_in_the_bucket(cloud: Cloud) -> None:
    heads = [f"==> {RUN}/logs/worker-{n}.log <==" for n in range(3)]
    logs = [head + "".join(f"\n{n}" for n in range(lines)) for head, lines in zip(heads, (9, 1, 2), strict=True)]
    cloud.world(rules=[["worker-*.log", {"out": "\n".join(logs)}]])
    shown = cloud.run("logs", "--bucket", "--worker", "all", "--lines", "2").stdout.split("\n")
    assert shown == [heads[0], "7", "8", heads[1], "0", heads[2], "0", "1", ""]


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


# The whole way, with worker.sh really running in four home folders.
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
            assert tpu.endswith("install jax[tpu]") and "--no-deps" in package
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
