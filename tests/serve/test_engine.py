"""Decoding in chunks against `generate`, rows that do not touch each other, top-p, log-probs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import save_model

from psyche_jax.data.streams import pad_prompts
from psyche_jax.model.decode import generate
from psyche_jax.model.qwen2 import Execution, bind
from psyche_jax.model.sampling import Sampling, keep_nucleus
from psyche_jax.model.sharding import DECODE_RULES, TRAIN_RULES, Sharding, make_mesh
from psyche_jax.serve.engine import MOST_ALTERNATIVES, Batch, Chunk, Engine, RowSettings
from psyche_jax.train.stored_models import open_model

PROMPTS = [[5, 6, 7], [9], [30, 40, 50, 60, 70, 80, 90], [11, 12], [200, 3]]
GREEDY = RowSettings(24, 0.0, 1.0, 0)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Many ids end a response, so that some rows end early."""
    folder = tmp_path_factory.mktemp("serve") / "model"
    return open_model(str(save_model(folder, stop_token_ids=(*range(280, 304), *range(9)))))


def make_engine(stored, devices=1, chunk=5):
    sharding = Sharding(make_mesh(devices=jax.devices()[:devices]), DECODE_RULES)
    execution = Execution(sharding, jnp.dtype("float32"))
    return Engine(stored.config, stored.read_parameters(sharding, jnp.dtype("float32")), execution, chunk)


@pytest.fixture(scope="module")
def engine(stored):
    return make_engine(stored)


def responses(engine, prompts, settings, alternatives=False):
    """Tokens of each row, and the log-probs of each."""
    batch = Batch()
    slots = engine.join(batch, prompts, settings)
    chunks = []
    while batch.left.any():
        chunks.append(Chunk(*(part[slots] for part in engine.advance(batch, alternatives))))
    tokens, mask, log_probs = (np.concatenate([chunk[i] for chunk in chunks], axis=1) for i in range(3))
    rows = [(t[m].tolist(), p[m]) for t, m, p in zip(tokens, mask, log_probs, strict=True)]
    return rows, chunks


def test_chunks_say_what_generate_says(stored, engine):
    sharding = Sharding(make_mesh(devices=jax.devices()[:1]), TRAIN_RULES)
    execution = Execution(sharding, jnp.dtype("float32"))
    parameters = stored.read_parameters(sharding, jnp.dtype("float32"))
    padded = pad_prompts(PROMPTS, stored.config.max_position_embeddings)
    rollout = jax.jit(lambda *arrays: generate(stored.config, *arrays, Sampling(24, 0.0), execution))(
        parameters, padded["tokens"], padded["mask"], jax.random.key(0)
    )
    rows, _ = responses(engine, PROMPTS, [GREEDY] * 5)
    lengths = set()
    for row, (tokens, log_probs) in enumerate(rows):
        expected = np.asarray(rollout.mask[row])
        assert tokens == np.asarray(rollout.tokens[row])[expected].tolist()
        np.testing.assert_allclose(log_probs, np.asarray(rollout.log_probs[row])[expected], atol=1e-4)
        lengths.add(len(tokens))
    assert len(lengths) > 1, "no row ended early: the test shows nothing"


def test_rows_are_those_that_they_are_alone(engine):
    settings = [
        RowSettings(n, t, p, seed)
        for n, t, p, seed in [(9, 1, 1, 1), (24, 0.7, 0.9, 2), (1, 0, 1, 3), (7, 2, 0.5, 4), (24, 1, 1, 1)]
    ]
    together, _ = responses(engine, PROMPTS, settings)
    for row, setting in enumerate(settings):
        alone, _ = responses(engine, [PROMPTS[row]], [setting])
        assert alone[0][0] == together[row][0]
        assert len(alone[0][0]) <= setting.max_new_tokens


def test_devices_and_chunks_change_nothing(stored, engine):
    settings = [RowSettings(20, 1.0, 0.95, row) for row in range(5)]
    one, _ = responses(engine, PROMPTS, settings)
    other, _ = responses(make_engine(stored, devices=4, chunk=3), PROMPTS, settings)
    assert [tokens for tokens, _ in one] == [tokens for tokens, _ in other]


