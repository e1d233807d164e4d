"""One mesh and tables of rules: where each logical axis goes while training and while decoding."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeAlias

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from psyche_jax.errors import UsageError
from psyche_jax.model.config import ModelConfig

MESH_AXES = ("data", "fsdp", "tensor")
GATHER_ROWS = "gather_rows"  # the scope by which `psyche plan` tells such gathers from those of weights
Rules: TypeAlias = Mapping[str, str | tuple[str, ...] | None]

# Training: parameters and optimizer state are spread over every device (FSDP), weights gathered layer by layer.
TRAIN_RULES: Rules = MappingProxyType(
    {
        "batch": ("data", "fsdp"),
        "residual_batch": ("data", "fsdp"),  # rows of what layers add to
        "sequence": None,
        "layers": None,
        "embed": "fsdp",
        "vocab": "tensor",
        "embed_for_vocab": ("fsdp", "tensor"),  # of a vocabulary that `tensor` does not divide
        "heads": "tensor",
        "kv_heads": "tensor",
        "mlp": "tensor",
        "activation_embed": None,
        # The loss spreads the vocabulary instead of the rows: tokens' hidden states travel, the head never does.
        "loss_batch": "data",
        "loss_vocab": ("tensor", "fsdp"),
    }
)
# Training where the axis `tensor` is for decoding alone: rows and weights are spread over it as over `fsdp`.
SPREAD_RULES: Rules = MappingProxyType(
    {
        **TRAIN_RULES,
        **dict.fromkeys(("batch", "residual_batch"), ("data", "fsdp", "tensor")),
        "embed": ("fsdp", "tensor"),
        **dict.fromkeys(("vocab", "heads", "kv_heads", "mlp")),
    }
)
# Decoding: weights are whole but for the tensor axis, so that no step of the loop gathers any. Between its products,
# each of the devices that share weights has rows of its own: none computes norms and sums that another computes, too.
DECODE_RULES: Rules = MappingProxyType(
    {
        **TRAIN_RULES,
        "residual_batch": ("data", "fsdp", "tensor"),
        "embed": None,
        "embed_for_vocab": "tensor",
        "loss_vocab": "tensor",
    }
)


# How the TPU compiler brings the weights of FSDP: each whole, while others are computed with. By itself it cuts its
# products in pieces, each of which waits for some of the weights. What is gained: docs/measurements/benchmarks.md.
# (libtpu refuses a flag that it does not know. To fuse gathers with products is its default on v5e; elsewhere newer
# versions refuse it: it "might lead to incorrect results".)
_TPU_FLAGS = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000 --xla_enable_async_all_gather=true"
# On v6e a gather occupies the core that computes, unless it is given to the SparseCores. (So it is on v5p, but there
# that needs settings of the chip, too; v5e has none.)
_OF_DEVICES = {"TPU v6 lite": {"xla_tpu_enable_sparse_core_collective_offload_all_gather": True}}


def set_tpu_flags() -> None:
    """Give libtpu our flags when it starts, unless the environment has `LIBTPU_INIT_ARGS` (which may be empty)."""
    os.environ.setdefault("LIBTPU_INIT_ARGS", _TPU_FLAGS)


@dataclass(frozen=True)
class Sharding:
    """A mesh and the table that maps logical axis names to its axes."""

    mesh: Mesh
    rules: Rules

    @property
    def sizes(self) -> dict[str, int]:
        """How many parts the axes of the mesh have, as these rules use them: `tensor` may be used as `fsdp` is."""
        sizes = dict(self.mesh.shape)
        if self.rules["heads"] is None:
            sizes |= {"fsdp": sizes["fsdp"] * sizes["tensor"], "tensor": 1}
        return sizes

    @property
    def platform(self) -> str:
        """What its devices are: `tpu`, `gpu` or `cpu`."""
        return self.mesh.devices.flat[0].platform

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Of `jax.jit`, for programs that train: what its devices want beside our flags; nothing beside others."""
        ours = os.environ.get("LIBTPU_INIT_ARGS", _TPU_FLAGS) == _TPU_FLAGS
        return _OF_DEVICES.get(self.mesh.devices.flat[0].device_kind, {}) if ours else {}

    def for_decoding(self) -> "Sharding":
        """The same mesh, as decoding uses it."""
        return replace(self, rules=DECODE_RULES)

    def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
        """The partition of an array whose dimensions have these logical names (None: not split)."""
        return PartitionSpec(*(None if axis is None else self.rules[axis] for axis in axes))

    def named(self, *axes: str | None) -> NamedSharding:
        """The same as `spec`, bound to the mesh."""
        return NamedSharding(self.mesh, self.spec(axes))

    def divides(self, size: int, axis: str) -> bool:
        """Whether a dimension of `size` can be split as the rule of `axis` says."""
        return size % self.parts(axis) == 0

    def _divides_all(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> bool:
        return all(axis is None or self.divides(size, axis) for size, axis in zip(shape, axes, strict=True))

    def constrain(self, array: jax.Array, *axes: str | None) -> jax.Array:
        """Fix how `array` is laid out on the mesh at this point; what is not divided, the compiler pads."""
        return jax.lax.with_sharding_constraint(array, self.named(*axes))

    def gather_rows(self, array: jax.Array) -> jax.Array:
        """`array` [batch, sequence, width], from each device's own rows to those of all that share weights."""
        with jax.named_scope(GATHER_ROWS):
            return self.constrain(array, "batch", "sequence", "activation_embed")

    def parts(self, axis: str) -> int:
        """Into how many parts the rule of `axis` splits a dimension."""
        return parts_of_axes(self.mesh, self.rules[axis])

    def by_part(
        self, function: Callable[..., Any], *arrays: Any, axes: tuple[int, ...] | None = None, out: int = 0
    ) -> Any:
        """`function` of the rows that lie together, for each part of the batch axes by itself: no row travels.

        Args:
          function: takes and gives trees of arrays; sizes and numbers of rows are those of one part.
          arrays: trees of arrays whose rows are spread over the batch axes.
          axes: along which dimension the rows lie, for each of `arrays`; None: the first.
          out: the same for what it gives.
        """
        parts = self.parts("batch")
        if parts == 1:
            return function(*arrays)
        axes = axes or (0,) * len(arrays)

        def split(tree: Any, axis: int) -> Any:
            return jax.tree.map(lambda x: x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :]), tree)

        inner = [split(tree, axis) for tree, axis in zip(arrays, axes, strict=True)]
        result = jax.vmap(function, axes, out, spmd_axis_name=self.rules["batch"])(*inner)
        return jax.tree.map(lambda x: x.reshape(*x.shape[:out], -1, *x.shape[out + 2 :]), result)

    def of_parameters(self, abstract_parameters: nnx.State, padded: bool = False) -> dict[str, Any]:
        """NamedShardings of a model's parameters, as a plain nested dict of the same structure.

        A parameter is laid out as its `logical_axes` say or, where the mesh does not divide these, as the first of
        `otherwise` says that it does divide. `padded`: always as they say, for constraints within a program, where
        the compiler pads what is not divided (and masks it); arguments and results of a program cannot be.
        """

        def place(variable: nnx.Variable) -> NamedSharding:
            metadata = variable.get_metadata()
            axes = metadata["logical_axes"]
            ways = (axes,) if padded else (axes, *metadata.get("otherwise", ()))
            return self.named(*next((way for way in ways if self._divides_all(variable.shape, way)), axes))

        places = jax.tree.map(place, abstract_parameters, is_leaf=lambda node: isinstance(node, nnx.Variable))
        return nnx.to_pure_dict(places)

    def __hash__(self) -> int:
        return hash((self.mesh, tuple(self.rules.items())))


