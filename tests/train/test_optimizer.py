"""The optimizer and its schedules against torch's AdamW and the schedules of transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.optional_torch import torch
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from psyche_jax.config import OptimizerSection
from psyche_jax.train.state import TrainState, apply_gradients, make_optimizer, make_schedule, rounded_up_by


def torch_rates(kind, warmup, total, peak):
    """The learning rate of each update, as a Hugging Face trainer sets it."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = (
        get_cosine_schedule_with_warmup(optimizer, warmup, total)
        if kind == "cosine"
        else get_constant_schedule_with_warmup(optimizer, warmup)
    )
    rates = []
    for _ in range(total):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("kind", ["cosine", "constant"])
@pytest.mark.parametrize(
    ("warmup", "steps", "updates_per_step", "expected_warmup"),
    [
        (0, 7, 1, 0),
        (0.1, 40, 1, 4),  # a share of all steps
        (0.5, 9, 2, 9),
        (1, 9, 1, 1),  # from 1 on a number of steps, not a share
        (10, 40, 1, 10),
        (10, 40, 4, 40),  # ten steps are forty updates
    ],
)
def test_rates_are_those_of_transformers(kind, warmup, steps, updates_per_step, expected_warmup):
    section = OptimizerSection(learning_rate=3e-3, schedule=kind, warmup=warmup)
    schedule = make_schedule(section, steps, updates_per_step)
    total = steps * updates_per_step
    rates = [float(schedule(jnp.int32(update))) for update in range(total)]
    np.testing.assert_allclose(rates, torch_rates(kind, expected_warmup, total, 3e-3), atol=1e-9)
    assert max(rates) <= 3e-3 * (1 + 1e-6)
    if kind == "cosine":
        assert abs(float(schedule(jnp.int32(total)))) < 1e-9, "the cosine ends at 0, one update after the last"


