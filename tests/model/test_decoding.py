"""Prefill and cached decoding against the whole forward, the trainer's scores and transformers' `generate`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.qwen2_reference import (
    SHAPES,
    SMALL,
    Batch,
    apart,
    jit,
    logits,
    padded,
    read,
    reference,
    scores,
    torch,
    worst,
)

from psyche_jax.model.decode import generate
from psyche_jax.model.qwen2 import KVCache, bind
from psyche_jax.model.sampling import Sampling, draw, filter_logits, uniform

LENGTHS = (5, 1, 9, 8)
PROMPT_LENGTH = 11


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return reference(SMALL, folder), read(folder)


@pytest.fixture(scope="module")
def port(models):
    return models[1]


def prompts(lengths=LENGTHS, length=PROMPT_LENGTH, side="left", seed=3, vocabulary=SMALL.vocabulary):
    random = np.random.default_rng(seed)
    rows = [random.integers(0, vocabulary, n) for n in lengths]
    return rows, padded(rows, length, side, np.zeros((len(rows), length)))


@functools.partial(jit, static_argnums=(0, 4, 5))
def program(config, parameters, batch, key, sampling, execution):
    return generate(config, parameters, batch.tokens, batch.segments > 0, key, sampling, execution)


def rollout(port, batch, sampling, seed=0, **config):
    config = dataclasses.replace(port.config, **config)
    result = program(config, port.parameters, batch, jax.random.key(seed), sampling, port.execution)
    tokens, mask, log_probs = map(np.asarray, result)
    assert (log_probs[~mask] == 0).all()
    assert (tokens[~mask] == (config.pad_token_id or 0)).all()
    assert (np.diff(mask.astype(int), axis=1) <= 0).all()
    return tokens, mask, log_probs


def joined(batch, tokens, mask, generations):
    """Each response after its (padded) prompt, as the trainer sees it."""
    prompt = Batch(*(np.repeat(x, generations, axis=0) for x in batch))
    segments = np.concatenate([prompt.segments, mask], axis=1).astype(np.int32)
    whole = np.concatenate([prompt.tokens, tokens], axis=1).astype(np.int32)
    return Batch(whole, segments, np.maximum(segments.cumsum(axis=1) - 1, 0).astype(np.int32))


@pytest.mark.parametrize(("side", "generations"), [("left", 3), ("right", 2), ("both", 1)])
def test_cached_decoding_equals_the_whole_forward(side, generations, port, figure):
    config, parameters, execution = port
    rows, batch = prompts(side=side)
    steps = 7
    responses = len(rows) * generations
    continuation = np.random.default_rng(4).integers(0, config.vocab_size, (responses, steps)).astype(np.int32)

    @jit
    def prefill(parameters):
        model = bind(config, parameters)
        hidden, (key, value) = model.prefill(batch.tokens, batch.segments, batch.positions, execution)
        # Not zeros: what was never written must not be seen.
        own = jnp.full((key.shape[0], responses, key.shape[2], steps, key.shape[4]), 1e3)
        return model.logits(hidden), KVCache(key, value, jnp.asarray(batch.segments > 0), own, own)

    @jit
    def decode(parameters, cache, step):
        model = bind(config, parameters)
        positions = np.repeat([len(row) for row in rows], generations) + step
        hidden, cache = model.decode(jnp.asarray(continuation)[:, step], positions, step, cache, execution)
        return model.logits(hidden), cache

    prefilled, cache = prefill(parameters)
    outputs = []
    for step in range(steps):
        output, cache = decode(parameters, cache, jnp.int32(step))
        outputs.append(np.asarray(output))
    decoded = np.stack(outputs, axis=1)
    prefilled = np.asarray(prefilled)
    for response in range(responses):
        prompt = rows[response // generations]
        whole = np.concatenate([prompt, continuation[response]])
        expected = logits(port, apart(whole[None]))[0]
        ours = prefilled[response // generations][batch.segments[response // generations] > 0]
        figure("prefill logits to the whole forward", worst(ours, expected[: len(prompt)]), 1e-4)
        figure("cached logits to the whole forward", worst(decoded[response], expected[len(prompt) :]), 1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_sampler_and_trainer_agree(side, temperature, port, figure):
    _, batch = prompts(side=side)
    sampling = Sampling(max_new_tokens=24, temperature=temperature, generations_per_prompt=3)
    # An eighth of the vocabulary stops, so that responses end at different places.
    tokens, mask, log_probs = rollout(port, batch, sampling, stop_token_ids=tuple(range(0, 101, 8)), pad_token_id=5)
    assert len(set(mask.sum(axis=1))) > 3
    whole = joined(batch, tokens, mask, 3)
    trained = scores(port, whole, temperature)[:, PROMPT_LENGTH - 1 : -1]
    if side == "right":  # the first token follows the last real one of its prompt, not the padding
        each, last = np.arange(len(tokens)), np.repeat(batch.segments.sum(axis=1), 3) - 1
        first = whole._replace(tokens=whole.tokens.copy())
        first.tokens[each, last + 1] = tokens[:, 0]
        trained[:, 0] = scores(port, first, temperature)[each, last]
    difference = np.abs(trained - log_probs)[mask]
    figure("sampler to trainer, |Δ log-prob|", difference.max(), 1e-4)
    figure(
        f"sampler to trainer, temperature {temperature}, mean |Δ log-prob|",
        difference.mean(),
        5e-6 / min(1, temperature),
    )
    colder = scores(port, whole, 0.9 * temperature)[:, PROMPT_LENGTH:-1]
    assert np.abs(colder - log_probs[:, 1:])[mask[:, 1:]].max() > 0.01


def test_greedy_log_probs_are_those_at_temperature_one(port, figure):
    _, batch = prompts()
    tokens, mask, log_probs = rollout(port, batch, Sampling(12, temperature=0.0, generations_per_prompt=2))
    assert mask.all()
    assert (tokens[::2] == tokens[1::2]).all()
    trained = scores(port, joined(batch, tokens, mask, 2))[:, PROMPT_LENGTH - 1 : -1]
    figure("sampler to trainer, |Δ log-prob|", worst(trained, log_probs), 1e-4)


def numbers(rows):
    """What each row is drawn with."""
    return uniform(jax.random.key(3), jnp.arange(rows), jnp.full(rows, 7))


def surprise(draws, exact):
    """Pearson's statistic in standard deviations: how far draws are from the distribution they should follow."""
    expected = len(draws) * np.asarray(exact, np.float64)
    likely = expected > 5
    cells = likely.sum()
    assert cells > 5
    seen = np.bincount(draws, minlength=len(expected))
    statistic = ((seen - expected)[likely] ** 2 / expected[likely]).sum()
    return (statistic - cells) / np.sqrt(2 * cells)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_draws_follow_the_distribution(temperature, port, figure):
    rows, batch = prompts(lengths=(6, 4))
    draws = 8_000
    sampling = Sampling(2, temperature=temperature, generations_per_prompt=draws)
    tokens, _, log_probs = rollout(port, batch, sampling)
    for prompt, row in enumerate(rows):
        own = slice(prompt * draws, (prompt + 1) * draws)
        first, second = tokens[own].T
        exact = np.asarray(jax.nn.softmax(logits(port, apart(row[None]))[0, -1] / temperature))
        figure("draws of a first token, deviations from its distribution", surprise(first, exact), 5)
        np.testing.assert_allclose(np.exp(log_probs[own, 0]), exact[first], rtol=1e-4)
        # The token after it is drawn anew, not with the same noise.
        likeliest = np.bincount(first).argmax()
        exact = jax.nn.softmax(logits(port, apart(np.append(row, likeliest)[None]))[0, -1] / temperature)
        figure(
            "draws of a second token, deviations from its distribution", surprise(second[first == likeliest], exact), 5
        )


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.8}], ids=str
)
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_filters_are_those_of_transformers(filters, temperature, figure):
    """The same tokens are left, with the same probabilities, and draws report and follow those."""
    pytest.importorskip("torch")
    from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = np.random.default_rng(5).normal(size=(4, 301)).astype(np.float32) * 2
    warpers = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    processors = LogitsProcessorList([warpers[name](value) for name, value in filters.items()])
    expected = torch.softmax(processors(None, torch.tensor(scores / np.float32(temperature))), dim=-1).numpy()
    sampling = Sampling(1, temperature, **filters)
    ours = np.asarray(jax.nn.softmax(filter_logits(jnp.asarray(scores / np.float32(temperature)), sampling)))
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-9)
    draws = 20_000
    repeated = jnp.repeat(jnp.asarray(scores), draws, axis=0)
    tokens, log_probs = (np.asarray(x) for x in jit(draw, static_argnums=2)(repeated, numbers(len(repeated)), sampling))
    for row in range(4):
        own = slice(row * draws, (row + 1) * draws)
        assert (expected[row][tokens[own]] > 0).all()
        np.testing.assert_allclose(np.exp(log_probs[own]), expected[row][tokens[own]], rtol=2e-4)
        if (expected[row] * draws > 5).sum() > 5:
            figure("filtered draws, deviations from their distribution", surprise(tokens[own], expected[row]), 5)


