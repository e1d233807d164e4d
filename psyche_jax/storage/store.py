"""Where data sets are kept: a local folder or one in a bucket (`gs://`), behind one interface.

Objects are written once, whole, with their CRC32C, and never changed.
"""

import base64
import contextlib
import functools
import json
import os
import shutil
import struct
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import google_crc32c
from google.api_core.exceptions import NotFound, PreconditionFailed

from psyche_jax.errors import UserError
from psyche_jax.storage import buckets
from psyche_jax.storage.files import bucket_and_prefix, in_bucket

Result = TypeVar("Result")
_BLOCK = 2**20


@dataclass(frozen=True)
class StoredObject:
    """One object of a store. `crc32c` is None where only reading the object could tell it."""

    name: str
    bytes: int
    crc32c: int | None = None


class Store(Protocol):
    """The objects under one address. Every method raises UserError, naming the object and the reason."""

    address: str

    def path(self, name: str) -> str:
        """The full address of an object, as ArrayRecord opens it."""

    def objects(self) -> list[StoredObject]:
        """All objects, by name."""

    def read(self, name: str) -> bytes | None:
        """The content of an object; None if there is none of that name."""

    def local(self, name: str) -> AbstractContextManager[Path]:
        """Within the block, a local file with the object's content: of a bucket a copy, compared with its CRC32C."""

    def upload(self, source: Path, name: str) -> StoredObject:
        """Write an object from a local file. An object of the same content may be there already.

        Raises:
          UserError: another object of that name is there, or the store cannot be written to.
        """

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""


def open_store(address: str) -> Store:
    """The store at a local path or a `gs://bucket/prefix`, which need not exist yet; nothing is asked of it here."""
    if in_bucket(address):
        return _Bucket(address)
    if "://" in address:
        raise UserError(f"{address}: must be a local folder or gs://bucket/prefix")
    return _Folder(address)


def crc32c_of(path: Path) -> int:
    """The CRC32C of a local file."""
    checksum = google_crc32c.Checksum()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum.update(block)
    return int.from_bytes(checksum.digest(), "big")


def seal(value: Any) -> int:
    """The CRC32C of a value that JSON can hold, for files that say their own."""
    return google_crc32c.value(json.dumps(value, ensure_ascii=False, sort_keys=True).encode())


class _Folder:
    def __init__(self, address: str) -> None:
        self.address = address
        self._folder = Path(address)

    def path(self, name: str) -> str:
        return str(self._folder / name)

    def objects(self) -> list[StoredObject]:
        files = [path for path in self._folder.rglob("*") if path.is_file() and not path.name.endswith(".partial")]
        return sorted(
            (StoredObject(path.relative_to(self._folder).as_posix(), path.stat().st_size) for path in files),
            key=lambda found: found.name,
        )

    def read(self, name: str) -> bytes | None:
        try:
            return (self._folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{self.path(name)}: cannot be read ({error.strerror})") from None

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        path = self._folder / name
        try:
            path.open("rb").close()
        except OSError as error:
            raise UserError(f"{path}: the data cannot be read ({error.strerror})") from None
        yield path

    def upload(self, source: Path, name: str) -> StoredObject:
        target = self._folder / name
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
        stored = StoredObject(name, source.stat().st_size, crc32c_of(source))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(source, partial)
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
                target.hardlink_to(partial)  # unlike a renaming, this fails if there is one
            finally:
                partial.unlink(missing_ok=True)
        except FileExistsError:
            if not target.is_file() or crc32c_of(target) != stored.crc32c:
                raise _taken(self.path(name)) from None
        except OSError as error:
            raise UserError(f"{self.path(name)}: cannot be written ({error.strerror})") from None
        return stored

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)


class _Bucket:
    def __init__(self, address: str) -> None:
        bucket, prefix = bucket_and_prefix(address)
        self.address = f"gs://{bucket}/{prefix}".rstrip("/")
        self._bucket_name, self._prefix = bucket, f"{prefix}/" if prefix else ""
        self._seconds = buckets.deadline_seconds()

    @functools.cached_property
    def _bucket(self) -> Any:
        return buckets.client().bucket(self._bucket_name)

    def path(self, name: str) -> str:
        return f"{self.address}/{name}"

    def objects(self) -> list[StoredObject]:
        def found(once: dict[str, Any]) -> list[StoredObject]:
            blobs = self._bucket.list_blobs(prefix=self._prefix, **once)
            return [
                StoredObject(blob.name.removeprefix(self._prefix), blob.size, _decoded(blob.crc32c)) for blob in blobs
            ]

        return sorted(buckets.tried(self.address, self._seconds, found), key=lambda stored: stored.name)

    def read(self, name: str) -> bytes | None:
        def content(once: dict[str, Any]) -> bytes | None:
            try:
                return self._blob(name).download_as_bytes(checksum="crc32c", **once)
            except NotFound:
                return None

        return self._tried(name, content)

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder, Path(name).name))
            self._tried(name, lambda once: self._blob(name).download_to_filename(path, checksum="crc32c", **once))
            yield Path(path)

    def upload(self, source: Path, name: str) -> StoredObject:
        stored = StoredObject(name, source.stat().st_size, crc32c_of(source))

        def write(once: dict[str, Any]) -> None:
            blob = self._blob(name)
            try:
                blob.upload_from_filename(str(source), if_generation_match=0, checksum="crc32c", **once)
            except PreconditionFailed:  # by someone else, or by a write of ours whose answer was lost
                blob.reload(**once)
                if (blob.size, _decoded(blob.crc32c)) != (stored.bytes, stored.crc32c):
                    raise _taken(self.path(name)) from None

        self._tried(name, write)
        return stored

    def remove(self, name: str) -> None:
        def delete(once: dict[str, Any]) -> None:
            with contextlib.suppress(NotFound):
                self._blob(name).delete(**once)

        self._tried(name, delete)

    def _blob(self, name: str) -> Any:
        return self._bucket.blob(self._prefix + name)

    def _tried(self, name: str, operation: Callable[[dict[str, Any]], Result]) -> Result:
        return buckets.tried(self.path(name), self._seconds, operation)


def _taken(where: str) -> UserError:
    return UserError(f"{where}: already exists with other content; is another run writing there? Choose another place")


def _decoded(crc32c: str) -> int:
    """A checksum as buckets write it."""
    return struct.unpack(">I", base64.b64decode(crc32c))[0]
