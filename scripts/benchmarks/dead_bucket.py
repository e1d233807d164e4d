"""Kills the server of a bucket under a training run, and says how the run ends and after how long.

    python scripts/benchmarks/dead_bucket.py             # the server is gone
    python scripts/benchmarks/dead_bucket.py --silent    # it is stopped: it takes connections and never answers

The run is SFT of the tests' tiny model; the server is the tests' (fake-gcs-server). It dies when the first checkpoint
is whole, so that the next one cannot be written.
"""

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support.bucket import running_bucket  # noqa: E402
from support.training_fixtures import make_model, sft_config, write_config, write_sft_data  # noqa: E402

from psyche_jax.config import CheckpointSection  # noqa: E402
from psyche_jax.storage.files import as_path  # noqa: E402


def main() -> None:
    """Run it; print what the run said last, its exit code and how long it took to end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--silent", action="store_true", help="stop the server instead of killing it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, running_bucket() as bucket:
        root = Path(folder)
        make_model(root / "model")
        write_sft_data(root / "sft.jsonl")
        config = sft_config(root, epochs=1000.0, checkpoints=CheckpointSection(every_steps=5))
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=f"{bucket}/run"))
        command = [
            sys.executable,
            "-m",
            "psyche_jax.cli",
            "sft",
            "--config",
            str(write_config(config, root / "c.yaml")),
        ]
        run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        while run.poll() is None and not as_path(f"{bucket}/run/checkpoints/5/commit_success.txt").exists():
            time.sleep(0.2)
        server = _server(os.environ["STORAGE_EMULATOR_HOST"])
        os.kill(server, signal.SIGSTOP if arguments.silent else signal.SIGKILL)
        started = time.monotonic()
        said = run.communicate()[1].splitlines()
        seconds = time.monotonic() - started
        os.kill(server, signal.SIGKILL)
    print(f"exit code {run.returncode} after {seconds:.0f} s; it said:")
    print("\n".join(line for line in said if "credentials" not in line))


def _server(url: str) -> int:
    """The process that listens there."""
    port = url.rpartition(":")[2]
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and folder.name != str(os.getpid()):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"-port" in words and words[words.index(b"-port") + 1] == port.encode():
                return int(folder.name)
    raise SystemExit(f"no server is found at {url}")


if __name__ == "__main__":
    main()
