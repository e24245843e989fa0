"""The line of calls: bounded, in turns, by rows; and the sums of what goes in and comes out."""

import asyncio
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.answering.calls import Call, Line, Terms
from api.models.classifier import Classifier

MODELS = [object.__new__(Classifier) for _ in range(2)]


@pytest.fixture(scope="module", autouse=True)
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield loop
    asyncio.set_event_loop(None)
    loop.close()


def call(caller: str, num_rows: int, *, model: int = 0) -> Call:
    frames = np.zeros((num_rows, 1), np.float32)
    sites = np.zeros(num_rows, np.int64)
    answer: asyncio.Future[object] = asyncio.get_event_loop_policy().get_event_loop().create_future()
    return Call(MODELS[model], frames, sites, ("probabilities",), Terms(caller), answer, 0)  # type: ignore[arg-type]


def taken(line: Line, max_rows: int) -> list[tuple[str, int]]:
    return [(row.call.terms.caller, row.stop - row.start) for row in line.take(max_rows)]


def test_callers_take_turns_however_much_one_has_in_line() -> None:
    line = Line(1000)
    for _ in range(50):
        line.push(call("greedy", 4))
    line.push(call("polite", 1))
    assert ("polite", 1) in taken(line, 8)


def test_a_long_call_goes_in_slices_that_cover_it_in_order() -> None:
    line = Line(100)
    long = call("a", 10)
    line.push(long)
    slices = [(row.start, row.stop) for _ in range(3) for row in line.take(4)]
    assert slices == [(0, 4), (4, 8), (8, 10)]
    assert line.num_rows == 0
    assert line.take(4) == []


def test_a_batch_is_of_one_model_and_who_was_passed_over_is_next() -> None:
    line = Line(100)
    line.push(call("a", 1))
    line.push(call("b", 1, model=1))
    line.push(call("c", 1))
    assert taken(line, 8) == [("a", 1), ("c", 1)]
    assert taken(line, 8) == [("b", 1)]


def test_a_full_line_costs_the_greediest_his_newest() -> None:
    line = Line(10)
    first, newest = call("greedy", 5), call("greedy", 5)
    assert line.push(first) == line.push(newest) == []
    polite = call("polite", 4)
    assert line.push(polite) == [newest]
    assert {row.call for row in line.take(100)} == {first, polite}


def test_a_full_line_refuses_whoever_would_hold_most_of_it() -> None:
    line = Line(4)
    assert line.push(call("a", 4)) == []
    late = call("a", 1)
    assert line.push(late) == [late]
    big = call("b", 4)
    assert line.push(big) == [big]


def test_a_call_longer_than_the_line_has_its_place_when_the_line_is_empty() -> None:
    line = Line(4)
    assert line.push(call("a", 9)) == []
    assert line.num_rows == 9


def test_a_call_that_is_removed_is_not_taken() -> None:
    line = Line(100)
    gone = call("a", 6)
    line.push(gone)
    line.take(2)
    line.remove(gone)
    line.remove(gone)
    assert (line.num_rows, line.take(10)) == (0, [])


STEPS = st.one_of(
    st.tuples(st.sampled_from("abc"), st.integers(1, 9), st.integers(0, 1)), st.integers(1, 12).map(lambda n: (n,))
)


@given(steps=st.lists(STEPS, max_size=60), max_rows=st.integers(1, 20))
def test_every_row_comes_out_once_or_its_call_is_told(steps: list[tuple[object, ...]], max_rows: int) -> None:
    line = Line(max_rows)
    pushed: dict[int, Call] = {}
    rows: Counter[int] = Counter()
    lost: set[int] = set()

    def take(num_rows: int) -> None:
        slices = line.take(num_rows)
        assert sum(row.stop - row.start for row in slices) <= num_rows
        assert len({row.call.batch_key for row in slices}) <= 1
        for row in slices:
            assert row.start == rows[id(row.call)]
            rows[id(row.call)] = row.stop

    for step in steps:
        if len(step) == 1:
            take(int(str(step[0])))
            continue
        caller, num_rows, model = step
        new = call(str(caller), int(str(num_rows)), model=int(str(model)))
        pushed[id(new)] = new
        lost |= {id(gone) for gone in line.push(new)}
        assert line.num_rows <= max(max_rows, *(one.num_rows for one in pushed.values()))
    while line.num_rows:
        take(5)
    for key, one in pushed.items():
        assert (rows[key] == one.num_rows) != (key in lost)