def staggered(engine, arrivals):
    """Tokens and log-probs of rows that join one batch, each before the chunk of which it says the number."""
    batch, owners, turn = Batch(), {}, 0
    said = [([], []) for _ in arrivals]
    slots_used = set()
    while turn <= max(at for at, _, _ in arrivals) or batch.left.any():
        due = [number for number, (at, _, _) in enumerate(arrivals) if at == turn]
        if due:
            slots = engine.join(batch, [arrivals[number][1] for number in due], [arrivals[n][2] for n in due])
            owners |= dict(zip(slots, due, strict=True))
            slots_used |= set(slots)
        chunk = engine.advance(batch)
        for slot, number in owners.items():
            tokens, log_probs = said[number]
            tokens += chunk.tokens[slot][chunk.mask[slot]].tolist()
            log_probs += chunk.log_probs[slot][chunk.mask[slot]].tolist()
        owners = {slot: number for slot, number in owners.items() if batch.left[slot] > 0}
        turn += 1
    return said, slots_used, batch.shape


def long_prompt(length):
    return (np.arange(length) * 7 % 250 + 10).tolist()


# Short ones first, past the end of a small ring; a long prompt and a long response, for which the cache grows; slots
# that are used again.
ARRIVALS = [
    (0, [5, 6, 7], RowSettings(60, 1.0, 1.0, 1)),
    (0, [9], RowSettings(1, 0.0, 1.0, 2)),
    (3, [9], RowSettings(64, 0.7, 0.9, 3)),
    (13, [200], RowSettings(50, 0.0, 1.0, 5)),
    (17, long_prompt(1023), RowSettings(1, 0.0, 1.0, 9)),
    (17, [12], RowSettings(100, 1.4, 1.0, 7)),
    (19, long_prompt(960), RowSettings(64, 1.0, 0.95, 6)),
    (20, [5, 6, 7], RowSettings(60, 1.0, 1.0, 1)),
]


@pytest.fixture(scope="module")
def talkative(tmp_path_factory):
    """A model whose responses mostly go on to the last token allowed."""
    return open_model(str(save_model(tmp_path_factory.mktemp("serve") / "model")))


@pytest.fixture(scope="module")
def talkative_engine(talkative):
    return make_engine(talkative)


@pytest.fixture(scope="module")
def alone(talkative_engine):
    return [responses(talkative_engine, [prompt], [setting])[0][0] for _, prompt, setting in ARRIVALS]


@pytest.mark.parametrize("devices", [1, 4])
def test_a_row_says_what_it_says_alone_whenever_and_wherever_it_joins(talkative, talkative_engine, alone, devices):
    said, slots, shape = staggered(talkative_engine if devices == 1 else make_engine(talkative, devices), ARRIVALS)
    assert (shape.prompt, shape.response) == (1024, 128), "it did not grow"
    assert len(slots) < len(ARRIVALS), "no slot was used again"
    for (tokens, log_probs), expected in zip(said, alone, strict=True):
        assert tokens == expected[0]
        np.testing.assert_allclose(log_probs, expected[1], atol=1e-4)
    assert said[0][0] == said[-1][0], "a seed repeats its response"
    assert sum(len(tokens) for tokens, _ in said) > 300


def test_what_was_compiled_serves_whoever_comes(talkative_engine):
    """Programs are as many as sizes, and know nothing of who is where."""
    engine = talkative_engine
    staggered(engine, ARRIVALS)
    programs = [engine._read, engine._grow, engine._enter, engine._advance]
    counts = [program._cache_size() for program in programs]
    others = [(at + at % 3, prompt[:-1] or prompt, replace(row, seed=row.seed + 1)) for at, prompt, row in ARRIVALS]
    staggered(engine, others)
    assert [program._cache_size() for program in programs] == counts


@pytest.mark.parametrize("devices", [1, 4])
def test_a_prompt_is_read_once_for_all_of_its_rows(stored, engine, devices):
    own = make_engine(stored, devices)
    read, reads = own._read, []
    own._read = lambda parameters, tokens, mask: reads.append(tokens) or read(parameters, tokens, mask)
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[0], PROMPTS[0]]
    settings = [RowSettings(12, 1.0, 1.0, seed) for seed in range(4)]
    together, _ = responses(own, prompts, settings)
    assert len(reads) == (2 if devices == 1 else 1)
    for row, prompt, setting in zip(together, prompts, settings, strict=True):
        assert responses(engine, [prompt], [setting])[0][0][0] == row[0]


