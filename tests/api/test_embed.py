"""POST /v1/embed and raw bodies."""

import io
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.api.tiny import SHAPE, heatmap, npy, probability_of, publish_champion, registry_of, serving, until

RAW = {"content-type": "application/octet-stream", "x-shape": "2,4,3", "x-dtype": "float32"}


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    publish_champion(registry_of(tmp_path))
    async with serving(tmp_path) as (app, client):
        await until(lambda: app.state.live.is_ready)
        yield client


async def test_embeddings_have_length_one_as_json_and_as_npy(client: httpx.AsyncClient) -> None:
    frames = heatmap(3, *SHAPE)
    means = frames.mean(axis=(2, 3))
    expected = means / np.linalg.norm(means, axis=1, keepdims=True)
    by_json = await client.post("/v1/embed?site=north", content=npy(frames))
    assert np.array(by_json.json()["embeddings"]) == pytest.approx(expected, abs=1e-6)
    assert by_json.json()["site"] == {"name": "north", "known": True}
    by_npy = await client.post("/v1/embed", content=npy(frames), headers={"accept": "application/x-npy"})
    assert by_npy.headers["content-type"] == "application/x-npy"
    assert np.load(io.BytesIO(by_npy.content)) == pytest.approx(expected, abs=1e-6)


async def test_one_frame_gets_one_embedding(client: httpx.AsyncClient) -> None:
    one = await client.post("/v1/embed", json={"heatmap": heatmap().tolist()})
    assert np.linalg.norm(one.json()["embedding"]) == pytest.approx(1.0)
    nothing = await client.post("/v1/embed", content=npy(np.zeros(SHAPE, np.float32)))
    assert nothing.json()["embedding"] == [0.0, 0.0]


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
async def test_raw_bytes_are_read_as_the_headers_say(client: httpx.AsyncClient, dtype: str) -> None:
    body = heatmap(2, *SHAPE).astype(dtype).tobytes()
    headers = RAW | {"x-shape": "2, 2,4,3", "x-dtype": dtype}
    answer = await client.post("/v1/classify?site=south", content=body, headers=headers)
    assert [row["probabilities"]["empty"] for row in answer.json()["results"]] == pytest.approx(
        [probability_of(1, site=2)] * 2, abs=1e-6
    )


@pytest.mark.parametrize(
    ("change", "status", "named"),
    [
        ({"x-shape": "2,4"}, 400, "takes 32"),
        ({"x-shape": "2,-4,3"}, 422, "'2,-4,3'"),
        ({"x-shape": "9" * 40}, 422, "x-shape"),
        ({"x-shape": "999999999,999999999,999999999"}, 400, "body has 96 bytes"),
        ({"x-dtype": "object"}, 422, "'object'"),
        ({"x-dtype": ""}, 422, "x-dtype"),
    ],
)
async def test_raw_bytes_that_are_not_what_the_headers_say(
    client: httpx.AsyncClient, change: dict[str, str], status: int, named: str
) -> None:
    answer = await client.post("/v1/classify", content=heatmap().tobytes(), headers=RAW | change)
    assert (answer.status_code, named in answer.json()["detail"]) == (status, True)


async def test_values_beyond_any_radars_are_refused(client: httpx.AsyncClient) -> None:
    for dtype, value in ((np.float32, 3e38), (np.float16, 2e4)):
        answer = await client.post("/v1/classify", content=npy(np.full(SHAPE, value, dtype)))
        assert (answer.status_code, "keep within" in answer.json()["remedy"]) == (422, True)
