"""What `pip install` of the wheel gives: run from an empty folder, away from the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import psyche_jax

ROOT = Path(psyche_jax.__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that the wheel of this checkout was installed to."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = folder / "source"  # setuptools builds within the sources
    checkout = "cp -r psyche_jax configs pyproject.toml README.md LICENSE"
    source.mkdir()
    subprocess.run([*checkout.split(), source], check=True, cwd=ROOT)
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def psyche(installed, folder, *arguments):
    """Exit code and the lines of stderr."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "psyche_jax.cli", *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert "Traceback" not in result.stderr, result.stderr
    return result.returncode, result.stderr.splitlines()


@pytest.mark.slow
def test_all_files_that_are_no_code(installed):
    """Configs under their names, and every file that code reads."""
    configs = {path.name: path.read_bytes() for path in (ROOT / "configs").iterdir()}
    assert {path.name: path.read_bytes() for path in (installed / "psyche_jax/configs").iterdir()} == configs
    tracked = subprocess.run(["git", "ls-files", "psyche_jax"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no checkout of git")
    missing = [name for name in tracked.stdout.splitlines() if not (installed / name).exists()]
    assert missing == []


@pytest.mark.slow
def test_configs_are_found_by_name(installed, tmp_path):
    code, (line,) = psyche(installed, tmp_path, "sft", "--config", "sft_7b_v5e16")
    assert code == 1
    assert line.startswith("psyche sft: models/Qwen2.5-7B-Instruct: no such model: ")
    assert "psyche import hub:OWNER/Qwen2.5-7B-Instruct models/Qwen2.5-7B-Instruct" in line
    assert "--set model.path=" in line
    code, (line,) = psyche(installed, tmp_path, "sft", "--config", "sft_7b_v5e17")
    assert (code, "sft_7b_v5e16" in line, "grpo_tiny" in line) == (2, True, False), line
    # The passages and dialogues that synth's config names come with the package; then the key is missing.
    code, lines = psyche(installed, tmp_path, "synth", "--config", "configs/synth.yaml")
    assert code != 0
    assert "OPENAI_API_KEY" in lines[-1]
