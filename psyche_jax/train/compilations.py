"""How often XLA compiles: in a steady state it should not."""

import contextlib
from collections.abc import Iterator

import jax

_COMPILATION = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def count_compilations() -> Iterator[list[float]]:
    """Within the block the list that this yields grows by the seconds of each compilation."""
    found: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILATION:
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
