"""TPU slices by name (`v5e:4x4`, `v5litepod-16`): what is published of the chip, and its devices for compiling."""

import contextlib
import difflib
import importlib.metadata
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psyche_jax.errors import UsageError, UserError, first_reason
from psyche_jax.model.flops import BF16_PEAKS, HBM_BANDWIDTHS


@dataclass(frozen=True)
class Chip:
    """One TPU chip. Figures are those of one device, as JAX and its compiler count them: the chip, or a part of it.

    `hbm_gib` is what the compiler lets a program have, which is a little less than is built in.
    """

    name: str
    hbm_gib: float
    ici_bytes_per_second: float  # out of one device, all its links together
    accelerator: str  # as the cloud calls it
    per_accelerator_unit: int  # what the cloud counts behind that name: chips, or TensorCores, two a chip
    dimensions: int
    most: int  # chips of the largest slice
    multipliers: int  # of bfloat16, in all matrix units of one device: each multiplies and adds once a cycle
    devices: int = 1  # in a chip
    spellings: tuple[str, ...] = ()  # beside `name` and `accelerator`
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def bf16_flops(self) -> float:
        """The published peak, a second."""
        return BF16_PEAKS[self.name]

    @property
    def hbm_bytes_per_second(self) -> float:
        """The published bandwidth of its memory."""
        return HBM_BANDWIDTHS[self.name]

    @property
    def clock(self) -> float:
        """Cycles a second, from the peak: what the compiler counts in."""
        return self.bf16_flops / self.multipliers / 2


SOURCE = "cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: peak compute, HBM and inter-chip bandwidth per chip"
_MEGACORE = (("chip_config_name", "megacore"),)  # a chip's two TensorCores as one device
_FOUR_A_HOST = (("chips_per_host_bounds", (2, 2, 1)),)
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 30.75, 300e9, "v4", 2, 3, 4096, 8 * 128**2, options=_MEGACORE),
        Chip("v5e", 15.75, 200e9, "v5litepod", 1, 2, 256, 4 * 128**2, spellings=("v5lite",)),
        Chip("v5p", 95.74, 600e9, "v5p", 2, 3, 6144, 8 * 128**2, options=_MEGACORE),
        Chip("v6e", 31.25, 400e9, "v6e", 1, 2, 256, 4 * 256**2, spellings=("trillium", "v6lite"), options=_FOUR_A_HOST),
        # Ironwood: a chip has 192 GiB, 7,380 GB/s of HBM and 600 GB/s to its neighbours, for two devices.
        Chip("tpu7x", 94.74, 300e9, "tpu7x", 2, 3, 9216, 4 * 256**2, devices=2, spellings=("v7x", "ironwood")),
    )
}
# Dollars for an hour of one chip, on demand, where it is cheapest in the United States.
PRICES = {"v4": 3.22, "v5e": 1.20, "v5p": 4.20, "v6e": 2.70, "tpu7x": 12.00}
PRICE_SOURCE = "cloud.google.com/tpu/pricing, on demand in the US, as quoted in November 2026"
_FLAT_SHAPES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL_SHAPES = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


