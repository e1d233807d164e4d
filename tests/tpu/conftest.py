"""A stand-in for gcloud for every test of the scripts."""

from pathlib import Path

import pytest
from support.cloud import Cloud


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)
