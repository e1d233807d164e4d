"""Decoding in slots: the same responses whatever the slots and the mesh, those that the forward pass alone gives."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.qwen2_reference import SMALL, Shape, apart, jit, logits, one_device, padded, read, reference

from psyche_jax.errors import UsageError
from psyche_jax.model import decode
from psyche_jax.model.decode import generate_counted
from psyche_jax.model.qwen2 import Execution
from psyche_jax.model.sampling import Sampling, draw, uniform
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, make_mesh
from psyche_jax.plan.collectives import find_copies
from psyche_jax.plan.hlo import Module

# A prompt of one token beside a full one.
LENGTHS = (9, 1, 5, 9, 3, 7, 2, 8)
EACH, LONGEST = 4, 20
RESPONSES = len(LENGTHS) * EACH
SAMPLING = Sampling(LONGEST, temperature=1.3, generations_per_prompt=EACH)
SOMETIMES = tuple(range(0, SMALL.vocabulary, 9))  # stop tokens, so that responses are of many lengths
KEY = jax.random.key(8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    reference(SMALL._replace(heads=8, kv_heads=4, width=48), folder)
    return folder


@pytest.fixture(scope="module")
def prompts():
    random = np.random.default_rng(3)
    rows = [random.integers(0, SMALL.vocabulary, length) for length in LENGTHS]
    return rows, padded(rows, max(LENGTHS), "left", np.zeros((len(rows), max(LENGTHS))))


@functools.partial(jit, static_argnums=(0, 3, 4))
def program(config, parameters, batch, sampling, execution):
    return generate_counted(config, parameters, batch.tokens, batch.segments > 0, KEY, sampling, execution)


def on(*sizes):
    mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    return Execution(Sharding(mesh, TRAIN_RULES), jnp.dtype("float32"))


def decoded(folder, prompts, sampling, mesh=(1, 1, 1), stop=SOMETIMES):
    """Tokens, mask and log-probs, and the number of steps."""
    config, parameters, execution = read(folder, one_device() if mesh == (1, 1, 1) else on(*mesh))
    config = dataclasses.replace(config, stop_token_ids=stop, pad_token_id=5)
    rollout, steps = jax.device_get(program(config, parameters, prompts[1], sampling, execution))
    return rollout, int(steps)


def alone(folder, prompts, sampling, stop=SOMETIMES):
    """Each response by itself, token by token with the whole forward pass: the plain algorithm."""
    port = read(folder)
    rows = [np.asarray(prompts[0][number // EACH]) for number in range(RESPONSES)]
    ended = np.zeros(RESPONSES, bool)
    tokens, log_probs = np.full((RESPONSES, LONGEST), 5), np.zeros((RESPONSES, LONGEST))
    mask = np.zeros((RESPONSES, LONGEST), bool)
    for place in range(LONGEST):
        width = max(LENGTHS) + LONGEST
        whole = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
        scores = np.asarray(logits(port, apart(whole)))[np.arange(RESPONSES), [len(row) - 1 for row in rows]]
        numbers = uniform(KEY, jnp.arange(RESPONSES), jnp.full(RESPONSES, place))
        token, log_prob = map(np.asarray, draw(jnp.asarray(scores), numbers, sampling))
        going = ~ended
        mask[going, place], tokens[going, place], log_probs[going, place] = True, token[going], log_prob[going]
        rows = [np.append(row, new) if more else row for row, new, more in zip(rows, token, going, strict=True)]
        ended |= np.isin(token, stop)
    return tokens, mask, log_probs


def same(rollout, expected, figure):
    tokens, mask, log_probs = expected
    assert (rollout.mask == mask).all()
    assert (rollout.tokens == tokens).all()
    figure("slots to each response alone, |Δ log-prob|", np.abs(rollout.log_probs - log_probs).max(), 1e-4)


@pytest.fixture(scope="module")
def expected(folder, prompts):
    return alone(folder, prompts, SAMPLING)


@pytest.mark.parametrize(
    ("slots", "mesh"),
    [
        (None, (1, 1, 1)),  # all: no queue, halves of 32, 16, 8 rows
        (RESPONSES + 1, (1, 1, 1)),  # more than there are
        (16, (1, 1, 1)),
        (8, (1, 1, 1)),  # as many as prompts: each slot holds its prompt
        (5, (1, 1, 1)),  # no divisor of anything
        (1, (1, 1, 1)),
        (None, (1, 2, 1)),
        (16, (1, 2, 2)),
        (4, (2, 2, 1)),  # one a device
        (24, (2, 2, 2)),  # more than prompts, a queue shorter than the slots
    ],
    ids=str,
)
def test_responses_do_not_depend_on_slots_or_mesh(slots, mesh, folder, prompts, expected, figure):
    rollout, steps = decoded(folder, prompts, dataclasses.replace(SAMPLING, slots=slots), mesh)
    same(rollout, expected, figure)
    lengths = expected[1].sum(axis=1)
    assert len(set(lengths)) > 10
    assert steps == simulated(lengths, slots, math.prod(mesh[:2]))


def simulated(lengths, slots, parts=1):
    """How many steps it takes: one for all first tokens, then each part hands out its slots, all at one pace."""
    most = 0
    for part in np.split(np.asarray(lengths), parts):
        queue = [length - 1 for length in part if length > 1]
        rows = min(len(part), (slots or len(lengths)) // parts)
        ends = np.zeros(rows, int)
        for length in queue:
            ends[ends.argmin()] += length
        most = max(most, ends.max())
    return 1 + most


@pytest.mark.parametrize(
    ("filters", "slots"),
    [({"top_k": 7}, 8), ({"top_p": 0.7}, 16), ({"min_p": 0.2}, 3), ({"temperature": 0.0}, 16)],
    ids=str,
)
def test_filters_and_greedy(filters, slots, folder, prompts, figure):
    sampling = dataclasses.replace(SAMPLING, **filters)
    rollout, _ = decoded(folder, prompts, dataclasses.replace(sampling, slots=slots))
    same(rollout, alone(folder, prompts, sampling), figure)


@pytest.mark.parametrize("slots", [None, 8, 1])
def test_none_ever_ends(slots, folder, prompts, figure):
    rollout, steps = decoded(folder, prompts, dataclasses.replace(SAMPLING, slots=slots), stop=())
    assert rollout.mask.all()
    assert steps == 1 + (LONGEST - 1) * RESPONSES // (slots or RESPONSES)
    same(rollout, alone(folder, prompts, SAMPLING, stop=()), figure)


@pytest.mark.parametrize("slots", [None, 8])
def test_all_end_at_once(slots, folder, prompts):
    rollout, steps = decoded(
        folder, prompts, dataclasses.replace(SAMPLING, slots=slots), stop=tuple(range(SMALL.vocabulary))
    )
    assert (rollout.mask.sum(axis=1) == 1).all()
    assert (rollout.tokens[:, 1:] == 5).all()
    assert steps == 1


def test_a_cap_of_one(folder, prompts, expected):
    rollout, steps = decoded(folder, prompts, dataclasses.replace(SAMPLING, max_new_tokens=1, slots=8), stop=())
    assert steps == 1
    assert rollout.mask.all()
    assert (rollout.tokens[:, 0] == expected[0][:, 0]).all()


def test_slots_that_the_mesh_does_not_divide(folder, prompts):
    with pytest.raises(UsageError, match=r"6 slots cannot be spread over data × fsdp = 4 devices; use a multiple"):
        decoded(folder, prompts, dataclasses.replace(SAMPLING, slots=6), (2, 2, 1))


def test_numbers_of_a_token():
    """Uniform, and others for another response, place or key; not those of the first one moved on."""
    response, place = (grid.ravel() for grid in np.mgrid[:300, :200])
    numbers = np.asarray(uniform(KEY, jnp.asarray(response), jnp.asarray(place)))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert len(np.unique(numbers)) > 0.99 * numbers.size
    for row in numbers:
        share = np.histogram(row, 50, (0, 1))[0] / len(row)
        assert np.abs(share - 0.02).max() < 5 * math.sqrt(0.02 / len(row))
        assert abs(np.corrcoef(row[:-1], row[1:])[0, 1]) < 5 / math.sqrt(len(row))
    assert abs(np.corrcoef(*numbers)[0, 1]) < 5 / math.sqrt(len(response))
    other = np.asarray(uniform(jax.random.key(9), jnp.asarray(response), jnp.asarray(place)))
    assert (other != numbers).mean() > 0.99


def log_normal(responses, mean, longest, seed=0):
    """Lengths of which one is the longest that may be."""
    drawn = np.random.default_rng(seed).lognormal(0, 0.85, responses)
    low, high = 0.01 * mean, 10 * mean
    for _ in range(50):
        middle = (low + high) / 2
        small = np.clip(np.round(drawn * middle), 1, longest).mean() < mean
        low, high = (middle, high) if small else (low, middle)
    lengths = np.clip(np.round(drawn * low), 1, longest).astype(int)
    lengths[lengths.argmax()] = longest
    return lengths


def scheduled(folder, prompts, monkeypatch, lengths, sampling):
    """Decode with the numbers of the draws set so that responses have these lengths."""
    ends = jnp.asarray(lengths)

    def numbers(key, response, position):
        last = position + 1 >= ends[jnp.clip(response, 0, len(ends) - 1)]
        return jnp.tile(jnp.where(last, 1 - 2**-24, 0.0), (2, 1)).astype(jnp.float32)

    monkeypatch.setattr(decode, "uniform", numbers)
    program.clear_cache()
    # At the end of the cumulative sum lies the last token of the vocabulary, at its beginning the first one.
    try:
        return decoded(folder, prompts, sampling, stop=(2,))
    finally:
        program.clear_cache()


@pytest.fixture(scope="module")
def least(tmp_path_factory):
    """The smallest model there can be, with three tokens."""
    folder = tmp_path_factory.mktemp("least")
    reference(Shape(False, 1, 1, 2, 4, 3, 1, 3), folder)
    return folder


def prompts_of_one(count):
    return None, padded([np.ones(1, int)] * count, 1, "left", np.zeros((count, 1)))


@pytest.mark.parametrize(("slots", "most"), [(16, 190), (None, 128)])
def test_steps_of_ragged_responses(slots, most, least, monkeypatch):
    """Counted in the program, and as the simulation says: 64 responses, a sixteenth of the size of the issue's."""
    lengths = log_normal(64, 373 / 16, 128)
    sampling = Sampling(128, temperature=50.0, generations_per_prompt=8, slots=slots)
    rollout, steps = scheduled(least, prompts_of_one(8), monkeypatch, lengths, sampling)
    assert (rollout.mask.sum(axis=1) == lengths).all()
    assert steps == simulated(lengths, slots) <= most


def test_steps_of_many_ragged_responses():
    """By the simulation that the program's steps are compared with above."""
    assert simulated(log_normal(1024, 373, 2048, seed=2), 256) <= 3100


@pytest.mark.parametrize("slots", [None, 16])
@pytest.mark.parametrize("longest", [LONGEST, 150])
def test_the_cache_is_never_copied_as_a_whole_on_a_cpu(longest, slots, folder, prompts, optimized):
    """A step writes in place, whether it looks at all places (up to 64) or chooses how many; as users compile."""
    config, parameters, execution = read(folder, one_device())
    config = dataclasses.replace(config, stop_token_ids=SOMETIMES, pad_token_id=5)
    sampling = dataclasses.replace(SAMPLING, max_new_tokens=longest, slots=slots)
    compiled = program.lower(config, parameters, prompts[1], sampling, execution).compile()
    of_a_row = config.num_hidden_layers * config.num_key_value_heads * longest * config.head_dim
    sizes = frozenset(rows * of_a_row for rows in decode.loop_sizes(slots or RESPONSES))
    assert find_copies(Module.parse(compiled.as_text()), sizes) == []
