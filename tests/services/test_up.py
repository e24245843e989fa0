"""The supervisor: what its line says, what it restarts, in which order it stops, what it refuses."""

import contextlib
import io
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
import redis
from rich.console import Console

from services.core.errors import SettingsError
from services.core.settings import CoreSettings
from services.up import Supervisor, Worker, without_password
from tests.system.conftest import free_port, processes_of, wait_for


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@host:6379/0", "redis://:***@host:6379/0"),
        ("rediss://me:se@cr/et@host:6379/0", "rediss://me:***@host:6379/0"),
        ("redis://host:6379/0?password=secret&db=1", "redis://host:6379/0?password=***&db=1"),
        ("redis://me@host:6379/0", "redis://me@host:6379/0"),
        ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
    ],
)
def test_password_of_the_server_is_not_shown(url, shown) -> None:
    assert without_password(url) == shown


@pytest.fixture
def text() -> io.StringIO:
    return io.StringIO()


def supervisor(data_dir: Path, url: str, workers: list[Worker], text: io.StringIO) -> Supervisor:
    settings = CoreSettings(data_dir=data_dir, REDIS_URL=url)  # type: ignore[call-arg]
    return Supervisor(settings, workers, address=("127.0.0.1", free_port()), console=Console(file=text, width=200))


@contextlib.contextmanager
def running(watched: Supervisor) -> Iterator[None]:
    thread = threading.Thread(target=watched.run)
    thread.start()
    try:
        yield
    finally:
        watched.stop()
        thread.join(30)
    assert not thread.is_alive()


def test_worker_that_dies_is_started_again_and_its_last_words_are_shown(tmp_path, redis_url, text) -> None:
    watched = supervisor(tmp_path, redis_url, [Worker("broken", "timeit", ("raise OSError('[/absent]')",))], text)
    with running(watched):
        wait_for(lambda: "broken ended with status" in text.getvalue(), timeout_s=30, what="report of the death")
    assert "starting it again" in text.getvalue()
    assert "[/absent]" in text.getvalue()
    assert processes_of(tmp_path) == []


def test_worker_that_cannot_start_with_its_settings_stops_everything_and_is_told_once(
    tmp_path, redis_url, text, monkeypatch
) -> None:
    monkeypatch.setattr("services.up._STATUS_EVERY_S", 0.1)
    monkeypatch.setenv("ECHOSIGHT_WINDOW_MS", "-3")
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "ingest.log").write_text("what an earlier run said\n")
    workers = [Worker("ingest", "services.ingest"), Worker("other", "http.server", ("0",))]
    with pytest.raises(SettingsError, match=r"ECHOSIGHT_WINDOW_MS is '-3'") as caught:
        supervisor(tmp_path, redis_url, workers, text).run()
    assert "ingest cannot start" in str(caught.value)
    assert "earlier run" not in str(caught.value)
    assert "starting it again" not in text.getvalue()
    assert processes_of(tmp_path) == []


def test_worker_that_ends_with_status_2_after_it_had_started_is_started_again(
    tmp_path, redis_url, text, monkeypatch
) -> None:
    monkeypatch.setattr("services.up._STATUS_EVERY_S", 0.1)
    monkeypatch.setattr("services.up._LASTED_S", 0.0)
    with running(supervisor(tmp_path, redis_url, [Worker("late", "json.tool", ("/absent",))], text)):
        wait_for(lambda: "late ended with status 2" in text.getvalue(), timeout_s=30, what="report of the end")
    assert "starting it again" in text.getvalue()


def test_only_a_worker_that_may_finish_is_left_alone_after_status_0(
    tmp_path, redis_url, text, monkeypatch
) -> None:
    monkeypatch.setattr("services.up._STATUS_EVERY_S", 0.1)
    workers = [Worker("ingest", "this"), Worker("sensors", "this", may_finish=True)]
    with running(supervisor(tmp_path, redis_url, workers, text)):
        wait_for(
            lambda: text.getvalue().count("ingest ended with status 0; starting it again") > 1,
            timeout_s=30,
            what="second end of ingest",
        )
    assert text.getvalue().count("sensors has finished") == 1
    assert "sensors ended" not in text.getvalue()