@dataclass(frozen=True)
class Slice:
    """A chip and how many of them there are in each direction."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """As the compiler is asked for it: `v5e:4x4`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def accelerator_type(self) -> str:
        """As the cloud has it: `v5litepod-16`."""
        return f"{self.chip.accelerator}-{self.chips * self.chip.per_accelerator_unit}"

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
        # The compiler, which must look for no TPU here.
        if not find_compiler():
            raise UserError(
                f"libtpu, which holds the TPU compiler, is not installed: in a checkout `make tpu-compiler`, elsewhere "
                f"{_install_command()}; on a TPU pip install 'psyche_jax[tpu]'"
            )
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_ACCELERATOR_TYPE": self.accelerator_type,
        }
        os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
        from jax.experimental import topologies

        from psyche_jax.model.sharding import set_tpu_flags

        set_tpu_flags()  # as in a run

        # The slice, if there is one like that.
        options = dict(self.chip.options)
        if self.chips == 1:  # else the compiler thinks of a host with four
            options["chips_per_host_bounds"] = (1, 1, 1)
        try:
            topology = topologies.get_topology_desc(platform="tpu", topology_name=self.name, **options)
        except Exception as error:  # whatever libtpu raises, which changes with its version
            reason = first_reason(error)
            if "external name" in reason:
                version = importlib.metadata.version("libtpu")
                raise UserError(
                    f"--topology {self.name}: libtpu {version} does not know this chip; {_install_command()}"
                ) from None
            near = _near(self.chip, self.chips)
            raise UsageError(f"--topology {self.name}: there is no such slice ({reason}); {near}") from None
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
    """A slice by chip and shape (`v5e:4x4`), or as the cloud calls it (`v5litepod-16`, `v5p-8`).

    Raises:
      UsageError: it has another form, or names what is not known; with the nearest that is.
    """
    match = re.fullmatch(r"\s*(.*[a-z0-9])(?:\s*[:/_-]\s*|\s+)(\d{1,5}(?:[x×*]\d{1,5})*)\s*", text.lower())
    names = {_plain(name): chip for chip in CHIPS.values() for name in (chip.name, chip.accelerator, *chip.spellings)}
    chip = names.get(_plain(match[1] if match else text))
    if chip is None and match is not None:
        nearest = dict.fromkeys(names[name].name for name in difflib.get_close_matches(_plain(match[1]), names))
        hint = f"nearest: {', '.join(nearest)}" if nearest else f"known: {', '.join(CHIPS)}"
        raise UsageError(f"--topology {text}: the chip {match[1]!r} is not known; {hint}")
    if chip is None or match is None:
        examples = "try v5e:4x4, v6e-8, v5p:2x2x2, tpu7x:2x2x1" if chip is None else _near(chip, 4)
        raise UsageError(f"--topology {text}: must be a chip and a shape, or the cloud's name; {examples}")
    shape = tuple(int(size) for size in re.split("[x×*]", match[2]))
    if len(shape) == 1:
        chips, rest = divmod(shape[0], chip.per_accelerator_unit)
        usual = None if rest else next((s.shape for s in _slices(chip) if s.chips == chips), None)
        if usual is None:
            counted = "chips" if chip.per_accelerator_unit == 1 else "TensorCores, two a chip"
            raise UsageError(
                f"--topology {text}: there is no {chip.name} slice of {shape[0]} {counted}; {_near(chip, chips)}"
            )
        return Slice(chip, usual)
    if len(shape) != chip.dimensions or 0 in shape:
        near = _near(chip, math.prod(shape))
        raise UsageError(f"--topology {text}: {chip.name} slices have {chip.dimensions} dimensions; {near}")
    if math.prod(shape) > chip.most:
        near = _near(chip, chip.most)
        raise UsageError(f"--topology {text}: the largest {chip.name} slice has {chip.most} chips; {near}")
    return Slice(chip, shape)


def _plain(name: str) -> str:
    """A chip's name without what its spellings differ in: `TPU v5e`, `tpu-v5-lite-podslice`, `v5litepod`."""
    letters = re.sub("[^a-z0-9]", "", name.lower()).removeprefix("tpu")
    return re.sub("(pod)?(slice)?$", "", letters)


def _slices(chip: Chip) -> Iterator[Slice]:
    """The usual slices of a chip, those that the cloud's names with one number mean, by size."""
    if chip.dimensions == 2:
        yield from (Slice(chip, shape) for shape in _FLAT_SHAPES)
        return
    yield from (Slice(chip, shape) for shape in _SMALL_SHAPES)
    # From 64 chips on they are made of cubes of 4 × 4 × 4, arranged as near to a cube as they go.
    for cubes in range(1, chip.most // 64 + 1):
        shapes = [
            (4 * a, 4 * b, 4 * cubes // (a * b))
            for a in range(1, round(cubes ** (1 / 3)) + 1)
            for b in range(a, math.isqrt(cubes // a) + 1)
            if cubes % (a * b) == 0
        ]
        yield Slice(chip, min(shapes, key=sum))


def _near(chip: Chip, chips: int) -> str:
    """The usual slices that come nearest to so many chips, as a hint."""
    found = sorted(
        sorted(_slices(chip), key=lambda s: abs(math.log(s.chips / max(chips, 1))))[:2], key=lambda s: s.chips
    )
    return "nearest: " + ", ".join(f"{s.name} ({s.accelerator_type})" for s in found)


def use_cpu() -> None:
    """Keep JAX off accelerators in this process; a no-op where it has started already."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
