"""The frozen encoder's output, computed once per image and kept beside the store.

    store/SITE/encodings/ENCODER.bin   rows of (id, mirrored, checksum, vector in float16), only appended to

One writer, the trainer. A torn or damaged row is skipped: its image is encoded again. The file is written anew
when most of its rows belong to pairs that the store has dropped.
"""

import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np
import numpy.typing as npt

from services.core.files import write_atomically
from services.core.frames import FrameId

Vector = npt.NDArray[np.float16]
_HEAD = [("captured_at_ns", "<i8"), ("seq", "<i8"), ("mirrored", "<u4"), ("crc", "<u4")]


class EncodingCache:
    """Vectors (dim,) float16 of one site under one encoder, by frame and orientation."""

    def __init__(self, store_dir: Path, *, site: str, encoder_id: str, dim: int) -> None:
        self._path = store_dir / site / "encodings" / f"{encoder_id}.bin"
        self._row = np.dtype([*_HEAD, ("vector", "<f2", (dim,))])
        self._vectors: dict[tuple[FrameId, bool], Vector] = {}
        self._load()

    def _load(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            return
        data = self._path.read_bytes()
        num_rows, torn = divmod(len(data), self._row.itemsize)
        if torn:  # a crash cut the last append short; cut it off so that the next rows stay aligned
            with self._path.open("r+b") as file:
                file.truncate(num_rows * self._row.itemsize)
        for row in np.frombuffer(data[: num_rows * self._row.itemsize], self._row):
            if zlib.crc32(row["vector"].tobytes()) == int(row["crc"]):
                frame_id = FrameId(int(row["captured_at_ns"]), int(row["seq"]))
                self._vectors[frame_id, bool(row["mirrored"])] = row["vector"]

    def __len__(self) -> int:
        return len(self._vectors)

    def get(self, frame_id: FrameId, *, mirrored: bool) -> Vector | None:
        return self._vectors.get((frame_id, mirrored))

    def append(self, encodings: list[tuple[FrameId, bool, Vector]]) -> None:
        """Keep new vectors. Not synced: what a power cut takes is computed again."""
        rows = self._rows(encodings)
        for row, (frame_id, mirrored, _) in zip(rows, encodings, strict=True):
            self._vectors[frame_id, mirrored] = row["vector"]
        with self._path.open("ab") as file:
            file.write(rows.tobytes())

    def _rows(self, encodings: list[tuple[FrameId, bool, Vector]]) -> npt.NDArray[np.void]:
        rows = np.zeros(len(encodings), self._row)
        for row, (frame_id, mirrored, vector) in zip(rows, encodings, strict=True):
            row["captured_at_ns"], row["seq"] = frame_id
            row["mirrored"] = mirrored
            row["vector"] = vector
            row["crc"] = zlib.crc32(row["vector"].tobytes())
        return rows

    def forget_all_but(self, live: Collection[FrameId]) -> None:
        """Let go of vectors whose pair is gone; rewrite the file once they are the majority."""
        if len(self._vectors) <= 2 * len(live) + 1024:
            return
        kept = {key: vector for key, vector in self._vectors.items() if key[0] in live}
        rows = self._rows([(frame_id, mirrored, vector) for (frame_id, mirrored), vector in kept.items()])
        write_atomically(self._path, rows.tobytes())
        self._vectors = dict(zip(kept, rows["vector"], strict=True))
