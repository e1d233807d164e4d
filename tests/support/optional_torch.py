"""`torch` where it is installed; elsewhere a test is skipped as soon as it asks for anything of it."""

from typing import Any

import pytest


class _Absent:
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by pytest, of all that a module holds
            raise AttributeError(name)
        pytest.skip(f"torch is absent, and with it the reference (torch.{name}): pip install torch")


torch: Any
try:
    import torch
except ImportError:
    torch = _Absent()
else:
    # Models this small gain nothing from more, and threads that wait for a busy core lose much.
    torch.set_num_threads(1)
