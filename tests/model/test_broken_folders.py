"""Every broken model folder gives one line that names what is wrong with it."""

import json
import math
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from support.qwen2_reference import SMALL, one_device, reference

from psyche_jax.errors import UserError
from psyche_jax.model.config import read_hf_config
from psyche_jax.model.huggingface import copy_tokenizer, load_tokenizer, read_parameters

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e6}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    reference(SMALL, folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    reference(SMALL, folder, max_shard_size="20KB")
    return folder


def failure(folder, *expected):
    """Reads the folder, which must fail with one line that has all of `expected` in it."""
    with pytest.raises(UserError) as caught:
        config = read_hf_config(folder)
        read_parameters(folder, config, one_device().sharding, jnp.float32)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    for part in (folder.name, *expected):
        assert part in message
    return message


def edit(folder, file="config.json", **values):
    content = json.loads((folder / file).read_text())
    for name, value in values.items():
        if value is KeyError:
            del content[name]
        else:
            content[name] = value
    (folder / file).write_text(json.dumps(content))


@pytest.fixture
def model(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


@pytest.fixture
def shards(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "model")


def test_the_folders_before_they_are_broken(whole, sharded):
    for folder in (whole, sharded):
        read_parameters(folder, read_hf_config(folder), one_device().sharding, jnp.float32)


def test_no_folder(tmp_path):
    failure(tmp_path / "absent", "no such model folder")
    (tmp_path / "file").write_text("x")
    failure(tmp_path / "file", "no such model folder")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "no config.json"),
        ("", "config.json cannot be read"),
        ('{"model_type": ', "config.json cannot be read"),
        ("\n\n[1,\n2", "config.json cannot be read"),
        (b"\xff\xfe\x00", "config.json cannot be read"),
        ("[]", "config.json does not hold a JSON object"),
        ("{}", "model_type is None"),
        ('{"a":' * 100_000, "config.json cannot be read"),
        ("[" * 100_000 + "]" * 100_000, "config.json cannot be read"),
        ('{"hidden_size": 1' + "0" * 9999 + "}", "config.json cannot be read"),
    ],
)
def test_unreadable_config(text, expected, model):
    path = model / "config.json"
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    failure(model, expected)


