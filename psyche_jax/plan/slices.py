"""TPU slices by name (`v5e:4x4`, `v5litepod-16`): what is published of the chip, and its devices for compiling."""

import contextlib
import difflib
import importlib.metadata
import importlib.util
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psyche_jax.errors import UsageError, UserError
from psyche_jax.model.flops import BF16_PEAKS


@dataclass(frozen=True)
class Chip:
    """One TPU chip. Figures are those of one device, as JAX and its compiler count them: the chip, or a part of it.

    `hbm_gib` is what the compiler lets a program have, which is a little less than is built in.
    """

    name: str
    bf16_flops: float
    hbm_gib: float
    hbm_bytes_per_second: float
    ici_bytes_per_second: float  # out of one device, all its links together
    accelerator: str  # as the cloud calls it
    per_accelerator_unit: int  # what the cloud counts behind that name: chips, or TensorCores, two a chip
    dimensions: int
    most: int  # chips of the largest slice
    devices: int = 1  # in a chip
    options: tuple[tuple[str, Any], ...] = ()


SOURCE = "cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: peak compute, HBM and inter-chip bandwidth per chip"
_MEGACORE = (("chip_config_name", "megacore"),)  # a chip's two TensorCores as one device
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", BF16_PEAKS["v4"], 30.75, 1.228e12, 300e9, "v4", 2, 3, 4096, options=_MEGACORE),
        Chip("v5e", BF16_PEAKS["v5e"], 15.75, 0.819e12, 200e9, "v5litepod", 1, 2, 256),
        Chip("v5p", BF16_PEAKS["v5p"], 95.74, 2.765e12, 600e9, "v5p", 2, 3, 6144, options=_MEGACORE),
        Chip(
            "v6e", BF16_PEAKS["v6e"], 31.25, 1.640e12, 400e9, "v6e", 1, 2, 256,
            options=(("chips_per_host_bounds", (2, 2, 1)),),
        ),
        # Ironwood: a chip has 192 GiB, 7,380 GB/s of HBM and 600 GB/s to its neighbours, for two devices.
        Chip("tpu7x", BF16_PEAKS["tpu7x"], 94.74, 3.690e12, 300e9, "tpu7x", 2, 3, 9216, devices=2),
    )
}  # fmt: skip
_EXAMPLES = "v5e:4x4, v6e-8, v5p:2x2x2, tpu7x:2x2x1"


@dataclass(frozen=True)
class Slice:
    """A chip and how many of them stand in each direction."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """As the compiler is asked for it: `v5e:4x4`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def device_count(self) -> int:
        """How many devices JAX sees."""
        return self.chips * self.chip.devices

    def devices(self) -> list[Any]:
        """Devices to compile for.

        Raises:
          UserError: libtpu is missing, or too old. UsageError: there is no such slice.
        """
        if not find_compiler():
            raise UserError(
                f"libtpu, which holds the TPU compiler, is not installed: in a checkout `make tpu-compiler`, elsewhere "
                f"{_install_command()}; on a TPU pip install 'psyche_jax[tpu]'"
            )
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_ACCELERATOR_TYPE": f"{self.chip.accelerator}-{self.chips * self.chip.per_accelerator_unit}",
        }
        os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
        from jax.experimental import topologies

        options = dict(self.chip.options)
        if self.chips == 1:  # else the compiler thinks of a host with four
            options["chips_per_host_bounds"] = (1, 1, 1)
        try:
            topology = topologies.get_topology_desc(platform="tpu", topology_name=self.name, **options)
        except Exception as error:  # whatever libtpu raises, which changes with its version
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if "external name" in reason:
                version = importlib.metadata.version("libtpu")
                raise UserError(
                    f"--topology {self.name}: libtpu {version} does not know this chip; {_install_command()}"
                ) from None
            nearest = _nearest(self.chip, self.chips)
            raise UsageError(
                f"--topology {self.name}: there is no such slice ({reason}); the nearest is {nearest.name}"
            ) from None
        devices = list(topology.devices)
        if len(devices) != self.device_count:
            raise UsageError(
                f"--topology {self.name}: the compiler sees {len(devices)} devices, not {self.device_count}"
            )
        return devices


