"""A store that misbehaves: what is read and written ends whole and identical, or in one clear line."""

import os
import socket
import time
from unittest import mock

import pytest
from support.faulty_proxy import FAULTS, FLIPPED, faulty, refusing

from psyche_jax.cli import main
from psyche_jax.data.dataset import copy_dataset, load_records, open_dataset, verify_dataset, write_dataset
from psyche_jax.data.records import Message, SftExample
from psyche_jax.errors import UserError
from psyche_jax.storage import buckets

RECORDS = [SftExample((Message("user", f"问{n}"), Message("assistant", f"答{n}" * 40))) for n in range(300)]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(buckets, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(buckets, "LONGEST_PAUSE", 0.1)


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
    assert done["none"] < 10  # not until the deadline; a thread of an earlier test may be asking for something, too


def test_a_bit_flipped_on_the_way_is_found(bucket):
    """What is read whole is asked for again; a record read at random is as it was written, or its shard is named."""
    write_dataset(f"{bucket}/flipped", RECORDS[:40], shard_bytes=2500)
    expected = list(open_dataset(f"{bucket}/flipped"))
    with faulty(0.3, faults=(FLIPPED,)) as done:
        assert load_records(SftExample, f"{bucket}/flipped").good == tuple(RECORDS[:40])
    assert done[FLIPPED] > 0
    dataset = open_dataset(f"{bucket}/flipped")
    with faulty(0.3, faults=(FLIPPED,)) as done:
        for index in range(40):
            try:
                assert dataset[index] == expected[index]
            except UserError as error:
                assert ".array_record: the shard is broken" in str(error)
    assert done[FLIPPED] > 0


@pytest.mark.parametrize("status", [401, 403])
def test_no_permission(status, bucket, tmp_path, capsys):
    """At once and in one line, whatever is wanted of the bucket."""
    write_dataset(str(tmp_path / "local"), RECORDS[:3])
    (tmp_path / "import.yaml").write_text("record: Dialogue\ncolumns: {user: u, assistant: a}\n")
    (tmp_path / "row.jsonl").write_text('{"u": "问", "a": "答"}\n')
    place = f"{bucket}/a"
    commands = [
        ["data", "ls", place],
        ["data", "verify", place],
        ["data", "cat", place],
        ["data", "copy", place, str(tmp_path / "new")],
        ["data", "copy", str(tmp_path / "local"), place],
        ["data", "import", str(tmp_path / "row.jsonl"), place, "--config", str(tmp_path / "import.yaml")],
        ["decontaminate", "--train", place, "--eval", place, "--out", str(tmp_path / "new")],
        ["eval", "http://127.0.0.1:9/v1#m", "--bench", place],
        ["report", place],
    ]
    with refusing(status) as asked:
        for command in commands:
            assert main(command) == 1, command
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert place in error
            reasons = ("no permission (", "the bucket cannot be used (", "there are no credentials (Anonymous")
            assert any(reason in error for reason in reasons), error
    assert max(asked.values()) <= len(commands) * 2  # nothing is tried again
    assert not (tmp_path / "new").exists()


def test_no_permission_for_a_shard(bucket):
    """The manifest may be read, and what it names may not."""
    manifest = write_dataset(f"{bucket}/shut", RECORDS[:40], shard_bytes=2500)
    name = manifest.shards[1].name
    with refusing(403, f"shut/{name}"):
        dataset = open_dataset(f"{bucket}/shut")
        with pytest.raises(UserError, match=f"{name}: no permission"):
            list(dataset)
        with pytest.raises(UserError, match=f"{name}: cannot be read; do you"):
            dataset.read(range(40))


def test_no_credentials(tmp_path, monkeypatch, capsys):
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # this machine may be one of Google's
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["data", "verify", "gs://bucket/a"]) == 1
    error = capsys.readouterr().err
    assert "gs://bucket/a/manifest.json: there are no credentials" in error
    assert "gcloud auth application-default login" in error
    assert error.count("\n") == 1
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "absent.json"))
    assert main(["data", "verify", "gs://bucket/a"]) == 1
    assert "absent.json was not found" in capsys.readouterr().err


def test_no_bucket_and_nothing_in_it(bucket, tmp_path, capsys):
    write_dataset(str(tmp_path / "local"), RECORDS[:3])
    cases = {
        ("data", "copy", str(tmp_path / "local"), "gs://none/a"): "gs://none/a",
        ("decontaminate", "--train", "gs://none/a", "--eval", "x", "--out", "y"): "does not exist",
        ("report", "gs://none/a"): "gs://none/a: is not a run",
        ("report", f"{bucket}/empty"): "empty: is not a run",
        ("data", "ls", f"{bucket}/empty"): "empty: there is no data set here",
        ("decontaminate", "--train", f"{bucket}/empty", "--eval", "x", "--out", "y"): "nothing is there",
    }
    for command, message in cases.items():
        assert main([*command]) == 1, command
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
