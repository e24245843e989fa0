"""POST /v1/labels: into the site's stream, or a problem that says why not."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from services.core import codec
from services.core.frames import Label
from services.core.streams import Publisher, stream_key
from tests.api.tiny import serving
from tests.conftest import radar_frame

LABEL = {"site": "north", "captured_at_ns": 1_700_000_000_000_000_001, "seq": 7, "label": "car"}


@pytest.fixture
async def client(tmp_path: Path, redis_url: str, publisher: Publisher) -> AsyncIterator[httpx.AsyncClient]:
    await publisher.publish([radar_frame(0.0)])
    async with serving(tmp_path, redis_url=redis_url) as (_, client):
        yield client


async def test_a_label_lies_in_the_sites_stream_as_ingest_reads_it(
    client: httpx.AsyncClient, redis_client: "redis.Redis"
) -> None:
    answer = await client.post("/v1/labels", json=LABEL | {"source": "ada"})
    assert (answer.status_code, answer.json()) == (202, {"accepted": 1})
    [(_, fields)] = redis_client.xrange(stream_key("north", "labels"))  # type: ignore[misc]
    label = codec.decode("north", "labels", fields)
    assert label == Label("north", 7, LABEL["captured_at_ns"], label="car", source="ada")  # type: ignore[arg-type]


async def test_many_labels_and_numbers_as_text(client: httpx.AsyncClient, redis_client: "redis.Redis") -> None:
    rows = [LABEL | {"captured_at_ns": str(LABEL["captured_at_ns"]), "seq": seq} for seq in range(3)]
    assert (await client.post("/v1/labels", json=rows)).json() == {"accepted": 3}
    assert redis_client.xlen(stream_key("north", "labels")) == 3


@pytest.mark.parametrize(
    ("change", "status", "named"),
    [
        ({"label": "lorry"}, 422, "lorry"),
        ({"site": "../x"}, 422, "site"),
        ({"site": "elsewhere"}, 422, "'elsewhere'"),
        ({"seq": -1}, 422, "seq"),
        ({"captured_at_ns": 2**63}, 422, "captured_at_ns"),
    ],
)
async def test_what_is_wrong_is_named_and_nothing_is_sent(
    client: httpx.AsyncClient, redis_client: "redis.Redis", change: dict[str, Any], status: int, named: str
) -> None:
    answer = await client.post("/v1/labels", json=[LABEL, LABEL | change])
    assert (answer.status_code, named in answer.json()["detail"]) == (status, True)
    assert redis_client.xlen(stream_key("north", "labels")) == 0


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b'{"site":"north"}', b"[" * 10_000])
async def test_rubbish_is_a_problem(client: httpx.AsyncClient, body: bytes) -> None:
    answer = await client.post("/v1/labels", content=body)
    assert answer.status_code in (400, 422)
    assert answer.json()["remedy"]


async def test_without_streams_or_with_lost_ones_it_is_a_503(tmp_path: Path) -> None:
    for redis_url, named in (("", "REDIS_URL is not set"), ("redis://127.0.0.1:1", "127.0.0.1:1")):
        async with serving(tmp_path, redis_url=redis_url) as (_, client):
            answer = await client.post("/v1/labels", json=LABEL)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert named in answer.json()["detail"]


async def test_labels_wait_until_they_are_read_however_many(
    client: httpx.AsyncClient, redis_client: "redis.Redis"
) -> None:
    for first in range(0, 12 * 256, 256):
        rows = [LABEL | {"seq": seq} for seq in range(first, first + 256)]
        assert (await client.post("/v1/labels", json=rows)).status_code == 202
    assert redis_client.xlen(stream_key("north", "labels")) == 12 * 256
