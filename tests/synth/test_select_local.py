"""Selection with two tiny models of one's own behind `psyche serve`: the rule of the split holds on what they say."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.tiny import save_model

from psyche_jax.config import RunSection
from psyche_jax.data.dataset import load_records
from psyche_jax.data.records import Question, write_records
from psyche_jax.synth.config import CallsSection, LlmSection, SelectConfig, SelectionSection
from psyche_jax.synth.pipeline import run_select

SAMPLES = Path(__file__).parents[2] / "psyche_jax" / "data" / "samples"


@contextmanager
def served(model: Path) -> Iterator[str]:
    """The address of `psyche serve` with that model."""
    command = [sys.executable, "-m", "psyche_jax.cli", "serve", str(model), "--port", "0", "--plain"]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        line = next((line for line in process.stderr if line.startswith("serving ")), None)
        assert line is not None, "psyche serve did not start"
        try:
            yield line.split(" on ")[1].split()[0]
        finally:
            process.kill()


@pytest.mark.slow
def test_the_split_rule_on_what_local_models_say(tmp_path: Path) -> None:
    questions = load_records(Question, SAMPLES / "questions.jsonl").good[:4]
    write_records(tmp_path / "questions.jsonl", questions)
    with ExitStack() as stack:
        llms = []
        for seed in range(2):
            model = save_model(tmp_path / f"model-{seed}", seed=seed, max_position_embeddings=1024)
            address = stack.enter_context(served(model))
            llms.append(LlmSection(f"m{seed}", model.name, f"{address}/v1", None, max_tokens=8))
        config = SelectConfig(
            RunSection(str(tmp_path / "run")),
            str(tmp_path / "out"),
            (str(tmp_path / "questions.jsonl"),),
            tuple(llms),
            calls=CallsSection(concurrency=3, retries=2),
            selection=SelectionSection(tuple(llm.name for llm in llms)),
        )
        counts = run_select(config)["selection"]["counts"]
    assert counts["in"] == len(questions)
    tracks = {}
    for track in ("sft", "rl", "review"):
        for line in (tmp_path / "run" / "selection" / f"{track}.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            right = record["meta"]["selection"]["answers"].values()
            tracks[record["id"]] = track
            assert (track == "sft") == any(record["answer"] in given for given in right)
    assert set(tracks) == {question.id for question in questions}, "none lost, none twice"
