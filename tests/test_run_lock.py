"""One run, one writer: who is refused, who gets in after whom, and what clocks have to do with it (nothing)."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest

from psyche_jax.errors import UserError
from psyche_jax.storage import buckets, locks
from psyche_jax.storage.files import LOCK_FILE, as_path
from psyche_jax.storage.locks import LostLockError, locked

HOLDER = """
import sys, time
from pathlib import Path
from psyche_jax.storage.files import as_path
from psyche_jax.storage import locks
locks.BEAT_SECONDS = 0.1
with locks.locked(as_path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(locks, "STALE_SECONDS", 1.5)


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path, bucket):
    return tmp_path if request.param == "disk" else as_path(f"{bucket}/{tmp_path.name}")


def test_the_second_is_refused_and_the_next_gets_in(place):
    with locked(place) as lock:
        for _ in range(2):
            with pytest.raises(UserError, match="another run is writing there") as error, locked(place):
                raise AssertionError("let in")
            text = str(error.value)
            assert "\n" not in text
            assert text.startswith(f"{place}: ") and "process " in text and "choose another run.dir" in text
        lock.confirm()
    assert not (place / LOCK_FILE).exists()
    with locked(place) as lock:
        lock.confirm()


def test_who_was_killed_is_no_hindrance(place):
    """On the same machine nobody waits: the kernel, or the list of processes, says that the holder is gone."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(place)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "holds\n"
    with pytest.raises(UserError, match=f"process {process.pid} on "), locked(place):
        raise AssertionError("let in")
    process.kill()
    process.wait()
    assert (place / LOCK_FILE).exists()
    with mock.patch.object(locks._BucketLock, "_watch", side_effect=AssertionError("waited")), locked(place):
        assert (place / LOCK_FILE).exists()


def left_by_another_machine(place: Path) -> None:
    (place / LOCK_FILE).write_text(
        json.dumps({"owner": "x", "host": "gone", "pid": 1, "place": "elsewhere", "started": "1"})
    )


def test_a_bucket_locked_by_a_machine_that_is_gone(bucket, capsys):
    place = as_path(f"{bucket}/gone")
    left_by_another_machine(place)
    with locked(place) as lock:
        lock.confirm()
    assert "watching for up to 2 s whether process 1 on gone" in capsys.readouterr().err


def test_the_lock_of_a_whole_bucket_is_where_its_files_are(monkeypatch):
    """To Google "/lock.json" is another object, in a folder without a name (to the server of these tests it is not)."""
    asked = mock.Mock(side_effect=UserError("asked"))
    bucket = mock.Mock(blob=asked)
    monkeypatch.setattr(buckets, "client", lambda: mock.Mock(bucket=lambda _: bucket))
    with pytest.raises(UserError, match="asked"), locked(as_path("gs://whole")):
        raise AssertionError("let in")
    asked.assert_called_once_with(LOCK_FILE)


def test_of_two_that_find_a_lock_stale_one_gets_in(bucket):
    place = as_path(f"{bucket}/two")
    left_by_another_machine(place)
    inside, refused, done = [], [], threading.Event()

    def enter() -> None:
        try:
            with locked(place):
                inside.append(1)
                done.wait(60)
        except UserError as error:
            refused.append(str(error))
            done.set()

    threads = [threading.Thread(target=enter) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(inside), len(refused)) == (1, 1)


def test_a_holder_that_was_silent_for_too_long_finds_out(bucket):
    place = as_path(f"{bucket}/silent")
    with (
        mock.patch.object(locks, "_is_dead", return_value=False),
        locked(place) as old,
    ):
        old._ended.set()  # as if its process were stopped: no heartbeat any more
        old._thread.join()
        with locked(place) as new:
            with pytest.raises(LostLockError, match="took this run over"):
                old.confirm()
            new.confirm()
            with pytest.raises(LostLockError):
                old.confirm()
        assert not (place / LOCK_FILE).exists()


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_clocks_that_are_set_open_no_lock(jump, place):
    with locked(place) as lock, mock.patch.object(time, "time", lambda now=time.time: now() + jump):
        with pytest.raises(UserError, match="another run"), locked(place):
            raise AssertionError("let in")
        lock.confirm()


def test_an_answer_that_was_lost_is_no_lost_lock(bucket):
    """The object was written, and the retry of that request finds it changed: by ourselves."""
    from google.api_core.exceptions import PreconditionFailed
    from google.cloud.storage import Blob

    upload = Blob.upload_from_string
    with locked(as_path(f"{bucket}/answer")) as lock:

        def twice(self, *arguments, **options):
            upload(self, *arguments, **options)
            raise PreconditionFailed("the second time")

        with mock.patch.object(Blob, "upload_from_string", twice):
            lock.confirm()
        lock.confirm()


def test_a_bucket_that_cannot_be_used_is_one_line(bucket):
    with (
        pytest.raises(UserError, match=r"gs://none/run: the bucket .*does not exist") as error,
        locked(as_path("gs://none/run")),
    ):
        raise AssertionError("let in")
    assert "\n" not in str(error.value)
