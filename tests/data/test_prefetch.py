import threading
import time
from typing import Any

import pytest

from dsbert.data.prefetch import Prefetcher


def numbers(*values: int) -> list[Any]:
    """In place of batches, which the thread does not look at."""
    return list(values)


def test_steps_come_in_order():
    prefetcher = Prefetcher(lambda step: numbers(step, step * 10), start=5)
    assert [prefetcher.next() for _ in range(20)] == [[step, step * 10] for step in range(5, 25)]
    prefetcher.close()


def test_works_ahead_and_no_further_than_depth():
    made = []
    prefetcher = Prefetcher(lambda step: made.append(step) or [], start=0, depth=3)
    time.sleep(0.2)
    # Three are ready, and a fourth waits for room.
    assert made == [0, 1, 2, 3]
    prefetcher.next()
    time.sleep(0.1)
    assert made == [0, 1, 2, 3, 4]
    prefetcher.close()


def test_an_error_reaches_the_caller_at_its_step():
    def make(step):
        if step == 2:
            raise OSError("shard gone")
        return [step]

    prefetcher = Prefetcher(make, start=0)
    assert [prefetcher.next(), prefetcher.next()] == [[0], [1]]
    for _ in range(2):
        with pytest.raises(OSError, match="shard gone"):
            prefetcher.next()
    prefetcher.close()


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_close_ends_the_thread(taken):
    before = threading.active_count()
    prefetcher = Prefetcher(lambda step: numbers(step), start=0)
    for _ in range(taken):
        prefetcher.next()
    prefetcher.close()
    prefetcher.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        prefetcher.next()
