"""Low-rank adapters and their base: apart while the adapters train, joined to compute, merged for good.

An adapter adds (alpha / rank) B A to the weights of a linear map (LoRA, arXiv 2106.09685); `model/linear.py` computes
it. A model with adapters has their factors `lora_a` and `lora_b` in its tree of parameters, beside the map's own; the
*base* is that tree without them.
"""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from psyche_jax.config import AdapterSection, StoredDtype
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.linear import Parameters
from psyche_jax.model.products import product
from psyche_jax.model.qwen2 import Qwen2, build
from psyche_jax.model.sharding import Sharding
from psyche_jax.storage.arrays import Index, ReadPart

FACTORS = ("lora_a", "lora_b")


def as_trained(config: ModelConfig, dtype: StoredDtype, adapter: AdapterSection | None) -> ModelConfig:
    """The config of what is trained of a stored model: over its weights in `dtype`, adapters or (None) all of them."""
    return replace(config, adapter=adapter, int8=dtype == "int8")


def without_adapter(config: ModelConfig) -> ModelConfig:
    """The config of the base."""
    return replace(config, adapter=None)


def adapters_of(tree: Parameters) -> Parameters:
    """Of a tree like a model's parameters, the adapters alone; empty if it has none."""
    found = {
        name: adapters_of(value) if isinstance(value, dict) else value
        for name, value in tree.items()
        if isinstance(value, dict) or name in FACTORS
    }
    return {name: value for name, value in found.items() if not isinstance(value, dict) or value}


def trained(tree: Parameters) -> Parameters:
    """Of a tree like a model's parameters, what training changes: the adapters if it has any, else all."""
    return adapters_of(tree) or tree


def joined(base: Parameters | None, parameters: Parameters) -> Parameters:
    """One tree of a base and adapters; without a base, `parameters` are all there is. No array is copied."""
    if base is None:
        return parameters
    inner = {name: joined(base.get(name), value) for name, value in parameters.items() if isinstance(value, dict)}
    return {**base, **parameters, **inner}


def initial_adapters(config: ModelConfig, key: jax.Array, sharding: Sharding) -> Parameters:
    """Adapters that change nothing yet, created where they belong on the mesh: `lora_a` random, `lora_b` zero."""
    places = adapters_of(sharding.of_parameters(build(config)[1]))

    @partial(jax.jit, out_shardings=places)
    def create(key: jax.Array) -> Parameters:  # of the weights, which nothing reads here, none is made
        return adapters_of(nnx.to_pure_dict(nnx.state(Qwen2(config, key, jnp.dtype("float32")))))

    return create(key)


def merged(config: ModelConfig, base: Parameters, adapters: Parameters, sharding: Sharding) -> Parameters:
    """The parameters of a model without adapters that computes what this one does, up to rounding.

    The sum is float32's, and is rounded once to the dtype of the base: what of it is below half a unit in the last
    place of a bfloat16 weight is lost. The memory of `base` is given to the result.
    """
    assert config.adapter is not None
    scale = config.adapter.scale

    def add(base: Parameters, adapters: Parameters) -> Parameters:
        result = dict(base)
        for name, inner in adapters.items():
            if "lora_a" in inner:
                change = scale * product("lor,lri->loi", inner["lora_b"], inner["lora_a"])
                kernel = base[name]["kernel"]
                result[name] = {**base[name], "kernel": (kernel.astype(jnp.float32) + change).astype(kernel.dtype)}
            else:
                result[name] = add(base[name], inner)
        return result

    places = sharding.of_parameters(build(without_adapter(config))[1])
    return jax.jit(add, donate_argnums=0, out_shardings=places)(base, adapters)


def merged_parts(config: ModelConfig, read: ReadPart, adapters: Parameters) -> ReadPart:
    """The same for parts on the host: what reads them, given what reads those of the base in float32."""
    assert config.adapter is not None
    scale = config.adapter.scale
    factors = traverse_util.flatten_dict(adapters, sep="/")

    def part(path: str, index: Index) -> np.ndarray:
        values, module = read(path, index), path.removesuffix("/kernel")
        if f"{module}/lora_a" not in factors:
            return values
        layers, rows, columns = index
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused where it is written
            return values + np.float32(scale) * (
                factors[f"{module}/lora_b"][layers, rows] @ factors[f"{module}/lora_a"][layers, :, columns]
            )

    return part


@cache
def num_trained(config: ModelConfig) -> int:
    """How many numbers training changes: those of the adapters, or all parameters."""
    if config.adapter is None:
        return config.num_parameters
    leaves: list[Any] = jax.tree.leaves(adapters_of(nnx.to_pure_dict(build(config)[1])))
    return sum(leaf.size for leaf in leaves)
