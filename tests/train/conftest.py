"""One tiny model folder and its data for all tests of training. It is read only; runs go elsewhere."""

import shutil
from pathlib import Path

import pytest
from support.training_fixtures import make_model, write_prompts, write_sft_data

from psyche_jax.model.config import ModelConfig, read_hf_config


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `sft.jsonl` and `rl.jsonl`."""
    root = tmp_path_factory.mktemp("training")
    make_model(root / "model")
    write_sft_data(root / "sft.jsonl")
    write_prompts(root / "rl.jsonl")
    return root


@pytest.fixture(scope="session")
def tiny_config(tiny_root: Path) -> ModelConfig:
    """The model's config."""
    return read_hf_config(tiny_root / "model")


@pytest.fixture
def root(tiny_root: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_root` to run in and to break."""
    return Path(shutil.copytree(tiny_root, tmp_path / "work"))
