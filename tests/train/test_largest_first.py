"""The largest shapes are compiled before the first step, once; memory that does not suffice for them is one line."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from support.training_fixtures import grpo_config, metrics_of, sft_config, state_of, write_prompts

from psyche_jax.config import GrpoDataSection, SftDataSection
from psyche_jax.errors import UserError
from psyche_jax.rewards import FunctionReward
from psyche_jax.train import loop
from psyche_jax.train.grpo_run import train_grpo
from psyche_jax.train.loop import check_memory, out_of_memory
from psyche_jax.train.runs import Run
from psyche_jax.train.sft import train_sft

JUDGE = "def judge(prompts, completions, records):\n    return [len(text) / 9 for text in completions]\n"


@pytest.fixture
def compiled():
    """What XLA compiles of our programs, and, in its place, "logged" for each step that is logged."""
    names = []

    def listen(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    log_metrics = Run.log_metrics

    def logged(run, step, metrics):
        names.append("logged")
        log_metrics(run, step, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log_metrics", logged)
        yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def ours(names):
    """The programs of steps and evaluations, and the steps."""
    known = ("step", "__call__", "sample", "learn", "evaluate", "<lambda>", "logged")
    return [name for name in (name.removeprefix("jit(").rstrip(")") for name in names) if name in known]


@pytest.fixture
def one_long(root):
    """Data in which one record is far longer than the others, and comes last."""
    lines = (root / "rl.jsonl").read_text(encoding="utf-8").splitlines()
    long = json.loads(lines[-1])
    long["messages"][0]["content"] = "记忆" * 20
    (root / "rl.jsonl").write_text("\n".join([*lines[:-1], json.dumps(long)]) + "\n", encoding="utf-8")
    write_prompts(root / "more.jsonl", 24)
    return root


@pytest.mark.slow
def test_grpo(one_long, compiled, monkeypatch):
    """The program of a step, and that of the evaluation."""
    data = GrpoDataSection(str(one_long / "rl.jsonl"), 64, str(one_long / "more.jsonl"))
    train_grpo(grpo_config(one_long, data=data, epochs=1.0))
    lengths = ours(compiled)
    before, after = lengths[: lengths.index("logged")], lengths[lengths.index("logged") :]
    assert before.count("__call__") in (1, 2), "the largest; and the shape of the first step where it is another"
    assert "evaluate" in before
    assert before.count("__call__") + after.count("__call__") == 2, "each shape once"
    assert lengths.count("evaluate") <= 2


@pytest.mark.slow
def test_grpo_with_functions(one_long, compiled, monkeypatch):
    (one_long / "a_judge.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(str(one_long))
    rewards = (FunctionReward(function="a_judge:judge"),)
    train_grpo(grpo_config(one_long, rewards=rewards, epochs=1.0))
    names = ours(compiled)
    assert names.count("sample") == names.count("learn") == 2, "each shape once"
    assert names[:2] == ["sample", "learn"]


def test_sft(root, compiled):
    data = SftDataSection(str(root / "sft.jsonl"), str(root / "sft.jsonl"), max_length=96)
    train_sft(sft_config(root, data=data, epochs=1.0))
    names = ours(compiled)
    assert names[0] == "step"
    before = names[: names.index("logged")]
    lengths = {name: names.count(name) for name in ("step", "<lambda>")}
    assert all(count <= 2 for count in lengths.values()), lengths
    assert set(before) == {"step", "<lambda>"}


@pytest.mark.parametrize("verb", ["sft", "grpo"])
def test_memory_that_does_not_suffice_is_known_before_the_first_step(verb, root, monkeypatch):
    """By what a device says it has, as GPUs do; a device that has enough is no hindrance."""
    make, train = {"sft": (sft_config, train_sft), "grpo": (grpo_config, train_grpo)}[verb]
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 2**20, "bytes_in_use": 2**20 - 10})
    monkeypatch.setattr(loop.jax, "local_devices", lambda: [device])
    with pytest.raises(UserError, match="out of memory: the largest step needs") as error:
        train(make(root))
    for setting in ("model.remat=full", "micro_batch"):
        assert setting in str(error.value)
    assert "\n" not in str(error.value)
    assert metrics_of(root / "run") == []
    assert state_of(root / "run")["status"] == "failed"
    monkeypatch.undo()
    smaller = make(root, epochs=1.0)
    smaller = dataclasses.replace(smaller, model=dataclasses.replace(smaller.model, remat="full"))
    smaller = dataclasses.replace(smaller, epochs=2.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psyche_jax.train.loop.check_memory", lambda *_: (_ for _ in ()).throw(UserError("again")))
        with pytest.raises(UserError, match="again"):
            train(smaller)


def test_what_fits_is_let_through(monkeypatch):
    program = jax.jit(lambda x: jnp.sin(x) @ x.T).lower(jnp.ones((64, 64))).compile()
    for stats in (None, {}, {"bytes_limit": 2**30, "bytes_in_use": 2**20}):
        monkeypatch.setattr(
            loop.jax, "local_devices", lambda stats=stats: [SimpleNamespace(memory_stats=lambda: stats)]
        )
        check_memory(program, "")


def test_what_xla_says_of_memory_is_one_line():
    text = "RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.\nBuffer assignment:\n  a\n  b"
    with pytest.raises(UserError, match="out of memory; set less") as error, out_of_memory("set less"):
        raise jax.errors.JaxRuntimeError(text)
    assert "\n" not in str(error.value)
    with pytest.raises(jax.errors.JaxRuntimeError), out_of_memory("set less"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
