"""Published folders read to the shape, RoPE base, ids and templates that transformers has."""

import json

import pytest
import transformers
from support.published_folders import BILLIONS, FOLDERS, IM_END, OTHER_FAMILIES, R1_IDS, R1_TOKENS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from psyche_jax.data.chat import end_of_turn_id, opened_text
from psyche_jax.model.config import hf_config, model_config_from_hf
from psyche_jax.model.huggingface import load_tokenizer
from psyche_jax.train.stored_models import open_model

CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def tokenizer_json():
    """A function that gives a `tokenizer.json` with special tokens at the ids at which Qwen2's have theirs."""

    def text(special):
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        filler = [f"Ġ{number}" for number in range(151643 - len(alphabet))]
        vocabulary = {token: index for index, token in enumerate([*sorted(alphabet), *filler])}
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        return tokenizer.to_str()

    return {"r1": text(R1_TOKENS), "chatml": text(CHATML_TOKENS)}


def write(folder, published, tokenizer_json):
    folder.mkdir()
    for name in ("config", "generation_config", "tokenizer_config"):
        (folder / f"{name}.json").write_text(json.dumps(getattr(published, name)()))
    kind = "r1" if published.template == "r1" else "chatml"
    (folder / "tokenizer.json").write_text(tokenizer_json[kind])
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_config(name):
    published = FOLDERS[name]
    config = model_config_from_hf(published.config(), published.generation_config())
    theirs = transformers.Qwen2Config.from_dict(published.config())
    assert config.rope_theta == theirs.rope_parameters["rope_theta"] == published.theta
    for field in ("vocab_size", "hidden_size", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(config, field) == getattr(theirs, field)
    assert set(theirs.layer_types) == {"full_attention"}
    # A repeated head is what 1.5B of R1 has over the tied one.
    untied = published.template == "r1" and published.size == "1.5B"
    assert config.num_parameters / 1e9 == pytest.approx(1.78 if untied else BILLIONS[published.size], abs=0.01)
    generation = transformers.GenerationConfig.from_dict(published.generation_config())
    named = generation.eos_token_id
    assert set(named if isinstance(named, list) else [named]) <= set(config.stop_token_ids)
    again = model_config_from_hf(hf_config(config, "bfloat16"))
    assert (again.rope_theta, set(again.stop_token_ids)) == (config.rope_theta, set(config.stop_token_ids))


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_config_of_another_family(name):
    """Read as transformers reads it, and written so that transformers reads the same again."""
    published, billions = OTHER_FAMILIES[name]
    config = model_config_from_hf(published)
    written = json.loads(json.dumps(hf_config(config, "bfloat16")))
    assert written["architectures"] == published["architectures"]
    assert model_config_from_hf(written) == config
    assert config.num_parameters / 1e9 == pytest.approx(billions, abs=0.005)
    kind = transformers.AutoConfig.for_model(published["model_type"]).__class__
    theirs, again = kind.from_dict(json.loads(json.dumps(published))), kind.from_dict(written)
    kept = (
        "hidden_size",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
        "max_position_embeddings",
        "attention_bias",
    )
    for field in kept:
        assert getattr(config, field) == getattr(theirs, field) == getattr(again, field)
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert again.rope_parameters == {k: v for k, v in theirs.rope_parameters.items() if k != "attn_factor"}


@pytest.mark.parametrize(
    ("name", "stops", "opened"),
    [
        ("Qwen2-7B", (151643, 151645), ""),
        ("Qwen2.5-7B-Instruct", (151645, 151643), ""),
        ("Qwen2.5-Math-7B", (151643, 151645), ""),
        ("QwQ-32B-Preview", (151645, 151643), ""),
        ("QwQ-32B", (151645, 151643), "<think>\n"),
        ("DeepSeek-R1-Distill-Qwen-1.5B", (151643,), "<think>\n"),
    ],
)
def test_tokens_and_templates(name, stops, opened, tmp_path, tokenizer_json):
    """Also what a base folder does not name: the token that its template ends a turn with."""
    published = FOLDERS[name]
    folder = write(tmp_path / "model", published, tokenizer_json)
    assert open_model(str(folder)).config.stop_token_ids == stops
    tokenizer = load_tokenizer(folder)
    assert end_of_turn_id(tokenizer) == (R1_IDS[0] if published.template == "r1" else IM_END)
    assert opened_text(tokenizer) == opened
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for field in ("chat_template", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, field) == getattr(theirs, field)
    talk = [{"role": "user", "content": "心?"}, {"role": "assistant", "content": "<think>a</think>b"}]
    ours = tokenizer.apply_chat_template(talk, tokenize=False)
    assert ours == theirs.apply_chat_template(talk, tokenize=False)
    ids = tokenizer.encode(ours, add_special_tokens=False)
    assert (ids[0] == R1_IDS[3]) == (published.template == "r1"), "R1's template begins with its bos, once"
    assert ids.count(R1_IDS[3]) == (published.template == "r1")
