"""The thread that decodes for all, with an engine that counts instead of a model."""

import queue
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from psyche_jax.serve.batcher import Batcher, BusyError, ClosingError, Job
from psyche_jax.serve.engine import Chunk, RowSettings

STOP = 0
LONG = 9999  # the last number of prompts that join no others
LARGE = 5555  # and of those for which there is no memory beside others


class CountingEngine:
    """Says the numbers after the prompt's last one; `STOP` after a prompt's first number of tokens."""

    config = SimpleNamespace(stop_token_ids=(STOP,))

    def __init__(self):
        self.begun = []
        self.slots = {}  # of each batch, the prompts in its slots and how many tokens each has said
        self.may_advance = threading.Semaphore(0)

    def takes(self, batch, prompts, settings):
        return len({prompt[-1] == LONG for prompt in [*(prompt for prompt, _ in self._slots(batch)), *prompts]}) < 2

    def join(self, batch, prompts, settings):
        if any(prompt[0] == 666 or (prompt[-1] == LARGE and batch.left.any()) for prompt in prompts):
            raise RuntimeError("RESOURCE_EXHAUSTED: no memory")
        self.begun.append([tuple(prompt) for prompt in prompts])
        slots = self._slots(batch)
        missing = max(len(prompts) - np.count_nonzero(batch.left == 0), 0)
        slots += [None] * missing
        batch.left = np.pad(batch.left, (0, missing))
        free = np.flatnonzero(batch.left == 0)[: len(prompts)].tolist()
        for slot, prompt, row in zip(free, prompts, settings, strict=True):
            slots[slot] = (prompt, 0)
            batch.left[slot] = row.max_new_tokens
        return free

    def advance(self, batch, alternatives):
        assert self.may_advance.acquire(timeout=20)
        slots, steps = self._slots(batch), 2
        tokens, mask = np.zeros((len(slots), steps), int), np.zeros((len(slots), steps), bool)
        for slot, (prompt, said) in ((slot, own) for slot, own in enumerate(slots) if own):
            for step in range(min(steps, batch.left[slot])):
                tokens[slot, step] = prompt[-1] + 1 + said + step if said + step < prompt[0] else STOP
                mask[slot, step] = True
                batch.left[slot] -= 1
                if tokens[slot, step] == STOP:
                    batch.left[slot] = 0
                    break
            slots[slot] = (prompt, said + steps)
        empty = np.zeros((*tokens.shape, 3))
        return Chunk(tokens, mask, tokens * -1.0, empty.astype(int), empty)

    def _slots(self, batch):
        return self.slots.setdefault(batch, [])


@pytest.fixture
def engine():
    return CountingEngine()


@pytest.fixture
def batcher(engine):
    batcher = Batcher(engine, rows=4, waiting=3)
    yield batcher
    engine.may_advance.release(1000)
    batcher.close(20)


def job(stop_after, last=100, most=20, rows=1):
    pieces = queue.Queue()
    wanted = Job([stop_after, last], [RowSettings(most, 0, 1, 0)] * rows, 0, pieces.put)
    return wanted, pieces


def begin(wanted, engine, batcher):
    """Submit the first job, and wait until it has its slots."""
    batcher.submit(wanted)
    while not engine.begun:
        pass


def everything(pieces):
    """Tokens of a job of one row, and how it ended."""
    tokens = []
    while (piece := pieces.get(timeout=20)) is not None:
        tokens += piece.tokens
        assert piece.log_probs == [-token for token in piece.tokens]
        if piece.finish:
            return tokens, piece.finish
    return tokens, "failed"


def test_tokens_come_in_order_without_the_stop_token(engine, batcher):
    engine.may_advance.release(1000)
    for wanted, pieces in (job(5), job(0), job(3, last=40)):
        batcher.submit(wanted)
        tokens, finish = everything(pieces)
        first = wanted.prompt[-1] + 1
        assert tokens == list(range(first, first + wanted.prompt[0])) and finish == "stop"
    wanted, pieces = job(99, most=7)
    batcher.submit(wanted)
    assert everything(pieces) == (list(range(101, 108)), "length")


def test_what_waits_is_begun_together_as_far_as_there_is_room(engine, batcher):
    first, pieces = job(1, last=1)
    batcher.submit(first)
    while not engine.begun:  # it is running, and stands still
        pass
    others = [job(1, last=10), job(1, last=20, rows=2), job(1, last=30, rows=2)]
    for wanted, _ in others:
        batcher.submit(wanted)
    engine.may_advance.release(1000)
    for _, own in [(first, pieces), *others]:
        assert everything(own)[1] == "stop"
    assert engine.begun[0] == [(1, 1)]
    assert engine.begun[1][:3] == [(1, 10), (1, 20), (1, 20)], "in the order of arrival"
    assert max(map(len, engine.begun)) <= 4


@pytest.mark.parametrize("last", [100, LONG])
def test_a_short_answer_does_not_wait_for_a_long_one(engine, batcher, last):
    long, long_pieces = job(500, last, most=1000)
    begin(long, engine, batcher)
    short, short_pieces = job(1)
    batcher.submit(short)
    engine.may_advance.release(10)
    assert everything(short_pieces)[1] == "stop"
    assert long_pieces.qsize() < 12
    long.give_up()