def kept_compiler() -> Path:
    """The folder in which an environment keeps a libtpu that JAX does not find, as it would look for a TPU then."""
    return Path(sys.prefix) / "tpu-compiler"


def find_compiler() -> bool:
    """Whether there is a libtpu, an installed one or that of `kept_compiler`, which Python then finds too."""
    if importlib.util.find_spec("libtpu") is None and (kept_compiler() / "libtpu").is_dir():
        sys.path.append(str(kept_compiler()))
    return importlib.util.find_spec("libtpu") is not None


def wanted_libtpu() -> str:
    """The libtpu that the installed JAX asks for: `libtpu==0.0.42.*`."""
    wanted = importlib.metadata.requires("jax") or []
    return next((line.partition(";")[0].strip() for line in wanted if line.startswith("libtpu")), "libtpu")


def _install_command() -> str:
    return f"pip install --no-deps --upgrade --target {kept_compiler()} '{wanted_libtpu()}'"


def parse_topology(text: str) -> Slice:
    """`v5e:4x4` and the like, and names that the cloud has for slices: `v5litepod-16`.

    Behind the latter's hyphen v5e and v6e count chips, the others TensorCores, of which a chip has two.

    Raises:
      UsageError: it has another form, or names a chip that is not known.
    """
    match = re.fullmatch(r"(\w+)(?::(\d{1,5}(?:x\d{1,5})*)|-(\d{1,5}))", text)
    if match is None:
        raise UsageError(f"--topology {text}: must be a chip and a shape; try {_EXAMPLES}")
    chip = CHIPS.get(match[1]) or next((chip for chip in CHIPS.values() if chip.accelerator == match[1]), None)
    if chip is None:
        nearest = difflib.get_close_matches(match[1], CHIPS, 1, 0.4)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise UsageError(f"--topology {text}: the chip {match[1]!r} is not known; {hint}known: {', '.join(CHIPS)}")
    if match[3] is not None:
        return _of_size(chip, int(match[3]), text)
    shape = tuple(int(size) for size in match[2].split("x"))
    if len(shape) != chip.dimensions or 0 in shape:
        raise UsageError(f"--topology {text}: {chip.name} slices have {chip.dimensions} dimensions; try {_EXAMPLES}")
    if math.prod(shape) > chip.most:
        raise UsageError(f"--topology {text}: the largest {chip.name} slice has {chip.most} chips; try {_EXAMPLES}")
    return Slice(chip, shape)


def _of_size(chip: Chip, size: int, text: str) -> Slice:
    nearest = _nearest(chip, max(1, size) / chip.per_accelerator_unit)
    usual = nearest.chips * chip.per_accelerator_unit
    if usual != size:
        unit = "chips" if chip.per_accelerator_unit == 1 else "TensorCores, two a chip"
        raise UsageError(
            f"--topology {text}: {size} ({unit}) is no usual size; the nearest is {chip.accelerator}-{usual} "
            f"({nearest.name}); others go by their shape"
        )
    return nearest


def _nearest(chip: Chip, chips: float) -> Slice:
    """Of the slices that the cloud calls by their size (1, 4, 8, 16, … chips, as square as can be) the nearest."""
    shapes = []
    for exponent in (0, *range(2, chip.most.bit_length())):
        shape = tuple(2 ** ((exponent + axis) // chip.dimensions) for axis in range(chip.dimensions))
        shapes.append((2, 2, 1) if shape == (1, 2, 2) else shape)
    return Slice(chip, min(shapes, key=lambda shape: abs(math.log(math.prod(shape) / chips))))


def use_cpu() -> None:
    """Keep JAX off accelerators in this process; a no-op where it has started already."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with contextlib.suppress(ImportError, RuntimeError):
        import jax

        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
