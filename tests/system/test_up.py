"""`echosight up`: from a simulated radar frame in to an answer out, stopped without a trace, and continued."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from services.core.registry import Registry
from services.core.store import StoreReader
from services.sensors.simulator import Scene, load_site
from tests.system.conftest import free_port, is_ready, processes_of, wait_for

pytestmark = pytest.mark.system

_SMALL = {
    "ECHOSIGHT_MIN_PAIRS": "48",
    "ECHOSIGHT_MIN_PUBLISH_STEPS": "16",
    "ECHOSIGHT_MIN_LABELS": "8",
    "ECHOSIGHT_BATCH_SIZE": "16",
    "ECHOSIGHT_CHECKPOINT_EVERY_S": "2",
    "ECHOSIGHT_MIN_FREE_BYTES": "0",
}


def start(data_dir: Path, port: int) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    environment |= {"ECHOSIGHT_DATA_DIR": str(data_dir), **_SMALL}
    return subprocess.Popen(
        [sys.executable, "-m", "services.cli", "up", "--port", str(port), "--label-share", "0.5"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stop(process: "subprocess.Popen[str]", data_dir: Path) -> str:
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert processes_of(data_dir) == []
    return output


def test_simulated_site_is_learnt_and_served_and_a_second_start_continues(tmp_path: Path) -> None:
    data_dir, port = tmp_path / "var", free_port()
    process = start(data_dir, port)
    try:
        wait_for(lambda: is_ready(port), timeout_s=240, what="live model")
        body = io.BytesIO()
        np.save(body, Scene(load_site("demo"), seed=7).radar(5.0))
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/classify?site=demo", content=body.getvalue(), timeout=30)
        assert answer.status_code == 200, answer.text
        assert answer.json()["site"] == {"name": "demo", "known": True}
        assert sum(answer.json()["probabilities"].values()) == pytest.approx(1, abs=1e-3)
        refused = httpx.post(f"http://127.0.0.1:{port}/v1/classify", content=body.getvalue()[:-5], timeout=30)
        assert refused.headers["content-type"] == "application/problem+json"
    finally:
        output = stop(process, data_dir)
    assert "pairs/s" in output
    assert "chance" in output

    registry = Registry(data_dir / "models", "radar")
    champion = registry.aliases()["champion"]
    parity = registry.manifest(champion).parity
    assert parity is not None
    assert parity.batch_sizes == (1, 8)
    assert parity.num_frames >= 8
    reader = StoreReader(data_dir / "store")
    stored = reader.refresh()
    reader.close()

    process = start(data_dir, port)
    try:
        wait_for(lambda: is_ready(port), timeout_s=60, what="live model after a second start")
        log = data_dir / "logs" / "trainer.log"
        wait_for(lambda: "resumed" in log.read_text(), timeout_s=60, what="resumed trainer")
    finally:
        stop(process, data_dir)
    again = StoreReader(data_dir / "store")
    assert again.refresh() >= stored
    again.close()
    assert registry.versions()[0] == 1
