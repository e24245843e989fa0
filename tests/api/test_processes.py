"""A server of several processes: a client must not be able to tell."""

import asyncio
import http.client
import os
import re
import resource
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import orjson
import pytest
import uvloop
import websockets
from websockets.sync.client import connect

from api.answering.statistics import Statistics
from api.metrics import Metrics
from api.processes import movable
from api.processes.channel import Channel, pair
from api.processes.hot import is_hot
from api.processes.movable import MovableHttp, Place, Switch
from api.server import adopt
from api.tallies import COUNTERS, WAITING
from services.core.keys import KeyFile, write_keys
from tests.api.test_process import LOG, api_process
from tests.api.tiny import (
    answering,
    attach,
    heatmap,
    npy,
    probability_of,
    publish,
    publish_champion,
    registry_of,
    tiny_model,
    until,
)
from tests.system.conftest import wait_for

BODY = npy(heatmap())
SERVES = "process serves"


class Client:
    """A connection that is kept. process: the first part of a request's id, which each process has of its own."""

    opened: ClassVar[list["Client"]] = []

    def __init__(self, port: int) -> None:
        self.opened.append(self)
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=20.0)
        self._http.connect()
        self.socket: socket.socket = self._http.sock

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str, bytes]:
        """Status, process, body. The connection is the same as before."""
        self._http.request(method, path, body, headers)
        answer = self._http.getresponse()
        content = answer.read()
        assert self._http.sock is self.socket, "the connection was closed"
        return answer.status, (answer.getheader("x-request-id") or "").partition("-")[0], content

    def classify(self) -> str:
        """The process that has answered."""
        status, process, content = self.ask("POST", "/v1/classify", BODY)
        assert status == 200, content
        return process

    def close(self) -> None:
        self._http.close()


class Service:
    """A running server of two processes."""

    def __init__(self, data_dir: Path, process: "subprocess.Popen[bytes]", port: int) -> None:
        self.registry = registry_of(data_dir)
        self.process = process
        self.port = port
        self._log = data_dir / LOG

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def worker_pids(self) -> list[int]:
        return [int(pid) for pid in re.findall(r"process started .*pid=(\d+)", self.log)]

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def two_clients(self) -> tuple[Client, Client]:
        """One that the first process answers, one that the other does."""
        _, first, _ = Client(self.port).ask("GET", "/readyz")
        found: dict[bool, Client] = {}
        while len(found) < 2:
            client = Client(self.port)
            found.setdefault(client.classify() == first, client)
        return found[True], found[False]

    def count_of(self, sample: str) -> float:
        found = re.search(rf"^{re.escape(sample)} (\S+)$", httpx.get(self.url("/metrics")).text, re.MULTILINE)
        return float(found[1]) if found else 0.0


@pytest.fixture(autouse=True)
def _close_clients() -> Iterator[None]:
    yield
    while Client.opened:
        Client.opened.pop().close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """For tests that leave both processes running."""
    data_dir = tmp_path_factory.mktemp("processes")
    publish_champion(registry_of(data_dir))
    with api_process(
        data_dir, wait_until=SERVES, ECHOSIGHT_API_PROCESSES="2", ECHOSIGHT_POLL_INTERVAL_S="0.1"
    ) as (process, port):
        yield Service(data_dir, process, port)


@pytest.fixture
def own_service(tmp_path: Path) -> Iterator[Service]:
    """For a test that ends a process."""
    version = publish(registry_of(tmp_path))
    attach(registry_of(tmp_path), version, tiny_model(version, can_dawdle=True))
    registry_of(tmp_path).promote(version, by="test", why="test")
    with api_process(
        tmp_path, wait_until=SERVES, ECHOSIGHT_API_PROCESSES="2", ECHOSIGHT_POLL_INTERVAL_S="0.1"
    ) as (process, port):
        yield Service(tmp_path, process, port)


def test_clients_are_shared_out_evenly_and_keep_their_process(service: Service) -> None:
    clients = [Client(service.port) for _ in range(6)]
    processes = [client.classify() for client in clients]
    assert sorted(Counter(processes).values()) == [3, 3]
    assert [client.classify() for client in clients] == processes


