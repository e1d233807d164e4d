"""Low-rank adapters: gradients against peft, a base that never changes, runs that resume, models that are merged."""

import dataclasses
import functools
import json
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import transformers
import yaml
from flax import traverse_util
from safetensors.numpy import load_file, save_file
from support.optional_torch import torch
from support.stored import FLOAT32, TOKENS, logits_of, parameters_at, served_tokens
from support.training_fixtures import (
    PROMPT,
    execution,
    grpo_config,
    largest_difference,
    metrics_of,
    sft_config,
    state_of,
)

from psyche_jax.config import (
    LINEAR_MAPS,
    AdapterSection,
    GrpoConfig,
    MeshSection,
    ModelSection,
    OptimizerSection,
    SftConfig,
)
from psyche_jax.config_files import parse_config
from psyche_jax.convert import export_model, import_model
from psyche_jax.data.chat import tokenize_example
from psyche_jax.data.dataset import load_records
from psyche_jax.data.records import SftExample
from psyche_jax.data.streams import pad_examples
from psyche_jax.errors import UserError
from psyche_jax.model.adapters import adapters_of, initial_adapters, joined, merged
from psyche_jax.model.decode import generate
from psyche_jax.model.huggingface import load_tokenizer, tensor_names
from psyche_jax.model.linear import turned, turned_back
from psyche_jax.model.sampling import Sampling
from psyche_jax.storage.files import read_json
from psyche_jax.train.checkpoints import array_differences
from psyche_jax.train.grpo_run import train_grpo
from psyche_jax.train.setup import prepare
from psyche_jax.train.sft import next_token_loss, train_sft
from psyche_jax.train.state import make_optimizer
from psyche_jax.train.step_folders import find_checkpoint, write_checksums
from psyche_jax.train.stored_models import open_model

pytestmark = pytest.mark.usefixtures("optimized")

ADAPTER = AdapterSection(rank=4, alpha=8.0)
RUNS = {"sft": (train_sft, sft_config), "grpo": (train_grpo, grpo_config)}


def leaves(tree):
    return [leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(tree))]


@pytest.fixture(scope="module")
def runs(tiny_root, tmp_path_factory):
    """A run of either kind with adapters, and the model and data that they read."""
    folder = Path(shutil.copytree(tiny_root, tmp_path_factory.mktemp("adapters") / "work"))
    for kind, (train, config) in RUNS.items():
        train(config(folder, kind, adapter=ADAPTER, mesh=MeshSection(2, 2, 2)))
    return folder


@pytest.mark.parametrize("kind", RUNS)
def test_a_checkpoint_holds_the_adapters_alone(kind, runs):
    """And the base is as it was, to the bit."""
    assert state_of(runs / kind)["status"] == "done"
    _, base = parameters_at(runs / "model")
    _, parameters = parameters_at(runs / kind)
    adapters = adapters_of(parameters)
    assert traverse_util.flatten_dict(adapters).keys() == {
        ("layers", name, factor) for name in LINEAR_MAPS for factor in ("lora_a", "lora_b")
    }
    assert all(np.any(pair["lora_b"]) for pair in adapters["layers"].values()), "all of them were trained"
    assert leaves(joined(base, adapters)) == leaves(parameters)
    optimizer = make_optimizer(OptimizerSection(), lambda _: 0.0).init(adapters)
    for item, tree in (("parameters", adapters), ("optimizer", optimizer)):
        assert array_differences(find_checkpoint(runs / kind) / item, tree, item) == []


