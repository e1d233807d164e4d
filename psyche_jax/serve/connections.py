"""The socket that servers of this package answer on, and connections that wait only so long."""

import asyncio
import socket

from uvicorn.protocols.http.h11_impl import H11Protocol

from psyche_jax.errors import UserError


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any that is free.

    Raises:
      UserError: the address is none, or taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError, UnicodeError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot serve on {host} port {port}: {reason}; choose another with --port") from None
    listening.listen(512)  # before the address is shown: who comes at once waits, and is not refused
    listening.setblocking(False)
    return listening


def impatient(seconds: float) -> type[H11Protocol]:
    """A protocol for uvicorn that closes a connection if the head of a request takes longer to arrive."""

    class Impatient(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._timer = self.loop.call_later(seconds, transport.close)

        def data_received(self, data: bytes) -> None:
            if self._timer is None and self._idle:
                self._timer = self.loop.call_later(seconds, self.transport.close)
            super().data_received(data)
            if not self._idle:
                self._forget()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        @property
        def _idle(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _forget(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Impatient
