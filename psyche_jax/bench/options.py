"""The options of `psyche bench`: most are short names of a config's keys.

The defaults are the sizes of the benchmarks that it is compared with.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

What: TypeAlias = Literal["sft", "grpo", "rollout"]
WHATS: Mapping[What, str] = {
    "sft": "an SFT step",
    "grpo": "a GRPO iteration (rollout, rewards, update)",
    "rollout": "the GRPO rollout alone",
}


@dataclass(frozen=True)
class Option:
    """`key`: what it sets, in a config or, of `MODEL`, in a `ModelConfig`; `least`: the smallest value, None: any."""

    key: str
    default: Any
    meaning: str
    least: int | None = 1
    choices: tuple[str, ...] | None = None


# The shape of a Qwen2 with heads of width / heads, where no config says it.
MODEL: Mapping[str, Option] = {
    "layers": Option("num_hidden_layers", 4, "decoder layers"),
    "width": Option("hidden_size", 256, "hidden size"),
    "heads": Option("num_attention_heads", 8, "query heads"),
    "kv_heads": Option("num_key_value_heads", 2, "key-value heads"),
    "ffn": Option("intermediate_size", 1024, "inner width of the MLPs"),
    "vocab": Option("vocab_size", 4096, "vocabulary size"),
    "tied": Option("tie_word_embeddings", False, "tie the output head to the embedding", None),
}
_DTYPE = Option(
    "model.compute_dtype",
    "float32",
    "dtype of matrix products; weights are float32",
    None,
    ("float32", "bfloat16"),
)
_REMAT = Option("model.remat", "none", "what the backward pass recomputes", None, ("none", "full", "dots"))
_RESPONSES = {
    "prompts": Option("prompts_per_step", 4, "prompts per step"),
    "generations": Option("generations_per_prompt", 8, "responses to each prompt"),
    "prompt_length": Option("data.max_prompt_length", 64, "tokens of each prompt"),
    "completion_length": Option("max_new_tokens", 64, "tokens of the longest response"),
    "slots": Option("rollout.slots", None, "responses decoded at once"),
}
OPTIONS: Mapping[What, Mapping[str, Option]] = {
    "sft": {
        "dtype": _DTYPE,
        "batch": Option("batch_size", 8, "sequences per step"),
        "length": Option("data.max_length", 256, "tokens of each sequence", 2),
        "micro_batch": Option("micro_batch_size", None, "sequences per forward and backward pass"),
        "remat": _REMAT,
    },
    "grpo": {
        "dtype": _DTYPE,
        **_RESPONSES,
        "generations": Option("generations_per_prompt", 8, "responses to each prompt", 2),
        "micro_batch": Option("micro_batch_prompts", None, "prompts per forward and backward pass"),
        "remat": _REMAT,
        "beta": Option("objective.kl_coefficient", 0.0, "KL coefficient", 0),
    },
    "rollout": {"dtype": _DTYPE, **_RESPONSES},
}
