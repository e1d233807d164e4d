"""What training changes: parameters, optimizer state, step; gradients by micro-batches, and the optimizer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from psyche_jax.config import OptimizerSection
from psyche_jax.model.adapters import trained
from psyche_jax.model.linear import Parameters, turned, turned_back
from psyche_jax.model.sharding import Sharding, join_rows, split_rows


@dataclass(frozen=True)
class TrainState:
    """A pytree: of arrays, or of their shapes or shardings.

    `step`: int32 scalar, the steps done (the optimizer may update several times a step); `parameters`: nested dict;
    `optimizer_state`: optax's.
    """

    step: Any
    parameters: Any
    optimizer_state: Any


jax.tree_util.register_dataclass(TrainState, ["step", "parameters", "optimizer_state"], [])


def make_schedule(section: OptimizerSection, steps: int, updates_per_step: int = 1) -> optax.Schedule:
    """Learning rate by update of the optimizer: linear warm-up from 0, then cosine to 0, or constant."""
    total = steps * updates_per_step
    warmup = _warmup(section, total, updates_per_step)
    if section.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, section.learning_rate, warmup, max(total, warmup + 1))
    if warmup == 0:
        return optax.constant_schedule(section.learning_rate)
    return optax.linear_schedule(0.0, section.learning_rate, warmup)


def schedule_warning(section: OptimizerSection, steps: int, updates_per_step: int = 1) -> str:
    """What to say of a schedule whose rate never comes to `learning_rate` in a run of so many steps; mostly nothing."""
    total = steps * updates_per_step
    if _warmup(section, total, updates_per_step) < total:
        return ""
    last = float(make_schedule(section, steps, updates_per_step)(total - 1))
    return (
        f"optimizer.warmup {section.warmup:g}: the warm-up does not end within the run's {steps} steps; the learning "
        f"rate only reaches {last:.2g} of optimizer.learning_rate {section.learning_rate:.2g}"
    )


def _warmup(section: OptimizerSection, total: int, updates_per_step: int) -> int:
    return round(section.warmup * (total if section.warmup < 1 else updates_per_step))


def make_optimizer(section: OptimizerSection, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm. Weight decay spares vectors (norms and biases)."""
    adamw = optax.chain(
        _adam(section),
        optax.add_decayed_weights(
            section.weight_decay, lambda parameters: jax.tree_util.tree_map_with_path(_is_matrix, parameters)
        ),
        optax.scale_by_learning_rate(schedule),
    )
    return optax.chain(optax.clip_by_global_norm(section.max_grad_norm), adamw)


def _adam(section: OptimizerSection) -> optax.GradientTransformation:
    """Adam, whose moments are computed in float32 and stored in the dtypes of `section`.

    Optax's own `mu_dtype` also multiplies in that dtype, in which 0.9 is 0.898. The mean is rounded to the nearest;
    the squares' mean, which at a decay of 0.999 changes by less than bfloat16 resolves, up or down at random, so that
    it is right on average (stochastic rounding, arXiv 1502.02551). The draw depends on the number of the update alone.
    """
    adam = optax.scale_by_adam(section.beta1, section.beta2, section.epsilon)

    def stored(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
        mu = optax.tree.cast(state.mu, section.mu_dtype)
        nu = state.nu
        if section.nu_dtype == "bfloat16":
            key = jax.random.fold_in(jax.random.key(0), state.count)
            below = optax.tree.random_like(key, nu, jax.random.bits, jnp.uint16)
            nu = jax.tree.map(rounded_up_by, nu, below)
        return state._replace(mu=mu, nu=nu)

    def init(parameters: optax.Params) -> optax.ScaleByAdamState:
        return stored(adam.init(parameters))

    def update(
        gradients: optax.Updates, state: optax.ScaleByAdamState, parameters: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        mu, nu = optax.tree.cast((state.mu, state.nu), "float32")
        changes, state = adam.update(gradients, state._replace(mu=mu, nu=nu), parameters)
        return changes, stored(state)

    return optax.GradientTransformation(init, update)


def rounded_up_by(x: jax.Array, below: jax.Array) -> jax.Array:
    """`x` float32, not negative, in bfloat16: up where what it cuts off, and `below` uint16, overflow together."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + below.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def trained_shapes(abstract_parameters: Any) -> Any:
    """Shape and dtype of what is trained of a model's abstract parameters: the adapters, if there are any, else all."""
    plain = trained(nnx.to_pure_dict(abstract_parameters))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), plain)


