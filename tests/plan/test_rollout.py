"""The queue over slots in plain Python: against the program and against one step at a time; lengths of responses."""

import json
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psyche_jax.errors import UsageError, UserError
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.decode import generate_counted
from psyche_jax.model.qwen2 import Execution, initialize
from psyche_jax.model.sampling import Sampling
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, make_mesh
from psyche_jax.plan.rollout import draw_lengths, simulate

MODEL = ModelConfig(304, 32, 48, 2, 4, 2, 8, pad_token_id=0, stop_token_ids=tuple(range(1, 304, 9)))


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "parts"), [(16, 1), (5, 1), (1, 1), (None, 2), (24, 2)], ids=str)
def test_as_many_steps_as_the_program(slots, parts):
    prompts, each, longest = 8, 4, 20
    sharding = Sharding(make_mesh(1, parts, 1, jax.devices()[:parts]), TRAIN_RULES)
    parameters = initialize(MODEL, jax.random.key(0), sharding, jnp.float32)
    tokens = jax.random.randint(jax.random.key(1), (prompts, 6), 10, 300)

    @jax.jit
    def program(parameters):
        sampling = Sampling(longest, generations_per_prompt=each, slots=slots)
        execution = Execution(sharding, jnp.dtype("float32"))
        return generate_counted(MODEL, parameters, tokens, tokens > 0, jax.random.key(2), sampling, execution)

    rollout, steps = program(parameters)
    lengths = np.asarray(rollout.mask).sum(axis=1).tolist()
    assert len(set(lengths)) > 8, "ragged"
    assert simulate(lengths, slots or prompts * each, parts).steps == int(steps)


def one_by_one(lengths, slots, parts):
    """The turns of each loop, step by step."""
    share = len(lengths) // parts
    rows = min(share, slots // parts)
    queues = [[n - 1 for n in lengths[p * share : (p + 1) * share] if n > 1] for p in range(parts)]
    busy = [[queue.pop(0) for _ in range(min(rows, len(queue)))] for queue in queues]
    turns = []
    while True:
        following = rows // 2 if rows // 2 >= 8 else 0
        count = 0
        while any(queues) or max(map(len, busy)) > following:
            count += 1
            for part, queue in zip(busy, queues, strict=True):
                part[:] = [left - 1 for left in part if left > 1]
                part += [queue.pop(0) for _ in range(min(rows - len(part), len(queue)))]
        turns.append((rows, count))
        if not following:
            return turns
        rows = following


@pytest.mark.parametrize("seed", range(12))
def test_one_step_at_a_time(seed):
    chance = random.Random(seed)
    parts, share, longest = chance.choice([1, 2, 4]), chance.randint(1, 80), chance.choice([1, 2, 30])
    lengths = [chance.randint(1, longest) for _ in range(parts * share)]
    slots = parts * chance.randint(1, share + 3)
    decoding = simulate(lengths, slots, parts)
    assert [(loop.rows, loop.turns) for loop in decoding.loops] == one_by_one(lengths, slots, parts)
    assert decoding.tokens == sum(lengths)
    assert decoding.attended == sum(sum(range(length)) for length in lengths)


@pytest.mark.parametrize("seed", range(6))
def test_what_each_turn_looks_at(seed):
    """Against `_OwnPlaces`' rule, with the lengths of all rows in every turn."""
    chance = random.Random(seed)
    parts, share, longest = chance.choice([1, 2]), chance.randint(4, 40), chance.choice([60, 200, 300])
    lengths = [chance.randint(1, longest) for _ in range(parts * share)]
    slots = parts * chance.randint(1, share)
    decoding = simulate(lengths, slots, parts, longest)
    sizes = [size for size in (128, 256) if size < longest] + [longest]
    expected = dict.fromkeys(sizes, 0)
    rows = min(share, slots // parts)
    queues = [[n for n in lengths[p * share : (p + 1) * share] if n > 1] for p in range(parts)]
    busy = [[[1, queue.pop(0)] for _ in range(min(rows, len(queue)))] for queue in queues]
    for turn in range(decoding.steps - 1):
        most = max(said for part in busy for said, _ in part)
        fits = [size for size in sizes if size >= most]
        expected[longest if most > turn % longest + 1 else fits[0]] += 1
        for part, queue in zip(busy, queues, strict=True):
            part[:] = [[said + 1, length] for said, length in part if said + 1 < length]
            part += [[1, queue.pop(0)] for _ in range(min(rows - len(part), len(queue)))]
    assert [sum(looks) for looks in zip(*(loop.looks for loop in decoding.loops), strict=True)] == list(
        expected.values()
    )
    assert all(sum(loop.looks) == loop.turns for loop in decoding.loops)


def test_ragged_lengths_take_fewer_steps():
    lengths = draw_lengths("mean=100,p99=300", 256, 512)
    for slots in (32, 64, 256):
        full = simulate([512] * 256, slots, 2)
        assert max(lengths) <= simulate(lengths, slots, 2).steps < full.steps
        assert full.steps == 1 + 511 * 256 // slots
    assert simulate(lengths, 256, 2).steps == max(lengths)


@pytest.mark.parametrize("text", ["mean=400,p99=2048", "mean=400, p50=300", "mean=400,p95=400", "mean=3,p90=4"])
def test_a_log_normal_distribution_is_as_it_is_described(text):
    lengths = draw_lengths(text, 10_000, 10**6)
    mean, percentile, value = (
        float(part) for part in text.replace(" ", "").replace("mean=", "").replace(",p", "=").split("=")
    )
    assert sum(lengths) / 10_000 == pytest.approx(mean, rel=0.02)
    assert sorted(lengths)[math.ceil(percentile * 100) - 1] == pytest.approx(value, rel=0.02)
    assert lengths == draw_lengths(text, 10_000, 10**6), "the same every time"
    assert max(draw_lengths(text, 1000, 500)) <= 500
    assert min(draw_lengths(text, 1000, 500)) >= 1


def test_lengths_of_a_run(tmp_path, capsys):
    rows = [{"step": 1, "tokens": tokens} for tokens in (5, 9, 700, True, -3, "7")]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 1, "tok')
    assert sorted(draw_lengths(str(tmp_path), 6, 512)) == [5, 5, 9, 9, 512, 512]
    assert "samples.jsonl: skipped 4 lines without a number of tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be mean=400,p99=2048, or the folder of a GRPO run"),
        ("400", "must be mean="),
        ("mean=400", "must be mean="),
        ("mean=400,p98=500", "must be mean="),
        ("mean=-4,p99=500", "must be mean="),
        ("mean=nan,p99=500", "must be mean="),
        ("mean=0,p99=500", "at least 1, and the mean at most max_new_tokens 512"),
        ("mean=600,p99=700", "at least 1, and the mean at most max_new_tokens 512"),
        ("mean=400,p99=399", "p99 must be from the mean to 15.0 times it"),
        ("mean=40,p90=500", "p90 must be from the mean to 2.3 times it"),
        ("mean=400,p50=401", "p50 must be at most the mean"),
        ("no/such/run", "must be mean="),
    ],
)
def test_lengths_that_cannot_be(text, said):
    with pytest.raises(UsageError) as refused:
        draw_lengths(text, 8, 512)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [None, "", '{"step": 1}\n'])
def test_runs_without_samples(content, tmp_path):
    if content is not None:
        (tmp_path / "samples.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"samples\.jsonl"):
        draw_lengths(str(tmp_path), 8, 512)
