"""`ModelConfig` to Hugging Face's config and back."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_jax.errors import UserError
from psyche_jax.model.config import (
    ARCHITECTURES,
    ModelConfig,
    RopeScaling,
    hf_config,
    hf_generation_config,
    model_config_from_dict,
    model_config_from_hf,
)
from psyche_jax.model.huggingface import expected_shapes
from psyche_jax.model.rotary import rotary_tables

sizes = st.integers(1, 10**6)
ids = st.integers(0, 10**6)


positive = st.floats(0.1, 4)
scalings = st.builds(
    RopeScaling,
    st.just("yarn"),
    factor=st.floats(1, 64),
    original_max_position_embeddings=sizes,
    attention_factor=st.none() | positive,
    beta_fast=st.none() | st.floats(5, 50),
    beta_slow=st.none() | positive,
    truncate=st.none() | st.booleans(),
) | st.builds(
    RopeScaling,
    st.just("llama3"),
    factor=st.floats(1, 64),
    original_max_position_embeddings=sizes,
    low_freq_factor=positive,
    high_freq_factor=st.floats(5, 50),
)


@st.composite
def configs(draw):
    kv_heads = draw(st.integers(1, 64))
    model_type = draw(st.sampled_from(["qwen2", "qwen3", "llama"]))
    return ModelConfig(
        vocab_size=draw(sizes),
        hidden_size=draw(sizes),
        intermediate_size=draw(sizes),
        num_hidden_layers=draw(sizes),
        num_attention_heads=kv_heads * draw(st.integers(1, 64)),
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 512)),
        rms_norm_eps=draw(st.floats(1e-12, 1e-2)),
        rope_theta=draw(st.floats(1.5, 1e9)),
        tie_word_embeddings=draw(st.booleans()),
        max_position_embeddings=draw(sizes),
        bos_token_id=draw(st.none() | ids),
        pad_token_id=draw(st.none() | ids),
        stop_token_ids=tuple(draw(st.lists(ids, max_size=4, unique=True))),
        model_type=model_type,
        attention_bias=model_type != "qwen2" and draw(st.booleans()),
        rope_scaling=draw(st.none() | scalings),
    )


def through_json(value):
    return json.loads(json.dumps(value))


@given(configs(), st.sampled_from(["float32", "bfloat16"]), st.booleans())
def test_hugging_face_round_trip(config, dtype, nested):
    values = through_json(hf_config(config, dtype))
    if nested:  # as transformers 5 writes it
        scaling = values.pop("rope_scaling", {"rope_type": "default"})
        values["rope_parameters"] = {**scaling, "rope_theta": values.pop("rope_theta")}
    assert model_config_from_hf(values, through_json(hf_generation_config(config))) == config
    assert model_config_from_hf(values) == config, "also without a generation config"


@given(configs())
def test_round_trip_of_the_package_itself(config):
    assert model_config_from_dict(through_json(dataclasses.asdict(config))) == config


@settings(max_examples=20)
@given(configs(), st.integers(1, 4))
def test_num_parameters(config, layers):
    config = dataclasses.replace(config, num_hidden_layers=layers)
    assert config.num_parameters == sum(math.prod(shape) for _, shape in expected_shapes(config))


def test_transformers_reads_the_same():
    from transformers import Qwen2Config

    config = ModelConfig(61, 24, 40, 3, 6, 3, 8, 1e-5, 5e5, True, 777, 1, 2, (3, 4))
    theirs = Qwen2Config.from_dict(hf_config(config, "bfloat16"))
    for field in dataclasses.fields(ModelConfig):
        if field.name not in ("rope_theta", "stop_token_ids", "attention_bias", "rope_scaling", "adapter", "int8"):
            assert getattr(theirs, field.name) == getattr(config, field.name)
    assert theirs.rope_parameters["rope_theta"] == 5e5
    assert theirs.eos_token_id == [3, 4]
    assert str(theirs.dtype).removeprefix("torch.") == "bfloat16"
    assert model_config_from_hf(theirs.to_dict(), {"eos_token_id": [3, 4]}) == config


def test_published_qwen():
    """The figures of Qwen2.5-7B-Instruct, with what its config.json says besides."""
    published = {
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 152064,
    }
    config = model_config_from_hf(published, {"eos_token_id": [151645, 151643], "pad_token_id": 151643})
    assert (config.head_dim, config.rope_theta, config.rms_norm_eps) == (128, 1e6, 1e-6)
    assert config.stop_token_ids == (151645, 151643)
    assert config.num_parameters == 7_615_616_512


def test_unknown_key():
    values = dataclasses.asdict(ModelConfig(61, 24, 40, 3, 6, 3, 8)) | {"sliding_window": True}
    with pytest.raises(UserError, match=r"unknown keys .'sliding_window'.; it was written by another version"):
        model_config_from_dict(values)


def test_what_was_stored_before_there_were_families():
    config = ModelConfig(61, 24, 40, 3, 6, 3, 8)
    values = through_json(dataclasses.asdict(config))
    for newer in ("model_type", "attention_bias", "rope_scaling"):
        del values[newer]
    assert model_config_from_dict(values) == config


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen3-0.6B", 0.596),
        ("Qwen3-1.7B", 1.721),
        ("Qwen3-4B", 4.022),
        ("Qwen3-8B", 8.191),
        ("Qwen3-14B", 14.768),
        ("Qwen3-32B", 32.762),
        ("Llama-3.2-1B", 1.236),
        ("Llama-3.2-3B", 3.213),
        ("Llama-3.1-8B", 8.030),
    ],
)
def test_published_sizes(name, billions):
    """As the cards of these models count them."""
    assert ARCHITECTURES[name].num_parameters / 1e9 == pytest.approx(billions, abs=5e-4)


def test_positions():
    """Those that YaRN adds count, whether max_position_embeddings counts them or not; Llama's are counted already."""
    plain = ModelConfig(61, 24, 40, 3, 6, 3, 8, max_position_embeddings=32768)
    yarn = RopeScaling("yarn", 4.0, 32768)
    assert plain.max_positions == 32768
    assert dataclasses.replace(plain, rope_scaling=yarn).max_positions == 131072
    assert dataclasses.replace(plain, rope_scaling=yarn, max_position_embeddings=262144).max_positions == 262144
    assert ARCHITECTURES["Llama-3.1-8B"].max_positions == 131072


