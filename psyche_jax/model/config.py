"""The shape of a Qwen2 model, read from and written as a Hugging Face `config.json`."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psyche_jax.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """Everything the architecture needs; field names are those of Hugging Face's `Qwen2Config`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "head_dim",
        )
        for field in sizes:
            if getattr(self, field) < 1:
                raise UserError(f"model config: {field} is {getattr(self, field)}; it must be at least 1")
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"model config: head_dim {self.head_dim} is odd; rotary embedding needs an even one")

    @property
    def num_parameters(self) -> int:
        """Number of parameters, the tied head counted once."""
        heads, kv_heads = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = self.hidden_size * (2 * heads + 2 * kv_heads) + heads + 2 * kv_heads
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_hidden_layers * layer + embeddings + self.hidden_size


def model_config_from_hf(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Read a `config.json` (and `generation_config.json`) of a `Qwen2ForCausalLM`.

    RoPE's base is found both at the top level (as published) and under `rope_parameters` (as transformers 5
    writes it). Stop tokens are those of the generation config, since Qwen names its second one only there.

    Raises:
      UserError: another architecture, or a feature this port does not have (named).
    """
    if config.get("model_type") != "qwen2":
        raise UserError(f"config.json: model_type is {config.get('model_type')!r}; only 'qwen2' is supported")
    rope: Mapping[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}
        if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
            raise UserError(
                f"config.json: {key} is not one set of values for all layers, which is all that is supported"
            )
        rope_type = rope.get("rope_type") or rope.get("type") or "default"
        if rope_type != "default":
            raise UserError(f"config.json: RoPE scaling {rope_type!r} is not supported; remove it to use plain RoPE")
    if config.get("use_sliding_window"):
        raise UserError("config.json: use_sliding_window is on; only full attention is supported")
    if other := sorted({str(kind) for kind in config.get("layer_types") or ()} - {"full_attention"}):
        raise UserError(f"config.json: layer_types has {', '.join(other)}; only full attention is supported")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"config.json: hidden_act {config['hidden_act']!r} is not supported; Qwen2 uses 'silu'")
    try:
        heads = int(config["num_attention_heads"])
        stop = (generation or {}).get("eos_token_id", config.get("eos_token_id"))
        stops = stop if isinstance(stop, list) else [] if stop is None else [stop]
        return ModelConfig(
            vocab_size=int(config["vocab_size"]),
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_hidden_layers=int(config["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // max(heads, 1)),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta", 10_000.0)),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_position_embeddings=int(config.get("max_position_embeddings", 32768)),
            bos_token_id=config.get("bos_token_id"),
            pad_token_id=(generation or {}).get("pad_token_id", config.get("pad_token_id")),
            stop_token_ids=tuple(int(token) for token in stops),
        )
    except KeyError as error:
        raise UserError(f"config.json: the key {error.args[0]!r} is missing") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"config.json: a value has the wrong type ({error})") from None


def read_hf_config(folder: Path) -> ModelConfig:
    """Read the config of the Hugging Face model folder `folder`.

    Raises:
      UserError: the folder or its `config.json` is missing or broken.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a Hugging Face model folder, it has no config.json")
    generation_file = folder / "generation_config.json"
    try:
        generation = _read_json(generation_file) if generation_file.is_file() else None
        return model_config_from_hf(_read_json(folder / "config.json"), generation)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of `config`, in the form in which Qwen2.5 is published."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.stop_token_ids[0] if config.stop_token_ids else None,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "qwen2",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }


def hf_generation_config(config: ModelConfig) -> dict[str, Any]:
    """The `generation_config.json`: every stop id, and the paper's sampling (temperature 0.7, top-p 0.9)."""
    return {
        "bos_token_id": config.bos_token_id,
        "do_sample": True,
        "eos_token_id": list(config.stop_token_ids),
        "pad_token_id": config.pad_token_id,
        "temperature": 0.7,
        "top_p": 0.9,
    }


def model_config_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `dataclasses.asdict`, after a trip through JSON."""
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown := set(values) - names:
        raise UserError(f"model config: unknown keys {sorted(unknown)}; it was written by another version")
    return ModelConfig(**{**values, "stop_token_ids": tuple(values["stop_token_ids"])})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path.name} does not hold a JSON object")
    return value