def test_what_is_not_hot_is_answered_by_the_first_process_on_the_same_connection(service: Service) -> None:
    home, away = service.two_clients()
    first, other = home.classify(), away.classify()
    assert away.ask("POST", "/v1/embed", BODY)[:2] == (200, other)
    infer = orjson.dumps(
        {
            "inputs": [
                {"name": "heatmap", "shape": [1, 2, 4, 3], "datatype": "FP32", "data": heatmap().ravel().tolist()}
            ]
        }
    )
    assert away.ask("POST", "/v2/models/radar/infer", infer)[:2] == (200, other)
    assert away.ask("POST", "/v1/classify", b"no array")[:2] == (415, other)
    assert away.ask("POST", "/v2/models/radar/versions/1/infer", infer)[:2] == (200, first)
    assert away.classify() == first, "it has moved once, and stays"
    for method, path, status in (
        ("GET", "/v1/models", 200),
        ("GET", "/nowhere", 404),
        ("GET", "/v1/classify", 405),
    ):
        _, away = service.two_clients()
        assert away.ask(method, path)[:2] == (status, first)


def test_a_long_body_and_one_in_pieces_come_whole(service: Service) -> None:
    many = npy(heatmap(60, 2, 4, 3))
    pieces = [many[:10], many[10:5000], many[5000:]]
    _, away = service.two_clients()
    for client in (away, Client(service.port), Client(service.port)):
        for path in ("/v1/classify", "/v2/models/radar/versions/1/infer"):
            status, _, content = client.ask("POST", path, iter(pieces))
            assert status == (200 if path == "/v1/classify" else 400), content
    labels = {"frame_id": "x" * 200_000}
    _, away = service.two_clients()
    status, _, content = away.ask("POST", "/v1/labels", orjson.dumps(labels))
    assert 400 <= status < 500 or status == 503, content


def test_a_websocket_and_events_open_on_any_connection(service: Service) -> None:
    _, away = service.two_clients()
    with connect(f"ws://127.0.0.1:{service.port}/v1/stream", sock=away.socket) as stream:
        stream.send(BODY)
        assert orjson.loads(stream.recv())["model"]["version"] == service.registry.aliases()["champion"]


def test_pipelined_requests_are_answered_or_the_connection_is_closed(service: Service) -> None:
    hot = f"POST /v1/classify HTTP/1.1\r\nhost: api\r\ncontent-length: {len(BODY)}\r\n\r\n".encode() + BODY
    other = b"GET /readyz HTTP/1.1\r\nhost: api\r\n\r\n"
    last = hot.replace(b"host: api", b"host: api\r\nconnection: close")
    for sent, answers in ((hot + hot + last, 3), (hot + hot + other, 2), (hot + other + hot, 1)):
        _, away = service.two_clients()
        away.socket.sendall(sent)
        received = b"".join(iter(lambda away=away: away.socket.recv(65536), b""))  # type: ignore[misc]
        assert received.count(b"HTTP/1.1 200 OK") == answers


def test_a_client_that_has_said_all_is_answered_wherever_its_connection_goes(service: Service) -> None:
    hot = f"POST /v1/classify HTTP/1.1\r\nhost: api\r\ncontent-length: {len(BODY)}\r\n\r\n".encode() + BODY
    for asked in (hot, b"GET /v1/models HTTP/1.1\r\nhost: api\r\n\r\n"):
        for client in service.two_clients():
            client.socket.sendall(asked)
            client.socket.shutdown(socket.SHUT_WR)
            answered = b"".join(iter(lambda client=client: client.socket.recv(65536), b""))  # type: ignore[misc]
            assert answered.startswith(b"HTTP/1.1 200 OK"), asked


def test_a_wish_for_another_protocol_is_ignored_wherever_the_connection_goes(service: Service) -> None:
    first, other = (client.classify() for client in service.two_clients())
    _, away = service.two_clients()
    wish = {"connection": "upgrade, http2-settings", "upgrade": "h2c", "http2-settings": ""}
    assert away.ask("POST", "/v1/classify", BODY, **wish)[:2] == (200, other)
    assert away.ask("POST", "/v2/repository/index", b"{}", **wish)[:2] == (200, first)


