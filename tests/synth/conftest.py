"""A server with faults, and what it takes to ask it."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.faulty_server import KEY

from psyche_jax.synth.asking import Asker, Prompts
from psyche_jax.synth.calls import CallStore
from psyche_jax.synth.canned import serving
from psyche_jax.synth.client import Client
from psyche_jax.synth.config import BudgetSection, CallsSection, LlmSection

FAST = {"first_wait_seconds": 0.02, "longest_wait_seconds": 0.1}


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key that the server wants."""
    monkeypatch.setenv("FAULTY_KEY", KEY)


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., Any]:
    """`ask(server, work, **options)` runs `work(asker)` with an LLM `llm` at that server and a store in `tmp_path`."""

    def run(server: Any, work: Any, *, llm: dict[str, Any] | None = None, budget: Any = None, **calls: Any) -> Any:
        async def whole(url: str) -> Any:
            store = CallStore(tmp_path / "calls.sqlite")
            sections = [
                LlmSection(name, name, f"{url}/v1", "FAULTY_KEY", **{"timeout_seconds": 5.0, **(llm or {})})
                for name in ("llm", "other")
            ]
            section = CallsSection(**{**FAST, **calls})
            client = Client(sections, section, budget or BudgetSection(), store)
            try:
                return await work(Asker(client, Prompts(), section))
            finally:
                await client.close()
                store.close()

        with serving(server) as url:
            return asyncio.run(whole(url))

    return run
