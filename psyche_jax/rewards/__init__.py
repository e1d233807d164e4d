"""Rewards for responses of token ids, computed inside a jitted program, without decoding or callbacks.

Rules on text are automata, lifted from bytes to the tokens of a vocabulary; what they mean is written down in
plain Python in `psyche_jax.rewards.reference`.
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
from psyche_jax.rewards.score import (
    CompiledRules,
    RewardState,
    advance,
    compile_rules,
    completion_mask,
    finish,
    initial_state,
    score,
)
from psyche_jax.rewards.token_bytes import token_bytes_from_tokenizer

__all__ = [
    "AnswerSetRule",
    "CompiledRules",
    "FunctionReward",
    "LengthRule",
    "PatternRule",
    "RepetitionRule",
    "RewardConfig",
    "RewardState",
    "RuleConfig",
    "ThinkFormatRule",
    "advance",
    "compile_rules",
    "completion_mask",
    "extract_letters",
    "finish",
    "initial_state",
    "score",
    "token_bytes_from_tokenizer",
]
