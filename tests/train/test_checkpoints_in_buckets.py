"""Checkpoints in a bucket: damaged ones."""

import contextlib
import json

import numpy as np
import pytest
from google.cloud import storage
from test_checkpoints import leaves, state_on
from training_fixtures import PROMPT, execution

from psyche_jax.errors import UserError
from psyche_jax.files import as_path
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