def test_counters_are_those_of_all_processes(service: Service) -> None:
    sample = 'echosight_api_requests_total{route="/v1/classify",status="200"}'
    home, away = service.two_clients()
    wait_for(lambda: service.count_of(sample) == service.count_of(sample), timeout_s=20, what="rest")

    def counted() -> tuple[float, int]:
        rows = httpx.get(service.url("/v2/models/radar/stats")).json()["model_stats"]
        return service.count_of(sample), sum(row["inference_count"] for row in rows)

    before = counted()
    for _ in range(5):
        home.classify()
        away.classify()
    wait_for(lambda: counted() >= (before[0] + 10, before[1] + 10), timeout_s=20, what="sum")
    assert service.count_of("echosight_api_processes") == 2


def test_a_swap_reaches_every_process_and_no_answer_has_the_wrong_version(service: Service) -> None:
    clients = service.two_clients()
    version = publish(service.registry, verdict="hold")
    attach(service.registry, version, tiny_model(version))
    service.registry.promote(version, by="test", why="test")

    def versions() -> set[int]:
        found = set()
        for client in clients:
            _, _, content = client.ask("POST", "/v1/classify", BODY)
            answer = orjson.loads(content)
            served = answer["model"]["version"]
            assert answer["probabilities"]["empty"] == pytest.approx(probability_of(served), abs=1e-6)
            found.add(served)
        return found

    wait_for(lambda: versions() == {version}, timeout_s=30, what="swap")


def test_a_process_that_is_killed_is_replaced_and_its_counts_stay(own_service: Service) -> None:
    service = own_service
    sample = 'echosight_api_requests_total{route="/v1/classify",status="200"}'
    home, away = service.two_clients()
    total = 2 + sum(1 for _ in range(10) if away.classify())
    wait_for(lambda: service.count_of(sample) == total, timeout_s=20, what="sum")
    os.kill(service.worker_pids[0], signal.SIGKILL)
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        total += sum(1 for _ in iter(away.classify, ""))
    home.classify()
    Client(service.port).classify()
    wait_for(lambda: service.log.count(SERVES) == 2, timeout_s=40, what="replacement")
    service.two_clients()
    assert service.count_of("echosight_api_lost_processes_total") == 1
    assert service.count_of(sample) >= total


def test_all_processes_finish_what_they_have_and_end_on_sigterm(own_service: Service) -> None:
    service = own_service
    home, away = service.two_clients()
    slow = heatmap()
    slow[0, 0, 0] = 1000.0 + 1500.0
    away._http.request("POST", "/v1/classify", npy(slow))
    home.classify()
    service.process.send_signal(signal.SIGTERM)
    answer = away._http.getresponse()
    assert answer.status == 200
    assert service.process.wait(timeout=30.0) == 0
    wait_for(lambda: not _runs(service.worker_pids[0]), timeout_s=10, what="end")


def test_a_second_signal_ends_all_processes_though_requests_are_in_flight(own_service: Service) -> None:
    service = own_service
    for client in service.two_clients():
        _begin_to_classify(client)
    service.process.send_signal(signal.SIGTERM)
    wait_for(lambda: _refuses(service.port), timeout_s=10, what="end of listening")
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(timeout=10.0) == 0, "ECHOSIGHT_STOP_GRACE_S is 20"
    assert not _runs(service.worker_pids[0])


def test_a_process_that_hangs_gets_no_more_clients(own_service: Service) -> None:
    service = own_service
    home, _ = service.two_clients()
    (pid,) = service.worker_pids
    noticed_s: list[float] = []

    def has_noticed() -> bool:
        """For longer than what was on its way when the process was stopped can make it look alive."""
        if service.count_of("echosight_api_processes") == 2:
            noticed_s.clear()
        else:
            noticed_s.append(time.monotonic())
        return bool(noticed_s) and noticed_s[-1] - noticed_s[0] > 2.0

    os.kill(pid, signal.SIGSTOP)
    try:
        wait_for(has_noticed, timeout_s=30, what="notice")
        assert {Client(service.port).classify() for _ in range(4)} == {home.classify()}
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: service.count_of("echosight_api_processes") == 2, timeout_s=20, what="return")
    service.two_clients()


