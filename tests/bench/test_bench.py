"""`psyche bench`: what it prints, that responses have their full length, that visits to the host are seen."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psyche_jax import cli
from psyche_jax.bench.measure import grpo_workload, host_visits, rollout_workload
from psyche_jax.bench.shape import GrpoShape, ModelShape, RolloutShape
from psyche_jax.cli import start

SIZES = {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "ffn": 32, "vocab": 64}
MODEL = ModelShape(**SIZES)
ROLLOUT = {"prompts": 8, "generations": 2, "prompt_length": 5, "completion_length": 3}  # 8: the tests' devices


@pytest.fixture(autouse=True)
def settings_stay(monkeypatch):
    monkeypatch.setattr(start, "start_jax", lambda *_: None)


@pytest.mark.parametrize(
    ("what", "flags", "tokens"),
    [("sft", {"batch": 8, "length": 8}, 64), ("rollout", ROLLOUT, 48), ("grpo", {**ROLLOUT, "beta": 0.1}, 48)],
)
def test_one_json_object(what, flags, tokens, capsys):
    values = {**SIZES, **flags, "steps": 2, "warmup": 1}
    arguments = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert cli.main(["bench", what, *arguments, "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["what"] == what
    assert outcome["shape"]["width"] == 16 and outcome["shape"]["vocab"] == 64
    assert len(outcome["seconds_all"]) == len(outcome["cpu_seconds_all"]) == 2
    assert outcome["seconds_median"] > 0
    assert outcome["tokens_per_second"] == pytest.approx(tokens / outcome["seconds_median"], rel=0.01)
    assert (outcome["compilations"], outcome["compilations_timed"]) == (1, 0)
    assert outcome["peak_rss_mib"] > 50
    if what == "grpo":
        assert outcome["shape"]["beta"] == 0.1
        assert outcome["logp_difference"]["mean"] <= 1e-6 and outcome["logp_difference"]["max"] <= 1e-4
        assert (outcome["host_transfers"], outcome["host_callbacks"]) == (0, 0)


def test_no_response_ends_early():
    workload = rollout_workload(RolloutShape(MODEL, prompts=8, generations=8, completion_length=32), seed=0, steps=1)
    rollout = workload.program(*workload.arguments(workload.carry, 0))
    assert bool(rollout.mask.all())
    assert int(rollout.tokens.max()) < MODEL.vocab


def test_the_policy_learns_from_something():
    workload = grpo_workload(GrpoShape(MODEL, 8, 4, 8, 16), seed=0, steps=1)
    _, metrics = workload.split(workload.program(*workload.arguments(workload.carry, 0)))
    assert metrics["frac_reward_zero_std"] < 1 and metrics["grad_norm"] > 0


def test_visits_to_the_host_are_seen():
    def called_back(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct((3,), jnp.float32), x)

    def printed(x):
        jax.debug.print("{}", x)
        return x

    def text(function):
        return jax.jit(function).lower(jnp.ones(3)).compile().as_text()

    assert host_visits(text(called_back)) == {"host_transfers": 0, "host_callbacks": 1}
    assert host_visits(text(printed))["host_callbacks"] == 1
    assert host_visits(text(jnp.sin)) == {"host_transfers": 0, "host_callbacks": 0}
    # Forms that only other back ends use.
    sent = "  %s = (f32[2], u32[], token[]) send(%x, %t), channel_id=1"
    assert host_visits(sent)["host_transfers"] == 1
    assert host_visits("  %o = token[] outfeed(%x, %t)")["host_transfers"] == 1
    assert host_visits('  ROOT %c = f32[] custom-call(%x), custom_call_target="MoveToHost"')["host_callbacks"] == 1


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["sft", "--width", "20", "--heads", "4"], "--width 20 must be a multiple of twice --heads 4"),
        (["sft", "--heads", "8", "--kv-heads", "3"], "--heads 8 must be a multiple of --kv-heads 3"),
        (["grpo", "--generations", "1"], "--generations must be at least 2, not 1"),
        (["rollout", "--prompt-length", "0"], "--prompt-length must be at least 1, not 0"),
        (["sft", "--steps", "0"], "--steps must be at least 1, not 0"),
    ],
)
def test_wrong_sizes(flags, complaint, capsys):
    assert cli.main(["bench", *flags]) == 2
    assert capsys.readouterr().err == f"psyche bench: {complaint}\n"
