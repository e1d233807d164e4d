"""`psyche serve` in a process of its own."""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import httpx


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
        [sys.executable, "-m", "psyche_jax.cli", "serve", str(model), "--port", "0", "--set", "warm=false", *arguments],
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
    server = Server(line.split(" on ")[1].split()[0], process, lines)
    for _ in range(600):
        try:
            httpx.get(f"{server.address}/health", timeout=1)
            return server
        except httpx.HTTPError:
            continue
    raise AssertionError("psyche serve does not answer")
