"""What may be otherwise when a run goes on, and what is refused, named, and accepted with a flag."""

import dataclasses
import importlib
import json
import os
import shutil
import sys
from unittest import mock

import pytest
from safetensors.numpy import load_file, save_file
from support.training_fixtures import (
    PROMPT,
    grpo_config,
    metrics_of,
    restored,
    sft_config,
    state_of,
    stopped_when_restored,
    write_config,
)

from psyche_jax import cli
from psyche_jax.cli import start
from psyche_jax.config import (
    AdapterSection,
    CheckpointSection,
    DistributedSection,
    DynamicSamplingSection,
    LoggingSection,
    MeshSection,
    ObjectiveSection,
    OptimizerSection,
    RolloutSection,
)
from psyche_jax.config_files import config_to_dict
from psyche_jax.errors import UserError
from psyche_jax.rewards import FunctionReward
from psyche_jax.train.grpo_run import train_grpo
from psyche_jax.train.preemption import Stop
from psyche_jax.train.run_changes import CHANGES, changes, differences
from psyche_jax.train.run_files import check_place
from psyche_jax.train.runs import PreemptedError
from psyche_jax.train.sft import train_sft
from psyche_jax.train.step_folders import find_checkpoint, read_checkpoint_metadata
from psyche_jax.train.stored_models import identity, open_model


def configs(root, verb, **changes):
    made = {"sft": sft_config, "grpo": grpo_config}[verb](root, f"{verb}-run", **changes)
    held_out = str(root / "held_out.jsonl")
    return dataclasses.replace(made, data=dataclasses.replace(made.data, evaluation=held_out), **changes)


TRAIN = {"sft": train_sft, "grpo": train_grpo}


@pytest.fixture(scope="module")
def stopped(tiny_root, tmp_path_factory):
    """A run of SFT and one of GRPO, both stopped after a step."""
    root = shutil.copytree(tiny_root, tmp_path_factory.mktemp("stopped") / "work")
    for verb, source in (("sft", "sft.jsonl"), ("grpo", "rl.jsonl")):
        lines = (root / source).read_text(encoding="utf-8").splitlines(keepends=True)
        (root / f"{verb}.jsonl").write_text("".join(lines[:-2]), encoding="utf-8")
        (root / "held_out.jsonl").write_text("".join(lines[-2:]), encoding="utf-8")
        if verb == "grpo":
            (root / "rl.jsonl").write_text("".join(lines[:-2]), encoding="utf-8")
        with mock.patch.object(Stop, "requested", lambda _, step=None: step == 1), pytest.raises(PreemptedError):
            TRAIN[verb](configs(root, verb))
        (root / "held_out.jsonl").rename(root / f"held_out-{verb}.jsonl")
    return root


@pytest.fixture(params=["sft", "grpo"])
def verb(request):
    return request.param


@pytest.fixture
def root(stopped, tmp_path, verb):
    """A copy, elsewhere: the folder of the run, its model and its data have moved."""
    root = shutil.copytree(stopped, tmp_path / "work")
    (root / f"held_out-{verb}.jsonl").rename(root / "held_out.jsonl")
    return root


def data_of(root, verb):
    return root / ("sft.jsonl" if verb == "sft" else "rl.jsonl")


def reordered(root, verb):
    path = data_of(root, verb)
    path.write_text("".join(reversed(path.read_text(encoding="utf-8").splitlines(keepends=True))), encoding="utf-8")


def one_answer_changed(root, verb):
    path = data_of(root, verb)
    first, *rest = path.read_text(encoding="utf-8").splitlines(keepends=True)
    value = json.loads(first)
    if verb == "sft":
        value["messages"][-1]["content"] += "！"
    else:
        value["answer"] = "D"
    path.write_text("".join([json.dumps(value, ensure_ascii=False) + "\n", *rest]), encoding="utf-8")


def other_evaluation(root, verb):
    shutil.copy(data_of(root, verb), root / "held_out.jsonl")
    lines = (root / "held_out.jsonl").read_text(encoding="utf-8").replace("什么是记忆？", "什么是遗忘？")
    (root / "held_out.jsonl").write_text(lines, encoding="utf-8")


