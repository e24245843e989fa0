"""A real recording, all the way: replayed, paired, learnt, exported, and one of its frames classified."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from services.core.embedded import start_embedded_server
from services.core.store import StoreReader
from tests.system.conftest import free_port, is_ready, wait_for

RECORDING = os.environ.get("ECHOSIGHT_RADIATE_DIR", "")
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not RECORDING, reason="ECHOSIGHT_RADIATE_DIR does not name the real recording"),
]

_SMALL = {
    "ECHOSIGHT_MIN_PAIRS": "14",
    "ECHOSIGHT_MIN_PUBLISH_STEPS": "8",
    "ECHOSIGHT_MIN_LABELS": "8",
    "ECHOSIGHT_BATCH_SIZE": "8",
    "ECHOSIGHT_EXCLUDE_WITHIN_S": "0",
    "ECHOSIGHT_MIN_FREE_BYTES": "0",
    "ECHOSIGHT_POLL_INTERVAL_S": "0.5",
    "ECHOSIGHT_WINDOW_MS": "31",
}


@contextmanager
def worker(module: str, *arguments: str, environment: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], env=environment, stdout=file, stderr=file
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert process.returncode == 0, log.read_text()[-3000:]


def echosight(*arguments: str, environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments, "--json"],
        env=environment,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Any] = orjson.loads(done.stdout)
    return found


def test_real_recording_is_paired_learnt_and_classified(tmp_path: Path) -> None:
    server = start_embedded_server(tmp_path / "redis")
    port = free_port()
    environment = {**os.environ, **_SMALL, "REDIS_URL": server.url, "ECHOSIGHT_DATA_DIR": str(tmp_path)}
    environment["ECHOSIGHT_API_PORT"] = str(port)
    with ExitStack() as stack:
        stack.callback(server.stop)
        stack.enter_context(worker("services.ingest", environment=environment, log=tmp_path / "ingest.log"))
        stack.enter_context(worker("api", environment=environment, log=tmp_path / "api.log"))

        replayed = echosight("replay", "radiate", RECORDING, "--speed", "8", environment=environment)
        assert len(replayed["report"]["missing"]) == 50

        def counted() -> dict[str, int] | None:
            replicas = echosight("status", environment=environment)["ingest"]
            counts: dict[str, int] = replicas[0]["counts"] if replicas else {}
            decided = {
                side: sum(n for name, n in counts.items() if name.startswith(side)) for side in ("radar", "camera")
            }
            is_stored = counts.get("stored") == counts.get("radar.paired")
            return counts if decided == {"radar": 18, "camera": 50} and is_stored else None

        counts = wait_for(counted, timeout_s=30, what="decision about every frame")
        assert counts["radar.paired"] == counts["stored"] == 14
        assert counts["radar.no_partner"] == 4
        assert counts["camera.paired"] == 14
        assert counts["camera.no_partner"] + counts.get("camera.partner_taken", 0) == 36

        stack.enter_context(worker("trainer", environment=environment, log=tmp_path / "trainer.log"))
        wait_for(lambda: is_ready(port), timeout_s=300, what="live model")

        reader = StoreReader(tmp_path / "store")
        reader.refresh()
        frame = reader.pairs[0].radar()
        assert frame is not None
        assert frame.heatmap.shape == (576, 400)
        body = io.BytesIO()
        np.save(body, frame.heatmap)
        reader.close()
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/classify?site=radiate", content=body.getvalue(), timeout=60
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["label"] == "car"  # the only class that this recording has
