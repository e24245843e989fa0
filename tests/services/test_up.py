"""The supervisor: what its line says, what it restarts, what it refuses."""

import io
import socket
import threading
from pathlib import Path

import pytest
from rich.console import Console

from services.core.errors import SettingsError
from services.core.settings import CoreSettings
from services.up import Status, Supervisor, Worker
from tests.system.conftest import free_port, processes_of, wait_for


def test_line_tells_rate_store_loss_against_chance_model_and_accuracy() -> None:
    status = Status()
    assert status.line(champion=None) == "0.0 pairs/s | 0 stored | trainer is starting | no model live yet"
    status.take_in(
        [
            {"kind": "ingest", "pairs_per_s": 9.84, "pairs": 1204},
            {"kind": "trainer", "pairs": 20, "needed": 128, "labels": 3, "step": 0, "accuracy": None},
        ]
    )
    assert "waiting for pairs: 20 of 128" in status.line(champion=None)
    status.take_in(
        [{"kind": "trainer", "step": 1240, "loss": 4.519, "chance": 6.234, "accuracy": 0.834, "labels": 63}]
    )
    assert status.line(champion=7) == (
        "9.8 pairs/s | 1,204 stored | step 1,240 | loss 4.52 (chance 6.23) | live model v7"
        " | accuracy 83 % on held-out of 63 labels"
    )


@pytest.fixture
def text() -> io.StringIO:
    return io.StringIO()


def supervisor(data_dir: Path, url: str, workers: list[Worker], text: io.StringIO) -> Supervisor:
    settings = CoreSettings(data_dir=data_dir, REDIS_URL=url)  # type: ignore[call-arg]
    return Supervisor(settings, workers, address=("127.0.0.1", free_port()), console=Console(file=text, width=200))


def test_worker_that_dies_is_started_again_and_its_last_words_are_shown(tmp_path, redis_url, text) -> None:
    watched = supervisor(tmp_path, redis_url, [Worker("broken", "json.tool", ("/absent",))], text)
    thread = threading.Thread(target=watched.run)
    thread.start()
    try:
        wait_for(lambda: "broken ended with status" in text.getvalue(), timeout_s=30, what="report of the death")
    finally:
        watched.stop()
        thread.join(30)
    assert not thread.is_alive()
    assert "starting it again" in text.getvalue()
    assert "/absent" in text.getvalue()
    assert processes_of(tmp_path) == []


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
