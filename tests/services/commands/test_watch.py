"""`echosight watch` and the client's events, against a server whose radars stream."""

import asyncio
import io
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from rich.console import Console
from typer.testing import CliRunner

from services.cli import app
from services.client import Client, RefusedError, StreamClosedError, UnavailableError
from services.commands.watch import Board
from services.core.streams import Publisher
from tests.api.tiny import listening, publish_champion, registry_of
from tests.conftest import radar_frame


def event(site: str = "north", **changes: Any) -> dict[str, Any]:
    return {
        "kind": "prediction",
        "site": site,
        "answer": "car",
        "abstained": "",
        "smoothed": {"label": "car", "probabilities": {"empty": 0.2, "car": 0.8}, "num_frames": 3},
        "model": {"name": "radar", "version": 7},
        "latency_ms": {"captured": 21.0, "arrived": 4.0, "read": 3.0},
        **changes,
    }


@pytest.fixture
def address(tmp_path: Path, redis_url: str) -> Iterator[str]:
    """A server that classifies what streams at two sites, ten times a second; all of it on a thread."""
    publish_champion(registry_of(tmp_path))
    found: list[str] = []
    is_up, is_over = threading.Event(), threading.Event()

    async def stream() -> None:
        settings = {"live_lease_ms": 300, "redis_url": redis_url, "live_max_age_ms": 60_000}
        publisher = await Publisher.connect(redis_url)
        async with listening(tmp_path, **settings) as (_, host_and_port):
            found.append(f"http://{host_and_port}")
            is_up.set()
            seq = 0
            while not is_over.is_set():
                seq += 1
                await publisher.publish([radar_frame(50 * seq, seq=seq, site=site) for site in ("north", "south")])
                await asyncio.sleep(0.02)
        await publisher.close()

    thread = threading.Thread(target=lambda: asyncio.run(stream()))
    thread.start()
    assert is_up.wait(20.0)
    yield found[0]
    is_over.set()
    thread.join()


def test_client_hears_predictions_of_the_sites_that_it_asked_for(address: str) -> None:
    with Client(address) as client:
        with client.events(kinds=["prediction"], sites=["south"]) as events:
            first, second, *_ = (said for said, _ in zip(events, range(3), strict=False))
        assert (first["site"], first["label"], second["seq"]) == ("south", "pedestrian", first["seq"] + 1)
        assert "radar_id" in first
        with client.events() as events:
            assert {said["site"] for said, _ in zip(events, range(10), strict=False)} == {"north", "south"}
        with pytest.raises(RefusedError, match="site"):
            client.events(sites=["no site"])


def test_watch_prints_predictions_and_ends_after_so_many(address: str) -> None:
    done = CliRunner().invoke(app, ["watch", "--url", address, "--json", "--num", "3", "--site", "north"])
    assert done.exit_code == 0, done.output
    lines = [orjson.loads(line) for line in done.output.splitlines() if line.startswith("{")]  # the server logs
    assert [line["site"] for line in lines] == ["north"] * 3
    plain = CliRunner().invoke(app, ["watch", "--url", address, "--num", "2"])
    assert plain.exit_code == 0
    assert len(re.findall(r"^(?:north|south)  \? unsure  33 %  \d+ ms  v1$", plain.output, re.MULTILINE)) == 2


async def test_end_of_the_server_is_said_and_one_without_streams_refuses(tmp_path: Path, redis_url: str) -> None:
    async with listening(tmp_path, redis_url=redis_url) as (_, host_and_port):
        client = Client(f"http://{host_and_port}", retries=0)
        events = await asyncio.to_thread(client.events, kinds=["prediction"])
    with events, pytest.raises(StreamClosedError, match="ended"):
        await asyncio.to_thread(lambda: list(events))
    client.close()
    async with listening(tmp_path) as (_, host_and_port):
        with pytest.raises(UnavailableError, match="REDIS_URL"):
            await asyncio.to_thread(Client(f"http://{host_and_port}", retries=0).events)
        watched = await asyncio.to_thread(CliRunner().invoke, app, ["watch", "--url", f"http://{host_and_port}"])
        assert watched.exit_code == 2


def test_board_shows_each_site_its_confidence_and_when_it_abstains() -> None:
    board = Board()
    assert "nothing seen yet" in text_of(board)
    for _ in range(3):
        board.take_in(event())
    board.take_in(event("south", answer=None, abstained="unsure"))
    shown = text_of(board)
    assert "80 %" in shown
    assert "v7" in shown
    assert "? unsure" in shown
    board.trouble = "no answer"
    assert "no answer" in text_of(board)


def text_of(board: Board) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(board.table())
    return console.export_text()
