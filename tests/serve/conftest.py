"""A real server in a process of its own, with a tiny random model."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.serving import Server, start_server
from support.tiny import save_model


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