@given(
    st.lists(
        st.sampled_from([-1e30, -7.5, -1.0, -0.25, 0.0, 1e-20, 0.25, 1.0, 7.5, 7.5000005, 1e30]), min_size=9, max_size=9
    ),
    st.integers(1, 9),
)
def test_top_k_keeps_the_k_largest(scores, k):
    """Whatever the numbers, ties included."""
    row = np.asarray(scores, np.float32)
    kept = np.asarray(jit(filter_logits, static_argnums=1)(row[None], Sampling(1, top_k=k)))[0]
    assert ((kept > -np.inf) == (row >= np.sort(row)[-k])).all()


def test_tokens_of_no_weight_are_never_drawn():
    """Also where rounding brings a draw to the end of the cumulative sum."""
    scores = jnp.where(jnp.arange(300) % 150 == 7, 0.0, -jnp.inf)
    tokens, log_probs = draw(jnp.tile(scores, (50_000, 1)), numbers(50_000), Sampling(1))
    assert set(np.unique(tokens)) == {7, 157}
    np.testing.assert_allclose(log_probs, np.log(0.5), rtol=1e-6)


@pytest.mark.parametrize("settings", [{"temperature": 1e-30}, {"temperature": 1e-45}, {"top_p": 1e-45}], ids=str)
def test_as_little_as_there_is_left_to_chance_is_greedy(settings):
    """Numbers that float32 takes for 0, or by which a logit becomes infinite."""
    scores = jax.random.normal(jax.random.key(0), (100, 500)) * 1000
    tokens, log_probs = draw(scores, numbers(100), Sampling(1, **settings))
    assert (tokens == scores.argmax(axis=-1)).all()
    assert (np.abs(log_probs) < 1e-6).all() or "top_p" in settings
    assert np.isfinite(log_probs).all()


