"""The client against a real server, and against one that is busy, slow or none at all."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import numpy as np
import pytest
import redis

from services.client import (
    Client,
    RefusedError,
    ServerFailedError,
    StreamClosedError,
    UnavailableError,
    UnreachableError,
)
from services.client.http import pause_s
from services.core.keys import KeyFile, write_keys
from services.core.streams import Publisher, stream_key
from tests.api.tiny import (
    SHAPE,
    attach,
    heatmap,
    listening,
    probability_of,
    publish,
    publish_champion,
    registry_of,
    tiny_model,
    until,
)
from tests.conftest import radar_frame

T = TypeVar("T")


@pytest.fixture
async def url(tmp_path: Path, redis_url: str, publisher: Publisher) -> AsyncIterator[str]:
    await publisher.publish([radar_frame(0.0)])
    publish_champion(registry_of(tmp_path))
    async with listening(tmp_path, redis_url=redis_url, max_batch=4, max_streams=1) as (app, address):
        await until(lambda: app.state.live.is_ready)
        yield f"http://{address}"


async def using(url: str, use: Callable[[Client], T]) -> T:
    """What `use` returns for a client, on a thread: the server runs in this one."""

    def run() -> T:
        with Client(url, timeout_s=10.0, retries=0) as client:
            return use(client)

    return await asyncio.to_thread(run)


async def test_a_frame_gets_its_prediction(url: str) -> None:
    found = await using(url, lambda client: client.classify(heatmap(), site="north"))
    assert found.probabilities["empty"] == pytest.approx(probability_of(1, site=1), abs=1e-6)
    assert (found.version, found.site, found.is_site_known) == (1, "north", True)
    assert found.confidence == max(found.probabilities.values())
    assert found.is_unknown is None


async def test_what_is_like_nothing_known_is_told_from_the_rest(tmp_path: Path) -> None:
    version = publish(registry_of(tmp_path), unknown_threshold=100.0)
    attach(registry_of(tmp_path), version, tiny_model(version, has_unknown=True))
    registry_of(tmp_path).promote(version, by="test", why="test")
    async with listening(tmp_path) as (app, address):
        await until(lambda: app.state.live.is_ready)
        frames = [heatmap(), heatmap() + 1000.0]
        many = await using(f"http://{address}", lambda client: client.classify_many(frames))
        one = await using(f"http://{address}", lambda client: client.classify(frames[1]))
    assert [found.is_unknown for found in (*many, one)] == [False, True, True]


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "u1", "i8"])
async def test_many_frames_go_in_batches_whatever_their_dtype(url: str, dtype: str) -> None:
    frames = heatmap(7, *SHAPE).astype(dtype)
    assert len(await using(url, lambda client: client.classify_many(frames, batch=3))) == 7
    embeddings = await using(url, lambda client: client.embed(list(frames), batch=3))
    assert np.linalg.norm(embeddings, axis=1) == pytest.approx(np.ones(7))


async def test_what_the_server_refuses_is_raised_with_its_remedy(url: str) -> None:
    with pytest.raises(RefusedError, match=r"shape is \(3, 3\)") as caught:
        await using(url, lambda client: client.classify(heatmap(3, 3)))
    assert (caught.value.status, caught.value.kind) == (422, "wrong-shape")
    assert "send (2, 4, 3)" in caught.value.remedy


@pytest.mark.parametrize(
    ("frames", "named"),
    [
        ([heatmap().astype("c8")], "complex64"),
        ([np.full(SHAPE, "car")], "<U3"),
        ([heatmap(), heatmap(3, 3)], r"\(1, 3, 3\)"),
        ([[[[1.0, 2.0], [1.0]]]], "no array"),
    ],
)
def test_what_is_no_heatmap_is_refused_before_anything_is_sent(frames: Any, named: str) -> None:
    with Client("http://127.0.0.1:1", retries=0) as client, pytest.raises(RefusedError, match=named):
        client.classify_many(frames)


def test_several_frames_for_one_prediction_are_refused_with_the_way_to_ask() -> None:
    with (
        Client("http://127.0.0.1:1", retries=0) as client,
        pytest.raises(RefusedError, match=r"\(2, 1, 4, 4\).*classify_many"),
    ):
        client.classify([np.zeros((1, 4, 4))] * 2)  # type: ignore[arg-type]


async def test_labels_and_models(url: str, redis_client: "redis.Redis") -> None:
    await using(url, lambda client: client.label("car", site="north", captured_at_ns=1, seq=2))
    assert redis_client.xlen(stream_key("north", "labels")) == 1
    assert (await using(url, lambda client: client.models()))["live_version"] == 1


async def test_a_stream_answers_in_order_and_goes_on_after_a_bad_frame(url: str) -> None:
    def use(client: Client) -> tuple[list[str], list[str]]:
        with client.stream(site="north") as stream:
            frames = [heatmap() + number for number in range(5)]
            before = [found.label for found in stream.classify(frames)]
            stream.send(heatmap(3, 3))
            with pytest.raises(RefusedError):
                stream.receive()
            large = np.zeros((4, *SHAPE), np.float32)
            stream.send(large)
            with pytest.raises(KeyError):  # a batch is answered as one
                stream.receive()
            return before, [found.site for found in stream.classify(frames[:1])]

    labels, sites = await using(url, use)
    assert (len(labels), sites) == (5, ["north"])


async def test_a_stream_of_which_some_answers_were_not_wanted_goes_on_with_the_right_ones(url: str) -> None:
    def use(client: Client) -> list[str]:
        with client.stream() as stream:
            with pytest.raises(RefusedError):
                list(stream.classify([heatmap(3, 3), *[heatmap()] * 4]))
            answers = stream.classify([heatmap(), *[heatmap(3, 3)] * 4])
            assert isinstance(answers, Generator)
            next(answers)
            answers.close()
            return [found.label for found in stream.classify([heatmap()] * 4)]

    assert len(await using(url, use)) == 4


async def test_a_stream_that_is_refused_or_ended_says_why(url: str) -> None:
    def use(client: Client) -> None:
        with client.stream(), pytest.raises(UnavailableError, match="stream already"):
            client.stream()
        with pytest.raises(RefusedError):
            client.stream(site="../etc")

    await using(url, use)


async def test_the_end_of_a_stream_says_why(tmp_path: Path) -> None:
    publish_champion(registry_of(tmp_path))
    async with listening(tmp_path, stream_idle_s=0.2) as (app, address):
        await until(lambda: app.state.live.is_ready)

        def use(client: Client) -> None:
            with client.stream() as stream, pytest.raises(StreamClosedError, match=r"1000.*no frame for 0.2 s"):
                stream.receive()

        await using(f"http://{address}", use)


class _Script(BaseHTTPRequestHandler):
    """Answers with one status after the other; 0 ends the connection without an answer."""

    protocol_version = "HTTP/1.1"
    statuses: list[int]
    num_connections = 0

    def setup(self) -> None:
        super().setup()
        type(self).num_connections += 1

    def do_GET(self) -> None:
        status = self.statuses.pop(0)
        if status == 0:
            self.close_connection = True
            return
        body = b'{"name": "radar"}' if status == 200 else b'{"detail": "busy", "remedy": "wait"}'
        self.send_response(status)
        self.send_header("retry-after", "0")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def scripted(*statuses: int) -> Iterator[tuple[str, type[_Script]]]:
    handler = type("Script", (_Script,), {"statuses": list(statuses)})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler
        finally:
            server.shutdown()
            thread.join()


def test_a_busy_server_is_asked_again_on_the_same_connection() -> None:
    with scripted(503, 429, 200, 200) as (url, handler), Client(url, retries=2) as client:
        assert client.models() == client.models() == {"name": "radar"}
        assert handler.num_connections == 1


def test_a_connection_that_was_closed_meanwhile_is_opened_again() -> None:
    with scripted(200, 0, 200) as (url, _), Client(url, retries=1) as client:
        assert client.models() == client.models() == {"name": "radar"}


@pytest.mark.parametrize(
    ("status", "error"),
    [(503, UnavailableError), (429, UnavailableError), (500, ServerFailedError), (404, RefusedError)],
)
def test_the_last_answer_becomes_a_typed_error(status: int, error: type[Exception]) -> None:
    with (
        scripted(status, status) as (url, _),
        Client(url, retries=0) as client,
        pytest.raises(error, match="busy; wait"),
    ):
        client.models()


def test_nobody_at_the_address_is_said_with_the_remedy() -> None:
    with (
        Client("http://127.0.0.1:1", retries=0) as client,
        pytest.raises(UnreachableError, match="echosight serve"),
    ):
        client.models()
    for url in ("ftp://here", "http://", "http://here:many"):
        with pytest.raises(UnreachableError, match="use http://host:port"):
            Client(url)


def test_pauses_follow_the_server_within_reason() -> None:
    assert pause_s(0, "2") == 2.0
    assert pause_s(0, "86400") == 30.0
    assert [pause_s(attempt, None) for attempt in range(3)] == [0.25, 0.5, 1.0]
    assert pause_s(1, "Fri, 27 Nov 2026 22:00:00 GMT") == 0.5


def test_it_needs_numpy_and_the_standard_library_alone() -> None:
    code = (
        "import sys; known = {*sys.modules}; import services.client;"
        "names = {name.split('.')[0] for name in {*sys.modules} - known};"
        "print(*(names - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"numpy", "services"}


async def test_a_key_goes_with_requests_and_streams_and_without_it_both_are_refused(tmp_path: Path) -> None:
    file, key = KeyFile().added("north", ("predict",), requests_per_s=None)
    write_keys(tmp_path / "keys.json", file)
    publish_champion(registry_of(tmp_path))
    async with listening(tmp_path, api_keys_file=str(tmp_path / "keys.json")) as (app, address):
        await until(lambda: app.state.live.is_ready)

        def ask(api_key: str, use: Callable[[Client], T]) -> T:
            with Client(f"http://{address}", retries=0, api_key=api_key) as client:
                return use(client)

        def stream(client: Client) -> str:
            with client.stream() as stream:
                return next(stream.classify([heatmap()])).label

        for use in (lambda client: client.classify(heatmap()).label, stream):
            assert await asyncio.to_thread(ask, key, use) == "pedestrian"
            for wrong in ("", key[:-1]):
                with pytest.raises(RefusedError, match="API key") as caught:
                    await asyncio.to_thread(ask, wrong, use)
                assert (caught.value.status, caught.value.kind) == (401, "no-key")
        with pytest.raises(RefusedError, match="API key"):
            await asyncio.to_thread(ask, "", lambda client: client.events())
        with pytest.raises(UnavailableError, match="REDIS_URL"):  # let in, and told what there is not
            await asyncio.to_thread(ask, key, lambda client: client.events())


@pytest.mark.parametrize("wrong", ["es_a\r\nx: y", "es a", "schlüssel"])
def test_what_cannot_be_a_key_is_said_before_it_is_sent_and_not_shown(wrong: str) -> None:
    with pytest.raises(RefusedError, match="API key has") as caught:
        Client(api_key=wrong)
    assert wrong not in str(caught.value)
