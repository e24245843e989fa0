"""The frozen encoder's output, computed once per image and kept beside the store.

A vector is found by the frame that the image belongs to, or by the image's content: a recording that is played
again, under other ids, costs no encoding. One writer, the trainer; `services.core.encodings` has the file's
layout. A torn or damaged row is skipped: its image is encoded again, if it is still there. The file is written
anew when most of its rows belong to pairs that the store has dropped, and when it went with its site's directory
and the site has come again.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from services.core.encodings import (
    DIRECTORY,
    HEADER_BYTES,
    UNKNOWN_DIGEST,
    VERSION,
    EncodingRows,
    checksum,
    header_of,
    read_header,
    row_dtype,
)
from services.core.errors import StoreError
from services.core.files import remove_asides, write_atomically
from services.core.frames import FrameId
from trainer.vectors import Vector, Vectors

__all__ = ["Encoded", "EncodingCache", "Vector"]

_ROWS_AT_ONCE = 1024
_MANY_DEAD = 1024


class Encoded(NamedTuple):
    """What the encoder made of one image, mirrored or not. vector: (D,) float16. digest: of the image's bytes."""

    frame_id: FrameId
    mirrored: bool
    vector: Vector
    digest: int = UNKNOWN_DIGEST


class EncodingCache:
    """Vectors (dim,) float16 of one site under one encoder, by frame, or by content, and orientation.

    num_taken_over: rows of a file of version 2, whose digests are not known.
    Raises StoreError for a file of an unknown version or of another dim.
    """

    def __init__(
        self,
        store_dir: Path,
        *,
        site: str,
        encoder_id: str,
        dim: int,
        is_live: Callable[[FrameId], bool] = lambda _: True,
    ) -> None:
        """is_live: whether a frame is still stored; others are not loaded."""
        self._path = store_dir / site / DIRECTORY / f"{encoder_id}.bin"
        self._dim = dim
        self._row = row_dtype(dim)
        self._num_rows = 0
        self.num_taken_over = 0
        self.vectors = Vectors(dim)
        self._slots: tuple[dict[FrameId, int], dict[FrameId, int]] = ({}, {})
        self._by_digest: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self._load(is_live)

    def __len__(self) -> int:
        return len(self.vectors)

    def slot(self, frame_id: FrameId, *, mirrored: bool) -> int | None:
        return self._slots[mirrored].get(frame_id)

    def get(self, frame_id: FrameId, *, mirrored: bool) -> Vector | None:
        """A view, good until the frame is forgotten."""
        slot = self.slot(frame_id, mirrored=mirrored)
        return None if slot is None else self.vectors[slot]

    def digest(self, frame_id: FrameId) -> int | None:
        """Of the frame's image; UNKNOWN_DIGEST if an earlier version encoded it, None if nothing did."""
        for slots in self._slots:
            if (slot := slots.get(frame_id)) is not None:
                return self.vectors.digest(slot)
        return None

    def find(self, digest: int, *, mirrored: bool) -> Vector | None:
        """The vector of an image with this content, whatever frame it belongs to."""
        slot = self._by_digest[mirrored].get(digest)
        return None if slot is None else self.vectors[slot]

    def append(self, encodings: Sequence[Encoded]) -> None:
        """Keep new vectors. Not synced: what a power cut takes is computed again.

        Raises StoreError if the disk refuses; the vectors are known all the same.
        """
        for encoding in encodings:
            self._keep(encoding)
        try:
            self._write(memoryview(self._rows(encodings).tobytes()))
        except FileNotFoundError:
            self._rewrite()
        except OSError as error:
            raise self._refused(error) from error

    def forget(self, frame_ids: Iterable[FrameId]) -> None:
        """Let go of the vectors of pairs that are gone; rewrite the file once those are the majority.

        Raises StoreError if the disk refuses.
        """
        for frame_id in frame_ids:
            self._drop(frame_id, mirrored=False)
            self._drop(frame_id, mirrored=True)
        if self._num_rows > 2 * len(self) + _MANY_DEAD:
            self._rewrite()

    def _keep(self, encoding: Encoded) -> None:
        slots, by_digest = self._slots[encoding.mirrored], self._by_digest[encoding.mirrored]
        self._drop(encoding.frame_id, mirrored=encoding.mirrored)
        slot = self.vectors.put(encoding.vector, digest=encoding.digest)
        slots[encoding.frame_id] = slot
        if encoding.digest != UNKNOWN_DIGEST:
            by_digest[encoding.digest] = slot

    def _drop(self, frame_id: FrameId, *, mirrored: bool) -> None:
        slot = self._slots[mirrored].pop(frame_id, None)
        if slot is not None:
            digest, by_digest = self.vectors.digest(slot), self._by_digest[mirrored]
            if by_digest.get(digest) == slot:
                del by_digest[digest]
            self.vectors.free(slot)

    def _load(self, is_live: Callable[[FrameId], bool]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        remove_asides(self._path)
        head = b""
        if self._path.exists():
            with self._path.open("rb") as file:
                head = file.read(HEADER_BYTES)
        header = read_header(head, path=self._path)
        if header is None:  # new, or from before it had a header: all is computed again
            write_atomically(self._path, header_of(self._dim))
            return
        version, dim = header
        if dim != self._dim:
            raise StoreError(
                f"encodings {self._path} have {dim} numbers each, expected {self._dim}",
                remedy="delete the file: it is computed again",
            )
        for row in self._read_rows(version):
            frame_id = FrameId(int(row["captured_at_ns"]), int(row["seq"]))
            if is_live(frame_id) and checksum(row) == int(row["sum"]):
                digest = UNKNOWN_DIGEST if version != VERSION else int(row["digest"])
                self._keep(Encoded(frame_id, bool(row["mirrored"]), row["vector"], digest))
        if version != VERSION:
            self.num_taken_over = len(self)
            self._rewrite()

    def _read_rows(self, version: int) -> Iterator[np.void]:
        row = row_dtype(self._dim, version=version)
        with self._path.open("rb") as file:
            file.seek(HEADER_BYTES)
            while data := file.read(_ROWS_AT_ONCE * row.itemsize):
                rows = np.frombuffer(data, row, count=len(data) // row.itemsize)
                self._num_rows += len(rows)
                yield from rows

    def _write(self, pending: memoryview) -> None:
        """Whole rows behind those that are there, over what a crash left of a torn one."""
        end = HEADER_BYTES + self._num_rows * self._row.itemsize
        fd = os.open(self._path, os.O_WRONLY)
        try:
            while pending:
                written = os.pwrite(fd, pending, end)
                end += written
                pending = pending[written:]
        finally:  # whole rows of a torn append stay: the store may have dropped their images already
            self._num_rows = (end - HEADER_BYTES) // self._row.itemsize
            os.close(fd)

    def _rewrite(self) -> None:
        """The live rows alone, in some thousand rows at a time; nothing if the site's directory was removed."""
        try:
            self._path.parent.mkdir(exist_ok=True)
            write_atomically(self._path, self._parts())
            self._num_rows = len(self)
        except FileNotFoundError:
            self._num_rows = 0
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> StoreError:
        return StoreError(f"cannot write to {self._path}: {error.strerror}", remedy="free some disk")

    def _parts(self) -> Iterator[bytes]:
        yield header_of(self._dim)
        part: list[Encoded] = []
        for mirrored in (False, True):
            for frame_id, slot in self._slots[mirrored].items():
                part.append(Encoded(frame_id, mirrored, self.vectors[slot], self.vectors.digest(slot)))
                if len(part) == _ROWS_AT_ONCE:
                    yield self._rows(part).tobytes()
                    part = []
        yield self._rows(part).tobytes()

    def _rows(self, encodings: Sequence[Encoded]) -> EncodingRows:
        rows: EncodingRows = np.zeros(len(encodings), self._row)
        for row, (frame_id, mirrored, vector, digest) in zip(rows, encodings, strict=True):
            row["captured_at_ns"], row["seq"] = frame_id
            row["mirrored"] = mirrored
            row["digest"] = digest
            row["vector"] = vector
            row["sum"] = checksum(row)
        return rows
