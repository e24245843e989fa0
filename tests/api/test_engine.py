"""The engine with models whose time and limits the test decides: batches, turns, deadlines, overload."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from api.answering.calls import Terms
from api.answering.engine import Engine, Limits
from api.problems import OVERLOADED, TOO_LATE, ProblemError

OUTPUTS = ("doubled", "site")


def limits(**changed: float) -> Limits:
    given: dict[str, Any] = {"max_waiting_rows": 512, "batch_wait_ms": 2.0, "answer_timeout_s": 30.0} | changed
    return Limits(max_rows=8, **given)


class Model:
    """Stands in for a Classifier: doubles what it gets. hold(): the next calls wait until release()."""

    threads = 1
    frame_ms = 1.0
    batch_gain = 1.0

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.may_run = threading.Event()
        self.may_run.set()
        self.began = threading.Semaphore(0)

    def run(self, heatmaps: npt.NDArray[Any], sites: npt.NDArray[Any], _: Any) -> list[npt.NDArray[Any]]:
        self.began.release()
        self.may_run.wait()
        self.batches.append(heatmaps[:, 0].tolist())
        if (heatmaps < 0).any():
            raise RuntimeError("negative")
        return [2 * heatmaps, sites]


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
async def engine(model: Model) -> AsyncIterator[Engine]:
    engine = Engine(threads=1, in_loop_below_ms=0.5, limits=limits(max_waiting_rows=16))
    yield engine
    model.may_run.set()
    engine.close()


async def ask(engine: Engine, model: Any, *values: float, caller: str = "", timeout_s: float = 0.0) -> list[float]:
    frames = np.array(values, np.float32)[:, None]
    deadline_ns = time.monotonic_ns() + int(timeout_s * 1e9) if timeout_s else 0
    found = await engine.run(model, frames, np.arange(len(values)), OUTPUTS, Terms(caller, deadline_ns))
    assert found.values[1].tolist() == list(range(len(values)))
    row: list[float] = found.values[0][:, 0].tolist()
    return row


async def hold(engine: Engine, model: Model) -> "asyncio.Task[list[float]]":
    """Let the engine's thread be in a call until `model.may_run` is set."""
    model.may_run.clear()
    task = asyncio.create_task(ask(engine, model, 0.0))
    await asyncio.to_thread(model.began.acquire)
    return task


async def line_up(engine: Engine, *asked: Any) -> list["asyncio.Task[list[float]]"]:
    """Tasks that are in line, in this order."""
    tasks = []
    for one in asked:
        tasks.append(asyncio.create_task(one))
        await asyncio.sleep(0)
    return tasks


async def test_a_lone_call_is_answered_at_once(engine: Engine, model: Model) -> None:
    assert await ask(engine, model, 1.0, 2.0) == [2.0, 4.0]
    assert model.batches == [[1.0, 2.0]]


async def test_calls_that_wait_share_a_batch_and_each_gets_its_own_rows(engine: Engine, model: Model) -> None:
    first = await hold(engine, model)
    others = await line_up(engine, ask(engine, model, 1.0), ask(engine, model, 2.0, 3.0), ask(engine, model, 4.0))
    model.may_run.set()
    assert await asyncio.gather(first, *others) == [[0.0], [2.0], [4.0, 6.0], [8.0]]
    assert model.batches == [[0.0], [1.0, 2.0, 3.0, 4.0]]


async def test_a_long_call_is_cut_into_batches_and_put_together_again(engine: Engine, model: Model) -> None:
    values = [float(i) for i in range(20)]
    assert await ask(engine, model, *values) == [2 * value for value in values]
    assert [len(batch) for batch in model.batches] == [8, 8, 4]


async def test_two_threads_share_a_long_call(model: Model) -> None:
    engine = Engine(threads=2, in_loop_below_ms=0.5, limits=limits())
    model.may_run.clear()
    task = asyncio.create_task(ask(engine, model, *range(8)))
    for _ in range(2):  # both are in the model at a time
        await asyncio.to_thread(model.began.acquire)
    model.may_run.set()
    assert await task == [2.0 * i for i in range(8)]
    assert sorted(len(batch) for batch in model.batches)[-2:] == [2, 4]
    engine.close()


async def test_a_model_that_takes_all_cores_is_called_once_at_a_time(model: Model) -> None:
    model.threads = 2
    engine = Engine(threads=2, in_loop_below_ms=0.5, limits=limits())
    first = await hold(engine, model)
    [second] = await line_up(engine, ask(engine, model, 1.0))
    assert not await asyncio.to_thread(model.began.acquire, timeout=0.05)
    model.may_run.set()
    assert await asyncio.gather(first, second) == [[0.0], [2.0]]
    engine.close()