def test_a_version_that_loads_in_the_first_process_alone_costs_nobody_an_answer(own_service: Service) -> None:
    service = own_service
    _, away = service.two_clients()
    _begin_to_classify(away)
    (pid,) = service.worker_pids
    usual = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    taken = {int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (min({*range(len(taken) + 1)} - taken), usual[1]))
    version = publish(service.registry, verdict="hold")
    attach(service.registry, version, tiny_model(version))
    service.registry.promote(version, by="test", why="test")
    wait_for(lambda: "process has no model" in service.log, timeout_s=20, what="refusal")
    away.socket.sendall(BODY)
    answer = http.client.HTTPResponse(away.socket)
    answer.begin()
    assert (answer.status, orjson.loads(answer.read())["model"]["version"]) == (200, 1)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, usual)
    status, _, content = away.ask("POST", "/v1/classify", BODY)
    assert (status, orjson.loads(content)["model"]["version"]) == (200, version)


def test_the_others_end_with_the_first_process(own_service: Service) -> None:
    own_service.process.kill()
    wait_for(lambda: not _runs(own_service.worker_pids[0]), timeout_s=30, what="end")


def test_who_has_a_limit_is_counted_in_one_place(tmp_path: Path) -> None:
    publish_champion(registry_of(tmp_path))
    keys = tmp_path / "keys.json"
    file, limited = KeyFile().added("limited", ("predict",), requests_per_s=0.001)
    file, free = file.added("free", ("predict",), requests_per_s=None)
    write_keys(keys, file)
    with api_process(
        tmp_path,
        wait_until=SERVES,
        ECHOSIGHT_API_PROCESSES="2",
        ECHOSIGHT_API_KEYS_FILE=str(keys),
    ) as (_, port):
        clients = [Client(port) for _ in range(4)]
        asked = [client.ask("POST", "/v1/classify", BODY, authorization=f"Bearer {free}") for client in clients]
        assert len({process for _, process, _ in asked}) == 2
        asked = [client.ask("POST", "/v1/classify", BODY, authorization=f"Bearer {limited}") for client in clients]
        assert sorted(status for status, _, _ in asked) == [200, 429, 429, 429]
        assert len({process for _, process, _ in asked}) == 1


def _channel(end: socket.socket, heard: list[Any], **others: Any) -> Channel:
    return Channel(
        end,
        on_message=heard.append,
        on_connection=lambda *connection: heard.append(connection),
        on_end=lambda: heard.append("end"),
        **others,
    )


async def test_what_a_process_said_before_it_died_is_heard_though_it_left_something_unread() -> None:
    ours, theirs = pair()
    heard: list[Any] = []
    channel = _channel(ours, heard)
    channel.send(version=1)
    theirs.send(b'{"ended": 7}')
    theirs.close()
    channel.start()
    await until(lambda: "end" in heard)
    assert heard == [{"ended": 7}, "end"]


async def test_no_child_inherits_a_connection_that_came_from_another_process() -> None:
    ours, theirs = pair()
    heard: list[Any] = []
    channel, other = _channel(ours, heard), _channel(theirs, [])
    client, connection = socket.socketpair()
    assert other.send_connection(connection.fileno(), b"POST")
    channel.start()
    await until(lambda: heard)
    ((adopted, data),) = heard
    assert data == b"POST"
    assert not adopted.get_inheritable()
    for end in (channel, other, client, connection, adopted):
        end.close()


