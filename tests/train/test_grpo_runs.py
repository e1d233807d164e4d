"""What `train_grpo` gives each step: a key, prompts and the reference. The steps themselves are left out."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.training_fixtures import execution, grpo_config, largest_difference, make_model, state_of, write_prompts

from psyche_jax.config import DynamicSamplingSection, ObjectiveSection
from psyche_jax.data.chat import opened_text
from psyche_jax.data.dataset import load_records
from psyche_jax.data.records import Message, RlPrompt, write_records
from psyche_jax.errors import UserError
from psyche_jax.model.flops import layer_weights, peak_flops
from psyche_jax.model.huggingface import load_tokenizer, read_parameters
from psyche_jax.rewards import FunctionReward, LengthRule, PatternRule, ThinkFormatRule
from psyche_jax.rewards.functions import LoadedFunction
from psyche_jax.rewards.score import score
from psyche_jax.train import grpo_run, loop, stored_models
from psyche_jax.train.run_files import read_lines
from psyche_jax.train.step_folders import read_checkpoint_metadata
from psyche_jax.train.stored_models import identity, open_model

NUMBERS = ("loss", "grad_norm", "num_tokens", "reward", "kl", "completions/mean_length", "frac_reward_zero_std")
NAMES = ("tokens", "mask", "answers")
STEPS = 8


@pytest.fixture
def train(root, tiny_config, monkeypatch):
    """`train(run, seed, fail_at)` runs 8 steps that only note what they get: key, prompts with answers."""
    start = read_parameters(root / "model", tiny_config, execution(8).sharding, jnp.dtype("float32"))

    def train(run, seed=3, fail_at=None, epochs=4.0):
        seen = []

        def step(state, reference, rules, prompts, key):
            if len(seen) + 1 == fail_at:
                raise UserError("no more")
            assert largest_difference(reference, start) == 0, "the reference is the model that training starts from"
            rows = jax.device_get(prompts)
            texts = {(row[mask].tobytes(), int(a)) for row, mask, a in zip(*(rows[n] for n in NAMES), strict=True)}
            seen.append((jax.random.key_data(key).tobytes(), frozenset(texts)))
            moved = jax.tree.map(lambda x: x + 1, state.parameters)
            return dataclasses.replace(state, parameters=moved), {
                "metrics": {**dict.fromkeys(NUMBERS, 1.0), "skipped_updates": 0.0},
                "samples": {},
            }

        monkeypatch.setattr(grpo_run.Iteration, "program", lambda _: step)
        monkeypatch.setattr(grpo_run, "decoded_samples", lambda *_: [])
        config = grpo_config(root, run, epochs=epochs)
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=seed))
        try:
            grpo_run.train_grpo(config)
        except UserError:
            assert state_of(root / run)["status"] == "failed"
        return seen

    return train


def test_keys_and_prompts_of_the_steps(train):
    """A new key each step; each epoch holds every prompt once; another seed gives other keys and another order."""
    seen, other = train("run"), train("other", seed=4)
    assert len(seen) == len(other) == STEPS
    assert len({key for key, _ in seen + other}) == 2 * STEPS
    for epoch in range(0, STEPS, 2):
        assert len(seen[epoch][1] | seen[epoch + 1][1]) == 16
    assert len({prompts for _, prompts in seen + other}) > STEPS, "the order changes with epoch and seed"


def test_a_run_that_failed_goes_on_with_the_same_steps(train):
    """Saved every second step, failed in the fifth: step 5 is the first of the second start."""
    whole = train("whole")
    first, second = train("run", fail_at=6), train("run")
    assert first == whole[:5]
    assert second == whole[4:]


def test_another_reference_policy_is_refused(train, root):
    """Weights that changed since the run began: not those that it would measure the KL divergence from."""
    train("run", fail_at=4)
    weights = root / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"model.path: the model there has changed since this run began"):
        grpo_run.train_grpo(dataclasses.replace(grpo_config(root, "run", epochs=4.0)))
    content[-1] ^= 1
    weights.write_bytes(content)
    assert len(train("run")) == STEPS - 2


@pytest.fixture
def base(root):
    """Its files name only the end of a text as the end of a response, as those of many bases do."""
    ids = {token: index for token, index in load_tokenizer(root / "model").get_vocab().items() if "<|" in token}
    for file, key, value in (
        ("config.json", "eos_token_id", ids["<|endoftext|>"]),
        ("generation_config.json", "eos_token_id", None),
        ("tokenizer_config.json", "eos_token", "<|endoftext|>"),
    ):
        path = root / "model" / file
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    return ids["<|endoftext|>"], ids["<|im_end|>"]


def test_a_run_knows_how_sft_ends_turns(base, train, root):
    train("run", epochs=1.0)
    assert read_checkpoint_metadata(root / "run/checkpoints/2")["model"]["stop_token_ids"] == [*base]


def test_a_run_of_an_older_version_keeps_its_stop_tokens(base, train, root, monkeypatch):
    """It knew only those of the config; a change would make it another run, of another reference."""
    with monkeypatch.context() as patch:
        patch.setattr(stored_models, "with_stop_tokens", lambda config, _: config)
        train("run", fail_at=4)
    stored = [root / "run/checkpoints" / step / "metadata/metadata" for step in ("2", "8")]
    assert json.loads(stored[0].read_text())["model"]["stop_token_ids"] == [base[0]]
    assert len(train("run")) == STEPS - 2
    assert json.loads(stored[1].read_text())["model"]["stop_token_ids"] == [base[0]]
    assert open_model(str(root / "run")).config.stop_token_ids == base, "what reads it now has all"


def test_an_identity_is_that_of_the_weights(root, tmp_path):
    """The same for a copy, with whatever else beside it; another for other weights."""
    shutil.copytree(root / "model", tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("a copy")
    first, copy = (identity(open_model(str(path))) for path in (root / "model", tmp_path / "copy"))
    assert first == copy
    make_model(tmp_path / "other")
    assert identity(open_model(str(tmp_path / "other"))) == first, "the same seed gives the same weights"
    path = tmp_path / "other" / "model.safetensors"
    path.write_bytes(path.read_bytes() + b" ")
    assert identity(open_model(str(tmp_path / "other"))) != first


def test_rewards_know_what_the_template_has_opened(root, monkeypatch):
    """A prompt that ends in `<think>` and a newline, as QwQ's: rules and functions read it before the response."""
    template = root / "model" / "chat_template.jinja"
    start = "<|im_start|>assistant\n"
    assert start in template.read_text()
    template.write_text(template.read_text().replace(start, start + "<think>\n"))
    tokenizer = load_tokenizer(root / "model")
    tokens = tokenizer.encode("想</think>B<|im_end|>")
    found, heard = [], []

    def step(state, reference, rules, prompts, key):
        found.append(score(rules, jnp.asarray([tokens], jnp.int32))[1])
        raise UserError("enough")

    monkeypatch.setattr(grpo_run.Iteration, "program", lambda _: step)
    with pytest.raises(UserError, match="enough"):
        grpo_run.train_grpo(grpo_config(root, rewards=(ThinkFormatRule(), LengthRule(max_length=len(tokens)))))
    assert {name: value.tolist() for name, value in found[0].items()} == {"think_format": [1.0], "length": [0.0]}

    function = LoadedFunction(FunctionReward(function="a:b"), lambda p, c, r: heard.extend([*p, *c]) or [0.0])
    setup = SimpleNamespace(tokenizer=tokenizer, model=open_model(str(root / "model")))
    prompts, _ = grpo_run.tokenized_prompts(tokenizer, grpo_config(root), str(root / "rl.jsonl"))
    rows = np.asarray([tokens])
    grpo_run.judged([function], setup, opened_text(tokenizer), prompts, [0], rows, rows >= 0)
    assert heard[0].endswith("<think>\n")
    assert heard[1] == "<think>\n想</think>B"