def other_template(root, verb):
    path = root / "model" / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")


def permuted_ids(root, verb):
    path = root / "model" / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    one, other = list(vocabulary)[10:12]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def base_times_three(root, verb):
    path = root / "model" / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[len(tensors) // 2]
    save_file({**tensors, name: 3 * tensors[name]}, path)


OTHERWISE = {
    "data": (reordered, "data.train: the training data have changed since this run began"),
    "data ": (one_answer_changed, "data.train: the training data have changed since this run began"),
    "evaluation": (other_evaluation, "data.evaluation: the evaluation data have changed"),
    "template": (other_template, "the chat template at model.path, or the prompt section, has changed"),
    "tokenizer": (permuted_ids, "the tokenizer at model.path has changed since this run began"),
    "base": (base_times_three, "model.path: the model there has changed since this run began"),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_what_a_run_was_trained_on_is_remembered(what, root, verb, capsys):
    """Another content is refused and named, and nothing is changed; accepted, it goes on and is written down."""
    change, said = OTHERWISE[what]
    run = root / f"{verb}-run"
    kind = what.strip()
    change(root, verb)
    state = state_of(run)
    with pytest.raises(UserError, match="holds another run") as error:
        TRAIN[verb](configs(root, verb))
    assert said in str(error.value)
    assert str(error.value).endswith(f"--accept-changed {kind}")
    assert state_of(run) == state
    with pytest.raises(UserError, match="holds another run"):
        TRAIN[verb](configs(root, verb), accepted={"config"})
    restored(TRAIN[verb], configs(root, verb), accepted={kind})
    (entry,) = state_of(run)["accepted"]
    assert (entry["step"], entry["kinds"]) == (1, [kind])
    assert said in entry["changes"][0]
    assert said in capsys.readouterr().err
    assert state_of(run)["contents"][kind] != state["contents"][kind]
    restored(TRAIN[verb], configs(root, verb))  # and it stays accepted, though no new checkpoint was written yet


@pytest.mark.parametrize("what", ["evaluation", "data"])
@pytest.mark.parametrize("verb", ["sft"], indirect=True)
def test_the_best_by_another_evaluation_is_forgotten(what, root, verb):
    """No later one could reach a value that was found on easier data; changes of other kinds forget nothing."""
    run = root / "sft-run"
    config = dataclasses.replace(configs(root, verb), evaluate_every_steps=1)
    unbeatable = {"step": 1, "evaluation_loss": 0.0}
    (run / "state.json").write_text(json.dumps({**state_of(run), "best": unbeatable}))
    lines = [{**line, **unbeatable} if line["step"] == 1 else line for line in metrics_of(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    OTHERWISE[what][0](root, verb)
    restored(train_sft, config, accepted={what})
    assert state_of(run)["best"] == (None if what == "evaluation" else unbeatable)
    if what == "evaluation":
        with mock.patch.object(Stop, "requested", lambda _, step=None: step == 2), pytest.raises(PreemptedError):
            train_sft(config)  # started once more, and without the flag
        best = state_of(run)["best"]
        values = {line["step"]: line["evaluation_loss"] for line in metrics_of(run)}
        assert best["evaluation_loss"] == min(values.values()) > 0, "also of the last step, which is measured again"


@pytest.mark.slow
def test_the_code_of_reward_functions_is_remembered(tiny_root, tmp_path, monkeypatch):
    root = shutil.copytree(tiny_root, tmp_path / "work")
    config = grpo_config(root, rewards=(FunctionReward(function="my_judge:judge"),))
    monkeypatch.chdir(tmp_path)

    def write(value):
        code = f"def judge(prompts, completions, records):\n    return [{value} for c in completions]\n"
        (tmp_path / "my_judge.py").write_text(code)
        monkeypatch.delitem(sys.modules, "my_judge", raising=False)
        importlib.invalidate_caches()

    write("float(len(c))")
    with mock.patch.object(Stop, "requested", lambda _, step=None: step == 1), pytest.raises(PreemptedError):
        train_grpo(config)
    write("-float(len(c))")
    with pytest.raises(UserError, match=r"Python functions .* have changed .*--accept-changed rewards$"):
        train_grpo(config)
    restored(train_grpo, config, accepted={"rewards"})


@pytest.mark.parametrize("verb", ["sft"], indirect=True)
def test_the_config_of_the_base_is_remembered_too(root, verb):
    path = root / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 0.25}))
    with pytest.raises(UserError, match="the checkpoint does not belong to this run") as error:
        train_sft(configs(root, verb))
    assert "rms_norm_eps" in error.value.details[0]
    restored(train_sft, configs(root, verb), accepted={"base"})


@pytest.mark.parametrize("verb", ["sft"], indirect=True)
def test_checkpoints_remember_too(root, verb):
    """Where the run's own files were lost or changed."""
    reordered(root, verb)
    (root / "sft-run" / "state.json").unlink()
    with pytest.raises(UserError, match="the checkpoint does not belong to this run") as error:
        train_sft(configs(root, verb))
    assert error.value.details == ("data.train: the training data have changed since this run began",)


@pytest.mark.parametrize("verb", ["sft"], indirect=True)
def test_an_old_run_goes_on_and_remembers_from_now_on(root, verb, stopped, capsys):
    """Its checkpoints and its state hold no hashes: places are compared, spelled as they may be."""
    run = root / "sft-run"
    old = state_of(run)
    (run / "state.json").write_text(json.dumps({name: value for name, value in old.items() if name != "contents"}))
    step = find_checkpoint(run)
    metadata = read_checkpoint_metadata(step)
    del metadata["contents"]
    (step / "metadata" / "metadata").write_text(json.dumps({**metadata, "format": 1}))
    (step / "checksums.json").unlink()
    with pytest.raises(UserError, match=r"holds another run \(its model.path is"):
        train_sft(configs(root, verb))
    config = (run / "config.yaml").read_text(encoding="utf-8").replace(str(stopped), f"{root}/../{root.name}")
    (run / "config.yaml").write_text(config, encoding="utf-8")
    metadata["config"] = json.loads(json.dumps(metadata["config"]).replace(str(stopped), f"{root}/../{root.name}"))
    (step / "metadata" / "metadata").write_text(json.dumps({**metadata, "format": 1}))
    restored(train_sft, configs(root, verb))
    assert "no record of what it was trained on; it has one from now on" in capsys.readouterr().err
    assert state_of(run)["contents"] == old["contents"]


def relative(root, verb):
    os.chdir(root)
    return f"./{verb}-run/"


def through_a_link(root, verb):
    (root / "link").symlink_to(root)
    return str(root / "link" / f"{verb}-run")


@pytest.mark.parametrize("spell", [relative, through_a_link])
@pytest.mark.parametrize("verb", ["sft"], indirect=True)
def test_the_same_place_spelled_otherwise(spell, root, verb, monkeypatch):
    """Also the model's and the data's."""
    monkeypatch.chdir(root)
    place = spell(root, verb)
    base = "." if spell is relative else str(root / "link")
    config = configs(root, verb)
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=place),
        model=dataclasses.replace(config.model, path=f"{base}/model/"),
        data=dataclasses.replace(config.data, train=f"{base}/sft.jsonl"),
    )
    restored(train_sft, config)