def test_embedded_server_that_dies_is_started_again_at_the_same_address(tmp_path, text, monkeypatch) -> None:
    monkeypatch.setattr("services.up._STATUS_EVERY_S", 0.1)
    state_path = tmp_path / "redis" / "server.json"
    with running(supervisor(tmp_path, "", [], text)):
        wait_for(lambda: "pairs/s" in text.getvalue(), timeout_s=20, what="status line")
        before = orjson.loads(state_path.read_bytes())
        os.kill(before["pid"], signal.SIGKILL)

        def answers() -> bool:
            with contextlib.suppress(redis.RedisError), redis.Redis(port=before["port"]) as client:
                return bool(client.ping())
            return False

        wait_for(answers, timeout_s=20, what="server")
        wait_for(lambda: text.getvalue().rstrip().endswith("no model live yet"), timeout_s=20, what="status line")
    assert "the embedded server ended with status -9; starting it again" in text.getvalue()
    assert processes_of(tmp_path) == []


_STOPPING = """
import signal, sys, threading
from pathlib import Path
name, friend, path = sys.argv[1], sys.argv[2], Path(sys.argv[3])
def note(word):
    with path.open("a") as file:
        file.write(f"{name} {word}\\n")
told = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: None if name == "deaf" else told.set())
note("runs")
while not told.wait(0.02):
    pass
note("told")
for _ in range(1000):
    if f"{friend} told" in path.read_text():
        break
    threading.Event().wait(0.02)
note("gone")
"""


def test_workers_stop_in_the_order_of_the_flow_and_those_of_one_stage_together(
    tmp_path, redis_url, text, monkeypatch
) -> None:
    (tmp_path / "stopping.py").write_text(_STOPPING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    path = tmp_path / "notes"
    friends = {"sensors": "sensors", "ingest": "ingest", "trainer": "api", "api": "trainer"}
    stages = {"sensors": 0, "ingest": 1, "trainer": 2, "api": 2}
    workers = [
        Worker(name, "stopping", (name, friend, str(path)), stage=stages[name]) for name, friend in friends.items()
    ]
    workers.append(Worker("deaf", "stopping", ("deaf", "deaf", str(path)), stage=3, stop_timeout_s=0.1))
    with running(supervisor(tmp_path / "var", redis_url, workers, text)):
        wait_for(lambda: path.exists() and path.read_text().count("runs") == 5, timeout_s=30, what="workers")
    notes = path.read_text().splitlines()[5:]
    assert notes[:4] == ["sensors told", "sensors gone", "ingest told", "ingest gone"]
    assert {*notes[4:6]} == {"trainer told", "api told"}
    assert {*notes[6:]} == {"trainer gone", "api gone"}
    assert "deaf did not stop; killed" in text.getvalue()
    assert text.getvalue().count("did not stop") == 1


def test_address_of_ip_version_6_is_listened_at(tmp_path, redis_url, text) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    settings = CoreSettings(data_dir=tmp_path, REDIS_URL=redis_url)  # type: ignore[call-arg]
    console = Console(file=text, width=200)
    with running(Supervisor(settings, [], address=("::1", free_port()), console=console)):
        wait_for(lambda: "Ctrl-C" in text.getvalue(), timeout_s=10, what="greeting")
    assert "http://[::1]:" in text.getvalue()


def test_second_up_in_the_same_folder_is_refused(tmp_path, redis_url, text) -> None:
    first = supervisor(tmp_path, redis_url, [], text)
    thread = threading.Thread(target=first.run)
    thread.start()
    try:
        wait_for(lambda: "Ctrl-C" in text.getvalue(), timeout_s=10, what="greeting")
        with pytest.raises(SettingsError, match="another `echosight up` runs"):
            supervisor(tmp_path, redis_url, [], io.StringIO()).run()
    finally:
        first.stop()
        thread.join(30)


def test_port_that_is_taken_is_named_before_anything_starts(tmp_path, redis_url, text) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = CoreSettings(data_dir=tmp_path)
        blocked = Supervisor(settings, [], address=taken.getsockname(), console=Console(file=text))
        with pytest.raises(SettingsError, match="cannot listen on"):
            blocked.run()
    assert not (tmp_path / "redis").exists()