def state_shardings(
    optimizer: optax.GradientTransformation, abstract_parameters: Any, sharding: Sharding
) -> TrainState:
    """Where each part of the state is placed: the optimizer's moments beside their parameters, the rest everywhere."""
    parameters = trained(sharding.of_parameters(abstract_parameters))
    everywhere = sharding.named()
    plain = trained_shapes(abstract_parameters)
    optimizer_state = optax.tree.map_params(
        optimizer,
        lambda _, place: place,
        jax.eval_shape(optimizer.init, plain),
        parameters,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, parameters, optimizer_state)


def initial_state(optimizer: optax.GradientTransformation, parameters: Parameters, shardings: TrainState) -> TrainState:
    """Step 0 from given parameters."""
    optimizer_state = jax.jit(optimizer.init, out_shardings=shardings.optimizer_state)(parameters)
    return TrainState(jax.device_put(jnp.int32(0), shardings.step), parameters, optimizer_state)


@jax.named_scope("optimizer")
def apply_gradients(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    loss: jax.Array,
    gradients: Parameters,
    learns: jax.Array | bool = True,
) -> tuple[TrainState, jax.Array, jax.Array]:
    """One update of the optimizer, which changes nothing if the loss or the gradient is not finite, or not `learns`.

    Where nothing changes, the optimizer counts no update, so its learning rate stays too.

    Returns:
      The state (of the same step), the gradient's norm before clipping, and whether all was finite (bool).
    """
    norm = optax.global_norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    changes, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.parameters)
    new = optax.apply_updates(state.parameters, changes), optimizer_state
    parameters, optimizer_state = jax.tree.map(
        lambda new, old: jnp.where(finite & learns, new, old), new, (state.parameters, state.optimizer_state)
    )
    return TrainState(state.step, parameters, optimizer_state), norm, finite


def updates_counted(optimizer_state: Any) -> jax.Array:
    """How many updates the optimizer has counted, by which its learning rate goes; those that changed nothing are not
    among them."""
    (_, count), *_ = optax.tree.get_all_with_path(optimizer_state, "count")  # its parts all count alike
    return count


def _is_matrix(path: tuple[Any, ...], _: Any) -> bool:
    return path[-1].key not in ("bias", "scale")


LossFunction: TypeAlias = Callable[[Parameters, Any], tuple[jax.Array, Any]]


@jax.named_scope("updates")
def accumulate_gradients(
    loss: LossFunction,
    parameters: Parameters,
    batch: Any,
    micro_batches: int,
    sharding: Sharding,
    places: Any = None,
) -> tuple[jax.Array, Any, Parameters]:
    """Sum of the losses and gradients of consecutive micro-batches.

    Args:
      loss: `(parameters, part of batch) -> (loss, per-row extras)`.
      parameters: what is differentiated.
      batch: a pytree of arrays [rows, ...].
      micro_batches: divides `rows`.
      sharding: the mesh.
      places: shardings of the parameters, where their gradients are placed too (None: wherever the compiler likes).

    Returns:
      The loss, the extras of all rows, the gradient.
    """
    if micro_batches == 1:
        (value, extras), gradients = jax.value_and_grad(loss, has_aux=True)(parameters, batch)
        return value, extras, gradients

    # The backward pass adds each layer's gradient to these in place: there never is a second gradient beside them.
    # They are turned as parameters are, since JAX could not add to them through the turning.
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    zeros = zeros if places is None else jax.lax.with_sharding_constraint(zeros, places)
    sums = jax.tree.map(jax.new_ref, turned(zeros))
    parameters = turned(parameters)

    def add(total: jax.Array, part: Any) -> tuple[jax.Array, Any]:
        pull_back: Any  # jax.VJP, which jax.vjp's type does not say
        value, pull_back, extras = jax.vjp(lambda parameters: loss(parameters, part), parameters, has_aux=True)
        pull_back.with_refs(sums)(jnp.ones_like(value))
        return total + value, extras

    value, extras = jax.lax.scan(add, jnp.float32(0), split_rows(batch, micro_batches, sharding))
    return value, join_rows(extras), turned_back(jax.tree.map(jax.freeze, sums))
