"""What the tests of plans share."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def as_users_compile(optimized: None) -> None:
    """A plan is of the program as it will run."""
