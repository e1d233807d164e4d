"""How fast packed rows come from a bucket: tokens a second to one process, and how soon the first batch is there.

A packed data set of random tokens is written to fake-gcs-server on this machine (or to --uri) and read through the same
stream as SFT's. The server shares the machine's cores with the reader: CPU seconds of both are measured while batches
are read.

    python scripts/benchmarks/stream_benchmark.py --json
    python scripts/benchmarks/stream_benchmark.py --json --shards 1000 --late    # as from a bucket far away
"""

import argparse
import json
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from psyche_jax.data.chat import TokenizedExample
from psyche_jax.data.dataset import Packing, open_dataset, write_contents
from psyche_jax.data.packing import PACKED, packed_row, unpacked_rows
from psyche_jax.data.streams import batches

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from support.bucket import running_bucket
from support.faulty_proxy import faulty


def main() -> None:
    """Measure, and print one line or object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uri", help="where to write and read instead, for example gs://my-bucket/benchmark")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row (default 4096)")
    parser.add_argument("--rows", type=int, default=4000, help="of the data set (default 4000)")
    parser.add_argument("--shards", type=int, default=4, help="about how many (default 4)")
    parser.add_argument("--batch-size", type=int, default=128, help="rows of a batch (default 128)")
    parser.add_argument("--batches", type=int, default=40, help="that are read (default 40)")
    parser.add_argument("--late", action="store_true", help="every answer comes 0.3 s late (not with --uri)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.uri is not None:
        result = measure(arguments.uri, arguments)
    else:
        with running_bucket() as bucket:
            result = measure(f"{bucket}/packed", arguments)
    print(json.dumps(result) if arguments.json else ", ".join(f"{key} {value}" for key, value in result.items()))


def measure(uri: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Write the data set, then read it."""
    write(uri, arguments.length, arguments.rows, arguments.shards)
    if arguments.late:
        with faulty(1.0, faults=("late",)):
            return read(uri, arguments)
    return read(uri, arguments)


def read(uri: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Open the data set, and read it from the start and from the middle of an epoch."""
    started = time.perf_counter()
    dataset = open_dataset(uri)
    opened = time.perf_counter() - started

    def stream(first: int, count: int):
        collate = partial(unpacked_rows, length=arguments.length)
        return batches(dataset, arguments.batch_size, 0, collate, range(first, first + count))

    first_batch = seconds_to_first(stream(0, 1))
    resumed = seconds_to_first(stream(arguments.rows // arguments.batch_size // 2, 1))
    me = psutil.Process()
    processes = [me, *me.children()]
    before = [cpu_seconds(process) for process in processes]
    times = [time.perf_counter()]
    tokens = 0
    for batch in stream(0, arguments.batches):
        tokens += int((batch["segments"] > 0).sum())
        times.append(time.perf_counter())
    spent = [cpu_seconds(process) - earlier for process, earlier in zip(processes, before, strict=True)]
    return {
        "tokens_per_second": round(tokens / (times[-1] - times[0])),
        "seconds_median": statistics.median(np.diff(times)),
        "seconds": times[-1] - times[0],
        "reader_cpu_seconds": spent[0],
        "server_cpu_seconds": sum(spent[1:]),
        "open_seconds": opened,
        "first_batch_seconds": first_batch,
        "resume_seconds": resumed,
        "shards": len(dataset.manifest.shards),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "length": arguments.length,
        "batch_size": arguments.batch_size,
    }


def cpu_seconds(process: psutil.Process) -> float:
    """Of all its threads, so far."""
    times = process.cpu_times()
    return times.user + times.system


def seconds_to_first(stream) -> float:
    """Until the first batch is there."""
    started = time.perf_counter()
    next(stream)
    return time.perf_counter() - started


def write(uri: str, length: int, rows: int, shards: int) -> None:
    """Rows of four examples of random tokens, as compressible as numbers up to 150,000 are."""
    random = np.random.default_rng(0)
    mask = np.arange(length // 4) > length // 8

    def contents():
        for _ in range(rows):
            tokens = random.integers(0, 150_000, (4, length // 4), np.int32)
            yield packed_row([TokenizedExample(example, mask) for example in tokens])

    packing = Packing(length, 4 * rows, rows * length, 0.0, 0, 0, "", "")
    write_contents(uri, PACKED, contents(), {}, -(-rows // shards) * length * 4, packing=packing)


if __name__ == "__main__":
    main()
