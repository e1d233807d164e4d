"""The sizes that a benchmark is run at. The defaults are those of the benchmarks that it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from psyche_jax.errors import UsageError

if TYPE_CHECKING:
    from psyche_jax.config import Dtype

What: TypeAlias = Literal["sft", "grpo", "rollout"]


def _at_least_one(shape: object, *names: str) -> None:
    for name in names:
        if getattr(shape, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(shape, name)}")


@dataclass(frozen=True)
class ModelShape:
    """A Qwen2 with heads of width / heads; parameters are float32, `dtype` is what products are computed in."""

    layers: int = 4
    width: int = 256
    heads: int = 8
    kv_heads: int = 2
    ffn: int = 1024
    vocab: int = 4096
    tied: bool = False
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        _at_least_one(self, "layers", "width", "heads", "kv_heads", "ffn", "vocab")
        if self.width % (2 * self.heads):
            raise UsageError(f"--width {self.width} must be a multiple of twice --heads {self.heads}")
        if self.heads % self.kv_heads:
            raise UsageError(f"--heads {self.heads} must be a multiple of --kv-heads {self.kv_heads}")


@dataclass(frozen=True)
class SftShape:
    """A step of SFT: full sequences, every token learned but the first."""

    model: ModelShape = ModelShape()
    batch: int = 8
    length: int = 256

    def __post_init__(self) -> None:
        _at_least_one(self, "batch", "length")
        if self.length < 2:
            raise UsageError(f"--length must be at least 2, not {self.length}")

    @property
    def tokens(self) -> int:
        """Trained on in a step."""
        return self.batch * self.length


@dataclass(frozen=True)
class RolloutShape:
    """Responses of full length: no token stops them."""

    model: ModelShape = ModelShape()
    prompts: int = 4
    generations: int = 8
    prompt_length: int = 64
    completion_length: int = 64

    def __post_init__(self) -> None:
        _at_least_one(self, "prompts", "generations", "prompt_length", "completion_length")

    @property
    def tokens(self) -> int:
        """Generated in a step."""
        return self.prompts * self.generations * self.completion_length


@dataclass(frozen=True)
class GrpoShape(RolloutShape):
    """An iteration of GRPO with one update, on such responses; `beta` is the KL coefficient."""

    beta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generations < 2:
            raise UsageError(f"--generations must be at least 2, not {self.generations}")
        if self.beta < 0:
            raise UsageError(f"--beta must not be negative, not {self.beta}")
