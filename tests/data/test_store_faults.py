"""A store that misbehaves: what is read and written ends whole and identical, or in one clear line."""

import os
import socket
import time
from unittest import mock

import pytest
from bucket import running_bucket
from faulty_proxy import FAULTS, faulty

from psyche_jax.cli import main
from psyche_jax.data import store
from psyche_jax.data.dataset import copy_dataset, load_records, open_dataset, verify_dataset, write_dataset
from psyche_jax.data.records import Message, SftExample

RECORDS = [SftExample((Message("user", f"问{n}"), Message("assistant", f"答{n}" * 40))) for n in range(300)]


@pytest.fixture(scope="module")
def bucket():
    with running_bucket() as address:
        yield address


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(store, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(store, "_LONGEST_PAUSE", 0.1)


def test_a_third_of_all_answers_is_bad(bucket, tmp_path):
    """429, 503, resets, bodies cut short, delays: data sets are written, read, verified and copied all the same."""
    with faulty(0.3) as done:
        manifest = write_dataset(f"{bucket}/a", RECORDS, shard_bytes=2500)
        assert load_records(SftExample, f"{bucket}/a").good == tuple(RECORDS)
        copy_dataset(f"{bucket}/a", f"{bucket}/b")
        assert verify_dataset(f"{bucket}/b") == (manifest, [])
    assert all(done[fault] > 0 for fault in FAULTS), done
    assert load_records(SftExample, f"{bucket}/b").good == tuple(RECORDS)
    assert write_dataset(str(tmp_path / "local"), RECORDS, shard_bytes=2500).shards == manifest.shards


def test_reading_at_random_through_faults(bucket):
    """ArrayRecord's own client of buckets tries again, too."""
    write_dataset(f"{bucket}/random", RECORDS[:40], shard_bytes=2500)
    expected = list(open_dataset(f"{bucket}/random"))
    with faulty(0.15, seed=1) as done:
        dataset = open_dataset(f"{bucket}/random")
        assert [dataset[index] for index in range(40)] == expected
    assert sum(done[fault] for fault in FAULTS) > 0


@pytest.mark.parametrize("kind", ["silent", "closed"])
def test_a_dead_server_ends_in_one_line(kind, bucket, capsys):
    """One that accepts and never answers; one that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as dead:
        port = dead.getsockname()[1]
        if kind == "closed":
            dead.close()
        started = time.monotonic()
        with mock.patch.dict(os.environ, {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}):
            assert main(["data", "verify", f"{bucket}/a", "--deadline", "3"]) == 1
    error = capsys.readouterr().err
    assert f"{bucket}/a/manifest.json: gave up after 3 s of trying" in error
    assert error.count("\n") == 1
    assert time.monotonic() - started < 120  # a busy machine is no failure; without an end it would be 300


def test_what_is_not_tried_again(bucket, capsys):
    """A refusal is said at once."""
    with faulty(0) as done:
        assert main(["data", "ls", "gs://none/x"]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert done["none"] <= 2  # not until the deadline
