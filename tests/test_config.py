"""Configs: read, extended, overridden, checked; every mistake is one line that names the key."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import psyche_jax
from psyche_jax.config import GrpoConfig, SftConfig
from psyche_jax.config_files import config_to_dict, dump_yaml, load_config, parse_config
from psyche_jax.data.mapping import ImportConfig
from psyche_jax.data.packing import PackConfig
from psyche_jax.errors import UsageError
from psyche_jax.rewards import (
    AnswerSetRule,
    FunctionReward,
    LengthRule,
    PatternRule,
    RepetitionRule,
    RuleConfig,
    ThinkFormatRule,
)
from psyche_jax.synth.config import SelectConfig, SynthConfig

PACKAGE = Path(psyche_jax.__file__).parent
CONFIGS = sorted((PACKAGE.parent / "configs").glob("*.yaml"))
LEAST: dict[str, Any] = {"run": {"dir": "r"}, "model": {"path": "m"}, "data": {"train": "t.jsonl"}}


def load(kind, folder, values, *overrides):
    text = values if isinstance(values, str) else yaml.safe_dump(values, allow_unicode=True)
    (folder / "c.yaml").write_text(text, encoding="utf-8")
    return load_config(kind, folder / "c.yaml", overrides)


def failure(kind, folder, values, *overrides):
    """The message of the one line that a wrong config gives."""
    with pytest.raises(UsageError) as caught:
        load(kind, folder, values, *overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert caught.value.exit_code == 2
    return message


@pytest.mark.parametrize(("kind", "values"), [(SftConfig, LEAST), (GrpoConfig, LEAST)])
def test_defaults_are_the_papers(kind, values, tmp_path):
    config = load(kind, tmp_path, values)
    assert (config.run.dir, config.model.path, config.data.train, config.run.seed) == ("r", "m", "t.jsonl", 42)
    optimizer = config.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.999, 1e-8)
    if kind is SftConfig:
        assert (config.batch_size, config.epochs, optimizer.learning_rate, optimizer.warmup) == (256, 2, 1e-5, 0.1)
        assert optimizer.schedule == "cosine"
    else:
        assert (config.prompts_per_step, config.objective.kl_coefficient, config.epochs) == (128, 0.001, 2)
        assert (optimizer.learning_rate, optimizer.warmup) == (1e-6, 10)


@pytest.mark.parametrize(
    ("kind", "key", "named", "hint"),
    [
        (SftConfig, "batch_sise", "batch_sise", "did you mean 'batch_size'?"),
        (SftConfig, "optimizer.lerning_rate", "optimizer.lerning_rate", "did you mean 'optimizer.learning_rate'?"),
        (SftConfig, "data.max_lenght", "data.max_lenght", "did you mean 'data.max_length'?"),
        (SftConfig, "optimizer.lr", "optimizer.lr", "did you mean 'optimizer.learning_rate'?"),
        (SftConfig, "lr", "lr", "did you mean 'optimizer.learning_rate'?"),
        (SftConfig, "num_train_epochs", "num_train_epochs", "did you mean 'epochs'?"),
        (SftConfig, "per_device_train_batch_size", "per_device_train_batch_size", "did you mean 'batch_size'?"),
        (GrpoConfig, "per_device_train_batch_size", "per_device_train_batch_size", "did you mean 'prompts_per_step'?"),
        (GrpoConfig, "epsilon", "epsilon", "did you mean 'objective.clip_low'?"),
        (GrpoConfig, "beta", "beta", "did you mean 'objective.kl_coefficient'?"),
        (GrpoConfig, "num_generations", "num_generations", "did you mean 'generations_per_prompt'?"),
        (SftConfig, "learning_rate", "learning_rate", "did you mean 'optimizer.learning_rate'?"),
        (SftConfig, "seed", "seed", "did you mean 'run.seed'?"),
        (SftConfig, "optimizer.seed", "optimizer.seed", "did you mean 'run.seed'?"),
        (SftConfig, "zzz", "zzz", "valid keys here: run, model, data,"),
        (SftConfig, "mesh.zzz", "mesh.zzz", "valid keys here: data, fsdp, tensor"),
        (SftConfig, "rewards.x", "rewards", "valid keys here: "),
        (GrpoConfig, "temprature", "temprature", "did you mean 'temperature'?"),
        (GrpoConfig, "logging.samples_every_step", "logging.samples_every_step", "'logging.samples_every_steps'?"),
    ],
)
def test_unknown_keys_name_themselves_and_the_nearest(kind, key, named, hint, tmp_path):
    nested: Any = 1
    for part in reversed(key.split(".")):
        nested = {part: nested}
    top = next(iter(nested))
    values = {**LEAST, top: {**LEAST.get(top, {}), **nested[top]} if isinstance(nested[top], dict) else nested[top]}
    for message in (failure(kind, tmp_path, values), failure(kind, tmp_path, LEAST, f"{key}=1")):
        assert message.startswith(f"{tmp_path / 'c.yaml'}: unknown key '{named}'; ")
        assert hint in message
        assert "__" not in message


def test_unknown_keys_of_rules(tmp_path):
    rules = [{"rule": "think_format"}, {"rule": "answer_set", "weigth": 2}]
    message = failure(GrpoConfig, tmp_path, {**LEAST, "rewards": rules})
    assert message.endswith("unknown key 'rewards.1.weigth'; did you mean 'rewards.1.weight'?")
    message = failure(GrpoConfig, tmp_path, {**LEAST, "rewards": [{"rule": "length", "zzz": 2, "max_length": 3}]})
    assert "unknown key 'rewards.0.zzz'; valid keys here: rule, name, weight, max_length, buffer" in message


WRONG = [
    (SftConfig, "batch_size: many", "batch_size: must be a whole number", ", not 'many'"),
    (SftConfig, "batch_size: 2.5", "batch_size: must be a whole number", ", not 2.5"),
    (SftConfig, "batch_size: [1]", "batch_size: ", "[1]"),
    (SftConfig, "batch_size:", "batch_size: ", "None"),
    (SftConfig, "batch_size: 0", "batch_size", "at least 1, not 0"),
    (SftConfig, "epochs: 0", "epochs", "above 0"),
    (
        GrpoConfig,
        "mesh: {tensor: 2}\nrollout: {tensor: 4}",
        "rollout.tensor",
        "needs a mesh.tensor of 1 (or the same)",
    ),
    (SftConfig, "epochs: .inf", "epochs", "finite"),
    (SftConfig, "epochs: .nan", "epochs", "finite"),
    (SftConfig, "micro_batch_size: 3", "micro_batch_size", "must divide batch_size 256, not 3"),
    (SftConfig, "micro_batch_size: 0", "micro_batch_size", "at least 1"),
    (SftConfig, "micro_batch_size: -2", "micro_batch_size", "at least 1"),
    (SftConfig, "evaluate_every_steps: 0", "evaluate_every_steps", "at least 1"),
    (SftConfig, "run: {dir: 5}", "run.dir: must be text", ", not 5"),
    (SftConfig, "run: {dir: r, seed: -1}", "run.seed", "at least 0, not -1"),
    (SftConfig, "run: {dir: r, seed: 4294967296}", "run.seed", "at most 4294967295"),
    (SftConfig, "batch_size: 99999999999999999999", "batch_size", "at most 2147483647"),
    (SftConfig, "adapter: {rank: 99999999999999999999}", "adapter.rank", "at most 2147483647"),
    (SftConfig, "run: {dir: ''}", "run", "must be a folder or gs://bucket/prefix"),
    (SftConfig, 'run: {dir: "a\\0b"}', "run", "must be a folder or gs://bucket/prefix"),
    (SftConfig, 'run: {dir: "\\ud800"}', "run", "must be a folder or gs://bucket/prefix"),
    (SftConfig, "run: {dir: 'gs://'}", "run", "must be a folder or gs://bucket/prefix"),
    (SftConfig, "run: {dir: 'gs:///a'}", "run", "must be a folder or gs://bucket/prefix"),
    (SftConfig, "run: {}", "'run.dir' is missing", ""),
    (SftConfig, "run: r", "run: must be a section of keys and values", ", not 'r'"),
    (SftConfig, "run:", "run: ", "None"),
    (SftConfig, "model: {path: m, dtype: float16}", "model.dtype: must be ", ", not 'float16'"),
    (SftConfig, "model: {path: m, remat: yes}", "model.remat", "True"),
    (SftConfig, "data: {train: t, max_length: 0}", "max_length", "at least 1"),
    (SftConfig, "optimizer: {learning_rate: 0}", "learning_rate", "above 0"),
    (SftConfig, "optimizer: {learning_rate: -1e-5}", "learning_rate", "above 0"),
    (SftConfig, "optimizer: {learning_rate: fast}", "optimizer.learning_rate", "'fast'"),
    (SftConfig, "optimizer: {warmup: -1}", "warmup", "at least 0"),
    (SftConfig, "optimizer: {max_grad_norm: 0}", "max_grad_norm", "above 0"),
    (SftConfig, "optimizer: {beta1: 1}", "beta1", "below 1"),
    (SftConfig, "optimizer: {beta2: -0.1}", "beta2", "at least 0"),
    (SftConfig, "optimizer: {epsilon: 0}", "epsilon", "above 0"),
    (SftConfig, "optimizer: {weight_decay: -1}", "weight_decay", "at least 0"),
    (SftConfig, "optimizer: {schedule: linear}", "optimizer.schedule", "'linear'"),
    (SftConfig, "checkpoints: {every_steps: 0}", "every_steps", "at least 1"),
    (SftConfig, "checkpoints: {keep: 0}", "keep", "at least 1"),
    (SftConfig, "logging: {samples_every_steps: 0}", "samples_every_steps", "at least 1"),
    (SftConfig, "logging: {tensorboard: 3}", "logging.tensorboard", "3"),
    (SftConfig, "1: 2", "the key 1 is no text", "put it in quotes"),
    (SftConfig, "epochs: yes", "epochs: must be a number", ", not True"),
    (SftConfig, "optimizer: {weight_decay: off}", "optimizer.weight_decay: must be a number", ", not False"),
    (SftConfig, "data: {train: {a: true}}", "data.train.a: must be a number", ", not True"),
    (SftConfig, "data: {train: {a: .nan}}", "data.train.a: ", "finite"),
    (SftConfig, "data: {train: {a: many}}", "data.train.a: must be a number", ", not 'many'"),
    (SftConfig, "data: {train: 5}", "data.train: must be text", ", not 5"),
    (GrpoConfig, "prompts_per_step: 0", "prompts_per_step", "at least 1"),
    (GrpoConfig, "max_new_tokens: 0", "max_new_tokens", "at least 1"),
    (GrpoConfig, "generations_per_prompt: 1", "generations_per_prompt", "at least 2"),
    (GrpoConfig, "minibatch_prompts: 3", "minibatch_prompts", "must divide prompts_per_step 128"),
    (GrpoConfig, "minibatch_prompts: 32\nmicro_batch_prompts: 64", "micro_batch_prompts", "minibatch_prompts 32"),
    (GrpoConfig, "temperature: 0", "temperature", "above 0"),
    (GrpoConfig, "passes_per_step: 0", "passes_per_step", "at least 1"),
    (GrpoConfig, "objective: {clip_low: 1.5}", "clip_low", "at most 1"),
    (GrpoConfig, "objective: {clip_high: 0}", "clip_high", "above 0"),
    (GrpoConfig, "objective: {clip_delta: 1}", "clip_delta", "above 1"),
    (GrpoConfig, "objective: {clip_delta: 2, name: cispo}", "clip_delta", "cispo"),
    (GrpoConfig, "objective: {kl_coefficient: -1}", "kl_coefficient", "at least 0"),
    (GrpoConfig, "objective: {kl_coefficient: 0, kl_unbiased: true}", "kl_unbiased", "above 0"),
    (GrpoConfig, "objective: {kl_estimator: k2, kl_unbiased: true}", "kl_unbiased", "k2"),
    (GrpoConfig, "objective: {kl_estimator: k4}", "objective.kl_estimator", "'k4'"),
    (GrpoConfig, "objective: {entropy_coefficient: -1}", "entropy_coefficient", "at least 0"),
    (GrpoConfig, "objective: {top_entropy: 0}", "top_entropy", "above 0"),
    (GrpoConfig, "objective: {sampler_cap: 0.5}", "sampler_cap", "at least 1"),
    (GrpoConfig, "objective: {sampler_cap: 2, old_log_probs: sampler}", "sampler_cap", "needs old_log_probs: trainer"),
    (GrpoConfig, "objective: {name: mean}", "objective.name", "'mean'"),
    (GrpoConfig, "objective: {scale: std}", "objective.scale", "'std'"),
    (GrpoConfig, "dynamic_sampling: {candidate_prompts: 130}", "candidate_prompts", "multiple of prompts_per_step 128"),
    (GrpoConfig, "dynamic_sampling: {candidate_prompts: 0}", "candidate_prompts", "multiple of prompts_per_step 128"),
    (GrpoConfig, "dynamic_sampling: {candidate_prompts: 256, rule: x}", "dynamic_sampling.rule", "'x'"),
    (GrpoConfig, "evaluate_every_steps: 0", "evaluate_every_steps", "at least 1"),
    (GrpoConfig, "optimizer: {max_skipped_steps: 0}", "max_skipped_steps", "at least 1"),
    (GrpoConfig, "rewards: [{rule: function}]", "'rewards.0.function' is missing", ""),
    (GrpoConfig, "rewards: [{rule: function, function: judge}]", "function", "module:function"),
    (GrpoConfig, "rewards: [{rule: function, function: a:b, on_error: x}]", "rewards.0.on_error", "'x'"),
    (GrpoConfig, "rewards: []", "rewards", "at least one"),
    (GrpoConfig, "rewards: think_format", "rewards", "'think_format'"),
    (GrpoConfig, "rewards: [{rule: format}]", "rewards.0", "'format'"),
    (GrpoConfig, "rewards: [{rule: think_format, weight: on}]", "rewards.0.weight: must be a number", ", not True"),
    (GrpoConfig, "rewards: [{weight: 1}]", "rewards.0", "'rule'"),
    (GrpoConfig, "rewards: [{rule: pattern, pattern: '('}]", "pattern", "'('"),
    (GrpoConfig, "rewards: [{rule: pattern}]", "'rewards.0.pattern' is missing", ""),
    (GrpoConfig, "rewards: [{rule: length, max_length: x}]", "rewards.0.max_length", "'x'"),
    (GrpoConfig, "rewards: [{rule: think_format, weight: .inf}]", "weight", "1e6"),
    (GrpoConfig, "rewards: [{rule: think_format}, {rule: think_format}]", "think_format", "another `name`"),
    (GrpoConfig, "data: {train: t, max_prompt_length: 0}", "max_prompt_length", "at least 1"),
]


@pytest.mark.parametrize(("kind", "text", "key", "wrong"), WRONG, ids=[text for _, text, *_ in WRONG])
def test_wrong_values_are_named(kind, text, key, wrong, tmp_path):
    try:
        override = yaml.safe_load(text)
    except yaml.YAMLError:
        override = {}
    message = failure(
        kind, tmp_path, f"{yaml.safe_dump({k: v for k, v in LEAST.items() if k not in override})}{text}\n"
    )
    assert message.startswith(f"{tmp_path / 'c.yaml'}: ")
    assert key in message
    assert wrong in message


@pytest.mark.parametrize(
    "text", ["", "5", "[1]", "a: [", ": : :", "a: 2024-13-45", "x: \0", "!!python/object:os.system x", "[" * 1000]
)
def test_broken_yaml(text, tmp_path):
    message = failure(SftConfig, tmp_path, text)
    assert message.startswith(f"{tmp_path / 'c.yaml'}: ")


@pytest.mark.parametrize(
    ("text", "key"), [("1: 2", "1"), ("on: 2", "True"), ("optimizer: {null: 3}", "optimizer.None")]
)
def test_keys_that_are_no_text(text, key, tmp_path):
    said = failure(SftConfig, tmp_path, f"{dump_yaml(LEAST)}{text}\n")
    assert f"the key {key} is no text, as YAML reads it; put it in quotes" in said


@pytest.mark.parametrize("text", ["epochs: 1\nepochs: 2", "optimizer: {warmup: 3}\noptimizer: {beta1: 0.5}"])
def test_keys_that_stand_twice(text, tmp_path):
    """PyYAML takes the last, and the first setting is lost without a word."""
    key = text.partition(":")[0]
    assert f"the key '{key}' stands twice" in failure(SftConfig, tmp_path, f"{dump_yaml(LEAST)}{text}\n")
    failure(SftConfig, tmp_path, LEAST, "optimizer={warmup: 3, warmup: 4}")
    # What an anchor merges may be set anew.
    merged = f"{dump_yaml(LEAST)}optimizer:\n  <<: {{warmup: 3}}\n  warmup: 4\n"
    assert load(SftConfig, tmp_path, merged).optimizer.warmup == 4


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "latin.yaml"):
        (tmp_path / "latin.yaml").write_bytes("prompt: {system: é}".encode("latin-1"))
        with pytest.raises(UsageError) as caught:
            load_config(SftConfig, path)
        assert str(caught.value).startswith(f"{path}: ")
        assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).endswith("is not a config (YAML, as UTF-8 text)")


def test_numbers_as_people_write_them(tmp_path):
    """YAML 1.1 reads `1e-5` as a string."""
    text = dump_yaml(LEAST)
    for written, value in {
        "1e-5": 1e-5,
        "1E-5": 1e-5,
        "1.0e-5": 1e-5,
        "0.00001": 1e-5,
        "1": 1.0,
        "2.5e+1": 25.0,
    }.items():
        config = load(SftConfig, tmp_path, f"{text}optimizer: {{learning_rate: {written}}}\n")
        assert config.optimizer.learning_rate == value
        assert load(SftConfig, tmp_path, text, f"optimizer.learning_rate={written}") == config
    for written in ("inf", "nan", ".inf", "-.inf"):
        failure(SftConfig, tmp_path, text, f"epochs={written}")


def test_extends(tmp_path):
    (tmp_path / "sub").mkdir()
    base = {**LEAST, "batch_size": 8, "optimizer": {"learning_rate": 1e-3, "warmup": 3}}
    (tmp_path / "base.yaml").write_text(dump_yaml(base))
    (tmp_path / "sub/middle.yaml").write_text("extends: ../base.yaml\noptimizer: {warmup: 4}\nepochs: 3\n")
    (tmp_path / "leaf.yaml").write_text("extends: sub/middle.yaml\nepochs: 5\nrun: {seed: 1}\n")
    config = load_config(SftConfig, tmp_path / "leaf.yaml", ["batch_size=16"])
    assert (config.run.dir, config.run.seed, config.epochs, config.batch_size) == ("r", 1, 5, 16)
    assert (config.optimizer.learning_rate, config.optimizer.warmup) == (1e-3, 4)
    assert load_config(SftConfig, tmp_path / "sub/middle.yaml").epochs == 3


def test_extends_replaces_lists_and_scalars_whole(tmp_path):
    (tmp_path / "base.yaml").write_text(dump_yaml({**LEAST, "rewards": [{"rule": "think_format"}, {"rule": "length"}]}))
    config = load(GrpoConfig, tmp_path, "extends: base.yaml\nrewards: [{rule: answer_set}]\n")
    assert config.rewards == (AnswerSetRule(),)


def test_extends_gone_wrong(tmp_path):
    assert "c.yaml: `extends` leads back to this file" in failure(SftConfig, tmp_path, "extends: c.yaml\n")
    (tmp_path / "a.yaml").write_text("extends: ./b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: ../" + tmp_path.name + "/a.yaml\n")
    assert "leads back to this file" in failure(SftConfig, tmp_path, "extends: a.yaml\n")
    assert "none.yaml: the config cannot be read" in failure(SftConfig, tmp_path, "extends: none.yaml\n")
    assert "`extends` must be the path" in failure(SftConfig, tmp_path, "extends: [a.yaml]\n")
    # A parent's mistake is found too.
    (tmp_path / "b.yaml").write_text(dump_yaml({**LEAST, "epoch": 3}))
    assert "unknown key 'epoch'; did you mean 'epochs'?" in failure(SftConfig, tmp_path, "extends: b.yaml\n")


def test_overrides(tmp_path):
    values = {**LEAST, "rewards": [{"rule": "think_format"}, {"rule": "answer_set", "markers": ["a：", "b："]}]}
    overrides = [
        "rewards.0.weight=2",
        "rewards.1.markers.1=答案＝",
        "rewards.1.answer_after=null",
        "optimizer.schedule=cosine",
        "prompt.system=a=b",
        "logging.wandb_project='1'",
        "run.seed=1",
        "run.seed=2",
        "data={train: other.jsonl}",
    ]
    config = load(GrpoConfig, tmp_path, values, *overrides)
    assert config.rewards[0].weight == 2
    assert config.rewards[1] == AnswerSetRule(markers=("a：", "答案＝"), answer_after=None)
    assert config.optimizer.schedule == "cosine"
    assert config.prompt.system == "a=b"
    assert config.logging.wandb_project == "1"
    assert config.run.seed == 2
    assert config.data.train == "other.jsonl"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.seed", "form key=value"),
        ("=1", "form key=value"),
        ("", "form key=value"),
        ("run.dir.x=1", "there is no 'run.dir.x'"),
        ("rewards.7.weight=1", "there is no 'rewards.7.weight'"),
        ("rewards.x.weight=1", "there is no 'rewards.x.weight'"),
        ("rewards.0=", "rewards.0"),
        ("rewards=3", "rewards"),
        ("run.dir=2024-13-45", "not valid YAML"),
        ("run.dir=[", "not valid YAML"),
        ("run=", "run: "),
        ("run..dir=x", "unknown key 'run.'"),
        ("extends=x.yaml", "unknown key 'extends'"),
        ("a\nb=1", "unknown key 'a\\nb'"),
    ],
)
def test_wrong_overrides(override, expected, tmp_path):
    assert expected in failure(GrpoConfig, tmp_path, {**LEAST, "rewards": [{"rule": "think_format"}]}, override)


def positive(largest: float) -> st.SearchStrategy[float]:
    return st.floats(1e-12, largest)


texts = st.text(st.characters(exclude_categories=["Cs"]))
rules = st.lists(
    st.builds(ThinkFormatRule, name=texts, weight=st.floats(-10, 10))
    | st.builds(AnswerSetRule, letters=st.sampled_from(["ABCD", "AZ"]), answer_after=st.none() | st.just("</t>"))
    | st.builds(PatternRule, pattern=st.sampled_from([r"a\d*\n?", "答案：[A-D]+", "'\"#: -"]), max_states=st.just(9))
    | st.builds(LengthRule, max_length=st.integers(5, 10**6), buffer=st.integers(0, 5))
    | st.builds(RepetitionRule, ngram=st.integers(1, 16)),
    min_size=1,
    max_size=3,
    unique_by=lambda rule: rule.name,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts, texts, st.integers(0, 2**32 - 1), positive(1e6), positive(1), st.integers(1, 99), rules, st.booleans())
def test_what_a_run_keeps_reads_back_the_same(
    tmp_path, folder, system, seed, epochs, rate, steps, rewards, tensorboard
):
    """config_to_dict → dump_yaml → load_config, for values of every kind."""
    values = {
        "run": {"dir": "".join(filter(str.isprintable, folder)) or "r", "seed": seed},
        "model": {"path": folder, "remat": "none"},
        "data": {"train": system},
        "epochs": epochs,
        "optimizer": {"learning_rate": rate},
        "prompt": {"system": system},
        "logging": {"tensorboard": tensorboard, "wandb_project": folder, "samples_every_steps": steps},
    }
    grpo = dataclasses.replace(parse_config(GrpoConfig, values, "x"), rewards=tuple(rewards))
    for config in (parse_config(SftConfig, values, "x"), grpo):
        stored = config_to_dict(config)
        path = tmp_path / "config.yaml"
        path.write_text(dump_yaml(stored), encoding="utf-8")
        assert load_config(type(config), path) == config
        assert yaml.safe_load(path.read_text(encoding="utf-8")) == stored
        assert set(stored) == {field.name for field in dataclasses.fields(config)}


def sections(kind):
    """All dataclasses of a config."""
    yield kind
    for hint in get_type_hints(kind).values():
        if dataclasses.is_dataclass(hint):
            yield from sections(hint)


def fields_of_configs():
    kinds = {*sections(SftConfig), *sections(GrpoConfig), *get_args(RuleConfig), FunctionReward}
    assert len(kinds) >= 16
    named = {(kind.__name__, field.name) for kind in kinds for field in dataclasses.fields(kind)}
    return sorted(named)


@pytest.fixture(scope="module")
def attributes():
    """Names of all attributes that the package reads; where configs are defined, in public methods alone."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        read = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        if path.relative_to(PACKAGE).parts in (("config.py",), ("rewards", "config.py")):
            public = [node for node in read if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
            read = [node for one in public for node in ast.walk(one)]
        for node in read:
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names


@pytest.mark.parametrize(("section", "name"), fields_of_configs())
def test_no_field_is_dead(section, name, attributes):
    if (name, section[-4:]) == ("rule", "Rule"):
        return  # tells the rules apart
    assert name in attributes, f"{section}.{name} is read nowhere"


@pytest.mark.skipif(not CONFIGS, reason="configs/ is empty")
@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_configs_of_the_repository(path):
    kinds = {"sft": SftConfig, "grpo": GrpoConfig, "pack": PackConfig, "synth": SynthConfig, "select": SelectConfig}
    kinds |= {"import": ImportConfig}
    (kind,) = [kind for name, kind in kinds.items() if name in path.stem.split("_")]
    config = load_config(kind, path)
    if isinstance(config, SftConfig | GrpoConfig):
        assert load_config(kind, path, ["run.seed=7"]).run.seed == 7
        assert config.run.dir and not Path(config.run.dir).is_absolute()


def test_rare_line_ends_in_texts_read_back(tmp_path):
    """PyYAML writes U+0085 bare, and reads it as a blank."""
    values = {
        "run": {"dir": "run"},
        "model": {"path": "m"},
        "data": {"train": "t"},
        "prompt": {"system": "\x85", "instruction": "一\u2028二\u2029\x85三\n"},
    }
    config = parse_config(SftConfig, values, "x")
    (tmp_path / "config.yaml").write_text(dump_yaml(config_to_dict(config)), encoding="utf-8")
    assert load_config(SftConfig, tmp_path / "config.yaml") == config


def test_reading_a_config_starts_no_jax():
    code = "import sys, psyche_jax.config, psyche_jax.synth.config; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_configs_that_come_with_the_package(tmp_path, monkeypatch):
    """By name, with or without `.yaml`, also as a parent; a file of the user's of that path comes first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft_tiny").mkdir()  # a folder is no config
    for name in ("sft_tiny", "sft_tiny.yaml", "configs/sft_tiny.yaml", "configs/sft_tiny"):
        assert load_config(SftConfig, Path(name)).run.dir == "runs/sft_tiny"
    (tmp_path / "mine.yaml").write_text("extends: sft_7b_v5e16\nepochs: 7\n")
    config = load_config(SftConfig, Path("mine"))
    assert (config.epochs, config.model.architecture, config.batch_size) == (7, "Qwen2.5-7B", 256)
    (tmp_path / "sft_tiny.yaml").write_text("extends: sft_7b_v5e16\n")
    for name in ("sft_tiny", "sft_tiny.yaml"):
        assert load_config(SftConfig, Path(name)).run.dir == "runs/sft_7b"
    for name, shown in (("sft_7b_v5", "sft_7b_v5e16"), ("sft_7b_v5e61.yaml", "sft_7b_v5e16"), ("qqq", "grpo_tiny")):
        with pytest.raises(UsageError, match=f"{name}: the config cannot be read .*; configs that come with .*{shown}"):
            load_config(SftConfig, Path(name))


def test_waves_are_an_old_name_of_slots(tmp_path, capsys):
    values = {**LEAST, "prompts_per_step": 12, "generations_per_prompt": 4}
    config = load(GrpoConfig, tmp_path, {**values, "rollout_waves": 3})
    assert (config.rollout.slots, config.slots) == (16, 16)
    assert capsys.readouterr().err.endswith("c.yaml: rollout_waves: 3 is an old name; write rollout: {slots: 16}\n")
    assert load(GrpoConfig, tmp_path, values, "rollout_waves=1").slots == 48
    assert load(GrpoConfig, tmp_path, {**values, "rollout": {"slots": 100}}).slots == 48
    assert "and both are set" in failure(GrpoConfig, tmp_path, {**values, "rollout": {"slots": 8}}, "rollout_waves=2")
    for wrong in (5, 0, "x", None, 2.0):
        message = failure(GrpoConfig, tmp_path, {**values, "rollout_waves": wrong})
        assert f"rollout_waves must divide prompts_per_step 12, not {wrong!r}" in message
    assert "slots must be at least 1, not 0" in failure(GrpoConfig, tmp_path, {**values, "rollout": {"slots": 0}})
    assert "'rollout.slots'" in failure(GrpoConfig, tmp_path, {**values, "rollout": {"slot": 1}})


@pytest.mark.parametrize(
    ("epochs", "items", "steps"), [(1.1, 100, 11), (2.0, 100, 20), (0.7, 30, 3), (1.11, 100, 12), (1e-9, 5, 1)]
)
def test_steps_are_counted_from_the_number_that_was_written(epochs, items, steps):
    """In floats 1.1 × 100 / 10 is a little above 11, and 0.7 × 30 is a little below 21."""
    places = {"run": {"dir": "runs/a"}, "model": {"path": "m"}, "data": {"train": "t"}, "epochs": epochs}
    assert parse_config(SftConfig, {**places, "batch_size": 10}, "x").count_steps(items) == steps
    assert parse_config(GrpoConfig, {**places, "prompts_per_step": 10}, "x").count_steps(items) == steps
