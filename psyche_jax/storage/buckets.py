"""Buckets: what is tried again there and for how long, and small files read and written at once."""

import inspect
import io
import logging
import os
from functools import cache
from typing import Any

import aiohttp
import gcsfs
from fsspec import asyn
from gcsfs.retry import is_retriable
from google.api_core.exceptions import RetryError
from google.api_core.retry import AsyncRetry

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

    gcsfs is replaced by `BucketFiles`. TensorStore tries again by itself, 32 times within about a quarter
    of an hour, but by default waits for ever for a server that is silent.
    """
    import fsspec

    from psyche_jax.storage.buckets import BucketFiles

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


_ask_once = inspect.unwrap(gcsfs.GCSFileSystem._request)  # without gcsfs's own six tries


class BucketFiles(gcsfs.GCSFileSystem):
    """gcsfs whose requests are tried again until a deadline, and may all be repeated without harm.

    A file is written by one request when it is closed. By itself gcsfs opens an upload and finishes it; where the
    answer to the last request was lost, a server may know no such upload any more.
    """

    _dead = False  # the last request found the bucket so: the next one need not wait as long

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault(
            "requests_timeout", aiohttp.ClientTimeout(sock_connect=ANSWER_SECONDS, sock_read=ANSWER_SECONDS)
        )
        super().__init__(*args, **kwargs)

    async def _request(self, *args: Any, **kwargs: Any) -> Any:
        seconds = ANSWER_SECONDS if self._dead else DEADLINE_SECONDS
        again = AsyncRetry(is_retriable, initial=FIRST_PAUSE, maximum=LONGEST_PAUSE, timeout=seconds)
        try:
            answer = await again(_ask_once)(self, *args, **kwargs)
        except RetryError as error:
            self._dead = True
            why = reason(error.cause or error)
            raise OSError(f"gave up after {seconds:.0f} s of trying ({why})") from None
        self._dead = False
        return answer

    async def _rm(self, path: Any, **kwargs: Any) -> Any:
        try:
            return await super()._rm(path, **kwargs)
        except FileNotFoundError:  # perhaps removed by a request of ours whose answer was lost
            return []

    rm = asyn.sync_wrapper(_rm)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return _WholeFile(self, path) if mode == "wb" else super()._open(path, mode, **kwargs)


class _WholeFile(io.BytesIO):
    """A file that is written when it is closed."""

    def __init__(self, files: BucketFiles, path: str) -> None:
        super().__init__()
        self._files, self._path = files, path

    def close(self) -> None:
        if not self.closed:
            content = self.getvalue()
            super().close()
            self._files.pipe_file(self._path, content)