def parts_of_axes(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """Into how many parts an entry of a PartitionSpec splits a dimension."""
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `tensor`; one size may be -1, which takes the devices left.

    Raises:
      UsageError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    asked = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    if sum(size == -1 for size in sizes.values()) > 1 or any(s < 1 and s != -1 for s in sizes.values()):
        raise UsageError(f"mesh: {asked}: sizes must be positive, and at most one may be -1 (all that is left)")
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % known:
        raise UsageError(f"mesh: {asked} does not divide the {len(devices)} devices")
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes.values())
    if math.prod(shape) != len(devices):
        raise UsageError(
            f"mesh: {asked} needs {math.prod(shape)} devices, and there are {len(devices)}; "
            "set one axis to -1 to take what is left"
        )
    return jax.make_mesh(shape, MESH_AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)


def training_sharding(
    data: int, fsdp: int, tensor: int, decoding_tensor: int | None = None, devices: list[jax.Device] | None = None
) -> Sharding:
    """The mesh that a config describes, as training uses it; `for_decoding` gives it as decoding does.

    Args:
      data, fsdp, tensor: as in `make_mesh`.
      decoding_tensor: over how many devices decoding splits weights, where that is another number than `tensor`, which
        then is 1: they are taken from the axis `fsdp`.
      devices: those to use; None: all.

    Raises:
      UsageError: the sizes are impossible.
    """
    mesh = make_mesh(data, fsdp, tensor, devices)
    if decoding_tensor is None or decoding_tensor == tensor:
        return Sharding(mesh, TRAIN_RULES)
    if (spread := mesh.shape["fsdp"]) % decoding_tensor:
        raise UsageError(f"rollout.tensor: {decoding_tensor} does not divide mesh.fsdp {spread}")
    mesh = make_mesh(mesh.shape["data"], spread // decoding_tensor, decoding_tensor, devices)
    return Sharding(mesh, SPREAD_RULES)


def check_mesh_fits(sharding: Sharding, config: ModelConfig) -> None:
    """Raise UsageError unless the model's dimensions can be split as the rules say; the vocabulary always can.

    Raises:
      UsageError: naming the axis, its size and the dimension that it does not divide.
    """
    dimensions = {
        "num_attention_heads": (config.num_attention_heads, "heads", "tensor"),
        "num_key_value_heads": (config.num_key_value_heads, "kv_heads", "tensor"),
        "intermediate_size": (config.intermediate_size, "mlp", "tensor"),
        "hidden_size": (config.hidden_size, "embed", "fsdp"),
    }
    for rules in (sharding, sharding.for_decoding()):
        for name, (size, axis, of_mesh) in dimensions.items():
            if size % (parts := rules.parts(axis)):
                raise UsageError(f"mesh: {of_mesh} {parts} does not divide the model's {name} {size}")


def split_rows(tree: Any, parts: int, sharding: Sharding) -> Any:
    """[rows, ...] of every leaf to [parts, rows / parts, ...], the rows of each part over the batch axes."""

    def split(leaf: jax.Array) -> jax.Array:
        leaf = leaf.reshape(parts, -1, *leaf.shape[1:])
        return sharding.constrain(leaf, None, "batch", *(None,) * (leaf.ndim - 2))

    return jax.tree.map(split, tree)


def join_rows(tree: Any) -> Any:
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)
