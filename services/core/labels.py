"""The label log of a site: an append-only file of JSON lines beside its segments.

One writer (ingest), many readers. The last label of a frame wins. A label may arrive before or long after its
pair: the log does not care, and keeps both.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import orjson

from services.core.errors import StoreError
from services.core.frames import FrameId, Label

FILE_NAME = "labels.jsonl"
_VERSION = 1


class LabelLog:
    """Labels by frame. `refresh` takes in what another process appended since."""

    def __init__(self, site_dir: Path, *, site: str) -> None:
        self._path = site_dir / FILE_NAME
        self._site = site
        self._position = 0
        self.labels: dict[FrameId, Label] = {}

    def refresh(self) -> int:
        """Read complete new lines; return how many. Raises StoreError for a line of an unknown version."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                tail = file.read()
        except FileNotFoundError:
            return 0
        whole, newline, _ = tail.rpartition(b"\n")
        if not newline:
            return 0
        self._position += len(whole) + 1
        lines = whole.split(b"\n")
        for line in lines:
            self._take_in(line)
        return len(lines)

    def _take_in(self, line: bytes) -> None:
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            return  # the torn line of a crash: its label was never acknowledged and comes again
        if row.get("v") != _VERSION:
            raise StoreError(f"{self._path} has a line of version {row.get('v')!r}", remedy="upgrade Echosight")
        frame_id = FrameId(row["captured_at_ns"], row["seq"])
        self.labels[frame_id] = Label(
            self._site, frame_id.seq, frame_id.captured_at_ns, label=row["label"], source=row["source"]
        )

    def append(self, labels: Sequence[Label]) -> int:
        """Write new labels durably; return how many were news. Only the site's writer may call this.

        Raises StoreError if the disk does not take them; a later call may work.
        """
        try:
            return self._append(labels)
        except OSError as error:
            raise StoreError(
                f"cannot write to {self._path}: {error.strerror}", remedy="free some disk; nothing was lost"
            ) from error

    def _append(self, labels: Sequence[Label]) -> int:
        self.refresh()
        news = [label for label in labels if self.labels.get(label.id) != label]
        if not news:
            return 0
        lines = b"".join(
            orjson.dumps(
                {
                    "v": _VERSION,
                    "captured_at_ns": label.captured_at_ns,
                    "seq": label.seq,
                    "label": label.label,
                    "source": label.source,
                },
                option=orjson.OPT_APPEND_NEWLINE,
            )
            for label in news
        )
        with self._path.open("ab") as file:
            if file.tell() and file.tell() != self._position:
                lines = b"\n" + lines  # close the torn line of a crash first
            file.write(lines)
            file.flush()
            os.fdatasync(file.fileno())
        self.refresh()
        return len(news)
