"""Small files in buckets as Orbax and `epath` read and write them: gcsfs, made to survive a server that misbehaves."""

import inspect
import io
from typing import Any

import aiohttp
import gcsfs
from fsspec import asyn
from gcsfs.retry import is_retriable
from google.api_core.exceptions import RetryError
from google.api_core.retry import AsyncRetry

from psyche_jax.buckets import ANSWER_SECONDS, DEADLINE_SECONDS, FIRST_PAUSE, LONGEST_PAUSE, reason

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