async def test_a_connection_for_which_there_are_no_descriptors_is_counted_and_no_message() -> None:
    ours, theirs = pair()
    heard: list[Any] = []
    channel, other = _channel(ours, heard, on_loss=lambda: heard.append("loss")), _channel(theirs, [])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert other.send_connection(theirs.fileno(), b"POST")
    lowest_free = os.dup(0)
    os.close(lowest_free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
        assert not other.send_connection(theirs.fileno(), b"POST")
        channel._loop = asyncio.get_running_loop()
        channel.read()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert heard == ["loss"]
    channel.close()
    other.close()


def test_a_version_is_asked_of_the_first_process_however_its_path_is_written() -> None:
    assert is_hot(b"POST", b"/v2/models/radar/infer?site=a%20b")
    assert not is_hot(b"POST", b"/v2/models/radar/versions/1/infer")
    assert not is_hot(b"POST", b"/v2/models/radar%2Fversions%2F1/infer")


class _Full(Switch):
    """Would rather have everything elsewhere, where there is no room."""

    num_refused = 0

    def place(self, protocol: MovableHttp, *_: Any) -> Place:
        return Place.HERE if protocol.has_moved else Place.RATHER_THERE

    def move(self, *_: Any) -> bool:
        self.num_refused += 1
        return False

    def ended(self, protocol: MovableHttp) -> None: ...


async def test_a_connection_that_finds_no_room_elsewhere_stays() -> None:
    async def echo(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message["body"]})

    switch = _Full()
    async with answering(echo, switch=switch) as server:
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient() as client:
            for body in (b"one", b"two"):
                assert (await client.post(f"http://127.0.0.1:{port}/", content=body)).content == body
    assert switch.num_refused == 1


class _Home(Switch):
    """Keeps POST, sends the rest away."""

    def __init__(self) -> None:
        self.num_ended = self.num_moved = 0

    def place(self, _: MovableHttp, method: bytes, *__: Any) -> Place:
        return Place.HERE if method == b"POST" else Place.ONLY_THERE

    def move(self, *_: Any) -> bool:
        self.num_moved += 1
        return True

    def ended(self, _: MovableHttp) -> None:
        self.num_ended += 1


async def test_what_a_slow_client_has_not_read_yet_comes_before_its_connection_moves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = bytes(32 * 1024 * 1024)
    monkeypatch.setattr(movable, "_RETRY_S", 0.0)
    monkeypatch.setattr(movable, "_MAX_RETRIES", 1)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"keep-alive")]})
        await send({"type": "http.response.body", "body": answer})

    switch = _Home()
    async with answering(app, switch=switch) as server:
        port = server.servers[0].sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST / HTTP/1.1\r\nhost: a\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        await until(lambda: any(protocol._is_leaving for protocol in server.server_state.connections))  # type: ignore[union-attr]
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(await reader.readexactly(len(answer))) == len(answer)
        await until(lambda: switch.num_moved)
        writer.close()


async def test_a_connection_that_becomes_a_websocket_is_no_longer_counted() -> None:
    switch = _Home()
    switch.place = lambda *_: Place.HERE  # type: ignore[method-assign]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await receive()

    async with answering(app, switch=switch) as server:
        port = server.servers[0].sockets[0].getsockname()[1]
        async with websockets.connect(f"ws://127.0.0.1:{port}/"):
            assert switch.num_ended == 1


@pytest.mark.parametrize("has_moved", [False, True])
def test_who_asks_without_end_is_not_read_on_while_the_first_answer_is_made(has_moved: bool) -> None:
    ask = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"

    async def run() -> None:
        may_answer = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await may_answer.wait()
            await send({"type": "http.response.start", "status": 204, "headers": [(b"connection", b"close")]})
            await send({"type": "http.response.body"})

        async with answering(app, switch=_Full()) as server:
            if has_moved:
                with socket.create_server(("127.0.0.1", 0)) as listener:
                    _, writer = await asyncio.open_connection(*listener.getsockname())
                    connection, _ = listener.accept()
                connection.setblocking(False)
                server.lifespan.state = {}
                await adopt(server, _Full(), connection, ask * 2)
            else:
                _, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname())
                writer.write(ask * 2)
            connections = server.server_state.connections
            await until(lambda: any(protocol.pipeline for protocol in connections))  # type: ignore[union-attr]
            writer.write(ask * 10_000)
            for _ in range(100):
                await asyncio.sleep(0)
            may_answer.set()
            assert [len(protocol.pipeline) for protocol in connections] == [1]  # type: ignore[union-attr]
            writer.transport.abort()

    uvloop.run(run())


