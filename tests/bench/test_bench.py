"""`psyche bench`: what it prints, how long responses are, what it takes of configs, that host visits are seen."""

import json
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psyche_jax import cli
from psyche_jax.bench import measure
from psyche_jax.bench.case import make_case
from psyche_jax.bench.measure import grpo_workload, host_visits, rollout_workload, sft_workload, shares_of_peaks
from psyche_jax.cli import start
from psyche_jax.config_files import dump_yaml
from psyche_jax.model.config import ARCHITECTURES
from psyche_jax.model.flops import memory_bandwidth, peak_flops
from psyche_jax.plan.rollout import draw_lengths, simulate

SIZES = {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "ffn": 32, "vocab": 64}
ROLLOUT = {"prompts": 8, "generations": 2, "prompt_length": 5, "completion_length": 3}  # 8: the tests' devices
RAGGED = {"prompts": 8, "generations": 8, "prompt_length": 3, "completion_length": 24}


@pytest.fixture(autouse=True)
def settings_stay(monkeypatch):
    monkeypatch.setattr(start, "start_jax", lambda *_: None)


def flags(values):
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def outcome_of(capsys, what, *arguments):
    assert cli.main(["bench", what, *arguments, "--steps", "2", "--warmup", "1", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("what", "values", "tokens"),
    [
        ("sft", {"batch": 16, "length": 8, "micro_batch": 8, "remat": "full"}, 128),
        ("rollout", ROLLOUT, 48),
        ("rollout", {**ROLLOUT, "generations": 1, "slots": 8}, 24),
        ("grpo", {**ROLLOUT, "beta": 0.1, "micro_batch": 4, "remat": "dots"}, 48),
    ],
)
def test_one_json_object(what, values, tokens, capsys):
    outcome = outcome_of(capsys, what, *flags({**SIZES, **values}))
    assert outcome["what"] == what
    assert outcome["shape"].items() >= {**SIZES, **values, "tied": False, "dtype": "float32"}.items()
    assert len(outcome["seconds_all"]) == len(outcome["cpu_seconds_all"]) == 2
    assert outcome["seconds_median"] > 0
    assert outcome["tokens_per_second"] == pytest.approx(tokens / outcome["seconds_median"], rel=0.01)
    assert (outcome["compilations"], outcome["compilations_timed"]) == (1, 0)
    assert outcome["peak_rss_mib"] > 50
    # Of a CPU no peak is known.
    assert not {"mfu", "bandwidth_share"} & outcome.keys()
    if what != "sft":
        assert (outcome["mean_length"], outcome["max_length"], outcome["decoding_steps"]) == (3, 3, 3)
    if what == "grpo":
        assert outcome["logp_difference"]["mean"] <= 1e-6 and outcome["logp_difference"]["max"] <= 1e-4
        assert (outcome["host_transfers"], outcome["host_callbacks"]) == (0, 0)


def test_no_response_ends_early():
    case = make_case("rollout", {**SIZES, "prompts": 8, "completion_length": 32})
    workload = rollout_workload(case, seed=0, steps=1)
    rollout, steps = workload.program(*workload.arguments(workload.carry, 0))
    assert bool(rollout.mask.all()) and steps == 32
    assert int(rollout.tokens.max()) < SIZES["vocab"]


@pytest.mark.parametrize("slots", [None, 16])
def test_responses_have_the_lengths_that_are_asked_for(slots):
    """Those that `psyche plan` forecasts with, each by one stop token at its end, decoded in as many steps."""
    given = {**SIZES, **RAGGED} | ({} if slots is None else {"slots": slots})
    case = make_case("rollout", given, lengths="mean=6,p99=20")
    workload = rollout_workload(case, seed=0, steps=1)
    rollout, steps = jax.device_get(workload.program(*workload.arguments(workload.carry, 0)))
    lengths = draw_lengths("mean=6,p99=20", 64, 24)
    assert len(set(lengths)) > 10
    assert rollout.mask.sum(axis=1).tolist() == lengths
    assert ((rollout.tokens == 0) & rollout.mask).sum(axis=1).tolist() == [1] * 64
    assert rollout.tokens[np.arange(64), np.asarray(lengths) - 1].tolist() == [0] * 64
    assert len(np.unique(rollout.tokens)) > 40
    assert steps == simulate(lengths, slots or 64, 8).steps


def test_ragged_grpo_is_counted_as_it_is(capsys):
    outcome = outcome_of(capsys, "grpo", *flags({**SIZES, **RAGGED, "lengths": "mean=6,p99=20"}))
    lengths = draw_lengths("mean=6,p99=20", 64, 24)
    assert outcome["mean_length"] == pytest.approx(np.mean(lengths), abs=1e-3)
    assert (outcome["max_length"], outcome["decoding_steps"]) == (max(lengths), max(lengths))
    assert outcome["tokens_per_second"] == pytest.approx(sum(lengths) / outcome["seconds_median"], rel=0.01)
    assert outcome["logp_difference"]["max"] <= 1e-4


def test_the_policy_learns_from_something():
    given = {**SIZES, "prompts": 8, "generations": 4, "prompt_length": 8, "completion_length": 16}
    workload = grpo_workload(make_case("grpo", given), seed=0, steps=1)
    _, metrics = workload.split(workload.program(*workload.arguments(workload.carry, 0)))
    assert metrics["frac_reward_zero_std"] < 1 and metrics["grad_norm"] > 0


def test_the_program_is_that_of_the_options():
    """Backward computes more again under remat; what a loop over micro-batches does counts once."""

    def work(**given):
        workload = sft_workload(make_case("sft", {**SIZES, "batch": 16, "length": 64, **given}), seed=0, steps=1)
        return workload.program.lower(*workload.arguments(workload.carry, 0)).cost_analysis()["flops"]

    assert work(remat="full") > 1.1 * work()
    assert work(micro_batch=8) < 0.7 * work()


@pytest.fixture
def grpo_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        dump_yaml(
            {
                "run": {"dir": str(tmp_path / "run")},
                "model": {"path": "nowhere", "architecture": "Qwen2.5-0.5B", "remat": "full"},
                "data": {"train": "nothing.jsonl", "max_prompt_length": 7},
                "prompts_per_step": 16,
                "generations_per_prompt": 4,
                "minibatch_prompts": 8,
                "max_new_tokens": 9,
                "temperature": 0.7,
                "rollout": {"slots": 32},
                "rewards": [{"rule": "think_format"}, {"rule": "function", "function": "mine:reward"}],
                "dynamic_sampling": {"candidate_prompts": 32, "rule": "think_format"},
            }
        )
    )
    return path


