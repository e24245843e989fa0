"""Changes of what arrives: told once, by part, with from and to; a wild look and passing cars are none."""

import numpy as np
import pytest

from trainer.drift import Drift, Look, PageHinkley

SHAPE = (1, 8, 6)


def look(
    rng,
    *,
    gain_db: float = 0.0,
    turn: float = 0.0,
    longer: float = 1.0,
    residual_ms: float = 0.0,
    car: float = 0.0,
) -> Look:
    heatmaps = rng.normal(20 + gain_db, 3, (40, *SHAPE)).astype(np.float32)
    heatmaps[: round(40 * car), :, 2:6, 2:5] += 25
    vectors = rng.normal(0, 0.1, (40, 16)) + 1.0
    vectors[:, 0] += turn
    return Look(
        heatmaps=heatmaps,
        clutter=np.full(SHAPE, 20, np.float32),
        unit="dB",
        scale=5.0,
        vectors=(longer * vectors).astype(np.float32),
        residual_ms=rng.normal(residual_ms, 10, 40),
    )


def run(*phases: tuple[int, dict[str, float]]) -> list[tuple[int, str, str, float, float]]:
    """What was told, with the number of the look since its phase began."""
    drift, rng = Drift(), np.random.default_rng(0)
    told = []
    for num, values in phases:
        for i in range(num):
            told += [
                (i, change.part, change.what, change.was, change.now)
                for change in drift.observe("north", look(rng, **values))
            ]
    return told


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"gain_db": 4.0}, "radar"),
        ({"gain_db": -4.0}, "radar"),
        ({"turn": 4.0}, "vision"),
        ({"longer": 1.5}, "vision"),
        ({"residual_ms": 40.0}, "pairing"),
    ],
)
def test_change_is_told_once_within_four_looks(values, part) -> None:
    told = run((40, {}), (60, values))
    assert [at[1] for at in told] == [part]
    assert told[0][0] < 4


def test_change_tells_from_what_to_what() -> None:
    [(_, _, what, was, now)] = run((20, {}), (40, {"gain_db": 4.0}))
    assert what.startswith("radar_")
    assert now - was == pytest.approx(4.0, abs=0.8)


def test_change_back_is_told_too() -> None:
    assert [at[1] for at in run((20, {}), (30, {"gain_db": 4.0}), (30, {}))] == ["radar", "radar"]


def test_nothing_is_told_of_a_thousand_looks_that_are_alike_though_cars_pass() -> None:
    drift, rng = Drift(), np.random.default_rng(1)
    told = [drift.observe("north", look(rng, car=0.4 * rng.random() ** 2)) for _ in range(1000)]
    assert sum(map(len, told)) == 0


def test_one_wild_look_is_no_change() -> None:
    assert run((20, {}), (1, {"gain_db": 40.0, "residual_ms": 500.0}), (40, {})) == []


def test_site_map_that_follows_a_change_does_not_hide_it() -> None:
    drift, rng = Drift(), np.random.default_rng(0)
    told = []
    for i in range(60):
        gain_db = 4.0 if i >= 30 else 0.0
        seen = look(rng, gain_db=gain_db)
        seen.clutter[:] = seen.heatmaps.mean(0)  # at once
        told += drift.observe("north", seen)
    assert [change.part for change in told] == ["radar"]


def test_sites_have_levels_of_their_own_and_are_forgotten_with_their_store() -> None:
    drift, rng = Drift(), np.random.default_rng(0)
    for _ in range(20):
        assert not drift.observe("north", look(rng))
        assert not drift.observe("south", look(rng, gain_db=30.0))
    assert drift.levels("south")["radar_mean"] == pytest.approx(30, abs=1)
    drift.keep_only({"north"})
    assert drift.levels("south") == {}


def test_series_has_a_bounded_memory_and_passes_over_what_is_no_number() -> None:
    series, rng = PageHinkley(0.1), np.random.default_rng(0)
    for value in rng.normal(0, 1, 5000):
        series.observe(float(value))
    assert series.observe(float("nan")) is None
    assert len(series._learnt) <= 8
