"""What is asked again, how often and when: one policy for all who ask servers of LLMs."""

import asyncio
import itertools
import time

import pytest

from psyche_jax.llm.reply import NoReplyError, Reply
from psyche_jax.llm.retries import Pace, Patience, ask_patiently

FAST = Patience(retries=4, answers=3, first_wait=0.02, longest_wait=0.05, longest_rest=0.3)
GOOD = Reply("好", finish="stop")
BROKEN = Reply("半", finish="error")


def asked(*steps, patience=FAST, pace=None):
    """What comes of asking, the faults that were heard of, and how often it was asked; the last step for ever."""
    faults, times = [], []

    async def ask():
        step = steps[min(len(times), len(steps) - 1)]
        times.append(time.monotonic())
        if isinstance(step, Exception):
            raise step
        return step

    try:
        found = asyncio.run(ask_patiently(ask, patience, pace or Pace("it"), faults.append))
    except NoReplyError as error:
        found = error
    return found, [str(fault) for fault in faults], times


@pytest.mark.parametrize("status", [None, 408, 409, 425, 429, 500, 503, 529])
def test_what_may_pass_is_tried_so_often(status):
    fault = NoReplyError("busy", status=status)
    assert asked(fault, fault, fault, fault, GOOD)[:2] == (GOOD, ["busy"] * 4)
    found, faults, times = asked(fault)
    assert (str(found), found.status, len(faults), len(times)) == ("busy", status, 5, 5)


@pytest.mark.parametrize("status", [301, 400, 401, 404, 413, 422])
def test_what_will_not_pass_is_tried_once(status):
    found, faults, times = asked(NoReplyError("no", status=status))
    assert found.status == status and faults == [] and len(times) == 1
    assert found.for_all == (status in (301, 401, 404))


def test_answers_that_are_none_have_a_number_of_their_own():
    broken = NoReplyError("the stream ended early", came=True)
    assert asked(broken, BROKEN, GOOD)[0] == GOOD
    assert asked(NoReplyError("busy"), broken, NoReplyError("busy"), broken, GOOD)[0] == GOOD
    found, faults, times = asked(broken, BROKEN)
    assert (str(found), found.came, len(faults), len(times)) == ("error, 3 times", True, 3, 3)
    found, _, times = asked(BROKEN, patience=Patience(retries=0))
    assert (str(found), len(times)) == ("error", 1)


@pytest.mark.parametrize("finish", ["stop", "length", "content_filter", "refusal"])
def test_what_the_model_says_or_a_filter_holds_back_is_a_reply(finish):
    assert len(asked(Reply("字", finish=finish))[2]) == 1


def test_waits_double_up_to_the_longest_and_a_server_may_name_its_own():
    _, _, times = asked(NoReplyError("busy"))
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert gaps[0] >= 0.01 and gaps[1] >= 0.02 and all(gap >= 0.025 for gap in gaps[2:])
    _, _, (first, second) = asked(NoReplyError("busy", status=429, wait=0.2), GOOD)
    assert second - first >= 0.2
    _, _, (first, second) = asked(NoReplyError("busy", status=429, wait=0.0), GOOD)
    assert 0.01 <= second - first < 0.2, "a time that has passed says nothing"


def test_a_rest_is_everybodys_and_a_long_one_is_cut_and_told_of_once(capsys):
    pace = Pace("the server")
    _, _, (first, second) = asked(NoReplyError("busy", wait=1000), GOOD, pace=pace)
    assert 0.3 <= second - first < 5
    pace.rest(500, FAST)
    started = time.monotonic()
    assert asked(GOOD, pace=pace)[2][0] - started >= 0.2, "also who asks for the first time waits"
    assert capsys.readouterr().err == "the server: asks to wait 1,000 s; waiting 0.3 s\n"


def test_whoever_hears_of_a_fault_may_end_it():
    def stop(_):
        raise NoReplyError("the run ends")

    async def ask():
        raise NoReplyError("busy")

    with pytest.raises(NoReplyError, match="the run ends"):
        asyncio.run(ask_patiently(ask, FAST, Pace("it"), stop))
