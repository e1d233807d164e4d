"""A base in int8: how it is made, what is computed from it, runs over it, and what becomes of them."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file
from support.stored import FLOAT32, TOKENS, logits_of, parameters_at, served_tokens
from support.tiny import save_model
from support.training_fixtures import execution, grpo_config, largest_difference, metrics_of, sft_config, state_of

from psyche_jax.config import LINEAR_MAPS, AdapterSection, MeshSection, ModelSection
from psyche_jax.convert import export_model, import_model
from psyche_jax.errors import UserError
from psyche_jax.model.adapters import adapters_of, as_trained, initial_adapters, joined, without_adapter
from psyche_jax.model.huggingface import write_weights
from psyche_jax.model.products import weighted_int8
from psyche_jax.model.qwen2 import bind
from psyche_jax.train.checkpoints import array_differences
from psyche_jax.train.grpo_run import train_grpo
from psyche_jax.train.setup import prepare
from psyche_jax.train.sft import next_token_loss, train_sft
from psyche_jax.train.step_folders import find_checkpoint
from psyche_jax.train.stored_models import open_model

ADAPTER = AdapterSection(rank=4, alpha=8.0)
INT8 = jnp.dtype("int8")
RUNS = {"sft": (train_sft, sft_config), "grpo": (train_grpo, grpo_config)}


def over_int8(kind, root, name, **changes):
    _, config = RUNS[kind]
    model = ModelSection(str(root / changes.pop("base", "model")), "int8")
    return config(root, name, **{"model": model, "adapter": ADAPTER, "mesh": MeshSection(2, 2, 2), **changes})


@pytest.fixture(scope="module")
def runs(tiny_root, tmp_path_factory):
    """A run of either kind over the model in int8; the model as a checkpoint in int8, and a run over that one."""
    folder = Path(shutil.copytree(tiny_root, tmp_path_factory.mktemp("int8") / "work"))
    import_model(folder / "model", folder / "int8", "int8")
    for kind, (train, _) in RUNS.items():
        train(over_int8(kind, folder, kind))
    train_sft(over_int8("sft", folder, "over", base="int8"))
    train_sft(over_int8("sft", folder, "next", base="sft", epochs=0.4))
    return folder


def read(path, dtype=INT8, **mesh):
    """The model at `path` without adapters, and its config."""
    stored = open_model(str(path))
    sharding = execution(**({"devices": 1} | mesh)).sharding
    return as_trained(stored.config, dtype.name, None), stored.read_merged(sharding, dtype)


def dequantized(base):
    """The same without int8: float32."""
    layers = {
        name: {
            **{key: value for key, value in inner.items() if key != "kernel_scale"},
            "kernel": inner["kernel"].astype(FLOAT32) * inner["kernel_scale"][..., None],
        }
        if "kernel_scale" in inner
        else inner
        for name, inner in base["layers"].items()
    }
    return jax.tree.map(lambda x: x.astype(FLOAT32), {**base, "layers": layers})


def leaves(tree):
    return {path: (str(x.dtype), x.tobytes()) for path, x in flat(tree).items()}


def flat(tree):
    return traverse_util.flatten_dict(jax.device_get(tree), sep="/")


def refusal(act):
    with pytest.raises(UserError) as error:
        act()
    assert not error.value.details
    return str(error.value)


def test_weights_are_the_nearest_of_255_by_output(tiny_root):
    """Against a loop over the rows of the files; all that is no linear map is bfloat16."""
    files = load_file(tiny_root / "model" / "model.safetensors")
    ours = flat(read(tiny_root / "model")[1])
    for layer in range(2):
        weights = files[f"model.layers.{layer}.mlp.down_proj.weight"]
        for row, found, scale in zip(
            weights, ours["layers/down_proj/kernel"][layer], ours["layers/down_proj/kernel_scale"][layer], strict=True
        ):
            assert np.isclose(scale, max(abs(float(x)) for x in row) / 127, rtol=1e-6)
            assert found.tolist() == [round(float(x) / float(scale)) for x in row]
            assert abs(found).max() == 127
    kinds = {path: str(x.dtype) for path, x in ours.items()}
    assert {path for path, kind in kinds.items() if kind == "int8"} == {f"layers/{n}/kernel" for n in LINEAR_MAPS}
    assert {path for path, kind in kinds.items() if kind == "float32"} == {
        f"layers/{name}/kernel_scale" for name in LINEAR_MAPS
    }
    assert set(kinds.values()) == {"int8", "float32", "bfloat16"}


def test_an_output_of_zeros_stays_so(tmp_path):
    folder = save_model(tmp_path / "model")
    parameters = open_model(str(folder)).read_parameters(execution(1).sharding, FLOAT32)
    parameters["layers"]["q_proj"]["kernel"] = parameters["layers"]["q_proj"]["kernel"].at[0, 3].set(0)
    write_weights(folder, open_model(str(folder)).config, jax.device_get(parameters))
    kernel = read(folder)[1]["layers"]["q_proj"]
    assert not kernel["kernel"][0, 3].any()
    assert jnp.isfinite(kernel["kernel_scale"]).all()


@pytest.mark.parametrize("mesh", [{}, {"devices": 8, "data": 2, "fsdp": 2, "tensor": 2}], ids=["one device", "eight"])
def test_imported_or_made_on_load_it_is_the_same(mesh, runs):
    """From a folder, from a checkpoint in int8, wherever its parts lie."""
    expected = leaves(read(runs / "model")[1])
    assert leaves(read(runs / "model", **mesh)[1]) == expected
    assert leaves(read(runs / "int8", **mesh)[1]) == expected
    assert array_differences(find_checkpoint(runs / "int8") / "parameters", read(runs / "model")[1], "") == []


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_a_product_and_its_gradient_are_those_of_the_weights(dtype, limit, figure):
    """Relative to the largest: in bfloat16 the result alone is rounded, once."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(5, 64)), dtype)
    kernel = jnp.asarray(random.integers(-127, 128, (32, 64)), jnp.int8)
    scale = jnp.asarray(random.uniform(1e-3, 1e-2, 32), FLOAT32)
    gradient = jnp.asarray(random.normal(size=(5, 32)), dtype)
    weights = np.float64(kernel) * np.float64(scale)[:, None]
    ours, pull_back = jax.vjp(lambda x: weighted_int8(x, kernel, scale), x)
    for name, found, expected in (
        ("product", ours, np.float64(x) @ weights.T),
        ("gradient", pull_back(gradient)[0], np.float64(gradient) @ weights),
    ):
        assert found.dtype == dtype
        error = np.abs(np.float64(found) - expected).max() / np.abs(expected).max()
        figure(f"int8, {name} in {dtype}", error, limit if name == "product" else 2 * limit)


