"""Import and export of model folders: bit for bit, and read by plain transformers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file
from support.qwen2_reference import SMALL, apart, logits, one_device, read, reference, reference_logits, torch, worst

from psyche_jax.model import huggingface
from psyche_jax.model.config import ModelConfig, read_hf_config
from psyche_jax.model.huggingface import copy_tokenizer, load_tokenizer, read_parameters, write_weights
from psyche_jax.model.qwen2 import initialize


def tensors(folder):
    """All tensors of a folder as (dtype, shape, bytes); the files' own index is not trusted."""
    result = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert name not in result
                tensor = file.get_tensor(name)
                raw = tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32).numpy().tobytes()
                result[name] = (str(tensor.dtype), tuple(tensor.shape), raw)
    return result


@pytest.mark.parametrize("shard_bytes", [4 * 2**30, 20_000], ids=["whole", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_round_trip_is_bit_for_bit(tied, dtype, shard_bytes, tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    sharding = {"max_shard_size": "20KB"} if shard_bytes == 20_000 else {}
    reference(SMALL._replace(tied=tied), source, dtype=dtype, **sharding)
    config = read_hf_config(source)
    parameters = read_parameters(source, config, one_device().sharding, jnp.dtype(dtype))
    monkeypatch.setattr(huggingface, "_SHARD_BYTES", shard_bytes)
    write_weights(target, config, parameters)

    before, after = tensors(source), tensors(target)
    assert len(after) == 2 + 12 * SMALL.layers + (not tied)
    assert after == before
    files = sorted(path.name for path in target.glob("*.safetensors"))
    index = target / "model.safetensors.index.json"
    if shard_bytes == 20_000:
        assert len(files) > 3
        assert all((target / file).stat().st_size < 25_000 for file in files)
        content = json.loads(index.read_text())
        assert sorted(set(content["weight_map"].values())) == files
        assert set(content["weight_map"]) == set(after)
        assert content["metadata"]["total_size"] == sum(len(raw) for _, _, raw in after.values())
    else:
        assert files == ["model.safetensors"]
        assert not index.exists()
    with safe_open(target / files[0], framework="np") as file:
        assert file.metadata() == {"format": "pt"}

    loaded, report = transformers.Qwen2ForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.dtype == getattr(torch, dtype)
    tokens = np.arange(30).reshape(2, 15)
    model = transformers.Qwen2ForCausalLM.from_pretrained(source)
    assert (reference_logits(loaded, tokens) == reference_logits(model, tokens)).all()
    again = read_hf_config(target)
    assert again == config
    assert loaded.config.rope_parameters["rope_theta"] == config.rope_theta == 20_000


NEW = ModelConfig(41, 12, 20, 2, 3, 3, head_dim=6, rope_theta=123.0, pad_token_id=1)


@pytest.fixture(scope="module")
def fresh():
    """Parameters that no file held, three times as large as training starts from."""
    parameters = initialize(NEW, jax.random.key(0), one_device().sharding, jnp.float32)
    return jax.tree.map(lambda x: 3 * np.asarray(x) if x.ndim > 1 else np.asarray(x), parameters)


@pytest.mark.parametrize("stop", [(), (5, 9)])
def test_a_new_model_exported(stop, fresh, tmp_path, figure):
    """Made by the port, so with nothing of transformers' in the folder; its generation config takes effect."""
    pytest.importorskip("torch")
    config = dataclasses.replace(NEW, stop_token_ids=stop)
    write_weights(tmp_path, config, fresh)
    assert read_hf_config(tmp_path) == config
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is transformers.Qwen2ForCausalLM
    tokens = np.arange(40).reshape(2, 20)
    difference = worst(logits(read(tmp_path), apart(tokens)), reference_logits(model, tokens))
    figure("logits, random models", difference, 1e-4)
    generation = model.generation_config
    assert (generation.temperature, generation.top_p, generation.do_sample) == (0.7, 0.9, True)
    assert tuple(generation.eos_token_id or ()) == stop
    torch.manual_seed(0)
    response = model.generate(torch.tensor(tokens), max_new_tokens=300 if stop else 20)[:, 20:]
    if stop:
        assert all(set(row.tolist()) & set(stop) for row in response)
    else:
        assert response.shape == (2, 20)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_is_the_one_asked_for(dtype, tmp_path):
    reference(SMALL, tmp_path, dtype="bfloat16" if dtype == "float32" else "float32")
    config = read_hf_config(tmp_path)
    parameters = read_parameters(tmp_path, config, one_device().sharding, jnp.dtype(dtype))
    assert {str(x.dtype) for x in jax.tree.leaves(parameters)} == {dtype}


def test_superfluous_tensors_that_are_harmless(tmp_path):
    """A tied head stored twice and old buffers of RoPE are passed over."""
    reference(SMALL._replace(tied=True), tmp_path)
    expected = read(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(arrays, tmp_path / "model.safetensors")
    found = read(tmp_path)
    assert jax.tree.all(jax.tree.map(lambda one, other: bool((one == other).all()), found[1], expected[1]))


def save_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    fast = Tokenizer(models.WordLevel({"<|im_end|>": 0, "心": 1, "理": 2}, unk_token="<|im_end|>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token="<|im_end|>", chat_template=template
    )
    tokenizer.save_pretrained(folder)


def test_tokenizer_copy(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    save_tokenizer(source)
    (source / "secrets.txt").write_text("not part of a tokenizer")
    copy_tokenizer(source, target)
    assert {path.name for path in target.iterdir()} == {path.name for path in source.iterdir()} - {"secrets.txt"}
    tokenizer = load_tokenizer(target)
    assert tokenizer("理 心 <|im_end|>").input_ids == [2, 1, 0]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "心"}], tokenize=False) == "心"