def test_a_config_says_what_is_measured(grpo_file):
    case = make_case("grpo", {"prompt_length": 5}, grpo_file, ["max_new_tokens=6"])
    assert case.model.num_parameters == ARCHITECTURES["Qwen2.5-0.5B"].num_parameters
    config = case.config
    assert (config.data.max_prompt_length, config.max_new_tokens) == (5, 6)  # changed by the options
    assert (config.temperature, config.slots, config.updates_per_step, config.model.remat) == (0.7, 32, 2, "full")
    assert case.shape["prompts"] == 16 and case.shape["layers"] == 24 and case.shape["tied"]
    # Neither functions of the host nor prompts that are thrown away.
    assert not config.functions and config.candidates_per_step == 16
    packaged = make_case("sft", file=Path("sft_7b_v5e16"))
    assert packaged.shape["micro_batch"] == 16 and packaged.shape["width"] == 3584


def test_a_model_by_its_name_is_measured(capsys, monkeypatch):
    """Without a file too; the models that have names are too large to be run here."""
    monkeypatch.setitem(ARCHITECTURES, "Tiny", make_case("sft", SIZES).model)
    outcome = outcome_of(capsys, "sft", *flags({"batch": 8, "length": 4, "set": "model.architecture=Tiny"}))
    assert outcome["shape"].items() >= SIZES.items()


@pytest.fixture
def known_device(monkeypatch):
    monkeypatch.setattr(measure, "peak_of_all_devices", lambda: 1e9)
    monkeypatch.setattr(measure, "memory_bandwidth", lambda kind: 1e9)


def test_shares_of_published_peaks(known_device):
    """Beside a count by hand of this shape: one layer of width 16, one head of keys and values of 8."""
    layer, head = 16 * (2 * 16 + 2 * 8 + 3 * 32), 16 * 64
    case = make_case("sft", {**SIZES, "batch": 8, "length": 8, "dtype": "bfloat16"})
    flops = 3 * 8 * (8 * 2 * (layer + head) + 4 * 8 * 8 / 2 * 16)
    assert shares_of_peaks(case, {"num_tokens": 64}, 0.5) == {"mfu": pytest.approx(flops / 1e9 / 0.5, abs=1e-4)}

    given = {**SIZES, **RAGGED, "dtype": "bfloat16"}
    shares = shares_of_peaks(make_case("rollout", given, lengths="mean=6,p99=20"), {}, 0.01)
    lengths = np.asarray(draw_lengths("mean=6,p99=20", 64, 24))
    turns = lengths.max() - 1
    said = lengths * (lengths - 1) // 2
    cache = 2 * 2 * 8 * (turns * 3 + said.sum() / 8)  # on each device a prompt and its eight responses
    logits = turns * 8 * 64 * 4 * 3
    seconds = (turns * (layer + head) * 2 + cache + logits) / 1e9
    assert shares["bandwidth_share"] == pytest.approx(seconds / 0.01, abs=1e-4)
    decoded = (2 * (layer + head) * (lengths - 1) + 4 * 16 * (said + 3 * (lengths - 1))).sum()
    prefill = 8 * (3 * 2 * layer + 4 * 9 / 2 * 16 + 2 * head)
    assert shares["mfu"] == pytest.approx((decoded + prefill) / 1e9 / 0.01, abs=1e-4)

    # No peak of float32 products is published for TPUs.
    assert list(shares_of_peaks(make_case("rollout", {**SIZES, **RAGGED}), {}, 0.01)) == ["bandwidth_share"]


