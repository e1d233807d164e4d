from __future__ import annotations

import random
import unicodedata

import pytest
import tokenizers
from support.adversary import FRAGMENTS, Vocabulary, qwen_folder, random_text, tiny_tokenizer
from tokenizers import decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from psyche_jax.errors import UserError
from psyche_jax.rewards.token_bytes import token_bytes_from_tokenizer


@pytest.mark.parametrize("name", ["tiny", "qwen"])
def test_bytes_of_an_encoding_are_the_text(name: str, request: pytest.FixtureRequest) -> None:
    vocab: Vocabulary = request.getfixturevalue(name)
    rng = random.Random(0)
    for text in [random_text(rng).replace("<|im_end|>", "") for _ in range(300)] + FRAGMENTS:
        if text == "<|im_end|>":
            continue
        normal = unicodedata.normalize("NFC", text) if name == "qwen" else text  # Qwen's tokenizer does
        ids = vocab.tokenizer.encode(text, add_special_tokens=False).ids
        assert b"".join(vocab.token_bytes[i] or b"?" for i in ids).decode() == normal


def test_added_tokens_are_text_unless_special(tiny: Vocabulary) -> None:
    def of(token: str) -> bytes | None:
        return tiny.token_bytes[tiny.tokenizer.token_to_id(token)]

    assert of("</think>") == b"</think>"
    assert of("<tool_call>") == b"<tool_call>"
    assert of("<|im_start|>") is None
    assert tiny.token_bytes[-7:] == [None] * 7
    assert all(text is not None for text in tiny.token_bytes[3:-7])


def test_special_tags_are_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(["<think>", "<|x|>"])
    tag, x = tokenizer.token_to_id("<think>"), tokenizer.token_to_id("<|x|>")
    found = token_bytes_from_tokenizer(tokenizer)
    assert (found[tag], found[x]) == (b"<think>", None)


def test_every_single_byte_is_a_token(qwen: Vocabulary) -> None:
    assert {bytes([b]) for b in range(256)} <= {text for text in qwen.token_bytes if text is not None}
    assert len(qwen.token_bytes) == 152064
    assert qwen.token_bytes[151669:] == [None] * (152064 - 151669)
    assert qwen.token_bytes[qwen.tokenizer.token_to_id("<think>")] == b"<think>"
    assert all(qwen.token_bytes[i] is None for i in qwen.stops)


def test_from_transformers() -> None:
    tokenizer = tiny_tokenizer()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert token_bytes_from_tokenizer(fast) == token_bytes_from_tokenizer(tokenizer)


@pytest.mark.slow
def test_from_the_real_tokenizer(qwen: Vocabulary) -> None:
    tokenizer = AutoTokenizer.from_pretrained(qwen_folder())
    assert token_bytes_from_tokenizer(tokenizer, 152064) == qwen.token_bytes


def test_what_is_not_byte_level_is_refused() -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(UserError, match="not byte-level"):
        token_bytes_from_tokenizer(words)
    words.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    with pytest.raises(UserError, match="not byte-level"):
        token_bytes_from_tokenizer(words)
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "答": 1}, unk_token="a"))
    words.decoder = decoders.ByteLevel()
    with pytest.raises(UserError, match="token 1 "):
        token_bytes_from_tokenizer(words)
    with pytest.raises(UserError, match="not a fast one"):
        token_bytes_from_tokenizer(object())


def test_a_model_smaller_than_its_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match="vocab_size"):
        token_bytes_from_tokenizer(tiny_tokenizer(), 100)