def test_the_model_and_its_adapters_gradients_are_those_of_the_same_weights(tiny_root, figure):
    config, base = read(tiny_root / "model")
    plain = dataclasses.replace(config, int8=False)
    expected = logits_of(plain, dequantized(base), TOKENS)
    figure("int8, logits against the same weights", largest_difference(logits_of(config, base, TOKENS), expected), 1e-5)
    assert largest_difference(logits_of(plain, read(tiny_root / "model", FLOAT32)[1], TOKENS), expected) > 1e-3

    adapted = dataclasses.replace(config, adapter=ADAPTER)
    adapters = initial_adapters(adapted, jax.random.key(0), execution(1).sharding)
    assert (logits_of(adapted, joined(base, adapters), TOKENS) == logits_of(config, base, TOKENS)).all(), "B is 0"
    random = np.random.default_rng(1)
    adapters = jax.tree.map(lambda x: jnp.float32(random.normal(0, 0.05, x.shape)), adapters)
    ones = jnp.ones_like(TOKENS)
    batch = {"tokens": TOKENS, "segments": ones, "positions": jnp.cumsum(ones, axis=1) - 1, "weights": ones / ones.size}

    def gradient(config, base):
        def loss(adapters):
            return next_token_loss(config, execution(1), joined(base, adapters), batch)[0]

        return jax.jit(jax.grad(loss))(adapters)

    ours = gradient(adapted, base)
    theirs = gradient(dataclasses.replace(adapted, int8=False), dequantized(base))
    figure("int8, adapters' gradients against the same weights", largest_difference(ours, theirs), 1e-4)