@pytest.mark.parametrize("kind", RUNS)
def test_merged_into_the_base_it_is_the_same_model(kind, runs, tmp_path, figure):
    export_model(str(runs / kind), tmp_path / "merged", "float32")
    config, whole = parameters_at(tmp_path / "merged")
    assert config.adapter is None
    expected = logits_of(*parameters_at(runs / kind), TOKENS)
    difference = np.abs(logits_of(config, whole, TOKENS) - expected).max()
    figure("logits, adapters merged, relative to the largest", difference / np.abs(expected).max(), 5e-6)
    assert np.abs(logits_of(*parameters_at(runs / "model"), TOKENS) - expected).max() > 0.01, "they matter"
    in_memory = open_model(str(runs / kind)).read_merged(execution(8, 2, 2, 2).sharding, FLOAT32)
    figure("adapters merged in memory and on disk", largest_difference(in_memory, whole), 1e-6)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj", "o_proj", "up_proj"), ("gate_proj", "down_proj")])
def test_maps_of_one_input_may_have_adapters_or_not(targets, runs, figure):
    """Each adds its own product, whichever of its neighbours have adapters too."""
    config, base = parameters_at(runs / "model")
    adapted = dataclasses.replace(config, adapter=dataclasses.replace(ADAPTER, targets=targets))
    sharding = execution(1).sharding
    adapters = initial_adapters(adapted, jax.random.key(1), sharding)
    keys = iter(jax.random.split(jax.random.key(2), 2 * len(LINEAR_MAPS)))
    adapters = jax.tree.map(lambda leaf: 0.1 * jax.random.normal(next(keys), leaf.shape), adapters)
    apart = logits_of(adapted, joined(base, adapters), TOKENS)
    unadapted = logits_of(config, base, TOKENS)
    together = logits_of(config, merged(adapted, jax.tree.map(jnp.copy, base), adapters, sharding), TOKENS)
    assert np.abs(apart - unadapted).max() > 0.01
    figure("adapters of some maps, merged", np.abs(apart - together).max() / np.abs(apart).max(), 5e-6)


def test_turned_and_back(runs):
    """Whole or alone, adapters compute the same if they are turned already, and come back to the bit."""
    config, parameters = parameters_at(runs / "sft")
    assert leaves(turned_back(turned(parameters))) == leaves(parameters)
    assert leaves(turned(turned(parameters))) == leaves(turned(parameters))
    for name, values in adapters_of(parameters)["layers"].items():
        layers, features, rank = values["lora_b"].shape
        assert turned(parameters)["layers"][name]["lora_b_turned"].shape == (layers, rank, features)
    assert (logits_of(config, turned(parameters), TOKENS) == logits_of(config, parameters, TOKENS)).all()


def test_the_sampler_is_the_trainer_and_the_reference_the_base(runs, figure):
    """Log-probs of decoding are those of training while adapters grow; the KL begins at 0."""
    lines = metrics_of(runs / "grpo")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    figure("KL of a policy that is the base", lines[0]["kl"], 1e-8)
    assert lines[-1]["kl"] > 0.01
    for line in lines:
        figure("adapters, sampler and trainer", line["sampling/logp_difference/max"], 1e-4)


def test_what_serves_takes_the_run_as_it_is(runs, tmp_path):
    """The same tokens as the merged model's."""
    export_model(str(runs / "sft"), tmp_path / "merged", "float32")
    assert served_tokens(runs / "sft") == served_tokens(tmp_path / "merged")


@pytest.mark.slow
def test_without_training_the_policy_is_the_base(tiny_root, figure):
    """As long as B is 0, to the bit; in decoding, whose programs the compiler fuses otherwise, the tokens are."""
    config, base = parameters_at(tiny_root / "model")
    adapted = dataclasses.replace(config, adapter=ADAPTER)
    whole = joined(base, initial_adapters(adapted, jax.random.key(0), execution(1).sharding))
    assert (logits_of(adapted, whole, TOKENS) == logits_of(config, base, TOKENS)).all()

    @functools.partial(jax.jit, static_argnums=0)
    def say(config, parameters):
        sampling = Sampling(6, generations_per_prompt=2)
        return generate(config, parameters, TOKENS, TOKENS >= 0, jax.random.key(1), sampling, execution(1))

    ours, expected = say(adapted, whole), say(config, base)
    assert (ours.tokens == expected.tokens).all()
    figure("log-probs of decoding, adapters that are 0", np.abs(ours.log_probs - expected.log_probs).max(), 1e-5)


