"""Architectures of published models by name, so that a plan needs no model folder.

Source: `config.json` and `generation_config.json` of huggingface.co/Qwen/Qwen2.5-*-Instruct.
"""

import difflib

from psyche_jax.errors import UsageError
from psyche_jax.model.config import ModelConfig


def _qwen(width: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width // heads,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
        bos_token_id=151643,
        pad_token_id=151643,
        stop_token_ids=(151645, 151643),
    )


ARCHITECTURES: dict[str, ModelConfig] = {
    "Qwen2.5-0.5B": _qwen(896, 4864, 24, 14, 2, 151936, True),
    "Qwen2.5-1.5B": _qwen(1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-3B": _qwen(2048, 11008, 36, 16, 2, 151936, True),
    "Qwen2.5-7B": _qwen(3584, 18944, 28, 28, 4, 152064, False),
    "Qwen2.5-14B": _qwen(5120, 13824, 48, 40, 8, 152064, False),
}
SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)


def published_architecture(name: str) -> ModelConfig:
    """The architecture called `name`; the suffix `-Instruct` may stand or not.

    Raises:
      UsageError: there is none of that name.
    """
    known = ARCHITECTURES.get(name.removesuffix("-Instruct"))
    if known is None:
        nearest = difflib.get_close_matches(name, ARCHITECTURES, 1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise UsageError(f"model.architecture: {name!r} is not known; {hint}known: {', '.join(ARCHITECTURES)}")
    return known


def check_architecture(name: str | None, config: ModelConfig, origin: str) -> None:
    """Whether the model that was opened at `origin` has the shape of `name` (None: nothing is asked).

    Raises:
      UsageError: naming the first size that differs.
    """
    if name is None:
        return
    expected = published_architecture(name)
    for field in SHAPE:
        if getattr(config, field) != getattr(expected, field):
            raise UsageError(
                f"model.architecture: {origin} is no {name}: its {field} is {getattr(config, field)}, "
                f"not {getattr(expected, field)}; correct model.path or model.architecture"
            )