@pytest.mark.parametrize("kind", [*RUNS, "over", "next"])
def test_a_run_is_over_int8_which_stays_as_it_is(kind, runs):
    """What it computes with afterwards is the same int8 with adapters that were trained, which are all it stores."""
    assert state_of(runs / kind)["status"] == "done"
    config, parameters = parameters_at(runs / kind)
    assert config.int8
    adapters = adapters_of(parameters)
    assert all(np.any(pair["lora_b"]) for pair in adapters["layers"].values())
    assert array_differences(find_checkpoint(runs / kind) / "parameters", adapters, "") == []
    base = "sft" if kind == "next" else "model"
    assert leaves(joined(read(runs / base)[1], adapters)) == leaves(parameters)


def test_the_reference_is_the_same_base_and_the_sampler_the_trainer(runs, figure):
    lines = metrics_of(runs / "grpo")
    figure("int8, KL of a policy that is the base", lines[0]["kl"], 1e-8)
    assert lines[-1]["kl"] > 0.01
    for line in lines:
        figure("int8, sampler and trainer", line["sampling/logp_difference/max"], 1e-4)


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(kind, runs, tmp_path):
    copied = Path(shutil.copytree(runs, tmp_path / "copied"))
    last = find_checkpoint(copied / kind)
    shutil.rmtree(last)
    assert int(find_checkpoint(copied / kind).name) < int(last.name)
    RUNS[kind][0](over_int8(kind, copied, kind))
    assert metrics_of(copied / kind) == metrics_of(runs / kind)
    assert leaves(parameters_at(copied / kind)[1]) == leaves(parameters_at(runs / kind)[1])


def test_over_a_checkpoint_or_a_folder_it_learns_the_same(runs):
    assert leaves(parameters_at(runs / "over")[1]) == leaves(parameters_at(runs / "sft")[1])


def test_export_says_what_the_adapters_are_merged_into(runs, tmp_path, figure):
    """The original weights where they are known, else int8 times scales; that is the model of the run."""
    adapters = adapters_of(parameters_at(runs / "sft")[1])
    for source, base, line in (
        ("sft", None, f"merged into the original weights of `{runs / 'model'}`."),
        ("over", str(runs / "model"), f"merged into the original weights of `{runs / 'model'}`."),
        ("over", None, "merged into these weights, dequantized."),
        ("next", None, f"merged into the original weights of `{runs / 'model'}`."),
        ("int8", None, "The weights of its linear layers are dequantized from int8."),
    ):
        folder = tmp_path / f"{source} {base is None}"
        export_model(str(runs / source), folder, "float32", base=base)
        assert line in (folder / "README.md").read_text()
        config, found = read(folder, FLOAT32)
        assert not config.int8
        original = "original" in line
        expected = read(runs / "model", FLOAT32)[1] if original else dequantized(read(runs / "int8")[1])
        for learned in {"int8": [], "next": [adapters, adapters_of(parameters_at(runs / "next")[1])]}.get(
            source, [adapters]
        ):
            for name, pair in learned["layers"].items():
                change = ADAPTER.scale * pair["lora_b"] @ pair["lora_a"]
                expected["layers"][name]["kernel"] = expected["layers"][name]["kernel"] + change
        figure("int8, merged", largest_difference(found, expected), 1e-6)
        if (source, base) == ("over", None):
            figure(
                "int8, logits of the run and of its export",
                largest_difference(logits_of(config, found, TOKENS), logits_of(*parameters_at(runs / "over"), TOKENS)),
                1e-4,
            )


def test_what_serves_takes_a_run_and_a_checkpoint_as_they_are(runs, tmp_path):
    """The same tokens as from the weights de-quantized."""
    for name in ("over", "int8"):
        export_model(str(runs / name), tmp_path / name, "float32")
        assert served_tokens(runs / name) == served_tokens(tmp_path / name)


def test_adapters_alone_are_exported_as_ever(runs, tmp_path):
    export_model(str(runs / "sft"), tmp_path / "adapters", "float32", adapters_only=True)
    assert "trained over the base in int8 (one scale per output)." in (tmp_path / "adapters" / "README.md").read_text()
    import_model(tmp_path / "adapters", tmp_path / "again", "float32", str(runs / "int8"))
    assert leaves(parameters_at(tmp_path / "again")[1]) == leaves(parameters_at(runs / "sft")[1])


