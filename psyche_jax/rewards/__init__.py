"""Rewards for responses of token ids, computed inside a jitted program, without decoding or callbacks.

Rules on text are automata, lifted from bytes to the tokens of a vocabulary; what they mean is written down in
plain Python in `psyche_jax.rewards.reference`. Configs and their meaning are imported here; what computes (`score`,
`token_bytes`) is imported from its module, so that reading a config does not start JAX.
"""

from psyche_jax.rewards.config import (
    AnswerSetRule,
    FunctionReward,
    LengthRule,
    PatternRule,
    RepetitionRule,
    RewardConfig,
    RuleConfig,
    ThinkFormatRule,
)
from psyche_jax.rewards.reference import extract_letters

__all__ = [
    "AnswerSetRule",
    "FunctionReward",
    "LengthRule",
    "PatternRule",
    "RepetitionRule",
    "RewardConfig",
    "RuleConfig",
    "ThinkFormatRule",
    "extract_letters",
]
