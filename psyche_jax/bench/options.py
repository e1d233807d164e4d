"""The options of `psyche bench`: most are short names of a config's keys.

The defaults are the sizes of the benchmarks that it is compared with.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

What: TypeAlias = Literal["sft", "grpo", "rollout"]
WHATS: Mapping[What, str] = {
    "sft": "a step of SFT",
    "grpo": "an iteration of GRPO (rollout, rewards, update)",
    "rollout": "the rollout of GRPO alone",
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
    "layers": Option("num_hidden_layers", 4, "of the model"),
    "width": Option("hidden_size", 256, "of the model"),
    "heads": Option("num_attention_heads", 8, "of queries"),
    "kv_heads": Option("num_key_value_heads", 2, "of keys and values"),
    "ffn": Option("intermediate_size", 1024, "inner width of the MLPs"),
    "vocab": Option("vocab_size", 4096, "tokens that there are"),
    "tied": Option("tie_word_embeddings", False, "the head is the embedding", None),
}
_DTYPE = Option(
    "model.compute_dtype",
    "float32",
    "what products are computed in; weights are float32",
    None,
    ("float32", "bfloat16"),
)
_REMAT = Option("model.remat", "none", "what backward computes again", None, ("none", "full", "dots"))
_RESPONSES = {
    "prompts": Option("prompts_per_step", 4, "of a step"),
    "generations": Option("generations_per_prompt", 8, "responses to each prompt"),
    "prompt_length": Option("data.max_prompt_length", 64, "tokens of each prompt"),
    "completion_length": Option("max_new_tokens", 64, "tokens of the longest response"),
    "slots": Option("rollout.slots", None, "responses decoded at once"),
}
OPTIONS: Mapping[What, Mapping[str, Option]] = {
    "sft": {
        "dtype": _DTYPE,
        "batch": Option("batch_size", 8, "sequences of a step"),
        "length": Option("data.max_length", 256, "tokens of each sequence", 2),
        "micro_batch": Option("micro_batch_size", None, "sequences at once in forward and backward"),
        "remat": _REMAT,
    },
    "grpo": {
        "dtype": _DTYPE,
        **_RESPONSES,
        "generations": Option("generations_per_prompt", 8, "responses to each prompt", 2),
        "micro_batch": Option("micro_batch_prompts", None, "prompts at once in forward and backward"),
        "remat": _REMAT,
        "beta": Option("objective.kl_coefficient", 0.0, "coefficient of the KL", 0),
    },
    "rollout": {"dtype": _DTYPE, **_RESPONSES},
}
