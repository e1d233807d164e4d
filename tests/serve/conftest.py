"""A real server in a process of its own, with a tiny random model."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from tiny import save_model


@dataclass
class Server:
    """A running `psyche serve`."""

    address: str
    process: "subprocess.Popen[str]"
    lines: list[str] = field(default_factory=list)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        """Tell it to stop and wait; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    @property
    def log(self) -> str:
        """Everything on its stderr so far."""
        return "".join(self.lines)

    @property
    def resident_mib(self) -> float:
        """Memory of the process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def start_server(model: Path, *arguments: str, **environment: str) -> Server:
    """`psyche serve` on a free port, once it answers."""
    variables = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", "psyche_jax.cli", "serve", str(model), "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
    )
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("serving "):
            break
    else:
        raise AssertionError(f"psyche serve ended with {process.wait()}: {''.join(lines)}")
    threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()
    server = Server(line.split(" on ")[1].split("/v1")[0], process, lines)
    for _ in range(600):
        try:
            httpx.get(f"{server.address}/health", timeout=1)
            return server
        except httpx.HTTPError:
            continue
    raise AssertionError("psyche serve does not answer")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, called `tiny`, with a context of 1,024 tokens."""
    return save_model(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that only ask."""
    log = tmp_path_factory.mktemp("log") / "crisis.jsonl"
    limits = ("--set", "limits.per_minute=100000", "--set", "limits.body_seconds=3", "--crisis-log", str(log))
    running = start_server(tiny_model, *limits)
    running.crisis_log = log  # type: ignore[attr-defined]
    yield running
    assert running.stop() == 0, running.log
    assert "Traceback" not in running.log


@pytest.fixture
def another_server(tiny_model: Path) -> Iterator[Callable[..., Server]]:
    """Start servers with other settings; they are ended with the test."""
    started: list[Server] = []

    def start(*arguments: str, **environment: str) -> Server:
        started.append(start_server(tiny_model, *arguments, **environment))
        return started[-1]

    yield start
    for running in started:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()
