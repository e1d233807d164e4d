"""Bases whose weights are no numbers are refused before a step is done."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.training_fixtures import execution, grpo_config, sft_config

from psyche_jax.config import ModelSection
from psyche_jax.convert import export_model, import_model
from psyche_jax.errors import UserError
from psyche_jax.model import huggingface
from psyche_jax.train import grpo_run, sft
from psyche_jax.train.stored_models import open_model


def spoil(folder, name):
    arrays = load_file(folder / "model.safetensors")
    arrays[name].flat[5] = np.inf
    save_file(arrays, folder / "model.safetensors")


@pytest.mark.parametrize("train", [sft.train_sft, grpo_run.train_grpo], ids=["sft", "grpo"])
def test_a_base_whose_weights_are_no_numbers(train, root):
    spoil(root / "model", "model.layers.1.mlp.down_proj.weight")
    config = sft_config(root) if train is sft.train_sft else grpo_config(root)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj\.weight has values that are not finite"):
        train(config)


def test_a_checkpoint_whose_weights_are_no_numbers(root, monkeypatch):
    """As older versions imported them; looked for on the devices."""
    spoil(root / "model", "model.layers.1.self_attn.q_proj.bias")
    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "all_finite", lambda _: True)
        import_model(root / "model", root / "stored", "float32")
    with pytest.raises(UserError, match=r"layers/q_proj/bias has values that are not finite"):
        export_model(str(root / "stored"), root / "exported", "float32")
    expected = r"stored/0: model\.layers\.1\.self_attn\.q_proj\.bias has values that are not finite"
    for devices in (1, 8):
        with pytest.raises(UserError, match=expected):
            open_model(str(root / "stored")).read_parameters(execution(devices).sharding, jnp.dtype("float32"))
    with pytest.raises(UserError, match=expected):
        sft.train_sft(dataclasses.replace(sft_config(root), model=ModelSection(str(root / "stored"))))
    assert jax.device_count() == 8
