"""The bytes that each token id stands for."""

from __future__ import annotations

import json
from typing import Any

from psyche_jax.errors import UsageError
from psyche_jax.rewards.reference import CLOSE, OPEN


def _byte_of_character() -> dict[str, int]:
    """GPT-2's byte map: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def token_bytes_from_tokenizer(tokenizer: Any, vocab_size: int | None = None) -> list[bytes | None]:
    """The bytes of every token of a byte-level BPE tokenizer; None for ids that are not text.

    `tokenizer` is a fast tokenizer of `transformers`, or a `tokenizers.Tokenizer`. `vocab_size` is the
    model's, which may be larger (padding rows); the list has this length. Added tokens count as their text
    (Qwen3's `<think>`, `<tool_call>`), except those that the tokenizer calls special (`<|im_start|>`): these
    steer, and a response that holds one before its stop token has no text. `<think>` and `</think>` are text all the
    same. Ids that no token has are None.

    Raises UsageError if the tokenizer is not fast or not byte-level, or has more tokens than `vocab_size`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "get_added_tokens_decoder"):
        raise UsageError(
            f"tokenizer {type(tokenizer).__name__} is not a fast one: rewards need its tokenizer.json "
            "(load it with transformers.AutoTokenizer)"
        )
    parts = json.loads(backend.to_str())
    decoder = parts.get("decoder") or {}
    if "ByteLevel" not in [part.get("type") for part in (decoder, *decoder.get("decoders", ()))]:
        raise UsageError(
            f"tokenizer {type(tokenizer).__name__} is not byte-level (its decoder is "
            f"{decoder.get('type', 'missing')}): rewards need a byte-level BPE such as Qwen's"
        )
    added = backend.get_added_tokens_decoder()
    vocabulary = {i: token for token, i in backend.get_vocab(with_added_tokens=False).items()}
    tokens = 1 + max([*vocabulary, *added])
    size = tokens if vocab_size is None else vocab_size
    if tokens > size:
        raise UsageError(
            f"the tokenizer has {tokens} tokens, the model {size} (vocab_size): take the model's tokenizer"
        )
    byte_of = _byte_of_character()
    result: list[bytes | None] = [None] * size
    for i, token in vocabulary.items():
        if i not in added:
            try:
                result[i] = bytes([byte_of[character] for character in token])
            except KeyError as error:
                raise UsageError(
                    f"token {i} ({token!r}) is not made of byte-level characters: "
                    "rewards need a byte-level BPE such as Qwen's"
                ) from error
    for i, token in added.items():
        if not token.special or token.content in (OPEN, CLOSE):
            result[i] = token.content.encode("utf-8")
    return result
