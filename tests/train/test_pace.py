"""After which steps a checkpoint is due."""

import pytest

from psyche_jax.config import CheckpointSection
from psyche_jax.config_files import parse_config
from psyche_jax.errors import UsageError
from psyche_jax.train.loop import SavePace


def saved_after(section, lengths, writing=()):
    """The steps, each as many seconds long as `lengths` says, after which there is a checkpoint."""
    now = [1000.0]
    pace = SavePace(section, lambda: now[0])
    saved = []
    for step, length in enumerate(lengths, start=1):
        now[0] += length
        if pace.due(step, step in writing):
            pace.saved()
            saved.append(step)
    return saved


def test_by_steps_alone():
    section = CheckpointSection(every_steps=3, every_seconds=None)
    assert saved_after(section, [1e6] * 7) == [3, 6]


def test_before_more_work_than_allowed_could_be_lost():
    """Steps of 40 s: a third one would make 120 s, so after the second; the step that counts is always the last one."""
    section = CheckpointSection(every_steps=100, every_seconds=100)
    assert saved_after(section, [40] * 6) == [2, 4, 6]
    assert saved_after(section, [1] * 300) == [100, 200, 300]
    assert saved_after(section, [1] * 60 + [30] * 4) == [61, 64]


def test_iterations_that_are_longer_are_all_saved():
    section = CheckpointSection(every_steps=100, every_seconds=100)
    assert saved_after(section, [130] * 3) == [1, 2, 3]


def test_while_one_is_being_written_only_steps_count():
    section = CheckpointSection(every_steps=4, every_seconds=100)
    assert saved_after(section, [130] * 5, writing=(2, 3, 4, 5)) == [1, 4]


@pytest.mark.parametrize("name", ["every_seconds", "keep_every_hours"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_times_must_be_positive(name, value):
    with pytest.raises(UsageError, match=name):
        parse_config(CheckpointSection, {name: value}, "here")
