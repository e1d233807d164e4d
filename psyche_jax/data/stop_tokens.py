"""Which tokens end a response: all that a model's files name, and the one that SFT teaches as the end of a turn."""

import contextlib
import dataclasses
from pathlib import Path

from psyche_jax.data.chat import end_of_turn_id
from psyche_jax.errors import UserError
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.huggingface import is_tokenizer, load_tokenizer


def with_stop_tokens(config: ModelConfig, folder: Path) -> ModelConfig:
    """`config` with the stop tokens of the tokenizer in `folder`, if there is one, after its own.

    Raises:
      UserError: there is none at all; a token is named that the model does not have; or the tokenizer is broken.
    """
    stops = list(config.stop_token_ids)
    if is_tokenizer(folder):
        tokenizer = load_tokenizer(folder)
        if (size := max(tokenizer.get_vocab().values()) + 1) > config.vocab_size:  # ids may have gaps
            raise UserError(f"{folder}: the tokenizer has ids for {size} tokens, the model only {config.vocab_size}")
        if tokenizer.eos_token_id is not None:
            stops.append(tokenizer.eos_token_id)
        if tokenizer.chat_template is not None:
            with contextlib.suppress(UserError):  # a template without an end of turn adds nothing
                stops.append(end_of_turn_id(tokenizer))
    if not stops:
        raise UserError(
            f"{folder}: no stop token is named, so no response could end; "
            "give generation_config.json an eos_token_id, or tokenizer_config.json an eos_token"
        )
    for token in (*stops, config.bos_token_id, config.pad_token_id):
        if token is not None and token >= config.vocab_size:
            raise UserError(f"{folder}: token {token} is named (bos, eos or pad); the model has {config.vocab_size}")
    return dataclasses.replace(config, stop_token_ids=tuple(dict.fromkeys(stops)))