EXECUTION = {
    "remat": lambda c: {"model": dataclasses.replace(c.model, remat="full")},
    "attention": lambda c: {"model": dataclasses.replace(c.model, attention="blocked")},
    "mesh": lambda c: {"mesh": MeshSection(fsdp=4, tensor=2)},
    "checkpoints": lambda c: {"checkpoints": CheckpointSection(every_steps=7)},
    "logging": lambda c: {"logging": LoggingSection(tensorboard=True)},
    "distributed": lambda c: {"distributed": DistributedSection("never")},
    "micro-batches": lambda c: (
        {"micro_batch_size": 8} if hasattr(c, "micro_batch_size") else {"micro_batch_prompts": 4, "share_prompt": False}
    ),
    "slots": lambda c: {} if hasattr(c, "batch_size") else {"rollout": RolloutSection(16)},
    "evaluations": lambda c: {"evaluate_every_steps": 3},
}
NUMBERS = {
    "model.compute_dtype": lambda c: {"model": dataclasses.replace(c.model, compute_dtype="bfloat16")},
    "optimizer.learning_rate": lambda c: {"optimizer": OptimizerSection(learning_rate=2e-2)},
    "run.seed": lambda c: {"run": dataclasses.replace(c.run, seed=4)},
    "epochs": lambda c: {"epochs": 3.0},
}


