"""Who writes to a run's folder: one process at a time, and the next one at once, or soon, after it is gone.

On a disk the lock is the kernel's (flock), which the death of its holder opens. In a bucket it is an object that its
holder writes anew every few seconds, each time on the condition that nobody else has. Another process takes it over
where it sees that the holder's process is dead, or where the object has not changed while it watched for a minute and a
half by its own clock. No times of two machines are ever compared, so clocks that are wrong or are set harm nobody; and
a holder that was thought dead finds out before it next writes a checkpoint.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from google.api_core.exceptions import NotFound, PreconditionFailed

from psyche_jax.errors import UserError
from psyche_jax.storage import buckets
from psyche_jax.storage.files import LOCK_FILE, bucket_and_prefix, in_bucket, parsed_json

BEAT_SECONDS = 15.0  # between two writings of the object
STALE_SECONDS = 90.0  # without a change after which nobody is thought to hold it
Result = TypeVar("Result")


class LostLockError(UserError):
    """Another process has taken the run's folder over."""


class Lock(Protocol):
    """A lock that is held."""

    def confirm(self) -> None:
        """Make sure that it still is.

        Raises:
          LostLockError: it is not.
        """


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Lock]:
    """Hold the lock of `folder`, which exists if it is on a disk, within the block.

    Raises:
      UserError: another process holds it.
    """
    lock: _BucketLock | _FolderLock = _BucketLock(folder) if in_bucket(folder) else _FolderLock(folder)
    lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


def _held(folder: Path, holder: dict[str, Any]) -> UserError:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')}"
    return UserError(
        f"{folder}: another run is writing there ({who}); wait until it ends, stop it, or choose another run.dir"
    )


def _self() -> dict[str, Any]:
    """This process, for others to recognize."""
    return {
        "owner": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "place": _place(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _place() -> str | None:
    """Where the numbers of processes mean what they mean here: this start of the machine, this namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not on Linux
        return None


def _started(pid: int) -> str | None:
    """When a process was started, in ticks of this machine; None if it is gone."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else words[19]


def _is_dead(holder: dict[str, Any]) -> bool:
    """Return whether it is certain that the holder is gone: it ran here, and does not any more."""
    here = _place()
    return here is not None and holder.get("place") == here and _started(holder["pid"]) != holder["started"]


def is_left_behind(folder: Path) -> bool:
    """Whether the lock of a folder on this machine is there, and the process that held it is not."""
    path = folder / LOCK_FILE
    return not in_bucket(folder) and path.is_file() and _is_dead(_parsed(path.read_bytes()))


class _FolderLock:
    """The kernel's lock on a file that says who holds it; that of `filelock` would stay in the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: int | None = None

    def acquire(self) -> None:
        path = self._folder / LOCK_FILE
        while True:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                content = os.read(self._file, 2**16)
                os.close(self._file)
                raise _held(self._folder, _parsed(content)) from None
            except OSError as error:
                print(f"{path}: this disk has no locks ({error.strerror}); start no second run here", file=sys.stderr)
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(self._file).st_ino == path.stat().st_ino:
                    break
            os.close(self._file)  # its holder removed it just now
        os.ftruncate(self._file, 0)
        os.write(self._file, json.dumps(_self()).encode())

    def confirm(self) -> None:
        """The kernel keeps it."""

    def release(self) -> None:
        assert self._file is not None
        (self._folder / LOCK_FILE).unlink(missing_ok=True)
        os.close(self._file)


class _BucketLock:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        bucket, prefix = bucket_and_prefix(folder)
        self._bucket = self._tried(lambda _: buckets.client().bucket(bucket))
        self._name = f"{prefix}/{LOCK_FILE}".removeprefix("/")  # of a whole bucket there is no prefix
        self._self = _self()
        self._generation = 0
        self._beats = 0
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="run lock", daemon=True)

    def acquire(self) -> None:
        said = False
        while True:
            found = self._read()
            if found is not None and not _is_dead(found[1]):
                if not said:
                    print(
                        f"{self._folder}: is locked; watching for up to {STALE_SECONDS:.0f} s whether process "
                        f"{found[1].get('pid')} on {found[1].get('host')} still writes there",
                        file=sys.stderr,
                        flush=True,
                    )
                    said = True
                self._watch(*found)
            self._generation = 0 if found is None else found[0]
            if self._write():
                break
        self._thread.start()

    def _watch(self, generation: int, holder: dict[str, Any]) -> None:
        """Return if the lock does not change for long enough, or is gone.

        Raises:
          UserError: it does change.
        """
        end = time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(min(1.0, STALE_SECONDS / 10))
            found = self._read()
            if found is None:
                return
            if found[0] != generation:
                raise _held(self._folder, found[1])

    def confirm(self) -> None:
        if not self._write():
            raise LostLockError(
                f"{self._folder}: another process took this run over, because this one was silent for too long; "
                "stopping"
            )

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(UserError):  # what cannot be removed is found stale
            self._tried(lambda once: self._blob().delete(if_generation_match=self._generation, **once))

    def _beat_on(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                if not self._write():
                    return  # `confirm` says so
            except UserError:
                continue  # perhaps the next one gets through

    def _blob(self) -> Any:
        return self._bucket.blob(self._name)

    def _read(self) -> tuple[int, dict[str, Any]] | None:
        """Generation and content of the object, if there is one."""
        return self._tried(self._read_once)

    def _read_once(self, once: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        blob = self._blob()
        try:
            content = blob.download_as_bytes(**once)
        except NotFound:
            return None
        return int(blob.generation), _parsed(content)

    def _write(self) -> bool:
        """Replace the object if it is of the known generation (0: if there is none). Returns whether it was."""
        with self._writing:
            self._beats += 1
            content = {**self._self, "beat": self._beats}

            def write(once: dict[str, Any]) -> int | None:
                blob = self._blob()
                try:
                    blob.upload_from_string(json.dumps(content), if_generation_match=self._generation, **once)
                except PreconditionFailed:
                    found = self._read_once(once)
                    # Perhaps it was a write of ours whose answer was lost.
                    return found[0] if found is not None and found[1] == content else None
                return int(blob.generation)

            generation = self._tried(write)
            self._generation = self._generation if generation is None else generation
            return generation is not None

    def _tried(self, operation: Callable[[dict[str, Any]], Result]) -> Result:
        return buckets.tried(str(self._folder), buckets.LOCK_SECONDS, operation)


def _parsed(content: bytes) -> dict[str, Any]:
    found = parsed_json(content.decode("utf-8", "replace"))
    return found if isinstance(found, dict) else {}  # else its holder is just writing it