def test_who_comes_has_a_slot_in_the_next_chunk(engine, batcher):
    long, _ = job(500, most=1000)
    begin(long, engine, batcher)
    short, pieces = job(1)
    batcher.submit(short)
    engine.may_advance.release(2)  # the chunk that runs already, and one more
    assert everything(pieces) == ([101], "stop")
    long.give_up()


def test_slots_are_used_again_and_no_more_than_there_may_be(engine, batcher):
    engine.may_advance.release(10_000)
    jobs = []
    for number in range(30):
        jobs.append(job(number % 7, last=10 * number, rows=1 + number % 2))
        while True:
            try:
                batcher.submit(jobs[-1][0])
                break
            except BusyError:
                time.sleep(0.001)
    for wanted, pieces in jobs:
        rows = {row: [] for row in range(len(wanted.settings))}
        ended = set()
        while len(ended) < len(rows):
            piece = pieces.get(timeout=20)
            rows[piece.row] += piece.tokens
            ended |= {piece.row} if piece.finish else set()
        stop_after, last = wanted.prompt
        assert all(tokens == list(range(last + 1, last + 1 + stop_after)) for tokens in rows.values())
    assert len(engine.begun) > len(engine.slots), "nobody joined another"
    assert max(map(len, engine.slots.values())) <= 4


def test_too_many_are_refused_and_none_is_lost(engine, batcher):
    accepted = []
    with pytest.raises(BusyError):
        for _ in range(20):
            wanted, pieces = job(2, rows=4)
            batcher.submit(wanted)
            accepted.append(pieces)
    assert 3 <= len(accepted) <= 5
    engine.may_advance.release(1000)
    assert [pieces.get(timeout=20) is not None for pieces in accepted] == [True] * len(accepted)


def test_what_cannot_be_begun_fails_alone(engine, batcher):
    running, running_pieces = job(3, last=1)
    begin(running, engine, batcher)
    bad, bad_pieces = job(666)
    good, good_pieces = job(4)
    for wanted in (bad, good):
        batcher.submit(wanted)
    engine.may_advance.release(1000)
    assert everything(bad_pieces) == ([], "failed")
    assert everything(good_pieces) == ([101, 102, 103, 104], "stop")
    assert everything(running_pieces) == ([2, 3, 4], "stop")


def test_without_memory_beside_others_there_may_be_some_apart(engine, batcher):
    running, running_pieces = job(9, last=1)
    begin(running, engine, batcher)
    large, pieces = job(2, last=LARGE)
    batcher.submit(large)
    engine.may_advance.release(1000)
    assert everything(pieces) == ([LARGE + 1, LARGE + 2], "stop")
    assert everything(running_pieces)[1] == "stop"


def test_a_chunk_that_fails_fails_its_own_batch_only(engine, batcher):
    advance = engine.advance
    broken = []

    def breaks(batch, alternatives):
        if batch in broken:
            raise RuntimeError("RESOURCE_EXHAUSTED: no memory")
        return advance(batch, alternatives)

    engine.advance = breaks
    first, first_pieces = job(500, most=1000)
    other, other_pieces = job(6, last=LONG)
    for wanted in (first, other):
        batcher.submit(wanted)
    while len(engine.begun) < 2:
        engine.may_advance.release(1)
        time.sleep(0.01)
    broken.append(next(iter(engine.slots)))
    engine.may_advance.release(1000)
    assert everything(first_pieces)[1] == "failed"
    assert everything(other_pieces)[1] == "stop"
    following, pieces = job(3)
    batcher.submit(following)
    assert everything(pieces)[1] == "stop"


def test_a_row_that_is_given_up_makes_room_before_the_others_end(engine, batcher):
    long, long_pieces = job(500, most=1000, rows=4)
    begin(long, engine, batcher)
    long.give_up(2)
    short, pieces = job(1)
    batcher.submit(short)
    engine.may_advance.release(2)
    assert everything(pieces) == ([101], "stop")
    said = [long_pieces.get(timeout=20) for _ in range(7)]
    assert [piece.row for piece in said].count(2) == 1, "it went on"
    long.give_up()


def test_what_is_given_up_makes_room(engine, batcher):
    long, _ = job(500, most=1000, rows=4)
    begin(long, engine, batcher)
    long.give_up()
    engine.may_advance.release(3)
    short, pieces = job(1)
    batcher.submit(short)
    assert everything(pieces)[1] == "stop"


def test_closing_finishes_what_runs_and_refuses_the_rest(engine):
    batcher = Batcher(engine, rows=1, waiting=5)
    running, running_pieces = job(4)
    begin(running, engine, batcher)
    waiting, waiting_pieces = job(4)
    batcher.submit(waiting)
    engine.may_advance.release(1000)
    batcher.close(20)
    assert everything(running_pieces)[1] == "stop"
    assert everything(waiting_pieces)[1] in ("failed", "stop")
    with pytest.raises(ClosingError):
        batcher.submit(job(1)[0])


def test_closing_breaks_off_what_takes_too_long(engine):
    batcher = Batcher(engine, rows=1, waiting=5)
    running, _ = job(5000, most=10**6)
    batcher.submit(running)
    threading.Timer(1.0, lambda: engine.may_advance.release(1)).start()  # the step that runs when time is up
    batcher.close(0.5)
    assert not batcher._thread.is_alive()