@pytest.fixture(scope="module")
def known(tiny_root):
    """A batch, and a base with adapters whose B is not 0."""
    tokenizer = load_tokenizer(tiny_root / "model")
    records = load_records(SftExample, tiny_root / "sft.jsonl").good[:8]
    batch = pad_examples([tokenize_example(tokenizer, record.messages, PROMPT) for record in records], 96)
    config, base = parameters_at(tiny_root / "model")
    config = dataclasses.replace(config, adapter=ADAPTER)
    adapters = initial_adapters(config, jax.random.key(0), execution(1).sharding)
    random = np.random.default_rng(1)
    adapters = jax.tree.map(lambda x: jnp.float32(random.normal(0, 0.05, x.shape)), adapters)
    return batch, config, base, adapters


def with_plain_adapters(model):
    """Adapters as the paper writes them, under the names that peft has."""

    class Adapted(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear
            a = torch.nn.Linear(linear.in_features, ADAPTER.rank, bias=False)
            b = torch.nn.Linear(ADAPTER.rank, linear.out_features, bias=False)
            self.lora_A, self.lora_B = (torch.nn.ModuleDict({"default": factor}) for factor in (a, b))

        def forward(self, x):
            a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
            return self.linear(x) + ADAPTER.alpha / ADAPTER.rank * x @ a.T @ b.T

    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name in set(LINEAR_MAPS) & set(dict(part.named_children())):
                setattr(part, name, Adapted(getattr(part, name)))
    return torch.nn.ModuleDict({"base_model": torch.nn.ModuleDict({"model": model})}), model


def with_peft(model):
    peft = pytest.importorskip("peft", reason="peft is absent: pip install peft")
    config = peft.LoraConfig(r=ADAPTER.rank, lora_alpha=ADAPTER.alpha, target_modules=list(ADAPTER.targets))
    adapted = peft.get_peft_model(model, config)
    return adapted, adapted


@pytest.mark.parametrize("adapt", [with_plain_adapters, with_peft])
def test_gradients_of_adapters_are_those_of_torch(adapt, known, tiny_root, figure):
    pytest.importorskip("torch", reason="torch is absent, and with it the reference: pip install torch")
    batch, config, base, adapters = known
    model = transformers.Qwen2ForCausalLM.from_pretrained(tiny_root / "model", dtype=torch.float32)
    named, callable_ = adapt(model)
    theirs = {name.replace(".default.", "."): value for name, value in named.named_parameters()}
    factors = traverse_util.flatten_dict(adapters, sep="/")
    for path, stacked in factors.items():
        for name, ours in zip(tensor_names(path, config.num_hidden_layers), stacked, strict=True):
            theirs[name].data.copy_(torch.tensor(np.asarray(ours)))
    learned = torch.tensor(batch["loss_mask"])
    tokens = torch.tensor(batch["tokens"], dtype=torch.long)
    present = torch.tensor(batch["segments"], dtype=torch.long)
    expected = callable_(input_ids=tokens, attention_mask=present, labels=tokens.masked_fill(~learned, -100)).loss
    expected.backward()

    weights = np.float32(batch["loss_mask"]) / batch["loss_mask"].sum()

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(adapters):
        return next_token_loss(config, execution(1), joined(base, adapters), {**batch, "weights": weights})

    (value, _), gradients = loss(adapters)
    figure("adapters, loss against torch", abs(float(value) - expected.item()), 1e-5)
    norm = optax.global_norm(gradients)
    for path, gradient in traverse_util.flatten_dict(gradients, sep="/").items():
        reference = np.stack([theirs[n].grad.numpy() for n in tensor_names(path, config.num_hidden_layers)])
        figure(
            "adapters, gradient against torch, relative to its norm", np.abs(gradient - reference).max() / norm, 1e-6
        )


def test_a_peft_folder_there_and_back(runs, tmp_path):
    """Written, and read again as a checkpoint: the same bits, of the same base."""
    export_model(str(runs / "grpo"), tmp_path / "adapters", "float32", adapters_only=True)
    values = read_json(tmp_path / "adapters" / "adapter_config.json")
    assert values["base_model_name_or_path"] == str(runs / "model")
    assert (values["r"], values["lora_alpha"], values["target_modules"]) == (4, 8, list(LINEAR_MAPS))
    assert "Low-rank adapters (LoRA) of rank 4" in (tmp_path / "adapters" / "README.md").read_text()
    import_model(tmp_path / "adapters", tmp_path / "imported", "float32")
    (config, parameters), (expected_config, expected) = (
        parameters_at(tmp_path / "imported"),
        parameters_at(runs / "grpo"),
    )
    assert leaves(parameters) == leaves(expected)
    assert config == expected_config
    # Over another copy of the base, which may be a checkpoint.
    import_model(runs / "model", tmp_path / "base", "float32")
    import_model(tmp_path / "adapters", tmp_path / "over", "float32", str(tmp_path / "base"))
    assert leaves(parameters_at(tmp_path / "over")[1]) == leaves(expected)


def test_peft_loads_the_adapters(runs, tmp_path, figure):
    peft = pytest.importorskip("peft", reason="peft is absent: pip install peft")
    export_model(str(runs / "sft"), tmp_path / "adapters", "float32", adapters_only=True)
    base = transformers.Qwen2ForCausalLM.from_pretrained(runs / "model", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapters")
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(np.asarray(TOKENS), dtype=torch.long)).logits.numpy()
    ours = logits_of(*parameters_at(runs / "sft"), TOKENS)
    figure("logits, adapters in peft", np.abs(ours - theirs).max(), 1e-4)


def test_a_tokenizer_beside_adapters_that_the_base_has_no_rows_for(runs, tmp_path):
    """Refused at once: a checkpoint that no command could open would be of no use."""
    export_model(str(runs / "sft"), tmp_path / "adapters", "float32", adapters_only=True)
    tokenizer = load_tokenizer(tmp_path / "adapters")
    tokenizer.add_tokens([f"token {number}" for number in range(400)])
    tokenizer.save_pretrained(tmp_path / "adapters")
    said = refusal(lambda: import_model(tmp_path / "adapters", tmp_path / "new", "float32"))
    assert "the tokenizer has ids for" in said
    assert not (tmp_path / "new").exists()


SAME_NUMBERS = [
    {"target_modules": "all-linear", "exclude_modules": ["lm_head"]},
    {"target_modules": r".*\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"},
    {"target_modules": [], "target_parameters": [f"{name}.weight" for name in LINEAR_MAPS]},
    {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
    {"init_lora_weights": "gaussian", "lora_dropout": 0.5, "peft_version": "0.21.2", "qalora_group_size": 16},
    {"init_lora_weights": False, "use_rslora": False, "rank_pattern": {}, "modules_to_save": None},
]


def test_peft_configs_that_change_no_number(runs, tmp_path):
    export_model(str(runs / "sft"), tmp_path / "adapters", "float32", adapters_only=True)
    path = tmp_path / "adapters" / "adapter_config.json"
    good, expected = read_json(path), leaves(parameters_at(runs / "sft")[1])
    for number, values in enumerate(SAME_NUMBERS):
        path.write_text(json.dumps({**good, **values}))
        import_model(tmp_path / "adapters", tmp_path / str(number), "float32")
        assert leaves(parameters_at(tmp_path / str(number))[1]) == expected


def test_grpo_from_a_run_with_adapters_begins_with_what_it_learned(runs, tmp_path):
    """What it starts from, and refers to, is SFT's adapters merged into their base; its own come on top."""
    config = grpo_config(runs, model=ModelSection(str(runs / "sft"), "bfloat16"), adapter=AdapterSection(rank=2))
    setup = prepare(config.model, config.mesh, 64, "", adapter=config.adapter)
    expected = open_model(str(runs / "sft")).read_merged(setup.execution.sharding, jnp.dtype("bfloat16"))
    assert leaves(setup.read_base()) == leaves(expected)
    _, base = parameters_at(runs / "model")
    assert leaves(expected) != leaves(jax.tree.map(lambda x: x.astype(jnp.bfloat16), base))
    assert {leaf.dtype for leaf in jax.tree.leaves(setup.read_trained(0))} == {FLOAT32}


def refusal(act):
    with pytest.raises(UserError) as error:
        act()
    return "\n".join([str(error.value), *error.value.details])


@pytest.fixture
def copied(runs, tmp_path):
    return Path(shutil.copytree(runs, tmp_path / "copied"))


@pytest.mark.parametrize(
    ("adapter", "line"),
    [
        (None, "its adapter is {'rank': 4"),
        (AdapterSection(rank=8, alpha=8.0), "its adapter.rank is 4, not 8"),
        (AdapterSection(rank=4, alpha=4.0), "its adapter.alpha is 8.0, not 4.0"),
        (AdapterSection(rank=4, alpha=8.0, targets=("q_proj",)), "its adapter.targets is ["),
    ],
    ids=["all weights", "rank", "alpha", "targets"],
)
def test_other_adapters_cannot_resume(adapter, line, runs):
    said = refusal(lambda: train_sft(sft_config(runs, "sft", adapter=adapter)))
    assert line in said
    assert len(said.splitlines()) == 1, said


@pytest.mark.slow
def test_adapters_cannot_resume_all_weights(root):
    """Also of a run from before there were adapters, whose config has no such key."""
    train_sft(sft_config(root, epochs=1.0))
    for rewrite in (False, True):
        if rewrite:
            path = root / "run" / "config.yaml"
            values = yaml.safe_load(path.read_text())
            assert values.pop("adapter", 0) is None
            path.write_text(yaml.safe_dump(values))
        said = refusal(lambda: train_sft(sft_config(root, epochs=1.0, adapter=ADAPTER)))
        assert "its adapter is null, not {'rank': 4" in said
        assert len(said.splitlines()) == 1, said


def test_a_run_on_another_base_does_not_resume(copied):
    weights = copied / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    said = refusal(lambda: train_sft(sft_config(copied, "sft", adapter=ADAPTER, mesh=MeshSection(2, 2, 2))))
    assert "model.path: the model there has changed since this run began" in said


def test_what_reads_adapters_wants_their_base(copied, tmp_path):
    checkpoint = find_checkpoint(copied / "sft")
    path = checkpoint / "metadata" / "metadata"
    for base, line in (
        (
            {"path": str(copied / "model"), "identity": "0"},
            "its adapters were trained on another base than the model",
        ),
        ({"path": str(tmp_path / "gone"), "identity": "0"}, "the base of its adapters cannot be opened"),
    ):
        path.write_text(json.dumps({**read_json(path), "base": base}))
        write_checksums(checkpoint)
        for act in (
            lambda: open_model(str(copied / "sft")).read_parameters(execution(1).sharding, FLOAT32),
            lambda: export_model(str(copied / "sft"), tmp_path / "out", "float32"),
        ):
            said = refusal(act)
            assert line in said
            assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("adapter", "line"),
    [
        ({"rank": 0}, "adapter.rank must be at least 1, not 0"),
        ({"alpha": 0}, "adapter.alpha must be above 0, not 0"),
        ({"targets": []}, "adapter: targets must name at least one linear map, not []"),
        (
            {"targets": ["q_proj", "gate"]},
            "adapter: targets: no layer has a linear map 'gate'; did you mean 'gate_proj'?",
        ),
        ({"targets": ["q_proj", "q_proj"]}, "adapter: targets must name each map once, not ['q_proj', 'q_proj']"),
        ({"rnak": 2}, "unknown key 'adapter.rnak'; did you mean 'adapter.rank'?"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("kind", [SftConfig, GrpoConfig])
def test_adapters_that_cannot_be(kind, adapter, line):
    values = {"run": {"dir": "run"}, "model": {"path": "model"}, "data": {"train": "data.jsonl"}}
    assert line in refusal(lambda: parse_config(kind, {**values, "adapter": adapter}, "a.yaml"))


def test_peft_folders_that_cannot_be(runs, tmp_path):
    export_model(str(runs / "sft"), tmp_path / "adapters", "float32", adapters_only=True)
    path = tmp_path / "adapters" / "adapter_config.json"
    good = read_json(path)
    for values, base, line in (
        ({"use_dora": True}, None, "use_dora is set, which is not supported"),
        ({"alora_invocation_tokens": [5, 6]}, None, "alora_invocation_tokens is set, which is not supported"),
        ({"of_a_later_peft": 1}, None, "of_a_later_peft is set, which is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, None, "init_lora_weights is 'pissa_niter_4', which changes the base"),
        ({"init_lora_weights": "olora"}, None, "init_lora_weights is 'olora', which changes the base"),
        ({"target_modules": ["q_proj"]}, None, "adapter_config.json: leaves out base_model.model.model.layers.0."),
        ({"target_modules": r".*\.0\..*"}, None, "adapter_config.json: leaves out base_model.model.model.layers.1."),
        ({"target_modules": "("}, None, "which modules have adapters cannot be read"),
        ({"exclude_modules": ["layers.1.mlp.up_proj"]}, None, "leaves out base_model.model.model.layers.1.mlp.up_proj"),
        ({"layers_to_transform": 0}, None, "leaves out base_model.model.model.layers.1."),
        ({"bias": "all"}, None, "bias is 'all'; only 'none' is supported"),
        ({"peft_type": "IA3"}, None, "does not describe low-rank adapters"),
        ({"base_model_name_or_path": "Qwen/Qwen2.5-7B"}, None, "its base cannot be opened"),
        ({"base_model_name_or_path": None}, None, "adapter_config.json: names no base"),
        ({"base_model_name_or_path": ""}, None, "adapter_config.json: names no base"),
        ({"r": 8}, None, "the adapters do not fit the base"),
        ({"r": 0}, None, "rank must be at least 1, not 0"),
    ):
        path.write_text(json.dumps({**good, **values}))
        said = refusal(lambda base=base: import_model(tmp_path / "adapters", tmp_path / "new", "float32", base))
        assert line in said
        assert len(said.splitlines()) == 1
        assert not (tmp_path / "new").exists()
    with warnings.catch_warnings():  # NumPy's of an overflow would be a second line
        warnings.simplefilter("error", RuntimeWarning)
        path.write_text(json.dumps({**good, "lora_alpha": 1e308}))
        import_model(tmp_path / "adapters", tmp_path / "huge", "float32")
        said = refusal(lambda: export_model(str(tmp_path / "huge"), tmp_path / "new", "float32"))
    assert "has values that are not finite in float32" in said
    path.write_text(json.dumps(good))
    weights = tmp_path / "adapters" / "adapter_model.safetensors"
    arrays = load_file(weights)
    save_file({name: array.astype(ml_dtypes.float8_e4m3fn) for name, array in arrays.items()}, weights)
    said = refusal(lambda: import_model(tmp_path / "adapters", tmp_path / "new", "float32"))
    assert "lora_A.weight is F8_E4M3, which is not supported" in said
    weights.rename(weights.with_suffix(".bin"))
    said = refusal(lambda: import_model(tmp_path / "adapters", tmp_path / "new", "float32"))
    assert "adapter_model.bin: is a pickle, which is not read" in said
    said = refusal(lambda: train_sft(sft_config(runs, "new", model=ModelSection(str(tmp_path / "adapters")))))
    assert "a folder of adapters; import it first" in said
    said = refusal(lambda: export_model(str(runs / "model"), tmp_path / "new", "float32", adapters_only=True))
    assert "--adapters" in said