@pytest.mark.parametrize("what", EXECUTION)
def test_how_to_compute_may_change(what, tiny_root, verb):
    old = configs(tiny_root, verb)
    new = dataclasses.replace(old, **EXECUTION[what](old))
    assert changes(config_to_dict(old), config_to_dict(new)) == {}


def test_a_run_that_was_begun_in_waves_goes_on_in_slots(tiny_root):
    new = config_to_dict(grpo_config(tiny_root, rollout=RolloutSection(8)))
    old = {key: value for key, value in new.items() if key != "rollout"} | {"rollout_waves": 4}
    assert changes(old, new) == {}


ADAPTER = {"adapter": AdapterSection()}
NO_KL = {"objective": ObjectiveSection(kl_coefficient=0)}
WITHOUT_EFFECT = {
    "reference_dtype with adapters": (ADAPTER, {"reference_dtype": "bfloat16"}),
    "reference_dtype": (NO_KL, {"reference_dtype": "bfloat16"}),
    "objective.kl_estimator": (NO_KL, {"objective": ObjectiveSection(kl_coefficient=0, kl_estimator="k1")}),
    "dynamic_sampling.rule": ({}, {"dynamic_sampling": DynamicSamplingSection(rule="ascii")}),
}


@pytest.mark.parametrize(("run", "change"), WITHOUT_EFFECT.values(), ids=WITHOUT_EFFECT)
def test_what_has_no_effect_may_change(run, change, tiny_root):
    old = grpo_config(tiny_root, **run)
    assert changes(config_to_dict(old), config_to_dict(dataclasses.replace(old, **change))) == {}


@pytest.mark.parametrize(
    ("run", "change", "line"),
    [
        ({}, {"reference_dtype": "bfloat16"}, "its reference_dtype is 'float32', not 'bfloat16'"),
        (ADAPTER, {"adapter": None, "reference_dtype": "bfloat16"}, "its adapter is"),
        ({}, {"objective": ObjectiveSection(kl_coefficient=0.05, kl_estimator="k1")}, "its objective.kl_estimator is"),
        ({}, {"dynamic_sampling": DynamicSamplingSection(16, "ascii")}, "its dynamic_sampling.candidate_prompts is"),
        (
            {"dynamic_sampling": DynamicSamplingSection(16, "ascii")},
            {"dynamic_sampling": DynamicSamplingSection(16, "repetition")},
            "its dynamic_sampling.rule is 'ascii', not 'repetition'",
        ),
    ],
)
def test_the_same_settings_where_they_have_one_may_not(run, change, line, tiny_root):
    old = grpo_config(tiny_root, **run)
    found = changes(config_to_dict(old), config_to_dict(dataclasses.replace(old, **change)))["config"]
    assert [one.startswith(line) for one in found] == [True]


@pytest.mark.parametrize("what", NUMBERS)
def test_what_changes_the_numbers_may_not(what, tiny_root, verb):
    old = configs(tiny_root, verb)
    new = dataclasses.replace(old, **NUMBERS[what](old))
    found = changes(config_to_dict(old), config_to_dict(new))["config"]
    assert found[0].startswith(f"its {what} is ")


@pytest.mark.parametrize("name", ["mu_dtype", "nu_dtype"])
@pytest.mark.parametrize("value", ["float32", "bfloat16"])
def test_a_setting_that_is_newer_than_the_run(value, name, tiny_root, verb):
    """The run had what is the default, and goes on with that alone."""
    config = configs(tiny_root, verb)
    old = config_to_dict(config)
    del old["optimizer"][name]
    new = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **{name: value}))
    expected = {} if value == "float32" else {"config": [f"its optimizer.{name} is 'float32', not 'bfloat16'"]}
    assert changes(old, config_to_dict(new)) == expected