def test_a_next_stage_begins_with_what_was_learned(runs):
    """Merged into the original weights, and these in int8; or into int8 times scales."""
    setup = prepare(ModelSection(str(runs / "sft"), "int8"), MeshSection(2, 2, 2), 64, "", adapter=ADAPTER)
    base = setup.read_base()
    _, merged = read(runs / "sft", FLOAT32)
    scale = np.abs(merged["layers"]["up_proj"]["kernel"]).max(-1) / 127
    assert np.allclose(base["layers"]["up_proj"]["kernel_scale"], scale, rtol=1e-5)
    error = np.abs(flat(dequantized(base))["layers/up_proj/kernel"] - merged["layers"]["up_proj"]["kernel"])
    assert (error <= 0.501 * scale[..., None]).all()
    setup = prepare(ModelSection(str(runs / "over"), "bfloat16"), MeshSection(2, 2, 2), 64, "", adapter=ADAPTER)
    assert not setup.config.int8
    assert {str(x.dtype) for x in jax.tree.leaves(setup.read_base())} == {"bfloat16"}


@pytest.mark.parametrize(("devices", "mesh"), [(2, {"fsdp": 2}), (2, {"fsdp": 1, "tensor": 2})], ids=["fsdp", "tensor"])
def test_two_devices_are_one(devices, mesh, runs, figure):
    config, parameters = parameters_at(runs / "sft")
    here = execution(devices, **mesh)
    stored = open_model(str(runs / "sft"))
    parts = stored.read_parameters(here.sharding, FLOAT32)
    kernel = parts["layers"]["gate_proj"]
    if "tensor" in mesh:
        assert kernel["kernel_scale"].sharding.shard_shape(kernel["kernel_scale"].shape)[1] == 24

    @jax.jit
    def logits(parameters):
        model = bind(config, parameters)
        ones = jnp.ones_like(TOKENS)
        return model.logits(model(TOKENS, ones, jnp.cumsum(ones, axis=1) - 1, here))

    expected = logits_of(config, parameters, TOKENS)
    figure("int8, logits on two devices", largest_difference(logits(parts), expected), 1e-5)


def test_what_cannot_be(runs, tmp_path):
    def stage(path, dtype):
        return lambda: prepare(ModelSection(str(runs / path), dtype), MeshSection(), 64, "", adapter=ADAPTER)

    other = save_model(tmp_path / "other", seed=5)
    changed = Path(shutil.copytree(runs / "model", tmp_path / "changed"))
    content = bytearray((changed / "model.safetensors").read_bytes())
    content[-2] ^= 0x40
    (changed / "model.safetensors").write_bytes(content)
    export_model(str(runs / "sft"), tmp_path / "adapters", "float32", adapters_only=True)
    out = tmp_path / "out"
    for act, line in (
        (stage("int8", "bfloat16"), "int8; set it to int8, not bfloat16"),
        (stage("int8", "float32"), "int8; set it to int8, not float32"),
        (stage("over", "int8"), "would be lost in a merge"),
        (lambda: export_model(str(runs / "over"), out, "float32", base=str(other)), "--base: "),
        (
            lambda: export_model(str(runs / "over"), out, "float32", base=str(changed)),
            "is not what the int8 base was made from",
        ),
        (lambda: export_model(str(runs / "sft"), out, "float32", base=str(runs / "model")), "--base is for merging"),
        (lambda: export_model(str(runs / "int8"), out, "float32", base=str(runs / "model")), "--base is for merging"),
        (lambda: import_model(tmp_path / "adapters", out, "int8"), "which cannot be int8"),
    ):
        assert line in refusal(act)
        assert not out.exists()
    with pytest.raises(ValueError, match="must be float32 to train all weights: int8 weights cannot be trained"):
        sft_config(runs, model=ModelSection(str(runs / "model"), "int8"))
    assert without_adapter(parameters_at(runs / "sft")[0]).int8
    stage("next", "int8")()  # which can be
