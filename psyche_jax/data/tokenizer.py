"""A small byte-level BPE with Qwen's special tokens and pre-tokenization, for models made from nothing."""

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from psyche_jax.model.huggingface import make_portable

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Qwen2's split, from its published tokenizer.json.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> dict[str, Any]:
    """Train on `texts` and save as a Hugging Face tokenizer with a ChatML template, as Qwen2.5's.

    Returns what the ModelConfig of a model with this tokenizer says of it, but for the size of the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    end_of_text, _, end_of_turn = SPECIAL_TOKENS
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end_of_turn,
        pad_token=end_of_text,
        chat_template=chat_template(),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    make_portable(folder)
    text, turn = tokenizer.token_to_id(end_of_text), tokenizer.token_to_id(end_of_turn)
    return {"bos_token_id": text, "pad_token_id": text, "stop_token_ids": (turn, text)}


def chat_template() -> str:
    """ChatML without tools, which renders what Qwen2.5's template does when a system prompt is given."""
    return (files("psyche_jax.data") / "chat_template.jinja").read_text(encoding="utf-8")