async def test_who_asks_for_little_does_not_wait_behind_who_asks_for_much(engine: Engine, model: Model) -> None:
    first = await hold(engine, model)
    tasks = await line_up(
        engine,
        ask(engine, model, *[1.0] * 12, caller="greedy"),
        ask(engine, model, 5.0, caller="polite"),
    )
    model.may_run.set()
    await asyncio.gather(first, *tasks)
    assert 5.0 in model.batches[1]


async def test_a_full_line_is_429_with_a_time_to_try_again(engine: Engine, model: Model) -> None:
    first = await hold(engine, model)
    waiting = await line_up(engine, ask(engine, model, *[1.0] * 16, caller="a"))
    with pytest.raises(ProblemError) as refused:
        await ask(engine, model, *[1.0] * 16, caller="b")
    assert refused.value.kind is OVERLOADED
    assert int(refused.value.headers["retry-after"]) >= 1
    assert "16 frames wait" in refused.value.what
    model.may_run.set()
    await asyncio.gather(first, *waiting)


async def test_a_call_in_line_at_its_deadline_is_504_and_never_run(engine: Engine, model: Model) -> None:
    first = await hold(engine, model)
    with pytest.raises(ProblemError) as late:
        await ask(engine, model, 7.0, timeout_s=0.02)
    assert late.value.kind is TOO_LATE
    assert engine.num_waiting_rows == 0
    model.may_run.set()
    await first
    await ask(engine, model, 1.0)
    assert [7.0] not in model.batches


async def test_an_answer_after_the_deadline_is_504_too(engine: Engine, model: Model) -> None:
    model.may_run.clear()
    with pytest.raises(ProblemError, match="deadline passed after") as late:
        await ask(engine, model, 1.0, timeout_s=0.02)
    assert late.value.kind is TOO_LATE
    model.may_run.set()
    assert await ask(engine, model, 2.0) == [4.0]


async def test_a_call_that_could_not_be_done_in_time_is_not_begun(engine: Engine, model: Model) -> None:
    model.frame_ms = 60_000.0
    with pytest.raises(ProblemError, match="in line"):
        await ask(engine, model, 1.0, timeout_s=0.02)
    assert model.batches == []


async def test_a_deadline_that_is_over_is_504_without_a_call(engine: Engine, model: Model) -> None:
    with pytest.raises(ProblemError, match="before the model was asked"):
        await engine.run(model, np.zeros((1, 1), np.float32), np.zeros(1, np.int64), OUTPUTS, Terms("", 1))  # type: ignore[arg-type]
    assert model.batches == []


async def test_whoever_goes_away_leaves_the_line(engine: Engine, model: Model) -> None:
    first = await hold(engine, model)
    [gone] = await line_up(engine, ask(engine, model, 3.0))
    assert engine.num_waiting_rows == 1
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    assert engine.num_waiting_rows == 0
    model.may_run.set()
    await first


async def test_a_call_that_fails_does_not_fail_its_neighbours(engine: Engine, model: Model) -> None:
    first = await hold(engine, model)
    tasks = await line_up(engine, ask(engine, model, 1.0), ask(engine, model, -1.0), ask(engine, model, 2.0))
    model.may_run.set()
    await first
    good, bad, other = await asyncio.gather(*tasks, return_exceptions=True)
    assert (good, other) == ([2.0], [4.0])
    assert isinstance(bad, RuntimeError)


async def test_where_batches_are_cheaper_a_thread_waits_for_those_just_answered(model: Model) -> None:
    model.batch_gain = 2.0
    engine = Engine(threads=1, in_loop_below_ms=0.5, limits=limits(batch_wait_ms=60_000.0))
    first = await hold(engine, model)
    tasks = await line_up(engine, *[ask(engine, model, 1.0) for _ in range(3)])
    model.may_run.set()
    await asyncio.gather(first, *tasks)
    assert model.began.acquire(blocking=False)
    back = await line_up(engine, *[ask(engine, model, 2.0) for _ in range(2)])
    assert not await asyncio.to_thread(model.began.acquire, timeout=0.05)
    await asyncio.gather(*back, ask(engine, model, 3.0))
    assert model.batches[-1] == [2.0, 2.0, 3.0]
    engine.close()


async def test_calls_in_line_when_the_engine_closes_are_told(engine: Engine, model: Model) -> None:
    first = await hold(engine, model)
    [waiting] = await line_up(engine, ask(engine, model, 1.0))
    engine.close()
    with pytest.raises(ProblemError, match="stopping"):
        await waiting
    with pytest.raises(ProblemError, match="stopping"):
        await ask(engine, model, 1.0)
    model.may_run.set()
    assert await first == [0.0]
