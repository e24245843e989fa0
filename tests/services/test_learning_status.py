"""The table of the learning, from an event that anybody may have written."""

import io

import pytest
from rich.console import Console

from services.learning_status import learning_table


def shown(event) -> str:
    table = learning_table(event)
    if table is None:
        return ""
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return console.file.getvalue()


def test_table_tells_what_was_reached_beside_what_knowing_nothing_gets() -> None:
    text = shown(
        {
            "loss": 4.5,
            "chance": 6.2,
            "rollbacks": 2,
            "gauges": {
                "mi_nats": 1.7,
                "held_out_mi_nats": 1.2,
                "r5": 0.4,
                "r5_chance": 0.02,
                "rank": 20.4,
                "std": 0.6,
                "probe": 0.83,
                "lags": {"north": [198.2, 150.0, 240.0]},
                "alarms": ["sync_lag north"],
            },
        }
    )
    rows = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    assert "4.50" in rows["loss, nats"]
    assert "6.20" in rows["loss, nats"]
    assert "40 %" in rows["image found in 5 tries"]
    assert "2 %" in rows["image found in 5 tries"]
    assert "20.4" in rows["directions in use"]
    assert "83 %" in rows["held-out labels right"]
    assert "+198" in rows["camera's lag at north, ms"]
    assert "+150 to +240" in rows["camera's lag at north, ms"]
    assert "docs/gauges.md" in rows["sync_lag north"]
    assert " 2 " in rows["loss no number: went back"]


@pytest.mark.parametrize("event", [{}, {"gauges": None}, {"gauges": {}}, {"gauges": 5}])
def test_there_is_no_table_before_the_first_reading(event) -> None:
    assert learning_table(event) is None


@pytest.mark.parametrize(
    "gauges",
    [
        {"r5": "good", "lags": {"north": ["a", 1, 2]}, "alarms": 5},
        {"lags": [1], "alarms": [[], None]},
        {"lags": {"[red]": [1, 2]}, "rank": None, "mi_nats": {}},
    ],
)
def test_table_survives_an_event_that_is_not_as_it_should_be(gauges) -> None:
    assert "learning" in shown({"loss": "low", "chance": 1.0, "gauges": gauges})
