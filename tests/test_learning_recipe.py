"""`scripts/learning/learn_smollm2.py`: its data, what its reward rewards, and that both ways to score agree."""

from dataclasses import replace

import numpy as np
import pytest
from support.script_modules import load_script
from support.tiny import save_model

from psyche_jax.config import GrpoConfig, GrpoDataSection, SftConfig
from psyche_jax.config_files import load_config
from psyche_jax.data.dataset import load_records
from psyche_jax.data.records import RlPrompt, SftExample, answer_mask
from psyche_jax.rewards.reference import score_response


@pytest.fixture(scope="module")
def recipe():
    return load_script("learning", "learn_smollm2")


@pytest.fixture(scope="module")
def data(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe") / "data"
    recipe.make_data(folder, seed=3, grpo_prompts=400)
    return folder


def letters(record):
    return record.messages[0].content.partition("? ")[2].split()


def test_no_set_of_letters_twice(data):
    sft = load_records(SftExample, data / "sft.jsonl").good
    trained, held_out, watched = (
        load_records(RlPrompt, data / f"{name}.jsonl").good for name in ("rl", "held_out", "watched")
    )
    assert len({frozenset(letters(r)) for r in (*sft, *trained, *held_out)}) == len(sft) + 400 + len(held_out)
    assert watched == held_out[: len(watched)]
    assert all(record.answer == min(letters(record)) for record in trained)
    # No answer is right for over 0.35 of the prompts, and SFT's say nothing of what is right.
    answers = [record.answer for record in held_out]
    assert max(map(answers.count, answers)) / len(answers) <= 0.35
    right = [record.messages[1].content == f"Answer: {min(letters(record))}" for record in sft]
    assert abs(np.mean(right) - 0.2) < 0.08


@pytest.mark.parametrize(
    ("text", "stopped", "correct", "form"),
    [
        ("Answer: D", True, 1, 1),
        ("Answer: K", True, 0, 1),
        ("Answer: D", False, 0, 0),
        ("D", True, 0, 0),
        ("Answer: D K", True, 0, 0),
        ("Answer: D or K", True, 0, 0),
    ],
)
def test_what_is_rewarded(recipe, text, stopped, correct, form):
    rules = {rule.name: rule for rule in load_config(GrpoConfig, recipe.GRPO_CONFIG).rules}
    ids = [*text.encode(), *([256] if stopped else [])]
    vocabulary = [bytes([byte]) for byte in range(256)] + [None]
    given = {name: score_response(rule, ids, vocabulary, [256], answer_mask("D")) for name, rule in rules.items()}
    assert given == {"correct": correct, "format": form}
    assert {name: rule.weight for name, rule in rules.items()} == {"correct": 1, "format": 0}


def test_configs_agree(recipe):
    assert load_config(SftConfig, recipe.SFT_CONFIG).prompt == load_config(GrpoConfig, recipe.GRPO_CONFIG).prompt


def test_both_ways_to_score_agree(recipe, data, tmp_path):
    pytest.importorskip("torch")
    save_model(tmp_path / "model")
    config = replace(load_config(GrpoConfig, recipe.GRPO_CONFIG), data=GrpoDataSection("unused", 128))
    records = load_records(RlPrompt, data / "held_out.jsonl").good[:8]
    here = recipe.score_here(tmp_path / "model", records, config, temperature=0.0)
    there = recipe.score_in_transformers(tmp_path / "model", records, config)
    assert here.tokens == there.tokens
    assert here.means() == there.means() and set(here.rewards) == {"correct", "format"}
