"""A tiny model whose heads splash takes, and configs for it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import psyche_jax
from psyche_jax.model.config import ModelConfig, hf_config
from psyche_jax.plan.slices import find_compiler

ROOT = Path(psyche_jax.__file__).parents[1]
needs_libtpu = pytest.mark.skipif(not find_compiler(), reason="libtpu absent: make tpu-compiler")
MODEL = ModelConfig(1024, 256, 512, 3, 4, 2, 128, tie_word_embeddings=True, pad_token_id=0, stop_token_ids=(3,))


def write_config(folder: Path, program: str, head_dim: int = MODEL.head_dim, **changes) -> Path:
    """The folder of a model without weights, and a config for it."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(hf_config(replace(MODEL, head_dim=head_dim), "float32")))
    common = {
        "run": {"dir": "run"},
        "model": {"path": str(model), "compute_dtype": "bfloat16", "remat": "full"},
        "mesh": {"fsdp": 2, "tensor": 2},
    }
    sft = {"data": {"train": "sft.jsonl", "max_length": 256}, "batch_size": 16, "micro_batch_size": 8}
    grpo = {
        "data": {"train": "rl.jsonl", "max_prompt_length": 128},
        "prompts_per_step": 8,
        "minibatch_prompts": 4,
        "micro_batch_prompts": 2,
        "rollout": {"slots": 16},
        "generations_per_prompt": 4,
        "max_new_tokens": 128,
        "reference_dtype": "bfloat16",
    }
    path = folder / f"{program}.yaml"
    path.write_text(yaml.safe_dump({**common, **(sft if program == "sft" else grpo), **changes}))
    return path