PLACES = [
    {},
    {"rope_theta": 5e5},
    {"rope_scaling": None, "rope_theta": 5e5},
    {"rope_scaling": {"rope_type": "default", "rope_theta": 1e6}},
    {"rope_scaling": {"type": "default", "rope_theta": 1e6}},
    {"rope_scaling": {"rope_type": "default"}, "rope_theta": 5e5},
    {"rope_scaling": {"rope_theta": 1e6}, "rope_theta": 5e5},
    {"rope_parameters": {"rope_theta": 1e6}},
    {"rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "rope_theta": 5e5},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
    {"rope_parameters": {"rope_type": "default"}},
    {"rope_parameters": {}, "rope_theta": 5e5},
    {"rope_parameters": None, "rope_theta": 5e5},
    {"rope_scaling": {"rope_theta": 1e6}, "rope_parameters": {"rope_theta": 2e6}, "rope_theta": 5e5},
    {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_theta": 2e6}},
    {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_theta": 2e6}, "rope_theta": 5e5},
    {"rope_scaling": None, "rope_parameters": {"rope_theta": 2e6}, "rope_theta": 5e5},
    {"rope_scaling": {}, "rope_parameters": {"rope_theta": 2e6}},
    {"rope_scaling": {"rope_type": "default", "type": "yarn"}, "rope_theta": 5e5},
]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_rope_base_wherever_it_stands(place):
    """As transformers reads the same file."""
    from transformers import Qwen2Config

    values = hf_config(ModelConfig(61, 24, 40, 3, 6, 3, 8), "float32")
    del values["rope_theta"]
    values |= place
    theirs = Qwen2Config.from_dict(json.loads(json.dumps(values))).rope_parameters["rope_theta"]
    assert model_config_from_hf(values).rope_theta == theirs


@pytest.mark.parametrize("truncate", [{}, {"truncate": None}, {"truncate": False}, {"truncate": True}], ids=str)
def test_truncate_of_yarn_is_what_transformers_makes_of_it(truncate):
    """Null is false, and not the default."""
    pytest.importorskip("torch")
    from transformers import Qwen2Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    values = hf_config(ModelConfig(61, 24, 40, 3, 6, 3, 64), "float32")
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
    values["rope_scaling"] = {**yarn, "beta_fast": 3.3, "beta_slow": 0.3, **truncate}
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](Qwen2Config.from_dict(through_json(values)))
    cosine, sine = rotary_tables(np.ones((1, 1)), model_config_from_hf(values), np.dtype("float32"))
    np.testing.assert_allclose(np.arctan2(sine, cosine)[0, 0, 0], expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (2, [2, 1], (2, 1)),
        ([1], 2, (2, 1)),
        (1, None, (1,)),
        (1, [], (1,)),
        (None, [3, 1, 3], (3, 1)),
        ([], None, ()),
    ],
)
def test_stop_tokens_are_those_of_both_files(ours, theirs, expected):
    values = {**hf_config(ModelConfig(61, 24, 40, 3, 6, 3, 8), "float32"), "eos_token_id": ours}
    assert model_config_from_hf(values, {"eos_token_id": theirs}).stop_token_ids == expected
    if theirs is None:
        assert model_config_from_hf(values, {}).stop_token_ids == model_config_from_hf(values).stop_token_ids


@pytest.mark.parametrize("value", ["yarn", 4, ["yarn"]])
def test_a_scaling_that_is_no_object(value):
    with pytest.raises(UserError, match=r"wrong type .rope_scaling is .*, not an object"):
        model_config_from_hf({**hf_config(ARCHITECTURES["Qwen2.5-0.5B"], "float32"), "rope_scaling": value})
