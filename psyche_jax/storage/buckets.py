"""Buckets of Google Cloud Storage: how often, how long and after which errors a request is tried again.

This is the one place for it, for data sets and files (`store.py`), the lock of a run (`locks.py`), checkpoints and the
small files of runs (`BucketFiles`, through fsspec). Only TensorStore, which writes the arrays of checkpoints, and
ArrayRecord, which reads single records, try again by rules of their own; `prepare` says what TensorStore is told.
"""

import inspect
import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, TypeVar

import aiohttp
import fsspec
import gcsfs
from fsspec import asyn
from gcsfs.retry import HttpError, is_retriable
from google.api_core import exceptions
from google.api_core.retry import AsyncRetry, Retry
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from requests.exceptions import RequestException
from urllib3.exceptions import HTTPError

from psyche_jax.errors import UserError

Result = TypeVar("Result")
FILE_ERRORS = (OSError, aiohttp.ClientError, HttpError, GoogleAuthError)  # that files in a bucket raise

DEADLINE_SECONDS = 300.0  # of one object's reading or writing, with all that is tried again
LOCK_SECONDS = 60.0  # the same for the lock of a run, which is thought stale after 90
SAVE_SECONDS = 1200  # of a checkpoint that is written in the background
ANSWER_SECONDS = 30.0  # how long a server may be silent
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 20.0  # seconds between two tries

_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


@contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Give up on an object after so many seconds, if not None, in the stores that are opened within the block."""
    token = _deadline.set(seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


def deadline_seconds() -> float:
    """Seconds after which to give up on an object here."""
    return _deadline.get() or DEADLINE_SECONDS


def client() -> storage.Client:
    """The client of buckets with the user's credentials. Without a project: objects need none, a user may have none."""
    return storage.Client(project=None)


def may_pass(error: BaseException) -> bool:
    """Return whether to try again: after "later" (408, 429, 5xx), answers cut short or damaged, broken connections."""
    if isinstance(error, exceptions.GoogleAPICallError):
        return error.code in (408, 429) or (error.code is not None and error.code >= 500)
    if isinstance(error, InvalidResponse):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(
        error, RequestException | HTTPError | ConnectionError | TimeoutError | TransportError | DataCorruption
    )


def tried(where: str, seconds: float, operation: Callable[[dict[str, Any]], Result]) -> Result:
    """The result of an operation on the object `where`, tried again for `seconds` where that may help.

    Args:
      where: names the object in errors.
      seconds: after which to give up.
      operation: is given the keywords of a request that is made once; google-cloud-storage would try it again itself.

    Raises:
      UserError: missing permissions, credentials, buckets and objects, at once; all else when the time is over.
    """
    answer = min(ANSWER_SECONDS, seconds / 2)
    again = Retry(may_pass, initial=FIRST_PAUSE, maximum=LONGEST_PAUSE, timeout=seconds - answer)
    try:
        return again(operation)({"retry": None, "timeout": answer})
    except exceptions.RetryError as error:
        why = f"gave up after {seconds:.0f} s of trying ({reason(error.cause or error)})"
    except DefaultCredentialsError as error:
        why = f"there are no credentials ({reason(error)}); run `gcloud auth application-default login`"
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        why = f"no permission ({reason(error)}); see `gcloud auth list`"
    except exceptions.NotFound as error:
        why = f"the bucket or the object does not exist ({reason(error)})"
    except (exceptions.GoogleAPIError, GoogleAuthError, InvalidResponse, OSError, ValueError) as error:
        why = f"the bucket cannot be used ({reason(error)})"
    raise UserError(f"{where}: {why}")


def reason(error: BaseException) -> str:
    """What an error says, on one short line."""
    return " ".join((str(error) or type(error).__name__).split())[:200]


@cache
def prepare() -> None:
    """Make the libraries that Orbax reads and writes buckets with patient and quiet; once, before the first address.

    gcsfs is replaced by `BucketFiles`. TensorStore tries again by itself, 32 times within about a quarter
    of an hour, but by default waits for ever for a server that is silent.
    """
    for protocol in ("gs", "gcs"):
        fsspec.register_implementation(protocol, BucketFiles, clobber=True)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of what it then raises
    os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", f"{ANSWER_SECONDS:.0f}")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", f"{ANSWER_SECONDS:.0f}")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")


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
        except exceptions.RetryError as error:
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
