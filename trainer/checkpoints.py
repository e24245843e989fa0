"""The trainer's own state on disk, for a resume: one file, replaced whole, the one before kept.

data_dir/trainer/NAME/checkpoint.pt   tensors and plain values; read with weights_only

A save copies the state and returns; a thread writes it, one at a time.
"""

import io
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.core.files import remove_asides, write_atomically
from services.core.logs import Log

_FORMAT_VERSION = 3


class Checkpoints:
    """Saves and finds the state of one model's trainer."""

    def __init__(self, data_dir: Path, *, name: str, log: Log) -> None:
        self._path = data_dir / "trainer" / name / "checkpoint.pt"
        self._previous = self._path.with_suffix(".previous.pt")
        remove_asides(self._path)
        self._log = log
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._saved_s = time.monotonic()

    @property
    def age_s(self) -> float:
        """Since the last save that is on disk, or since the start."""
        return time.monotonic() - self._saved_s

    @property
    def is_busy(self) -> bool:
        """Whether the last save is still being written."""
        return self._writing is not None and not self._writing.done()

    def save(self, state: dict[str, Any]) -> None:
        """Copy `state` to the host and write it on the thread, after the save before. A failure is logged."""
        self.wait()
        self._writing = self._pool.submit(self._write, _on_host({"format_version": _FORMAT_VERSION, **state}))

    def wait(self) -> None:
        """Return once nothing is being written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                writing.result()
            except OSError as error:
                self._log.error("checkpoint_not_saved", path=str(self._path), reason=str(error))

    def close(self) -> None:
        """Return once all is written."""
        self.wait()
        self._pool.shutdown()

    def set_aside(self) -> Path:
        """Put what is there under another name, for it does not fit what learns now; return where."""
        self.wait()
        unfit = self._path.with_suffix(".unfit.pt")
        for path in (self._previous, self._path):  # the newest last: it stays
            if path.exists():
                path.replace(unfit)
        return unfit

    def load(self) -> dict[str, Any] | None:
        """The newest whole state, or None. A damaged or unknown file is said aloud and passed over."""
        self.wait()
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

    def _write(self, state: dict[str, Any]) -> None:
        """1. keep the old file under another name, 2. put the new one in its place: one is always whole."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        if self._path.exists():
            self._previous.unlink(missing_ok=True)
            self._previous.hardlink_to(self._path)
        write_atomically(self._path, buffer.getbuffer())
        self._saved_s = time.monotonic()


def _on_host(value: Any) -> Any:
    """The same in memory of its own: the learner goes on changing what it was taken from."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_host(item) for item in value)
    return value