def test_readable_text(known_device, capsys):
    values = {**SIZES, **ROLLOUT, "dtype": "bfloat16", "steps": 1, "warmup": 1}
    assert cli.main(["bench", "rollout", *flags(values)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("rollout on 8 × cpu: ") and "None" not in lines[0]
    assert lines[3] == "responses of 3 tokens on average, the longest 3, in 3 decoding steps"
    assert "of the published bfloat16 peak" in lines[4] and lines[4].endswith("of the bandwidth bound")


def test_known_devices():
    assert memory_bandwidth("NVIDIA H200") == 4.8e12
    assert memory_bandwidth("NVIDIA A100-SXM4-40GB") == 1.555e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert memory_bandwidth("TPU v6 lite") == 1.64e12
    assert memory_bandwidth("cpu") is None


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
    ("arguments", "complaint"),
    [
        ("sft --width 20 --heads 4", "--width 20 must be a multiple of twice --heads 4"),
        ("sft --heads 8 --kv-heads 3", "--heads 8 must be a multiple of --kv-heads 3"),
        ("grpo --generations 1", "--generations must be at least 2, not 1"),
        ("rollout --prompt-length 0", "--prompt-length must be at least 1, not 0"),
        ("grpo --beta -1", "--beta must be at least 0, not -1.0"),
        ("grpo --beta nan", "options: objective.kl_coefficient"),
        ("sft --steps 0", "--steps must be at least 1, not 0"),
        ("sft --steps 99999999999999999999", "--steps and --warmup must be at most 10000 together"),
        ("sft --micro-batch 3", "options: micro_batch_size must divide batch_size 8, not 3"),
        ("grpo --prompts 8 --micro-batch 3", "options: micro_batch_prompts must divide minibatch_prompts 8, not 3"),
        ("sft --batch 9", "batch_size: 9 rows cannot be spread over data × fsdp = 8 devices; use a multiple"),
        (
            "sft --batch 16 --micro-batch 4",
            "micro_batch_size: 4 rows cannot be spread over data × fsdp = 8 devices; use a multiple",
        ),
        (
            "rollout --prompts 8 --slots 12",
            "rollout.slots: 12 rows cannot be spread over data × fsdp = 8 devices; use a multiple",
        ),
        ("rollout --slots 0", "--slots must be at least 1, not 0"),
        ("rollout --lengths mean=8", "--lengths mean=8: must be mean=400,p99=2048, or the folder of a GRPO run"),
        (
            "rollout --lengths mean=80,p99=100",
            "--lengths mean=80,p99=100: lengths are at least 1, and the mean at most max_new_tokens 64",
        ),
        ("grpo --lengths mean=8,p99=7", "--lengths mean=8,p99=7: no log-normal distribution has these"),
        ("grpo --vocab 40 --lengths mean=8,p99=20", "--lengths needs a vocabulary of at least 64 tokens, not 40"),
        ("sft --config nowhere", "nowhere: the config cannot be read"),
        (
            "grpo --config sft_7b_v5e16",
            "--config sft_7b_v5e16: batch_size is a key of SFT; psyche bench grpo takes a config of GRPO",
        ),
        (
            "sft --config grpo_7b_v5e16",
            "--config grpo_7b_v5e16: prompts_per_step is a key of GRPO; psyche bench sft takes a config of SFT",
        ),
        ("sft --config import", "import: unknown key 'record'; valid keys here: run, model, data"),
        (
            "sft --set max_new_tokens=3",
            "--set: max_new_tokens is a key of GRPO; psyche bench sft takes a config of SFT",
        ),
        ("sft --set batch=3", "options: unknown key 'batch'; did you mean"),
        (
            "grpo --config grpo_7b_v5e16 --layers 2",
            "--layers: the config already sets the model's shape; leave out one of the two",
        ),
        ("grpo --config grpo_7b", "runs/sft_7b: no such model, and the config names no architecture"),
        (
            "grpo --config grpo_7b_v5e16",
            "mesh: data 1, fsdp 16, tensor 1 does not divide the 8 devices",
        ),
        (
            "sft --set mesh.data=2 --set mesh.fsdp=2",
            "mesh: data 2, fsdp 2, tensor 1 needs 4 devices, and there are 8; set one axis to -1 to take what is left",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, complaint, capsys):
    assert cli.main(["bench", *shlex.split(arguments)]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith(f"psyche bench: {complaint}") and error.count("\n") == 1
