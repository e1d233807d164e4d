"""TPU slices by name (`v5e:4x4`): what the published specifications say of the chip, and its devices for compiling."""

import contextlib
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from psyche_jax.errors import UsageError, UserError
from psyche_jax.model.flops import BF16_PEAKS


@dataclass(frozen=True)
class Chip:
    """One TPU chip. `hbm_gib` is what the compiler lets a program have, which is a little less than is built in."""

    name: str
    bf16_flops: float
    hbm_gib: float
    hbm_bytes_per_second: float
    ici_bytes_per_second: float  # out of one chip, all its links together
    accelerator: str  # the prefix of TPU_ACCELERATOR_TYPE
    per_accelerator_unit: int  # v4 and v5p count TensorCores in accelerator types, two a chip
    dimensions: int
    most: int  # chips of the largest slice
    options: tuple[tuple[str, Any], ...] = ()


SOURCE = "cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}: peak compute, HBM and inter-chip bandwidth per chip"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", BF16_PEAKS["v4"], 30.75, 1.228e12, 300e9, "v4", 2, 3, 4096, (("chip_config_name", "megacore"),)),
        Chip("v5e", BF16_PEAKS["v5e"], 15.75, 0.819e12, 200e9, "v5litepod", 1, 2, 256),
        Chip("v5p", BF16_PEAKS["v5p"], 95.74, 2.765e12, 600e9, "v5p", 2, 3, 6144, (("chip_config_name", "megacore"),)),
        Chip(
            "v6e", BF16_PEAKS["v6e"], 31.25, 1.640e12, 400e9, "v6e", 1, 2, 256, (("chips_per_host_bounds", (2, 2, 1)),)
        ),
    )
}
_EXAMPLES = "v5e:4x4, v6e:2x4, v5p:2x2x2, v4:2x2x2"


@dataclass(frozen=True)
class Slice:
    """A chip and how many of them stand in each direction."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """As it was given: `v5e:4x4`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    def devices(self) -> list[Any]:
        """Devices to compile for.

        Raises:
          UserError: libtpu is missing. UsageError: there is no such slice.
        """
        if importlib.util.find_spec("libtpu") is None:
            raise UserError("libtpu, which holds the TPU compiler, is not installed: pip install 'psyche_jax[tpu]'")
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_ACCELERATOR_TYPE": f"{self.chip.accelerator}-{self.chips * self.chip.per_accelerator_unit}",
        }
        os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
        from jax.experimental import topologies

        try:
            topology = topologies.get_topology_desc(platform="tpu", topology_name=self.name, **dict(self.chip.options))
        except Exception as error:  # whatever libtpu raises, which changes with its version
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(f"--topology {self.name}: there is no such slice ({reason}); try {_EXAMPLES}") from None
        devices = list(topology.devices)
        if len(devices) != self.chips:
            raise UsageError(f"--topology {self.name}: the compiler sees {len(devices)} devices, not {self.chips}")
        return devices


def parse_topology(text: str) -> Slice:
    """`v5e:4x4` and the like.

    Raises:
      UsageError: it has another form, or names a chip that is not known.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    if match is None:
        raise UsageError(f"--topology {text}: must be a chip and a shape; try {_EXAMPLES}")
    chip = CHIPS.get(match[1])
    if chip is None:
        raise UsageError(f"--topology {text}: the chip {match[1]!r} is not known; known: {', '.join(CHIPS)}")
    shape = tuple(int(size) for size in match[2].split("x"))
    if len(shape) != chip.dimensions or 0 in shape:
        raise UsageError(f"--topology {text}: {chip.name} slices have {chip.dimensions} dimensions; try {_EXAMPLES}")
    if math.prod(shape) > chip.most:
        raise UsageError(f"--topology {text}: the largest {chip.name} slice has {chip.most} chips; try {_EXAMPLES}")
    return Slice(chip, shape)


def use_cpu() -> None:
    """Keep JAX off accelerators in this process; a no-op where it has started already."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with contextlib.suppress(ImportError, RuntimeError):
        import jax

        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
