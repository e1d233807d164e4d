"""A synthesis that is killed at any moment goes on without asking for anything twice, to the same result."""

import pytest
from support.kills import CONCURRENCY, compare


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_killed_on_the_way(tmp_path, stream):
    result = compare(items=24, kills=3, folder=tmp_path, stream=stream)
    assert result["kills"] == 3
    assert result["received_replies_asked_again"] == 0
    assert result["most_in_flight_at_a_kill"] <= CONCURRENCY
    assert result["calls_repeated"] <= 3 * CONCURRENCY
    assert result["files_that_differ"] == []
    assert result["records_twice"] == 0 < result["sft_questions"]
    assert result["injected_words_published"] == 0
    assert result["key_in_files"] == 0
    assert set(result["faults"]) == {"429", "500", "time-out", "cut"}