@pytest.mark.parametrize("text", ["{", '{"a":' * 100_000])
def test_unreadable_generation_config(text, model):
    (model / "generation_config.json").write_text(text)
    failure(model, "generation_config.json cannot be read")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model_type": "mistral"}, ["model_type is 'mistral'", "'qwen2', 'qwen3', 'llama'"]),
        ({"model_type": "qwen3_moe"}, ["model_type is 'qwen3_moe'", "supported are dense text models", "'qwen3'"]),
        ({"model_type": "qwen2_5_vl"}, ["model_type is 'qwen2_5_vl'", "supported are dense text models", "'qwen2'"]),
        ({"model_type": "llama", "mlp_bias": True}, ["mlp_bias is on", "only an MLP without biases is supported"]),
        ({"model_type": "qwen3", "attention_bias": 1}, ["wrong type", "attention_bias"]),
        ({"model_type": "qwen3", "use_sliding_window": True}, ["use_sliding_window"]),
        ({"model_type": "llama"}, ["extra model.layers.0.self_attn.k_proj.bias"]),
        ({"use_sliding_window": True}, ["use_sliding_window"]),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, ["sliding_attention"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"is_causal": False}, ["is_causal is False", "only causal attention is supported"]),
        ({"is_causal": None}, ["is_causal is None"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config is set", "floating point"]),
        ({"transformers_weights": "other.safetensors"}, ["transformers_weights is set"]),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
            ["RoPE scaling 'yarn' has no original_max_position_embeddings"],
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["RoPE scaling 'linear'", "'yarn' and 'llama3' are"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["RoPE scaling 'dynamic' is not supported"]),
        ({"rope_scaling": {"rope_type": "longrope"}}, ["RoPE scaling 'longrope' is not supported"]),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, ["RoPE scaling ['yarn'] is not supported"]),
        ({"rope_scaling": {"rope_type": "llama3"}}, ["RoPE scaling 'llama3' has no factor"]),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, ["RoPE scaling 'llama3' has no low_freq_factor"]),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, ["low_freq_factor 1.0 must be less than"]),
        ({"rope_scaling": {**YARN, "factor": "4"}}, ["wrong type", "factor is '4'"]),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, ["factor is 0.5", "at least 1"]),
        ({"rope_scaling": {**YARN, "attention_factor": -1.0}}, ["attention_factor is -1.0", "positive"]),
        ({"rope_scaling": {**YARN, "beta_slow": 40}}, ["beta_slow 40.0 must be less than beta_fast 32.0"]),
        ({"rope_scaling": {**YARN, "truncate": "no"}}, ["wrong type", "truncate"]),
        ({"rope_scaling": {**YARN, "mscale": 1.0}}, ["RoPE scaling with mscale 1.0 is not supported"]),
        ({"rope_scaling": YARN, "partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5 is not supported"]),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, ["original_max_position_embeddings is 0"]),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 1.5}}, ["wrong type", "1.5"]),
        ({"rope_scaling": {**YARN, "rope_theta": 1.0}}, ["rope_theta 1.0", "must be over 1"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}}, ["rope_parameters"]),
        ({"rope_parameters": "default"}, ["rope_parameters"]),
        ({"rope_parameters": {"rope_theta": "large"}}, ["wrong type", "large"]),
        ({"num_attention_heads": 7}, ["num_attention_heads 7", "num_key_value_heads 3"]),
        ({"num_attention_heads": 0}, ["num_attention_heads"]),
        ({"num_attention_heads": 0, "head_dim": KeyError}, ["num_attention_heads"]),
        ({"num_key_value_heads": -3}, ["num_key_value_heads -3"]),
        ({"head_dim": 7}, ["head_dim 7 is odd"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers is 0"]),
        ({"hidden_size": KeyError}, ["'hidden_size' is missing"]),
        ({"vocab_size": None}, ["wrong type"]),
        ({"vocab_size": "many"}, ["wrong type", "many"]),
        ({"intermediate_size": [1]}, ["wrong type"]),
        ({"hidden_size": "1e400"}, ["wrong type", "hidden_size", "1e400"]),
        ({"hidden_size": True}, ["wrong type", "hidden_size", "True"]),
        ({"hidden_size": 64.5}, ["wrong type", "hidden_size", "64.5"]),
        ({"hidden_size": math.inf}, ["wrong type", "hidden_size", "inf"]),
        ({"hidden_size": 10**30}, ["hidden_size", "it must be from 1 to"]),
        ({"vocab_size": -101}, ["vocab_size is -101"]),
        ({"num_attention_heads": [6]}, ["wrong type", "num_attention_heads"]),
        ({"head_dim": {"a": 8}}, ["wrong type", "head_dim"]),
        ({"max_position_embeddings": "x" * 10**6}, ["wrong type", "max_position_embeddings"]),
        ({"max_position_embeddings": 0}, ["max_position_embeddings is 0"]),
        ({"rms_norm_eps": "1e-6"}, ["wrong type", "rms_norm_eps"]),
        ({"rms_norm_eps": -1.0}, ["rms_norm_eps is -1.0"]),
        ({"rms_norm_eps": math.nan}, ["rms_norm_eps is nan"]),
        ({"rope_parameters": {"rope_theta": math.inf}}, ["rope_theta is inf"]),
        ({"rope_parameters": {"rope_theta": 10**400}}, ["rope_theta is 1000"]),
        ({"rope_parameters": {"rope_theta": True}}, ["wrong type", "rope_theta"]),
        ({"rope_parameters": {"rope_theta": None}}, ["wrong type", "rope_theta"]),
        ({"rope_parameters": [1]}, ["rope_parameters"]),
        ({"tie_word_embeddings": "false"}, ["wrong type", "tie_word_embeddings"]),
        ({"layer_types": 3}, ["layer_types has 3"]),
        ({"layer_types": [[["full_attention"]]]}, ["layer_types"]),
        ({"model_type": ["qwen2"] * 9999}, ["model_type"]),
        ({"bos_token_id": "1"}, ["wrong type", "bos_token_id"]),
        ({"bos_token_id": -1}, ["bos_token_id is -1"]),
        ({"num_hidden_layers": 1_000_000}, ["num_hidden_layers is 1000000", "the files hold 39 tensors"]),
        ({"num_hidden_layers": 2**31 - 1}, ["num_hidden_layers is 2147483647"]),
        ({"vocab_size": 2**31 - 1}, ["mis-shaped", "model.embed_tokens.weight (101, 40), not (2147483647, 40)"]),
        ({"intermediate_size": 2**31 - 1, "hidden_size": 2**31 - 1}, ["mis-shaped", " more"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_config_that_is_not_supported(values, expected, model):
    edit(model, **values)
    failure(model, *expected)


@pytest.mark.parametrize("stop", ["<|im_end|>", ["<|im_end|>"], {"id": 1}, [[1, 2]]])
def test_stop_ids_that_are_no_numbers(stop, model):
    edit(model, "generation_config.json", eos_token_id=stop)
    failure(model, "generation_config.json: a value has the wrong type")


def test_no_weights(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    failure(model, "no model.safetensors")


@pytest.mark.parametrize("kept", [0, 5, 300, -1, -1000])
def test_weights_cut_short(kept, model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    failure(model, "model.safetensors: is broken or cut short")


def test_weights_that_are_something_else(model):
    (model / "model.safetensors").write_bytes(b"\x80\x02}q\x00." * 999)
    failure(model, "model.safetensors: is broken or cut short")


def test_one_shard_cut_short(shards):
    path = sorted(shards.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-8])
    failure(shards, f"{path.name}: is broken or cut short")


def test_index_names_absent_files(shards):
    absent = sorted(shards.glob("*.safetensors"))[1:3]
    for path in absent:
        path.unlink()
    failure(shards, "model.safetensors.index.json: names files that are absent", *(path.name for path in absent))


def test_index_names_tensors_that_are_nowhere(shards):
    weight_map = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    weight_map["model.layers.9.mlp.extra"] = next(iter(weight_map.values()))
    edit(shards, "model.safetensors.index.json", weight_map=weight_map)
    failure(shards, "index.json: names tensors that are in no file: model.layers.9.mlp.extra")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"lm_head.weight": 3}}',
        '{"weight_map": {"lm_head.weight": {"a": [1]}}}',
        '{"weight_map": {"lm_head.weight": "' + "x" * 9999 + '"}}',
        '{"weight_map":' * 100_000,
        '{"weight_map": {' + ", ".join(f'"t{i}": "f{i}"' for i in range(9999)) + "}}",
    ],
    ids=lambda text: text[:40],
)
def test_broken_index(text, shards):
    (shards / "model.safetensors.index.json").write_text(text)
    failure(shards, "model.safetensors.index.json")


def test_a_tensor_in_two_files(shards):
    """Which of them counts is not for this package to guess."""
    first, second = sorted(shards.glob("*.safetensors"))[:2]
    with safe_open(first, framework="np") as file:
        name = next(iter(file.keys()))
    rewrite(shards, lambda arrays: arrays.update({name: np.ones(3, np.float32)}), second.name)
    failure(shards, f"{second.name}: holds tensors that another file of the folder holds too: {name}")


def test_whole_weights_beside_an_index_of_others(shards, whole):
    """Plain transformers would read the first and never look at the index."""
    shutil.copy(whole / "model.safetensors", shards)
    failure(shards, "model.safetensors.index.json: does not name model.safetensors")
    with safe_open(whole / "model.safetensors", framework="np") as file:
        names = list(file.keys())
    edit(shards, "model.safetensors.index.json", weight_map=dict.fromkeys(names, "model.safetensors"))
    read_parameters(shards, read_hf_config(shards), one_device().sharding, jnp.float32)


def test_an_adapter_beside_the_weights(model):
    """Also one that is pickled, which a download does not fetch, but its config."""
    for name in ("adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"):
        (model / name).write_bytes(b"{}")
        failure(model, f"{name} would be left out", "import that")


def rewrite(folder, change, file="model.safetensors"):
    path = folder / file
    with safe_open(path, framework="np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(arrays)
    save_file(arrays, path)


def test_tensors_that_do_not_fit(model):
    def change(arrays):
        del arrays["model.layers.1.self_attn.q_proj.bias"]
        arrays["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
        arrays["model.norm.weight"] = np.ones(41, np.float32)
        arrays["lm_head.weight"] = arrays["lm_head.weight"].T.copy()

    rewrite(model, change)
    failure(
        model,
        "missing model.layers.1.self_attn.q_proj.bias",
        "extra model.layers.0.self_attn.q_norm.weight",
        "mis-shaped lm_head.weight (40, 101), not (101, 40), model.norm.weight (41,), not (40,)",
    )


def test_more_layers_than_config_says(model):
    edit(model, num_hidden_layers=2)
    failure(model, "extra model.layers.2.input_layernorm.weight", ", model.layers.2.self_attn.v_proj.weight")


def test_a_head_where_the_config_ties_it(model):
    edit(model, tie_word_embeddings=False)
    rewrite(model, lambda arrays: arrays.pop("lm_head.weight"))
    failure(model, "missing lm_head.weight")


@pytest.mark.parametrize("dtype", ["int8", "int32", "bool"])
def test_quantized_weights(dtype, model):
    name = "model.layers.2.mlp.up_proj.weight"
    rewrite(model, lambda arrays: arrays.update({name: np.zeros(arrays[name].shape, dtype)}))
    failure(model, name)


def test_a_tied_head_of_its_own_values(model):
    """Only one that equals the embedding is left out."""
    rewrite(model, lambda arrays: arrays.update({"lm_head.weight": arrays["model.embed_tokens.weight"].copy()}))
    edit(model, tie_word_embeddings=True)
    config = read_hf_config(model)
    assert "head" not in read_parameters(model, config, one_device().sharding, jnp.float32)
    rewrite(model, lambda arrays: arrays.update({"lm_head.weight": arrays["lm_head.weight"].astype(np.float64)}))
    read_parameters(model, config, one_device().sharding, jnp.float32)

    def change(arrays):
        arrays["lm_head.weight"][-1, -1] += 1

    rewrite(model, change)
    failure(model, "lm_head.weight differs from model.embed_tokens.weight", "tie_word_embeddings")
    rewrite(model, lambda arrays: arrays.update({"lm_head.weight": arrays["lm_head.weight"][:-1]}))
    failure(model, "mis-shaped lm_head.weight (100, 40), not (101, 40)")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_weights_that_are_no_numbers(value, dtype, model):
    """1e300 is none in float32."""
    name = "model.layers.2.mlp.up_proj.weight"

    def change(arrays):
        arrays[name] = arrays[name].astype(dtype)
        arrays[name][3, 5] = value

    with np.errstate(over="ignore"):
        rewrite(model, change)
    failure(model, f"{name} has values that are not finite in float32")


@pytest.mark.parametrize("text", [None, "", "{", "{}", '{"model": {"type": "BPE"}}', '{"model":' * 100_000])
def test_tokenizer(text, model, tmp_path):
    if text is not None:
        (model / "tokenizer.json").write_text(text)
    with pytest.raises(UserError) as caught:
        load_tokenizer(model)
    assert "\n" not in str(caught.value)
    assert str(model) in str(caught.value)
    if text is None:
        assert "has no tokenizer.json" in str(caught.value)
        with pytest.raises(UserError, match=r"has no tokenizer\.json; save it once with a fast tokenizer"):
            copy_tokenizer(model, tmp_path)