def test_a_draw_is_a_function_of_seed_and_place(stored, engine):
    """Against the logits of the whole sequence, and a draw for each place by itself."""
    prompt, temperature, seed = PROMPTS[2], 1.3, 77
    ((tokens, log_probs),), _ = responses(engine, [prompt], [RowSettings(24, temperature, 1.0, seed)])
    sharding = Sharding(make_mesh(devices=jax.devices()[:1]), TRAIN_RULES)
    model = bind(stored.config, stored.read_parameters(sharding, jnp.dtype("float32")))
    whole = jnp.asarray([[*prompt, *tokens]])
    hidden = model(
        whole, jnp.ones_like(whole), jnp.arange(whole.shape[1])[None], Execution(sharding, jnp.dtype("float32"))
    )
    logits = model.logits(hidden)[0, len(prompt) - 1 : -1]
    for place, (token, log_prob) in enumerate(zip(tokens, log_probs, strict=True)):
        key = jax.random.fold_in(jax.random.key(seed), place)
        assert jax.random.categorical(key, logits[place] / temperature) == token
        assert jax.nn.log_softmax(logits[place])[token] == pytest.approx(log_prob, abs=1e-4)


def test_a_cache_is_not_shared_where_that_would_waste_it(engine):
    short, long = RowSettings(24, 0.0, 1.0, 0), long_prompt(1000)
    few, many, alone = Batch(), Batch(), Batch()
    engine.join(few, [[9]], [short])
    engine.join(many, [[9]] * 4, [short] * 4)
    engine.join(alone, [long], [short])
    assert engine.takes(few, [long], [short]) and engine.takes(alone, [[9]], [short])
    assert not engine.takes(many, [long], [short]) and not engine.takes(alone, [[9]] * 9, [short] * 9)
    assert engine.takes(many, [[9]] * 12, [short] * 12) and engine.takes(many, [[9] * 60], [short])


def test_seeds_differ_and_repeat(engine):
    settings = [RowSettings(16, 1.5, 1.0, seed) for seed in (1, 1, 2, 3, 4)]
    rows = [tuple(tokens) for tokens, _ in responses(engine, [PROMPTS[2]] * 5, settings)[0]]
    assert rows[0] == rows[1] and len(set(rows)) == 4


def test_a_row_that_is_given_up_says_no_more(engine):
    batch = Batch()
    engine.join(batch, PROMPTS, [replace(GREEDY, max_new_tokens=64)] * 5)
    engine.advance(batch)
    batch.left[0] = 0
    while batch.left.any():
        assert not engine.advance(batch).mask[0].any()


def test_alternatives_are_the_likeliest(engine):
    rows, chunks = responses(engine, PROMPTS, [GREEDY] * 5, alternatives=True)
    best = np.concatenate([chunk.best for chunk in chunks], axis=1)
    best_log_probs = np.concatenate([chunk.best_log_probs for chunk in chunks], axis=1)
    for row, (tokens, log_probs) in enumerate(rows):
        assert best[row, : len(tokens), 0].tolist() == tokens, "greedy takes the likeliest"
        np.testing.assert_allclose(best_log_probs[row, : len(tokens), 0], log_probs, atol=1e-6)
        assert (np.diff(best_log_probs[row, : len(tokens)]) <= 0).all()
    assert best.shape[-1] == MOST_ALTERNATIVES


@pytest.mark.parametrize("seed", range(5))
def test_the_nucleus_is_what_sorting_gives(seed):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(6, 500)).astype(np.float32) * random.choice([0.1, 1, 8])
    top_p = random.uniform(0.01, 0.999, 6).astype(np.float32)
    kept = np.isfinite(np.asarray(keep_nucleus(jnp.asarray(logits), jnp.asarray(top_p)[:, None])))
    for row in range(6):
        probabilities = np.exp(logits[row].astype(np.float64))
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities)
        count = 1 + np.searchsorted(np.cumsum(probabilities[order]), top_p[row] - 1e-6)
        assert abs(kept[row].sum() - count) <= 1  # the last token, at the edge of float32
        assert kept[row][order[: count - 1]].all()
    whole = np.asarray(keep_nucleus(jnp.asarray(logits), jnp.ones((6, 1))))
    assert np.isfinite(whole).all()


def test_a_tiny_top_p_or_temperature_is_greedy(engine):
    tiny = ((1.7, 1e-4), (1.7, 1e-45), (1.0, 1e-320), (1e-30, 1.0), (2e-38, 1.0))
    settings = [RowSettings(12, *values, row) for row, values in enumerate(tiny)]
    sampled, _ = responses(engine, PROMPTS, settings)
    greedy, _ = responses(engine, PROMPTS, [replace(GREEDY, max_new_tokens=12)] * 5)
    assert [tokens for tokens, _ in sampled] == [tokens for tokens, _ in greedy]
