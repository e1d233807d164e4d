"""A Qwen2 of a few thousand random parameters with a byte-level tokenizer: a model folder in a moment."""

from pathlib import Path

import ml_dtypes
import numpy as np
from flax import nnx, traverse_util

from psyche_jax.demo import train_tokenizer
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.huggingface import write_weights
from psyche_jax.model.qwen2 import build

VOCAB_SIZE = 304  # bytes, three special tokens, some merges; eight devices can split it
TEXTS = ["答案：A", "答案：B", "答案：AC", "<think>想一想</think>\n", "单项选择题：", "多项选择题："] * 3


def save_tokenizer(folder: Path) -> Path:
    """Only the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(TEXTS, VOCAB_SIZE, folder)
    return folder


OPENED_THOUGHT = "<think>\n"
THINKING_SWITCH = "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"


def begin_responses(folder: Path, written: str) -> Path:
    """Have a folder's chat template write the first words of each response."""
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\n", f"assistant\n{written}{{{{ '' }}}}"))
    return folder


def save_model(folder: Path, dtype: str = "float32", seed: int = 0, **changes: object) -> Path:
    """A model folder; `changes` are fields of its ModelConfig."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
        **train_tokenizer(TEXTS, VOCAB_SIZE, folder),
    }
    config = ModelConfig(**{**fields, **changes})
    random = np.random.default_rng(seed)
    shapes = traverse_util.flatten_dict(nnx.to_pure_dict(build(config)[1]))
    scales = {"kernel": 0.2, "bias": 0.1, "scale": 1.0}
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    parameters = {
        path: (random.normal(size=leaf.shape) * scales.get(path[-1], 0.5)).astype(kind) for path, leaf in shapes.items()
    }
    write_weights(folder, config, traverse_util.unflatten_dict(parameters))
    return folder
