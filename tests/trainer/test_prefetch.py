"""Read ahead, in order, bounded; an error comes to whoever asks."""

import itertools
import threading

import pytest

from trainer.prefetch import Prefetch
from trainer.time_share import TimeShare


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_draws_come_in_order_whatever_is_read_ahead(depth) -> None:
    numbers = itertools.count()
    ahead = Prefetch(lambda: next(numbers), depth=depth)
    assert [ahead.next() for _ in range(20)] == list(range(20))
    ahead.close()
    assert next(numbers) <= 20 + depth


def test_next_is_drawn_while_the_caller_works() -> None:
    numbers, drawn = itertools.count(), threading.Semaphore(0)

    def draw() -> int:
        drawn.release()
        return next(numbers)

    ahead = Prefetch(draw, depth=2)
    assert ahead.next() == 0
    for _ in range(3):
        assert drawn.acquire(timeout=10)
    ahead.close()


def test_error_of_a_draw_is_raised_to_the_caller() -> None:
    ahead = Prefetch(lambda: 1 // 0, depth=2)
    with pytest.raises(ZeroDivisionError):
        ahead.next()
    ahead.close()


def test_neither_encoding_nor_learning_starves(monkeypatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    share, spent = TimeShare(0.3), {True: 0.0, False: 0.0}
    for _ in range(400):
        is_encoding, began_s = share.is_encoding_due(), now_s
        now_s += 0.25 if is_encoding else 1.5
        spent[is_encoding] += now_s - began_s
        share.note(since_s=began_s, encoded=is_encoding)
    assert 0.25 < spent[True] / sum(spent.values()) < 0.35
