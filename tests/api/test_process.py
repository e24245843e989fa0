"""`python -m api` as a process: what it imports, what a real client sees, and how it stops."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.api.tiny import export_command, heatmap, npy, publish_champion, registry_of
from tests.system.conftest import wait_for

LOG = "api.log"
"""Below the data folder of an `api_process`."""


@contextmanager
def api_process(
    data_dir: Path, *, wait_until: str = "model live", **environment: str
) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """A running API on a free port; yields the process and its port, once the log says `wait_until`."""
    log_path = data_dir / LOG
    with log_path.open("w") as log:  # a pipe that nobody empties would block the server
        process = subprocess.Popen(
            [sys.executable, "-m", "api", "--port", "0"],
            env=os.environ | {"ECHOSIGHT_DATA_DIR": str(data_dir), "REDIS_URL": ""} | environment,
            stderr=log,
        )

    def has_begun() -> bool:
        seen = log_path.read_text()
        assert process.poll() is None, seen
        return wait_until in seen and "http://127.0.0.1:" in seen

    try:
        wait_for(has_begun, timeout_s=60, what="the API")
        yield process, int(log_path.read_text().split("http://127.0.0.1:")[1].split()[0])
    finally:
        process.kill()
        process.wait()


def test_the_server_imports_neither_torch_nor_the_trainer() -> None:
    code = "import sys, api.__main__, api.app; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "onnxruntime" in imported
    assert not imported & {"torch", "torchvision", "trainer"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("ECHOSIGHT_API_PORT", "many"), ("REDIS_URL", "nonsense://x"), ("ECHOSIGHT_API_HOST", "192.0.2.7")],
)
def test_a_bad_setting_ends_the_process_with_its_name(name: str, value: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "api"],
        env=os.environ | {name: value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"{name} is '{value}'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_connection_lives_through_refusals_and_sigterm_lets_the_last_request_finish(tmp_path: Path) -> None:
    publish_champion(registry_of(tmp_path))
    body = npy(heatmap())
    with api_process(tmp_path, ECHOSIGHT_MAX_BODY_BYTES="100000") as (process, port):
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20.0) as client:
            assert client.post("/v1/classify", content=bytes(200_000)).status_code == 413
            assert client.post("/v1/classify", content=iter([bytes(50_000)] * 3)).status_code == 413
            assert client.post("/v1/classify", content=iter([body[:50], body[50:]])).status_code == 200
        with socket.create_connection(("127.0.0.1", port), timeout=20.0) as connection:
            head = f"POST /v1/classify HTTP/1.1\r\nhost: api\r\ncontent-length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body[:40])
            # A second request that was answered shows that the server has seen the first.
            assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
            process.send_signal(signal.SIGTERM)
            _until_refused(port)
            connection.sendall(body[40:])
            answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert process.wait(timeout=20.0) == 0
        assert "stopped" in (tmp_path / LOG).read_text()


def test_an_export_dies_with_a_server_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "1.hang").touch()
    code = (
        "import sys, uvloop; from pathlib import Path; from api.releases.exporter import Exporter\n"
        "path = Path(sys.argv[1])\n"
        "given = {'registry_dir': path, 'name': 'radar', 'store_dir': path, 'timeout_s': 60, 'threads': 1}\n"
        "uvloop.run(Exporter(sys.argv[2:], **given).export(1))"
    )
    server = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), *export_command(tmp_path)])
    pid_path = tmp_path / "1.pid"
    try:
        wait_for(lambda: pid_path.exists() and pid_path.read_text(), timeout_s=20, what="export")
    finally:
        server.kill()
        server.wait()
    wait_for(lambda: not _runs(int(pid_path.read_text())), timeout_s=20, what="end of the export")


def _runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def _until_refused(port: int) -> None:
    for _ in range(10_000):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5.0).close()
        except ConnectionError:  # refused, or reset with the listener that it waited at
            return
    raise AssertionError("the server still listens")
