"""Data sets: a folder, local or in a bucket, of ArrayRecord shards and a manifest that is written last.

A folder without a manifest does not count, so a data set is whole or absent. Shards are named by number and CRC32C: the
same records make the same files, and what a killed writer left behind never gets in the way of the next one.
"""

import contextlib
import functools
import json
import resource
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np

import psyche_jax
from psyche_jax.data.records import (
    BaseRecord,
    Dialogue,
    Question,
    Record,
    Records,
    RlPrompt,
    SftExample,
    Strict,
    collected,
    fault_of,
    from_json,
    record_to_json,
)
from psyche_jax.errors import UserError, first_reason
from psyche_jax.storage.files import in_bucket, parsed_json, read_jsonl
from psyche_jax.storage.store import Store, crc32c_of, open_store, seal

FORMAT = 1
MANIFEST = "manifest.json"
# Before compression; JSON and tokens shrink to a third or so, and files of 64 to 256 MiB suit buckets.
SHARD_BYTES = 2**28
_RECORDS_AT_ONCE = 32  # a bucket takes tens of milliseconds to answer, whatever is asked
_OPEN_SHARDS = 1024  # about a fifth of a MiB each, and three file handles or, read by several threads at once, more
_OPTIONS = "group_size:1,zstd:3"  # a record can be read alone


@dataclass(frozen=True)
class Shard(Strict):
    """One file of a data set."""

    name: str
    records: int
    bytes: int
    crc32c: int


@dataclass(frozen=True)
class Packing(Strict):
    """How tokenized examples were packed into rows of `length` tokens (`packing.pack`)."""

    length: int
    examples: int
    tokens: int
    padding_share: float
    set_aside: int
    cut: int
    tokenizer_sha256: str
    template_sha256: str


@dataclass(frozen=True)
class Manifest(Strict):
    """What a data set holds: `kind` names the schema of its records, `config` is how it was made."""

    kind: str
    records: int
    shards: tuple[Shard, ...]
    code_version: str = psyche_jax.__version__
    config: dict[str, Any] = field(default_factory=dict)
    packing: Packing | None = None
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.records != sum(shard.records for shard in self.shards):
            raise ValueError("its shards hold a different number of records")

    def __str__(self) -> str:
        size = sum(shard.bytes for shard in self.shards) / 2**20
        packed, shards = "", "shard" if len(self.shards) == 1 else "shards"
        if (packing := self.packing) is not None:
            packed = (
                f": {packing.examples} examples, {packing.tokens} tokens in rows of {packing.length}, "
                f"{packing.padding_share:.2%} padding"
            )
        return f"{self.records} records of {self.kind} in {len(self.shards)} {shards}, {size:.1f} MiB{packed}"


