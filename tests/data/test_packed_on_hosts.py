"""Packed rows read by several real processes, each its own: together they are the batches of one process."""

import os
import socket
import subprocess
import sys
from functools import partial

import numpy as np
from support.bucket import running_bucket

from psyche_jax.data.chat import TokenizedExample
from psyche_jax.data.dataset import Packing, open_dataset, write_contents
from psyche_jax.data.packing import PACKED, packed_row, unpacked_rows
from psyche_jax.data.streams import batches

LENGTH, ROWS, BATCH = 24, 21, 8
READ = """
import sys
from functools import partial

import numpy as np
from jax.experimental import multihost_utils

from psyche_jax.train import hosts
from psyche_jax.config import DistributedSection
from psyche_jax.data.dataset import open_dataset
from psyche_jax.data.packing import unpacked_rows
from psyche_jax.data.streams import batches
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, make_mesh

uri, coordinator, processes, process, length, batch, first, last, out = sys.argv[1:]
hosts.initialize(
    DistributedSection(coordinator=coordinator, num_processes=int(processes), process_id=int(process))
)
place = Sharding(make_mesh(1, -1, 1), TRAIN_RULES).named("batch", "sequence")
rows = hosts.own_rows(place, int(batch))


class Noting:
    read_rows = 0

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def read(self, indices):
        Noting.read_rows += len(indices)
        return self.dataset.read(indices)


found = []
collate = partial(unpacked_rows, length=int(length))
steps = range(int(first), int(last))
for read in batches(Noting(open_dataset(uri)), int(batch), 5, collate, steps, rows=rows):
    placed = hosts.place(read, place, rows.start, int(batch))
    found.append({name: multihost_utils.process_allgather(array, tiled=True) for name, array in placed.items()})
assert Noting.read_rows == len(steps) * int(batch) // int(processes), Noting.read_rows
np.savez(f"{out}-{process}.npz", **{name: np.stack([one[name] for one in found]) for name in found[0]})
"""


def write(uri: str) -> None:
    """Rows of two examples, each with other tokens."""
    rows = [
        packed_row(
            [
                TokenizedExample(np.arange(size, dtype=np.int32) + 100 * n, np.arange(size) > 2)
                for size in (5 + n % 9, 3 + n % 4)
            ]
        )
        for n in range(ROWS)
    ]
    packing = Packing(LENGTH, 2 * ROWS, sum(map(len, rows)), 0.0, 0, 0, "", "")
    write_contents(uri, PACKED, rows, {}, shard_bytes=600, packing=packing)


def test_two_processes_read_what_one_reads(tmp_path):
    """Over three epochs, started in the middle of the first."""
    processes, first, last = 2, 1, 7
    with running_bucket() as bucket:
        write(f"{bucket}/packed")
        assert len(open_dataset(f"{bucket}/packed").manifest.shards) > 2
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // processes}"}
        started = []
        for process in range(processes):
            values = (f"{bucket}/packed", address, processes, process, LENGTH, BATCH, first, last, tmp_path / "read")
            command = [sys.executable, "-c", READ, *map(str, values)]
            started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        errors = [process.communicate(timeout=300)[1] for process in started]
        assert [process.returncode for process in started] == [0] * processes, "\n".join(errors)
        dataset = open_dataset(f"{bucket}/packed")
        alone = list(batches(dataset, BATCH, 5, partial(unpacked_rows, length=LENGTH), range(last)))[first:]
    for process in range(processes):
        together = np.load(tmp_path / f"read-{process}.npz")
        assert set(together) == set(alone[0])
        for name in together:
            assert np.array_equal(together[name], np.stack([batch[name] for batch in alone])), name
