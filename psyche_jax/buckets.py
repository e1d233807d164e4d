"""What is tried again with a bucket, for how long, and the settings of the libraries that ask it."""

import logging
import os
from functools import cache
from typing import Any

DEADLINE_SECONDS = 300.0  # of one object's reading or writing, with all that is tried again
ANSWER_SECONDS = 30.0  # how long a server may be silent
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 20.0  # seconds between two tries


def client() -> Any:
    """The client of buckets with the user's credentials. Without a project: objects need none, a user may have none."""
    from google.cloud import storage

    return storage.Client(project=None)


@cache
def prepare() -> None:
    """Make the libraries that Orbax reads and writes buckets with patient and quiet; once, before the first address.

    gcsfs is replaced by `bucket_files.BucketFiles`. TensorStore tries again by itself, 32 times within about a quarter
    of an hour, but by default waits for ever for a server that is silent.
    """
    import fsspec

    from psyche_jax.bucket_files import BucketFiles

    for protocol in ("gs", "gcs"):
        fsspec.register_implementation(protocol, BucketFiles, clobber=True)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of what it then raises
    os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", f"{ANSWER_SECONDS:.0f}")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", f"{ANSWER_SECONDS:.0f}")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")


def may_pass(error: BaseException) -> bool:
    """Whether trying again may help, of an error of google-cloud-storage."""
    from google.api_core import exceptions
    from google.auth.exceptions import TransportError
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
    from requests.exceptions import RequestException
    from urllib3.exceptions import HTTPError

    if isinstance(error, exceptions.GoogleAPICallError):
        return error.code in (408, 429) or (error.code is not None and error.code >= 500)
    if isinstance(error, InvalidResponse):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(
        error, RequestException | HTTPError | ConnectionError | TimeoutError | TransportError | DataCorruption
    )


def reason(error: BaseException) -> str:
    """What an error says, on one short line."""
    return " ".join((str(error) or type(error).__name__).split())[:200]