class Dataset:
    """A data set opened for reading; `dataset[i]` is the content of record i, as bytes. Made by `open_dataset`."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store = store
        self.manifest = manifest
        self._starts = np.cumsum([0, *(shard.records for shard in manifest.shards)])
        file_handles, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._reader = functools.lru_cache(min(_OPEN_SHARDS, max(1, file_handles // 16)))(self._open_shard)

    def __len__(self) -> int:
        return self.manifest.records

    def __getitem__(self, index: int) -> bytes:
        return self.read([index])[0]

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """Several records, in the order asked for, read at once.

        Raises:
          UserError: a shard is missing, broken or not the one that the manifest names.
        """
        places = np.asarray(indices, np.int64)
        shards = np.searchsorted(self._starts, places, side="right") - 1
        positions = places - self._starts[shards]
        return list(self._threads.imap(self._read, zip(shards.tolist(), positions.tolist(), strict=True)))

    @functools.cached_property
    def _threads(self) -> ThreadPool:
        """Daemons: where a bucket dies, ArrayRecord may wait for ever, and the end of the process must not."""
        threads = ThreadPool(_RECORDS_AT_ONCE)
        weakref.finalize(self, threads.terminate)
        return threads

    def __iter__(self) -> Iterator[bytes]:
        """All records in order, each shard checked against its CRC32C before any of its records is given."""
        for shard in self.manifest.shards:
            with self.store.local(shard.name) as path:
                _check(self.store, shard, crc32c_of(path), path.stat().st_size)
                reader = _open_reader(str(path), self.store.path(shard.name))
                for start in range(0, shard.records, 256):
                    yield from reader.read(start, min(start + 256, shard.records))
                reader.close()

    def _open_shard(self, number: int) -> Any:
        shard = self.manifest.shards[number]
        path = self.store.path(shard.name)
        reader = _open_reader(path, path)
        found = reader.num_records()
        if not found and in_bucket(path):  # what ArrayRecord makes of a refusal
            raise UserError(f"{path}: cannot be read; do you have permission (storage.objects.get)?")
        if found != shard.records:
            raise _damaged(path, f"only {found} records can be read, but the manifest says {shard.records}")
        return reader

    def _read(self, place: tuple[int, int]) -> bytes:
        """The record at a position of a shard. One by one: several would take as many threads and connections."""
        number, position = place
        try:
            return self._reader(number).read([position])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise _damaged(self.store.path(self.manifest.shards[number].name), first_reason(error)) from None


def write_dataset(
    uri: str, records: Iterable[BaseRecord], config: Mapping[str, Any] | None = None, shard_bytes: int = SHARD_BYTES
) -> Manifest:
    """Write records of one kind as a new data set.

    Args:
      uri: a local folder or gs://bucket/prefix.
      records: all of the same class, at least one.
      config: how they were made; stored in the manifest.
      shard_bytes: content of a shard, before compression.

    Raises:
      UserError: there is a data set already, there are no records, or the store cannot be written to.
    """
    several = iter(records)
    first = next(several, None)
    if first is None:
        raise UserError(f"{uri}: there are no records to write")

    def contents() -> Iterator[bytes]:
        for record in chain([first], several):
            if type(record) is not type(first):
                raise TypeError(f"{uri}: a {type(first).__name__} and a {type(record).__name__} in one data set")
            yield json.dumps(record_to_json(record), ensure_ascii=False).encode()

    return write_contents(uri, type(first).__name__, contents(), config or {}, shard_bytes)


def write_contents(
    uri: str,
    kind: str,
    contents: Iterable[bytes],
    config: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    packing: Packing | None = None,
) -> Manifest:
    """As `write_dataset`, with the records' contents and the name of their schema."""
    store = _new_place(uri)
    shards = _write_shards(store, iter(contents), shard_bytes)
    records = sum(shard.records for shard in shards)
    manifest = Manifest(kind, records, shards, config=dict(config), packing=packing)
    write_manifest(store, manifest)
    return manifest


