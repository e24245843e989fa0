"""The trainer's own state on disk, for a resume: one file, replaced whole, the one before kept.

data_dir/trainer/NAME/checkpoint.pt   tensors and plain values; read with weights_only
"""

import io
from pathlib import Path
from typing import Any

import torch

from services.core.files import write_atomically
from services.core.logs import Log

_FORMAT_VERSION = 2


class Checkpoints:
    """Saves and finds the state of one model's trainer."""

    def __init__(self, data_dir: Path, *, name: str, log: Log) -> None:
        self._path = data_dir / "trainer" / name / "checkpoint.pt"
        self._previous = self._path.with_suffix(".previous.pt")
        self._log = log

    def save(self, state: dict[str, Any]) -> None:
        """1. keep the old file under another name, 2. put the new one in its place: one is always whole."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save({"format_version": _FORMAT_VERSION, **state}, buffer)
        if self._path.exists():
            self._previous.unlink(missing_ok=True)
            self._previous.hardlink_to(self._path)
        write_atomically(self._path, buffer.getvalue())

    def load(self) -> dict[str, Any] | None:
        """The newest whole state, or None. A damaged or unknown file is said aloud and passed over."""
        for path in (self._path, self._previous):
            if not path.exists():
                continue
            try:
                state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises many kinds for a damaged file
                self._log.error("checkpoint_damaged", path=str(path), reason=str(error)[:200])
                continue
            if state.get("format_version") == _FORMAT_VERSION:
                return state
            self._log.error("checkpoint_of_another_version", path=str(path), version=state.get("format_version"))
        return None