def test_rewards_that_are_always_equal_are_warned_of_once(train, capsys):
    train("run", epochs=20.0)
    said = [line for line in capsys.readouterr().err.splitlines() if "the same reward" in line]
    assert len(said) == 1
    assert said[0].startswith("grpo: in 10 steps in a row all responses to each prompt had the same reward")


@pytest.mark.slow
def test_a_run_whose_groups_all_fall_out(root, capsys):
    """Absent metrics are null, the steps are counted and warned of, and the policy stays what it was."""
    never = PatternRule(pattern="never said by anyone", name="never")
    config = grpo_config(root, rewards=(never,), dynamic_sampling=DynamicSamplingSection(8, "never"), epochs=1.0)
    grpo_run.train_grpo(config)
    for line in read_lines(root / "run" / "metrics.jsonl"):
        assert line["reward"] is line["frac_reward_zero_std"] is line["rewards/never/mean"] is line["loss"] is None
        assert line["empty_updates"] == 1
    assert "grpo: step 1 had no response to learn from, so it changed nothing" in capsys.readouterr().err
    start, end = (
        open_model(str(path)).read_parameters(execution(8).sharding, jnp.dtype("float32"))
        for path in (root / "model", root / "run")
    )
    assert largest_difference(start, end) == 0


def test_what_is_held_out_is_not_trained_on(root):
    """Prompts of data.evaluation that are in data.train are set aside by name; if all are, that is an error."""
    write_prompts(root / "more.jsonl", 18)
    config = grpo_config(root)
    tokenizer = load_tokenizer(root / "model")
    trained, _ = grpo_run.tokenized_prompts(tokenizer, config, str(root / "rl.jsonl"))
    more, _ = grpo_run.tokenized_prompts(tokenizer, config, str(root / "more.jsonl"))
    kept, faults = grpo_run.without_trained(more, trained, "more.jsonl")
    assert [prompt.record for prompt in kept] == [prompt.record for prompt in more[16:]]
    assert [prompt.number for prompt in kept] == [0, 1]
    assert len(faults) == 16
    assert f"record {more[0].record.id}: is in data.train too" in faults[0]
    data = dataclasses.replace(config.data, evaluation=config.data.train)
    with pytest.raises(UserError, match=r"all of its prompts are in data.train too"):
        grpo_run.train_grpo(dataclasses.replace(config, data=data))


