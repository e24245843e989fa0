"""The label log of a site: JSON lines, only appended to, and written anew when most say nothing any more.

One writer (ingest), many readers. The last label of a frame wins. A label may arrive before or long after its
pair: the log does not care, and keeps both. A reader follows by position and holds the file open; another file
under its name is read from the start.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson

from services.core.errors import StoreError
from services.core.files import write_atomically
from services.core.frames import FrameId, Label

FILE_NAME = "labels.jsonl"
_VERSION = 1
_MIN_LINES = 1024
"""A log shorter than this is never written anew."""


class LabelLog:
    """Labels by frame. `refresh` takes in what another process appended since.

    directory: where the log lies now; whoever knows that it moved says so.
    """

    def __init__(self, directory: Path, *, site: str) -> None:
        self.directory = directory
        self._site = site
        self._fd = -1
        self._position = 0
        self._written_at_s: dict[FrameId, float] = {}
        self._next_look = _MIN_LINES
        self._next_look_s = 0.0
        self.num_lines = 0
        self.labels: dict[FrameId, Label] = {}

    @property
    def path(self) -> Path:
        return self.directory / FILE_NAME

    @property
    def num_bytes(self) -> int:
        return self._position

    def refresh(self) -> int:
        """Read complete new lines; return how many. Raises StoreError for an unknown version, OSError."""
        if not self._is_current() and not self._reopen():
            return 0
        size = os.fstat(self._fd).st_size
        whole, newline, _ = os.pread(self._fd, max(0, size - self._position), self._position).rpartition(b"\n")
        if not newline:
            return 0
        lines = whole.split(b"\n")
        for line in lines:
            self._take_in(line)
        self._position += len(whole) + 1
        self.num_lines += len(lines)
        return len(lines)

    def _is_current(self) -> bool:
        """Whether the file that we follow is still the one under its name."""
        if self._fd < 0:
            return False
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return True  # it is about to move with its directory
        return os.path.samestat(there, os.fstat(self._fd))

    def _reopen(self) -> bool:
        try:
            fd = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        self.close()
        self._fd = fd
        self._position = self.num_lines = 0
        self.labels = {}
        self._written_at_s = {}
        return True

    def _take_in(self, line: bytes) -> None:
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            return  # the torn line of a crash: its label was never acknowledged and comes again
        if isinstance(row, dict) and row.get("v", _VERSION) != _VERSION:
            raise StoreError(f"{self.path} has a line of version {row.get('v')!r}", remedy="upgrade Echosight")
        try:
            frame_id = FrameId(row["captured_at_ns"], row["seq"])
            label = Label(
                self._site, frame_id.seq, frame_id.captured_at_ns, label=row["label"], source=row["source"]
            )
            written_at_s = float(row.get("written_at_s", 0.0))
        except (KeyError, TypeError, ValueError, AttributeError):
            return  # damaged: one label less
        self._written_at_s[frame_id] = written_at_s
        self.labels[frame_id] = label

    def append(self, labels: Sequence[Label]) -> int:
        """Write new labels durably; return how many were news. Only the site's writer may call this.

        Raises StoreError if the disk does not take them; a later call may work.
        """
        try:
            return self._append(labels)
        except OSError as error:
            raise StoreError(
                f"cannot write to {self.path}: {error.strerror}", remedy="free some disk; nothing was lost"
            ) from error

    def _append(self, labels: Sequence[Label]) -> int:
        self.refresh()
        news = [label for label in labels if self.labels.get(label.id) != label]
        if not news:
            return 0
        now_s = time.time()
        lines = b"".join(_line(label, written_at_s=now_s) for label in news)
        fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(fd).st_size
            if size and size != self._position:
                lines = b"\n" + lines  # close the torn line of a crash first
            pending = memoryview(lines)
            while pending:
                pending = pending[os.write(fd, pending) :]
            os.fdatasync(fd)
        finally:
            os.close(fd)
        self.refresh()
        return len(news)

    def rewrite(self) -> None:
        """Put a file of our own in place: a writer that was fenced off may still append to the one before.

        Raises OSError.
        """
        self.refresh()
        if self._fd < 0:
            return
        lines = (_line(label, written_at_s=self._written_at_s[at]) for at, label in self.labels.items())
        write_atomically(self.path, b"".join(lines))
        self.refresh()

    def compact(self, *, is_stored: Callable[[FrameId], bool], max_age_s: float) -> bool:
        """Write the log anew once most lines say nothing any more; return whether it was.

        A label says something if it is its frame's last, and the frame is stored or the label not older than
        `max_age_s`: its pair may be on its way. Looks only when the log has grown by half, or an eighth of that
        age after the last look. Raises OSError.
        """
        now_s = time.monotonic()
        if self.num_lines < _MIN_LINES or (self.num_lines < self._next_look and now_s < self._next_look_s):
            return False
        oldest_s = time.time() - max_age_s
        live = {at for at in self.labels if is_stored(at) or self._written_at_s[at] > oldest_s}
        is_due = 2 * len(live) < self.num_lines
        if is_due:
            self.labels = {at: label for at, label in self.labels.items() if at in live}
            lines = (_line(label, written_at_s=self._written_at_s[at]) for at, label in self.labels.items())
            write_atomically(self.path, b"".join(lines))
            self.refresh()
        self._next_look = self.num_lines + self.num_lines // 2
        self._next_look_s = now_s + max_age_s / 8
        return is_due

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _line(label: Label, *, written_at_s: float) -> bytes:
    row: dict[str, Any] = {
        "v": _VERSION,
        "captured_at_ns": label.captured_at_ns,
        "seq": label.seq,
        "label": label.label,
        "source": label.source,
        "written_at_s": round(written_at_s, 3),
    }
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
