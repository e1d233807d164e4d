"""Checkpoints in a bucket: damaged ones, and a server that misbehaves or is not there."""

import contextlib
import json
from unittest import mock

import aiohttp
import numpy as np
import pytest
from google.cloud import storage
from orbax.checkpoint._src.serialization import tensorstore_utils
from support.faulty_proxy import FAULTS, dying, faulty, silent
from support.training_fixtures import PROMPT, execution
from test_checkpoints import leaves, state_on

from psyche_jax.errors import UserError
from psyche_jax.storage import buckets
from psyche_jax.storage.files import as_path
from psyche_jax.train.checkpoints import Checkpoints, checkpoint_metadata


@pytest.fixture(scope="module")
def state(tiny_root, tiny_config):
    return state_on(tiny_root, tiny_config, execution(1))


@pytest.fixture(scope="module")
def metadata(tiny_config):
    return checkpoint_metadata(tiny_config, PROMPT, seed=5)


def write(place, state, metadata):
    with contextlib.closing(Checkpoints(as_path(place), keep=2)) as checkpoints:
        checkpoints.save(state, 4, metadata)


def restore(place, abstract, metadata):
    with contextlib.closing(Checkpoints(as_path(place), keep=2)) as checkpoints:
        return checkpoints.restore(abstract, metadata)


def test_a_flipped_bit_in_any_object_is_found_and_named(bucket, state, metadata):
    state, abstract = state
    write(f"{bucket}/flips", state, metadata)
    assert leaves(restore(f"{bucket}/flips", abstract, metadata)) == leaves(state)
    objects = {
        blob.name.removeprefix("flips/4/"): blob
        for blob in storage.Client().bucket(bucket.removeprefix("gs://")).list_blobs(prefix="flips/4/")
        if not blob.name.endswith("/")
    }
    known = json.loads(objects["checksums.json"].download_as_bytes())["files"]
    assert objects.keys() - known.keys() == {"checksums.json", "_CHECKPOINT_METADATA", "commit_success.txt"}
    random = np.random.default_rng(0)
    with contextlib.closing(Checkpoints(as_path(f"{bucket}/flips"), keep=2)) as checkpoints:
        for name in (*known, "checksums.json"):
            whole = objects[name].download_as_bytes()
            content = bytearray(whole)
            content[random.integers(len(content))] ^= 1 << int(random.integers(8))
            objects[name].upload_from_string(bytes(content))
            with pytest.raises(UserError, match=name.rpartition("/")[2]):
                checkpoints.restore(abstract, metadata)
            objects[name].upload_from_string(whole)
        largest = max(known, key=lambda name: known[name]["bytes"])
        objects[largest].delete()
        with pytest.raises(UserError, match=f"{largest} is missing"):
            checkpoints.restore(abstract, metadata)


@pytest.mark.slow
def test_a_third_of_all_answers_is_bad(bucket, state, metadata, monkeypatch):
    """429, 503, resets, bodies cut short, delays: what is written and restored is whole and the same all the same."""
    monkeypatch.setattr(buckets, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(buckets, "LONGEST_PAUSE", 0.1)
    state, abstract = state
    with faulty(0.3) as done:
        write(f"{bucket}/faults", state, metadata)
        assert leaves(restore(f"{bucket}/faults", abstract, metadata)) == leaves(state)
    assert all(done[fault] > 0 for fault in FAULTS), done
    assert leaves(restore(f"{bucket}/faults", abstract, metadata)) == leaves(state)


@pytest.fixture
def impatient(monkeypatch):
    """Short deadlines; TensorStore's can be set nowhere else."""
    monkeypatch.setattr(buckets, "DEADLINE_SECONDS", 1.0)
    monkeypatch.setattr(buckets, "ANSWER_SECONDS", 1.0)
    once = {"gcs_request_retries": {"max_retries": 1, "initial_delay": "10ms", "max_delay": "10ms"}}
    with mock.patch.dict(tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT, once):
        yield


@pytest.mark.parametrize("part", ["", "checksums.json", "manifest.ocdbt"])
def test_a_server_that_dies_while_it_is_read_from_ends_in_one_line(part, bucket, state, metadata, impatient):
    """Dead from the beginning, at the checksums, and at the arrays."""
    state, abstract = state
    write(f"{bucket}/read", state, metadata)
    with contextlib.closing(Checkpoints(as_path(f"{bucket}/read"), keep=2)) as checkpoints:
        with dying(part), pytest.raises(UserError, match=f"{bucket}/read/4") as error:
            checkpoints.restore(abstract, metadata)
        assert "\n" not in str(error.value)
        assert leaves(checkpoints.restore(abstract, metadata)) == leaves(state)


def test_a_server_that_dies_while_it_is_written_to_ends_in_one_line(bucket, state, metadata, impatient):
    """What it holds then is no checkpoint; the one before is."""
    state, abstract = state
    place = f"{bucket}/written"
    write(place, state, metadata)
    with contextlib.closing(Checkpoints(as_path(place), keep=2)) as checkpoints, dying("/6/parameters/ocdbt"):
        with pytest.raises(UserError, match=f"{place}/6: the checkpoint cannot be written") as error:
            checkpoints.save(state, 6, metadata)
            checkpoints.close()
        assert "\n" not in str(error.value)
    with contextlib.closing(Checkpoints(as_path(place), keep=2)) as checkpoints:
        assert checkpoints.latest == 4
        assert leaves(checkpoints.restore(abstract, metadata)) == leaves(state)


def test_a_silent_server_ends_in_one_line(bucket, monkeypatch):
    monkeypatch.setattr(buckets, "DEADLINE_SECONDS", 0.1)
    timeout = aiohttp.ClientTimeout(sock_read=0.2)
    files = buckets.BucketFiles(requests_timeout=timeout)
    files.pipe_file("bucket/file", b"content")
    assert files.cat_file("bucket/file") == b"content"
    with silent():
        files = buckets.BucketFiles(requests_timeout=timeout, skip_instance_cache=True)
        with pytest.raises(OSError, match="gave up after"):
            files.cat_file("bucket/file")


def test_what_is_gone_already_is_removed(bucket):
    """As after a request whose answer was lost."""
    path = as_path(f"{bucket}/gone")
    path.write_text("x")
    path.unlink()
    path.unlink()
    assert not path.exists()