def test_prompts_that_are_too_long_are_set_aside_and_counted(train, root, capsys):
    """By name; the others are trained on."""
    long = RlPrompt((Message("user", "很长" * 40),), "A", "single")
    write_records(root / "rl.jsonl", [long, *load_records(RlPrompt, root / "rl.jsonl").good])
    assert len(train("run")) == STEPS
    line = f"record {long.id}: "
    assert line in (root / "run" / "set_aside.txt").read_text()
    said = capsys.readouterr().err
    assert "over data.max_prompt_length 64" in said and "1 record skipped" in said


def test_mfu_is_there_where_the_peak_is_known(train, root, monkeypatch):
    """Model FLOPs a second over the peak; nothing on a CPU."""
    train("run")
    assert all("mfu" not in line for line in read_lines(root / "run" / "metrics.jsonl"))
    monkeypatch.setattr(loop, "peak_of_all_devices", lambda: 1e12)
    monkeypatch.setattr(grpo_run, "step_flops", lambda *_: 5e11)
    train("other")
    for line in read_lines(root / "other" / "metrics.jsonl"):
        assert line["mfu"] == pytest.approx(0.5 / line["step_time"])


def test_flops_of_an_iteration(root, tiny_config):
    """The parts by hand: a prompt once; one forward pass for sampling, three for training, one of the reference."""
    config = grpo_config(root)
    prompts, responses, prompt, response = 8, 32, 20.0, 6.0
    metrics = {"num_tokens": responses * (prompt + response), "completions/mean_length": response}
    weights, width = layer_weights(tiny_config), tiny_config.num_attention_heads * tiny_config.head_dim
    tokens = prompts * prompt + responses * response
    pairs = prompts * prompt**2 / 2 + responses * (response * prompt + response**2 / 2)
    forward = tiny_config.num_hidden_layers * (2 * tokens * weights + 4 * pairs * width)
    forward += 2 * responses * response * tiny_config.vocab_size * tiny_config.hidden_size
    assert grpo_run.step_flops(tiny_config, config, metrics) == pytest.approx(5 * forward)
    several = dataclasses.replace(config, passes_per_step=2, objective=ObjectiveSection(kl_coefficient=0.0))
    assert grpo_run.step_flops(tiny_config, several, metrics) == pytest.approx(8 * forward)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_peaks_of_devices(kind, peak):
    assert peak_flops(kind) == peak