def test_who_reads_nothing_is_sent_no_more_when_the_connection_finds_no_room_elsewhere() -> None:
    sent: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/many":
            for _ in range(100):
                await send({"type": "http.response.body", "body": bytes(100_000), "more_body": True})
                sent.append(100_000)
        else:
            await send({"type": "http.response.body", "body": bytes(32 * 1024 * 1024)})

    async def run() -> None:
        switch = _Full()
        switch.place = lambda protocol, *_: (  # type: ignore[method-assign]
            Place.RATHER_THERE if protocol.url == b"/many" and not protocol.has_moved else Place.HERE
        )
        async with answering(app, switch=switch) as server:
            reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname())
            writer.write(b"GET /long HTTP/1.1\r\nhost: a\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(b"GET /many HTTP/1.1\r\nhost: a\r\n\r\n")
            connections = server.server_state.connections
            await until(lambda: any(one.has_moved for one in connections))  # type: ignore[union-attr]
            for _ in range(100):
                await asyncio.sleep(0)
            assert not sent
            writer.transport.abort()

    uvloop.run(run())


def test_what_is_broken_behind_a_request_takes_it_no_answer_wherever_it_goes(service: Service) -> None:
    for client in service.two_clients():
        client.socket.sendall(b"GET /v1/models HTTP/1.1\r\nhost: api\r\n\r\n\x16\x03\r\n\r\n")
        answered = b"".join(iter(lambda client=client: client.socket.recv(65536), b""))  # type: ignore[misc]
        assert answered.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answered.count(b"HTTP/1.1") == 1


def test_totals_are_added_and_outlive_their_process() -> None:
    first, other = Metrics(), Metrics()
    assert {family.name for family in first.registry.collect()} >= {*COUNTERS, WAITING}
    first.count_request("/a", 200, 0.01)
    other.count_request("/a", 200, 0.01)
    other.count_request("/b", 404, 5.0)
    other.waiting_frames.set(7)
    other.model_went_live(3, 0.0)
    told = orjson.loads(orjson.dumps(other.rows()))
    for _ in range(2):  # totals, not differences
        first.tallies.tell(1, told)
    text = first.text().decode()
    assert 'echosight_api_requests_total{route="/a",status="200"} 2.0' in text
    assert 'echosight_api_requests_total{route="/b",status="404"} 1.0' in text
    assert 'echosight_api_request_duration_seconds_bucket{le="+Inf",route="/b"} 1.0' in text
    assert "echosight_api_waiting_frames 7.0" in text
    assert "echosight_api_model_swaps_total 0.0" in text
    assert first.num_requests == 3
    first.tallies.end(1)
    text = first.text().decode()
    assert 'echosight_api_requests_total{route="/a",status="200"} 2.0' in text
    assert "echosight_api_waiting_frames 0.0" in text


def test_statistics_of_all_processes_are_added() -> None:
    first, other = Statistics(), Statistics()
    first.count(3, 2, queue_ns=5, inference_ns=7)
    other.count(3, 1, queue_ns=1, inference_ns=2)
    other.count_batch(3, 8, 100)
    told = orjson.loads(orjson.dumps(other.untold(), option=orjson.OPT_NON_STR_KEYS))
    first.tell(1, told)
    first.tell(1, told)
    assert (first.of(3).num_frames, first.of(3).inference.ns, first.of(3).by_batch[8].count) == (3, 9, 1)
    first.end(1)
    assert (first.of(3).num_frames, first.of(3).queue.count, first.of(3).by_batch[8].ns) == (3, 2, 100)
    assert first.of(4).num_frames == 0


def _begin_to_classify(client: Client) -> None:
    """A request that is being answered, since the server asks for the body, which is still to be sent."""
    head = f"POST /v1/classify HTTP/1.1\r\nhost: api\r\nexpect: 100-continue\r\ncontent-length: {len(BODY)}"
    client.socket.sendall(f"{head}\r\n\r\n".encode())
    assert client.socket.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"


def _refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5.0).close()
    except ConnectionError:
        return True
    return False


def _runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
