"""The frozen encoder's output, computed once per image and kept beside the store.

One writer, the trainer; `services.core.encodings` has the file's layout. A torn or damaged row is skipped: its
image is encoded again, if it is still there. The file is written anew when most of its rows belong to pairs that
the store has dropped.
"""

import os
from collections.abc import Collection
from pathlib import Path

import numpy as np
import numpy.typing as npt

from services.core.encodings import (
    DIRECTORY,
    HEADER_BYTES,
    EncodingRows,
    checksum,
    header_of,
    read_dim,
    row_dtype,
)
from services.core.errors import StoreError
from services.core.files import write_atomically
from services.core.frames import FrameId

Vector = npt.NDArray[np.float16]


class EncodingCache:
    """Vectors (dim,) float16 of one site under one encoder, by frame and orientation.

    Each vector has memory of its own: whoever keeps one does not keep the others alive.
    Raises StoreError for a file of an unknown version or of another dim.
    """

    def __init__(self, store_dir: Path, *, site: str, encoder_id: str, dim: int) -> None:
        self._path = store_dir / site / DIRECTORY / f"{encoder_id}.bin"
        self._dim = dim
        self._row = row_dtype(dim)
        self._num_rows = 0
        self._vectors: dict[tuple[FrameId, bool], Vector] = {}
        self._load()

    def _load(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        data = self._path.read_bytes() if self._path.exists() else b""
        dim = read_dim(data[:HEADER_BYTES], path=self._path)
        if dim is None:  # new, or from before it had a header: all is computed again
            write_atomically(self._path, header_of(self._dim))
            return
        if dim != self._dim:
            raise StoreError(
                f"encodings {self._path} have {dim} numbers each, expected {self._dim}",
                remedy="delete the file: it is computed again",
            )
        self._num_rows = (len(data) - HEADER_BYTES) // self._row.itemsize
        for row in np.frombuffer(data, self._row, count=self._num_rows, offset=HEADER_BYTES):
            if checksum(row) == int(row["sum"]):
                frame_id = FrameId(int(row["captured_at_ns"]), int(row["seq"]))
                self._vectors[frame_id, bool(row["mirrored"])] = row["vector"].copy()

    def __len__(self) -> int:
        return len(self._vectors)

    def get(self, frame_id: FrameId, *, mirrored: bool) -> Vector | None:
        return self._vectors.get((frame_id, mirrored))

    def append(self, encodings: list[tuple[FrameId, bool, Vector]]) -> None:
        """Keep new vectors. Not synced: what a power cut takes is computed again.

        Raises StoreError if the disk refuses; the vectors are known all the same.
        """
        for frame_id, mirrored, vector in encodings:
            self._vectors[frame_id, mirrored] = np.array(vector, np.float16)
        pending = memoryview(self._rows(encodings).tobytes())
        end = HEADER_BYTES + self._num_rows * self._row.itemsize  # over what a crash left of a torn row
        try:
            fd = os.open(self._path, os.O_WRONLY)
            try:
                while pending:
                    written = os.pwrite(fd, pending, end)
                    end += written
                    pending = pending[written:]
            finally:
                os.close(fd)
        except OSError as error:
            raise StoreError(f"cannot write to {self._path}: {error.strerror}", remedy="free some disk") from error
        finally:  # whole rows of a torn append stay: the store may have dropped their images already
            self._num_rows = (end - HEADER_BYTES) // self._row.itemsize

    def _rows(self, encodings: list[tuple[FrameId, bool, Vector]]) -> EncodingRows:
        rows: EncodingRows = np.zeros(len(encodings), self._row)
        for row, (frame_id, mirrored, vector) in zip(rows, encodings, strict=True):
            row["captured_at_ns"], row["seq"] = frame_id
            row["mirrored"] = mirrored
            row["vector"] = vector
            row["sum"] = checksum(row)
        return rows

    def forget_all_but(self, live: Collection[FrameId]) -> None:
        """Let go of vectors whose pair is gone; rewrite the file once they are the majority."""
        if len(self._vectors) <= 2 * len(live) + 1024:
            return
        kept = {key: vector for key, vector in self._vectors.items() if key[0] in live}
        rows = self._rows([(frame_id, mirrored, vector) for (frame_id, mirrored), vector in kept.items()])
        write_atomically(self._path, header_of(self._dim) + rows.tobytes())
        self._vectors = kept
        self._num_rows = len(rows)