def write_manifest(store: Store, manifest: Manifest) -> None:
    """Make the shards that are there a data set."""
    values = record_to_json(manifest)
    sealed = {**values, "crc32c": seal(values)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MANIFEST
        path.write_text(json.dumps(sealed, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        store.upload(path, MANIFEST)


def open_dataset(uri: str) -> Dataset:
    """Open a data set: its manifest is read, and its files' names and sizes (in a bucket CRC32Cs) are compared.

    Raises:
      UserError: there is no whole data set, it was changed, or a newer version wrote it.
    """
    store = open_store(uri)
    manifest = _read_manifest(store)
    there = {stored.name: stored for stored in store.objects()}
    for shard in manifest.shards:
        if shard.name not in there:
            raise _broken(store.path(shard.name), "it is missing")
        stored = there[shard.name]
        _check(store, shard, shard.crc32c if stored.crc32c is None else stored.crc32c, stored.bytes)
    return Dataset(store, manifest)


def is_dataset(uri: str) -> bool:
    """Return whether `uri` is to be read as a data set: a folder, or anything in a bucket."""
    return in_bucket(uri) or Path(uri).is_dir()


def check_readable(location: str) -> None:
    """Raise UserError unless there is a data set or a file at `location`; in a bucket only who reads it asks."""
    if in_bucket(location):
        return
    if is_dataset(location):
        open_dataset(location)
    else:
        next(read_jsonl(Path(location)), None)


def read_values(kind: type[BaseRecord], location: str) -> Iterator[tuple[str, Any]]:
    """The values of a JSONL file or of a data set, as `read_jsonl` gives them.

    Raises:
      UserError: it cannot be read, or holds records of another kind.
    """
    if not is_dataset(location):
        yield from read_jsonl(Path(location))
        return
    dataset = open_dataset(location)
    if dataset.manifest.kind != kind.__name__:
        raise UserError(f"{location}: holds records of {dataset.manifest.kind}, not of {kind.__name__}")
    for number, content in enumerate(dataset):
        yield f"{location}: record {number}", parsed_json(content.decode("utf-8", "surrogateescape"))


def load_records(kind: type[Record], location: str | Path) -> Records[Record]:
    """Records of a JSONL file or of a data set, with a line for each bad one.

    Raises:
      UserError: nothing usable is there, or a data set holds records of another kind.
    """
    return collected(kind, str(location), read_values(kind, str(location)))


KINDS: dict[str, type[BaseRecord]] = {kind.__name__: kind for kind in (Question, SftExample, RlPrompt, Dialogue)}


def kind_at(location: str) -> str:
    """The name of the records' class: as a data set says, else as the first object of a JSONL file looks.

    What is wrong with a file is found on reading it.
    """
    if is_dataset(location):
        return open_dataset(location).manifest.kind
    with contextlib.suppress(UserError):
        first = next((value for _, value in read_jsonl(Path(location)) if isinstance(value, dict)), {})
        if "messages" in first:
            return RlPrompt.__name__ if "answer" in first else SftExample.__name__
        if "turns" in first:
            return Dialogue.__name__
    return Question.__name__


def load_any_records(location: str) -> Records[Any]:
    """Records of whatever kind is at a location.

    Raises:
      UserError: nothing usable is there, or no text: packed tokens, say.
    """
    kind = kind_at(location)
    if kind not in KINDS:
        raise UserError(f"{location}: holds records of {kind}, which cannot be compared as text")
    return load_records(KINDS[kind], location)


def verify_dataset(uri: str) -> tuple[Manifest, list[str]]:
    """Read every byte of a data set.

    Returns:
      Its manifest, and the names of files that it does not list (a killed writer leaves such).

    Raises:
      UserError: the first file that is not as it was written.
    """
    dataset = open_dataset(uri)
    if sum(1 for _ in dataset) != len(dataset):
        raise UserError(f"{uri}: holds a different number of records than its manifest says")
    listed = {MANIFEST, *(shard.name for shard in dataset.manifest.shards)}
    return dataset.manifest, [stored.name for stored in dataset.store.objects() if stored.name not in listed]


def first_records(uri: str, limit: int | None = None) -> Iterator[str]:
    """The records of a data set as JSON, all or the first `limit`.

    Raises:
      UserError: the data set is broken, or its records are packed.
    """
    dataset = open_dataset(uri)
    contents = iter(dataset) if limit is None else (dataset[index] for index in range(min(limit, len(dataset))))
    if dataset.manifest.packing is not None:
        raise UserError(f"{uri}: holds packed tokens, not text; look at the data that was packed")
    for content in contents:
        yield content.decode("utf-8")


def copy_dataset(source: str, target: str) -> Manifest:
    """Copy a data set, its manifest last; every file's CRC32C is checked on the way.

    Raises:
      UserError: `source` is broken, `target` is taken, or a store cannot be used.
    """
    dataset = open_dataset(source)
    store = _new_place(target)
    for shard in dataset.manifest.shards:
        with dataset.store.local(shard.name) as path:
            _check(dataset.store, shard, crc32c_of(path), path.stat().st_size)
            store.upload(path, shard.name)
    write_manifest(store, dataset.manifest)
    return dataset.manifest


def find_datasets(uri: str) -> list[tuple[str, Manifest]]:
    """The data sets at or under `uri`, by address.

    Raises:
      UserError: there is none.
    """
    store = open_store(uri)
    names = [stored.name for stored in store.objects() if stored.name.rpartition("/")[2] == MANIFEST]
    if not names:
        why = f"no {MANIFEST}" if in_bucket(uri) or Path(uri).exists() else "no such folder"
        raise UserError(f"{uri}: there is no data set here ({why})")
    folders = [store.path(name).removesuffix(MANIFEST).rstrip("/") for name in names]
    return [(folder, _read_manifest(open_store(folder))) for folder in folders]


def _new_place(uri: str) -> Store:
    store = open_store(uri)
    if store.read(MANIFEST) is not None:
        raise UserError(f"{uri}: already holds a data set; choose another place or remove it first")
    return store


def _write_shards(store: Store, contents: Iterator[bytes], shard_bytes: int) -> tuple[Shard, ...]:
    shards: list[Shard] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard"
        while records := _write_shard(path, contents, shard_bytes):
            number = crc32c_of(path)
            stored = store.upload(path, f"{len(shards):05}-{number:08x}.array_record")
            shards.append(Shard(stored.name, records, stored.bytes, number))
    return tuple(shards)


def _write_shard(path: Path, contents: Iterator[bytes], shard_bytes: int) -> int:
    """Write records until the shard is full or there are none left; return how many it holds."""
    from array_record.python.array_record_module import ArrayRecordWriter

    records = filled = 0
    with contextlib.closing(ArrayRecordWriter(str(path), _OPTIONS)) as writer:
        for content in contents:
            writer.write(content)
            records += 1
            filled += len(content)
            if filled >= shard_bytes:
                break
    return records


def _read_manifest(store: Store) -> Manifest:
    where = store.path(MANIFEST)
    content = store.read(MANIFEST)
    if content is None:
        if not in_bucket(store.address) and Path(store.address).is_file():
            raise UserError(f"{store.address}: is a file, not a data set; convert it with `psyche data import`")
        stored = [one.name for one in store.objects()]
        within = sorted(name.removesuffix(f"/{MANIFEST}") for name in stored if name.endswith(f"/{MANIFEST}"))
        what = f"{len(stored)} files but no {MANIFEST}: writing it was interrupted" if stored else "nothing is there"
        what = f"it holds several: {', '.join(store.path(name) for name in within)}" if within else what
        raise UserError(f"{store.address}: is not a data set ({what})")
    try:
        values = json.loads(content)
        checksum = values.pop("crc32c")
        if isinstance(version := values.get("format"), int) and version > FORMAT:
            raise UserError(f"{where}: was written by a newer version of psyche_jax (format {version}); upgrade it")
        if checksum != seal(values):
            raise ValueError("its CRC32C does not match: it was changed")
        return from_json(Manifest, values)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: the manifest is broken ({fault_of(error)})") from None


def _check(store: Store, shard: Shard, crc32c: int, size: int) -> None:
    if (crc32c, size) != (shard.crc32c, shard.bytes):
        raise _broken(store.path(shard.name), "it is not the file that the manifest names (size or CRC32C differs)")


def _open_reader(path: str, name: str) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        return ArrayRecordReader(path)
    except (RuntimeError, ValueError, OSError) as error:
        raise _damaged(name, first_reason(error)) from None


def _damaged(path: str, why: str) -> UserError:
    """Of what is found on reading at random; to read all tells which shards are not as they were written."""
    return UserError(f"{path}: the shard is broken, damaged: {why}; `psyche data verify` says where")


def _broken(path: str, why: str) -> UserError:
    return UserError(f"{path}: the shard is broken: {why}; make the data set again or copy it anew")