def test_key_decides(port):
    _, batch = prompts()
    one, same, other = (rollout(port, batch, Sampling(9), seed)[0] for seed in (0, 0, 1))
    assert (one == same).all()
    assert (one != other).any()


def greedy_by_transformers(model, batch, new_tokens, stop=None):
    tokens = model.generate(
        torch.tensor(batch.tokens, dtype=torch.long),
        attention_mask=torch.tensor(batch.segments, dtype=torch.long),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=0,
    )
    return tokens[:, batch.tokens.shape[1] :].numpy()


@pytest.mark.parametrize("shape", [SMALL, SHAPES[1], SHAPES[6], SHAPES[7]], ids=str)
def test_greedy_equals_transformers(shape, tmp_path):
    model = reference(shape, tmp_path, seed=1)
    port = read(tmp_path)
    _, batch = prompts(vocabulary=shape.vocabulary)
    expected = greedy_by_transformers(model, batch, 64)
    tokens, mask, _ = rollout(port, batch, Sampling(64, temperature=0.0))
    assert mask.all()
    assert len(np.unique(expected)) > 8
    assert tokens.tolist() == expected.tolist()
    _, right = prompts(side="right", vocabulary=shape.vocabulary)
    assert rollout(port, right, Sampling(64, temperature=0.0))[0].tolist() == expected.tolist()


@pytest.mark.parametrize("pad", [0, 50, "a stop id"])
def test_responses_end_at_the_first_of_two_stop_ids(pad, models):
    model, port = models
    _, batch = prompts()
    free, _, _ = rollout(port, batch, Sampling(40, temperature=0.0))
    # The first row ends at its seventh new token, the third at its third or before, with another id.
    stop = (int(free[0, 6]), int(free[2, 2]))
    assert stop[0] != stop[1]
    pad = stop[1] if pad == "a stop id" else pad
    tokens, mask, _ = rollout(port, batch, Sampling(40, temperature=0.0), stop_token_ids=stop, pad_token_id=pad)
    ends = []
    for row, values in enumerate(free.tolist()):
        end = next((at for at, token in enumerate(values) if token in stop), 39)
        ends.append(end)
        assert mask[row].sum() == end + 1
        assert tokens[row, : end + 1].tolist() == values[: end + 1]
    assert len(set(ends)) > 1
    if pad == 0:
        expected = greedy_by_transformers(model, batch, 40, list(stop))
        width = expected.shape[1]
        assert tokens[:, :width].tolist() == expected.tolist()
        assert not mask[:, width:].any()


def test_one_token_and_no_stop_id(port):
    rows, batch = prompts()
    tokens, mask, _ = rollout(port, batch, Sampling(1, temperature=0.0), stop_token_ids=(), pad_token_id=None)
    assert mask.tolist() == [[True]] * len(rows)
    for row, token in zip(rows, tokens[:, 0], strict=True):
        assert logits(port, apart(row[None]))[0, -1].argmax() == token


def test_an_empty_prompt_is_harmless(port):
    """A row that only fills up a batch changes nothing for the others, and gives numbers."""
    rows, batch = prompts()
    filler = Batch(*(np.concatenate([x, np.zeros_like(x[:1])]) for x in batch))
    tokens, mask, _ = rollout(port, batch, Sampling(10, temperature=0.0))
    more_tokens, more_mask, log_probs = rollout(port, filler, Sampling(10, temperature=0.0))
    assert np.isfinite(log_probs).all()
    assert (more_tokens[: len(rows)] == tokens).all()
    assert (more_mask[: len(rows)] == mask).all()
