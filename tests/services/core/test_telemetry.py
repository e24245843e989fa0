"""Nobody is told what runs here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.api.tiny import tiny_model

RUN = """
import importlib, sys
importlib.import_module(sys.argv[1])
import onnxruntime
onnxruntime.InferenceSession(sys.stdin.buffer.read())
"""


@pytest.mark.parametrize("module", ["api.app", "services.ingest.detector", "trainer.quantize"])
def test_onnxruntime_leaves_no_id_in_the_home_directory(tmp_path: Path, module: str) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_", "CI"))
    }
    subprocess.run(
        [sys.executable, "-c", RUN, module],
        input=tiny_model(1),
        env=environment | {"HOME": str(tmp_path)},
        check=True,
    )
    left = [path for path in tmp_path.rglob("*") if "onnxruntime" in str(path).lower()]
    assert left == []