def test_a_setting_of_adapters_that_is_newer_than_the_run(tiny_root, verb):
    config = configs(tiny_root, verb, adapter=AdapterSection(4))
    old = config_to_dict(config)
    del old["adapter"]["targets"]
    assert changes(old, config_to_dict(config)) == {}
    new = dataclasses.replace(config, adapter=AdapterSection(4, targets=("q_proj",)))
    ((kind, (line,)),) = changes(old, config_to_dict(new)).items()
    assert kind == "config" and "adapter.targets" in line


def test_a_run_of_the_other_kind_is_never_gone_on_with(root, verb, stopped):
    """Whatever is accepted."""
    other = config_to_dict(configs(root, {"sft": "grpo", "grpo": "sft"}[verb]))
    for early in (True, False):
        with pytest.raises(UserError, match=f"holds an? {verb.upper()} run; choose another run.dir"):
            check_place(root / f"{verb}-run", other, None, CHANGES, early)


def test_nothing_is_called_null_as_in_yaml():
    assert differences({"batch_size": 8, "name": None}, {"batch_size": None, "name": "x"}) == [
        "its batch_size is 8, not null",
        "its name is null, not 'x'",
    ]


def test_micro_batches_are_part_of_the_loss_of_bnpo(tiny_root):
    old = grpo_config(tiny_root, objective=ObjectiveSection("bnpo"), micro_batch_prompts=4)
    new = dataclasses.replace(old, micro_batch_prompts=2)
    assert "config" in changes(config_to_dict(old), config_to_dict(new))


@pytest.mark.slow
def test_a_run_that_ran_out_of_memory_goes_on_in_smaller_parts(root, verb):
    """To its end, with all that saves memory: the steps that were done stay, and the numbers but for rounding."""
    smaller = {"model": dataclasses.replace(configs(root, verb).model, remat="full"), "mesh": MeshSection(2, 2, 2)}
    smaller |= {"micro_batch_size": 4} if verb == "sft" else {"micro_batch_prompts": 4}
    whole = configs(root, verb)
    whole = dataclasses.replace(whole, run=dataclasses.replace(whole.run, dir=str(root / "whole")))
    TRAIN[verb](whole)
    TRAIN[verb](configs(root, verb, **smaller))
    lines, expected = metrics_of(root / f"{verb}-run"), metrics_of(root / "whole")
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    assert lines[:2] == expected[:2]
    assert lines[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-3, abs=1e-5)


def test_the_flag_of_the_command(root, verb, capsys, monkeypatch):
    monkeypatch.setattr(start, "start_jax", lambda *_: None)
    config = dataclasses.replace(configs(root, verb), prompt=dataclasses.replace(PROMPT, system="另一位专家。"))
    reordered(root, verb)
    path = write_config(config, root / "config.yaml")
    command = [verb, "--config", str(path)]
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert "--accept-changed data,template" in said
    assert "its prompt.system is '专家。', not '另一位专家。'" in said
    with stopped_when_restored():
        assert cli.main([*command, "--accept-changed", "data", "--accept-changed", "base,template"]) == 1
    assert state_of(root / f"{verb}-run")["reason"] == "far enough"
    with pytest.raises(SystemExit):
        cli.main([*command, "--accept-changed", "weather"])
    assert "'weather' is not one of config, data" in capsys.readouterr().err


def test_every_byte_of_a_model_counts(tiny_root, tmp_path):
    shutil.copytree(tiny_root / "model", tmp_path / "model")
    before = identity(open_model(str(tmp_path / "model")))
    path = tmp_path / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    for place in (len(content) // 3, len(content) // 2, len(content) - 1):
        content[place] ^= 1
        path.write_bytes(content)
        assert identity(open_model(str(tmp_path / "model"))) != before
        content[place] ^= 1
