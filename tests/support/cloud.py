"""The scripts in tpu/, to be run against a stand-in for gcloud (fake_gcloud.py): nothing reaches a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TPU = HERE.parents[1] / "tpu"
NAMES = ["create", "setup", "run", "logs", "status", "babysit", "delete"]
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


def one_line_error(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and ": error: " in lines[0], done.stderr
    for word in words:
        assert word in lines[0]
