"""The embedded server: found, started, remembered, continued, reaped."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
import redis

from services.core.embedded import find_server, reap_orphan, resolve_redis_url, start_embedded_server
from services.core.errors import StreamsError
from services.core.settings import CoreSettings


def settings(data_dir: Path, redis_url: str = "") -> CoreSettings:
    return CoreSettings.read(data_dir=data_dir, redis_url=redis_url)


def fake_server(directory: Path, name: str, version: str) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(f"#!/bin/sh\necho 'Redis server v={version} sha=00000000:0 malloc=libc bits=64'\n")
    path.chmod(0o755)
    return path


def test_server_on_the_path_is_preferred_if_new_enough(tmp_path) -> None:
    new = fake_server(tmp_path / "new", "redis-server", "7.0.15")
    fake_server(tmp_path / "old", "redis-server", "6.2.1")
    assert find_server({"PATH": str(tmp_path / "new")}) == new
    assert find_server({"PATH": str(tmp_path / "old")}) == find_server({"PATH": str(tmp_path / "none")})


def test_broken_server_on_the_path_is_passed_over(tmp_path) -> None:
    path = fake_server(tmp_path / "bin", "valkey-server", "8.0.0")
    path.write_text("#!/bin/sh\nexit 1\n")
    assert find_server({"PATH": str(tmp_path / "bin")}) != path


def test_running_server_is_remembered_and_continued_by_the_next(tmp_path) -> None:
    data_dir = tmp_path / "data"
    server = start_embedded_server(data_dir / "redis")
    try:
        assert resolve_redis_url(settings(data_dir)) == server.url
        with redis.Redis.from_url(server.url) as client:
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            assert client.config_get("appendfsync") == {"appendfsync": "everysec"}
            client.xadd("kept", {"a": 1})
    finally:
        server.stop()
    assert server.process.returncode is not None
    with pytest.raises(StreamsError, match="no embedded server runs"):
        resolve_redis_url(settings(data_dir))
    again = start_embedded_server(data_dir / "redis", port=server.port, appendfsync="always")
    try:
        assert again.url == server.url
        with redis.Redis.from_url(again.url) as client:
            assert client.xlen("kept") == 1
            assert client.config_get("appendfsync") == {"appendfsync": "always"}
    finally:
        again.stop()


def test_orphan_of_a_killed_parent_is_reaped_by_the_next_start(tmp_path) -> None:
    directory = tmp_path / "redis"
    code = (
        "import os, signal; from pathlib import Path\n"
        "from services.core.embedded import start_embedded_server\n"
        f"start_embedded_server(Path({str(directory)!r})); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    orphan = orjson.loads((directory / "server.json").read_bytes())["pid"]
    assert Path(f"/proc/{orphan}/comm").read_text().strip()
    server = start_embedded_server(directory)
    try:
        assert server.process.pid != orphan
        assert not _runs(orphan)
        assert orjson.loads((directory / "server.json").read_bytes())["pid"] == server.process.pid
    finally:
        server.stop()
    assert not (directory / "server.json").exists()


def _runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_process_that_only_took_over_the_number_is_left_alone(tmp_path) -> None:
    (tmp_path / "server.json").write_bytes(orjson.dumps({"pid": os.getpid(), "port": 1}))
    assert reap_orphan(tmp_path) is None
    assert _runs(os.getpid())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"port": 5}', b'{"pid": "many"}'])
def test_damaged_state_file_is_no_server(tmp_path, content) -> None:
    (tmp_path / "redis").mkdir()
    (tmp_path / "redis" / "server.json").write_bytes(content)
    assert reap_orphan(tmp_path / "redis") is None
    with pytest.raises(StreamsError, match="REDIS_URL is not set and no embedded server runs under"):
        resolve_redis_url(settings(tmp_path))


def test_redis_url_wins_over_the_embedded_server(tmp_path) -> None:
    assert resolve_redis_url(settings(tmp_path, "redis://host:1/0")) == "redis://host:1/0"


def test_absence_names_both_remedies(tmp_path) -> None:
    with pytest.raises(StreamsError, match=r"start `echosight up` .* or set REDIS_URL"):
        resolve_redis_url(settings(tmp_path))


def test_server_that_does_not_start_is_a_clear_error_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    fake_server(tmp_path / "bin", "redis-server", "7.0.15")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    with pytest.raises(StreamsError, match=r"did not start on port \d+; read .*server\.log"):
        start_embedded_server(tmp_path / "redis")
    assert not (tmp_path / "redis" / "server.json").exists()
