"""`echosight status` on what lies on disk, and errors that tell the next step."""

import os
import subprocess
import sys
from pathlib import Path

import orjson

from services.core.store import StoreLimits, StoreWriter
from tests.conftest import label, pair


def echosight(*arguments: str, data_dir: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments],
        env={**os.environ, "ECHOSIGHT_DATA_DIR": str(data_dir), "REDIS_URL": "", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_status_tells_what_is_stored_without_a_server(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "store", "north", limits=StoreLimits(min_free_bytes=0))
    writer.append([pair(0), pair(100, seq=1)])
    writer.append_labels([label(0, "car")])
    writer.close()
    done = echosight("status", "--json", data_dir=tmp_path)
    assert done.returncode == 0, done.stderr
    found = orjson.loads(done.stdout)
    assert found["store"] | {"bytes": 0} == {"pairs": 2, "bytes": 0, "sites": ["north"], "labels": 1}
    assert "echosight up" in found["streams"]
    assert "2 pairs" in echosight("status", data_dir=tmp_path).stdout


def test_bad_setting_is_one_line_with_the_variable_its_value_and_the_remedy(tmp_path: Path) -> None:
    done = echosight("ingest", data_dir=tmp_path, ECHOSIGHT_WINDOW_MS="-3")
    assert done.returncode == 2
    assert "ECHOSIGHT_WINDOW_MS is '-3'" in done.stderr
    assert "README" in done.stderr
    assert "Traceback" not in done.stderr


def test_worker_without_a_server_says_how_to_get_one(tmp_path: Path) -> None:
    done = echosight("ingest", data_dir=tmp_path)
    assert done.returncode == 2
    assert "echosight up" in done.stderr
