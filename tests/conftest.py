"""Shared by all tests: one real Redis-compatible server on a free port, and frames small enough to read."""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
import redis

import services.core.telemetry  # noqa: F401 - before onnxruntime is loaded
from services.core.embedded import start_embedded_server
from services.core.frames import CameraFrame, Label, RadarFrame
from services.core.store import Pair, StoreReader
from services.core.streams import Publisher

os.environ.pop("COLUMNS", None)  # pytest-xdist's: what is imported under it would keep its tables that narrow

JPEG = b"\xff\xd8\xff\xe0" + bytes(60) + b"\xff\xd9"
MS = 1_000_000


@pytest.fixture(scope="session")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = start_embedded_server(tmp_path_factory.mktemp("redis"))
    yield server.url
    server.stop()


@pytest.fixture
def redis_url(_server: str) -> str:
    """The address of an empty server."""
    with redis.Redis.from_url(_server) as client:
        client.flushall()
    return _server


@pytest.fixture
def redis_client(redis_url: str) -> Iterator["redis.Redis"]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
async def publisher(redis_url: str) -> AsyncIterator[Publisher]:
    publisher = await Publisher.connect(redis_url)
    yield publisher
    await publisher.close()


@pytest.fixture
def store_dir(tmp_path: Path) -> Path:
    return tmp_path / "store"


def radar_frame(
    at_ms: float, *, seq: int = 0, site: str = "north", shape: tuple[int, ...] = (2, 4, 3)
) -> RadarFrame:
    heatmap = np.full(shape, seq, np.float16)
    axes = ("channel", "range", "azimuth")[-len(shape) :]
    return RadarFrame(site, seq, round(at_ms * MS), heatmap=heatmap, axes=axes)


def camera_frame(at_ms: float, *, seq: int = 0, site: str = "north") -> CameraFrame:
    return CameraFrame(site, seq, round(at_ms * MS), image=JPEG, shape=(8, 8, 3))


def label(at_ms: float, name: str, *, seq: int = 0, site: str = "north") -> Label:
    return Label(site, seq, round(at_ms * MS), label=name)


def pair(at_ms: float, *, seq: int = 0, site: str = "north", shape: tuple[int, ...] = (2, 4, 3)) -> Pair:
    return Pair(radar_frame(at_ms, seq=seq, site=site, shape=shape), camera_frame(at_ms + 3, seq=seq, site=site))


def stored_seqs(store_dir: Path) -> list[int]:
    """Sequence numbers of all stored pairs, in the order of a reader; each can be read whole."""
    reader = StoreReader(store_dir)
    reader.refresh()
    found = [stored.id.seq for stored in reader]
    assert all(stored.radar() is not None and stored.camera() is not None for stored in reader)
    reader.close()
    return found