@pytest.mark.parametrize("kind", ["cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.1, 10])
def test_one_step_runs_have_finite_rates(kind, warmup):
    rate = float(make_schedule(OptimizerSection(schedule=kind, warmup=warmup), 1)(jnp.int32(0)))
    assert rate == pytest.approx(0 if warmup == 10 else 1e-5)


def test_updates_are_those_of_torch_adamw():
    """Clipping by the global norm, AdamW with decay of matrices only, cosine with warm-up, over 12 updates."""
    random = np.random.default_rng(0)
    section = OptimizerSection(
        learning_rate=1e-2, warmup=3, beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=0.1, max_grad_norm=0.7
    )
    start = {
        "kernel": random.normal(size=(3, 5, 4)),
        "bias": random.normal(size=(3, 5)),
        "scale": random.normal(size=(3, 4)),
        "embedding": random.normal(size=(7, 4)),
    }
    # Some gradients are under the norm at which they are clipped, some over it.
    gradients = [{k: random.normal(size=v.shape) * 0.2 ** (i % 3) for k, v in start.items()} for i in range(12)]

    theirs = {name: torch.nn.Parameter(torch.tensor(value, dtype=torch.float32)) for name, value in start.items()}
    groups = [
        {"params": [theirs["kernel"], theirs["embedding"]], "weight_decay": 0.1},
        {"params": [theirs["bias"], theirs["scale"]], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-6)
    schedule = get_cosine_schedule_with_warmup(adamw, 3, 12)
    optimizer = make_optimizer(section, make_schedule(section, 12))
    ours = jax.tree.map(jnp.float32, start)
    state = optimizer.init(ours)
    for gradient in gradients:
        updates, state = optimizer.update(jax.tree.map(jnp.float32, gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name], dtype=torch.float32)
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 0.7)
        adamw.step()
        schedule.step()
        for name, parameter in theirs.items():
            np.testing.assert_allclose(ours[name], parameter.detach().numpy(), atol=2e-6)


def test_a_mean_in_bfloat16_is_rounded_only_where_it_is_stored():
    """Each update reads the stored mean, and uses the new one before it is rounded; the squares stay float32."""
    random = np.random.default_rng(0)
    section = OptimizerSection(warmup=0, beta1=0.8, beta2=0.95, epsilon=1e-6, mu_dtype="bfloat16")
    optimizer = make_optimizer(section, optax.constant_schedule(0.1))
    parameters = {"weight": jnp.zeros((3, 4))}
    state = optimizer.init(parameters)
    weight, mean, squares = np.zeros((3, 4)), np.zeros((3, 4)), np.zeros((3, 4))
    for step in range(1, 13):
        gradient = random.uniform(-0.2, 0.2, (3, 4))  # under the norm at which gradients are clipped
        updates, state = optimizer.update({"weight": jnp.float32(gradient)}, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        mean = 0.8 * mean + 0.2 * gradient
        squares = 0.95 * squares + 0.05 * gradient**2
        weight -= 0.1 * mean / (1 - 0.8**step) / (np.sqrt(squares / (1 - 0.95**step)) + 1e-6)
        mean = mean.astype(jnp.bfloat16).astype(float)
        np.testing.assert_allclose(parameters["weight"], weight, atol=2e-5)
    (moments,) = (part for part in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu"))
    assert (moments.mu["weight"].dtype, moments.nu["weight"].dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(np.asarray(moments.mu["weight"], float), mean)


@pytest.mark.parametrize(("later", "off_by"), [(1.0, 0.055), (0.1, 0.15)])
def test_a_squares_mean_in_bfloat16_follows_the_gradients(later, off_by):
    """An update changes it by a thousandth, less than bfloat16 resolves: rounded to the nearest it would stay too small
    where gradients grow, and too large where they shrink. Drawn, it is right on average, and each number nearly so."""
    parameters = {"weight": jnp.zeros((64, 64))}
    sizes = jnp.linspace(1e-4, 1e-2, 64)

    def squares(dtype):
        section = OptimizerSection(warmup=0, nu_dtype=dtype)
        optimizer = make_optimizer(section, optax.constant_schedule(0.0))

        def update(state, step):
            drawn = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (64, 64))
            gradients = {"weight": sizes * drawn * jnp.where(step < 2000, 1.0, later)}
            return optimizer.update(gradients, state, parameters)[1], None

        state = jax.jit(lambda: jax.lax.scan(update, optimizer.init(parameters), jnp.arange(4000))[0])()
        return optax.tree.get(state, "nu")["weight"]

    drawn, exact = squares("bfloat16"), squares("float32")
    assert drawn.dtype == jnp.bfloat16
    shares = np.asarray(drawn, float) / np.asarray(exact)
    assert shares.mean() == pytest.approx(1, abs=0.01)
    assert shares.std() < off_by


def test_what_is_rounded_at_random_is_right_on_average():
    """Up as often as it is near to the next larger number; what bfloat16 holds stays."""
    for value, below, above in ((1.0, 1.0, 1.0), (1.0 + 2**-9, 1.0, 1 + 2**-7), (3e-8, 2**-25, 2**-25 * (1 + 2**-7))):
        draws = jax.random.bits(jax.random.key(1), (100_000,), jnp.uint16)
        rounded = np.asarray(rounded_up_by(jnp.full(draws.shape, value, jnp.float32), draws), float)
        assert {below, above} == set(rounded.tolist())
        assert rounded.mean() == pytest.approx(np.float32(value), rel=5e-5)
    assert rounded_up_by(jnp.zeros(3), jnp.full(3, 0xFFFF, jnp.uint16)).tolist() == [0, 0, 0]
    assert not np.isfinite(np.asarray(rounded_up_by(jnp.float32([np.inf]), jnp.uint16([0])), float)).any()


def test_a_draw_of_an_update_is_that_of_its_number():
    """The same from where a run was resumed, on other devices too; another at the next update."""
    optimizer = make_optimizer(OptimizerSection(warmup=0, nu_dtype="bfloat16"), optax.constant_schedule(0.1))
    parameters = {"one": jnp.zeros((40, 40)), "two": jnp.zeros((40, 40))}
    gradients = jax.tree.map(lambda x: x + 0.0123, parameters)
    state = optimizer.init(parameters)
    kept = []
    for _ in range(2):
        state = optimizer.update(gradients, state, parameters)[1]
        kept.append(state)
    first, second = (optax.tree.get(state, "nu") for state in kept)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), "fsdp")
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    before = gradients, kept[0], parameters
    for there in (before, jax.tree.map(lambda x: jax.device_put(x, spread) if x.ndim else x, before)):
        again = optax.tree.get(jax.jit(optimizer.update)(*there)[1], "nu")
        assert jax.tree.all(jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), second, again))
    assert not (first["one"] == first["two"]).all()
    assert not ((first["one"] == first["one"].max()) == (second["one"] == second["one"].max())).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    """Neither parameters nor moments; the next one does."""
    optimizer = make_optimizer(OptimizerSection(warmup=0), optax.constant_schedule(0.1))
    parameters = {"weight": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
    good = jax.tree.map(jnp.ones_like, parameters)
    broken = {**good, "bias": good["bias"].at[1].set(bad)}
    update = jax.jit(lambda state, loss, gradients: apply_gradients(optimizer, state, loss, gradients))
    state, _, applied = update(TrainState(jnp.int32(0), parameters, optimizer.init(parameters)), 1.0, good)
    assert applied
    for loss, gradients in ((1.0, broken), (bad, good)):
        after, _, applied = update(state, loss, gradients)
        assert not applied
        for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
            assert old.tobytes() == new.tobytes()
    after, norm, applied = update(after, 1.0, good)
    assert applied and norm == pytest.approx(3.0)
    assert (after.parameters["weight"] != state.parameters["weight"]).all()
