#!/usr/bin/env python
"""How fast `psyche import` and `psyche export` are, beside `cp` of the same bytes, and how much memory they take.

Writes a random model at the shapes of Qwen2.5-7B (fewer layers where the disk is too small), converts it there and
back in processes of their own, and compares the weights that come out with those that went in.

Example:
  python scripts/benchmarks/conversion_benchmark.py --folder /mnt/scratch --json
"""

import argparse
import dataclasses
import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from psyche_jax.demo import train_tokenizer
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.huggingface import stream_weights
from psyche_jax.storage.arrays import Index

FOLDERS_AT_A_TIME = 3.1  # the model, the checkpoint, and a copy or the export; and a little
PSYCHE = [sys.executable, "-m", "psyche_jax.cli"]


def main() -> int:
    """Measure, and print a table or one JSON object."""
    arguments = parse()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="conversion-") as place:
        result = measure(Path(place), fitting(config_of(arguments), arguments.dtype, Path(place)), arguments.dtype)
    if arguments.json:
        print(json.dumps(result))
        return 0
    print(f"{result['parameters']:,} parameters as {result['dtype']}, {result['bytes'] / 1e9:.1f} GB")
    for run in result["runs"]:
        memory = f", {run['peak_anonymous_gib']:.2f} GiB above the imports" if "peak_anonymous_gib" in run else ""
        print(f"{run['what']:8}{run['seconds']:8.1f} s{run['bytes_per_second'] / 1e6:8.0f} MB/s{memory}")
    print(f"exported weights are {'the same bits' if result['same_bits'] else 'NOT THE SAME'}")
    return 0 if result["same_bits"] else 1


def parse() -> argparse.Namespace:
    """The command line; the defaults are Qwen2.5-7B."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("layers", 28),
        ("width", 3584),
        ("heads", 28),
        ("kv-heads", 4),
        ("head-dim", 128),
        ("ffn", 18944),
        ("vocab", 152064),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default bfloat16")
    parser.add_argument("--folder", type=Path, default=None, help="on which disk (default: that of temporary files)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def config_of(arguments: argparse.Namespace) -> ModelConfig:
    """The model that the arguments describe."""
    return ModelConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.width,
        intermediate_size=arguments.ffn,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        head_dim=arguments.head_dim,
    )


def fitting(config: ModelConfig, dtype: str, place: Path) -> ModelConfig:
    """`config`, or one with fewer layers where the disk is too small for it."""
    free = shutil.disk_usage(place).free
    asked = config.num_hidden_layers
    while config.num_parameters * jnp.dtype(dtype).itemsize * FOLDERS_AT_A_TIME > free and config.num_hidden_layers > 1:
        config = dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers - 1)
    if config.num_hidden_layers < asked:
        print(f"{free / 1e9:.0f} GB are free: {config.num_hidden_layers} layers, not {asked}", file=sys.stderr)
    return config


def measure(place: Path, config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Convert there and back, each after a `cp` of what it reads."""
    size = config.num_parameters * jnp.dtype(dtype).itemsize
    model, checkpoint, exported, copy = (place / name for name in ("model", "checkpoint", "exported", "copy"))
    write_model(model, config, dtype)
    base = run([sys.executable, "-c", "import psyche_jax.convert, time; time.sleep(1)"])[1]
    runs = []
    for what, source, target in (("import", model, checkpoint), ("export", checkpoint, exported)):
        seconds, _ = run(["sh", "-c", 'cp -r "$0" "$1" && find "$1" -type f -exec sync {} +', source, copy])
        runs.append({"what": "cp", "seconds": seconds, "bytes_per_second": size / seconds})
        shutil.rmtree(copy)
        seconds, peak = run([*PSYCHE, what, source, target, "--dtype", dtype])
        speed = {"what": what, "seconds": seconds, "bytes_per_second": size / seconds}
        runs.append({**speed, "peak_anonymous_gib": (peak - base) / 2**30})
    names = [path.name for path in model.glob("*.safetensors")]
    same = all(filecmp.cmp(model / name, exported / name, shallow=False) for name in names)
    return {
        "what": "conversion",
        "shape": {"layers": config.num_hidden_layers, "width": config.hidden_size, "ffn": config.intermediate_size},
        "parameters": config.num_parameters,
        "dtype": dtype,
        "bytes": size,
        "cpus": len(os.sched_getaffinity(0)),
        "anonymous_after_imports_gib": base / 2**30,
        "runs": runs,
        "same_bits": same,
    }


def write_model(folder: Path, config: ModelConfig, dtype: str) -> None:
    """A model of random weights with a tokenizer."""
    folder.mkdir()
    train_tokenizer(["心理"], 300, folder)
    kind = np.dtype(jnp.dtype(dtype))
    random = np.random.default_rng(0)
    noise = (0.02 * random.standard_normal(2**24 + 1, np.float32)).astype(kind)

    def read(path: str, index: Index) -> np.ndarray:
        shape = [bounds.stop - bounds.start for bounds in index]
        return np.resize(np.roll(noise, random.integers(len(noise))), shape)

    stream_weights(folder, config, kind, read)


def run(command: list[Any]) -> tuple[float, int]:
    """Seconds that a process took, and the most anonymous memory that it held, in bytes; sampled every 10 ms."""
    started = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=sys.stderr)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{command} failed with {process.returncode}")
    return time.perf_counter() - started, peak


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


if __name__ == "__main__":
    sys.exit(main())
