"""The file of encodings: which images a frozen encoder has seen, and what it made of them.

    store/SITE/encodings/ENCODER.bin   header (magic, version, dim), then rows: id, mirrored, checksum, digest,
                                       vector

What a row says is true of the image whose bytes have its digest, under whatever id that image is stored. The
trainer writes the file, and writes it anew when most rows are out of date. Version 2 had no digests; version 1 had
no header and is computed again. The store reads the ids: an image that was encoded may be dropped.
"""

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from services.core.errors import StoreError
from services.core.frames import FrameId

DIRECTORY = "encodings"
HEADER_BYTES = 32
VERSION = 3
UNKNOWN_DIGEST = 0
"""Of a row from version 2: it is found by its id alone."""
_READ_VERSIONS = (2, VERSION)
_MAGIC = b"ECHOENC"
_HEADER = struct.Struct("<7sBI20x")
_MAX_ROWS = 4096
EncodingRows = npt.NDArray[np.void]


def header_of(dim: int) -> bytes:
    return _HEADER.pack(_MAGIC, VERSION, dim)


def read_header(header: bytes, *, path: Path) -> tuple[int, int] | None:
    """Version and length of the vectors; None if there is no header. Raises StoreError for an unknown version."""
    if len(header) < HEADER_BYTES or not header.startswith(_MAGIC):
        return None
    _, version, dim = _HEADER.unpack(header[:HEADER_BYTES])
    if version not in _READ_VERSIONS:
        raise StoreError(
            f"encodings {path} have version {version}, expected {VERSION}",
            remedy="upgrade Echosight, or delete the file: it is computed again",
        )
    return int(version), int(dim)


def row_dtype(dim: int, *, version: int = VERSION) -> "np.dtype[np.void]":
    fields: list[Any] = [
        ("captured_at_ns", "<i8"),
        ("seq", "<i8"),
        ("mirrored", "<u4"),
        ("sum", "<u4"),  # over the row with this field zero
        ("digest", "<u8"),  # of the image's bytes, as they were stored
        ("vector", "<f2", (dim,)),
    ]
    return np.dtype([field for field in fields if version != 2 or field[0] != "digest"])


def digest_of(image: bytes) -> int:
    """What names an image by its content: XXH3-64 of the compressed file, never UNKNOWN_DIGEST."""
    return xxhash.xxh3_64_intdigest(image) or 1


def checksum(row: Any) -> int:
    """row: one row of an encodings file, whatever its checksum says."""
    raw = bytearray(row.tobytes())
    raw[20:24] = bytes(4)
    return xxhash.xxh3_64_intdigest(bytes(raw)) & 0xFFFFFFFF


class EncodedIds:
    """Frames whose images some encoder of a site has encoded, in the order that the trainer wrote them."""

    def __init__(self, site_dir: Path) -> None:
        self._dir = site_dir / DIRECTORY
        self._files: dict[str, _Follower] = {}

    def take(self) -> set[FrameId]:
        """Some that were not taken yet, at most some thousands of each file; they are durable now.

        Raises OSError, StoreError for an unknown version.
        """
        found: set[FrameId] = set()
        for path in sorted(self._dir.glob("*.bin")):
            follower = self._files.get(path.name)
            if follower is None or not follower.is_current():
                if follower is not None:
                    follower.close()
                try:
                    follower = self._files[path.name] = _Follower(path)
                except FileNotFoundError:
                    continue
            found |= follower.take()
        return found

    def close(self) -> None:
        for follower in self._files.values():
            follower.close()
        self._files.clear()


class _Follower:
    """One file, by position. Held open, so that a file that takes its place cannot be mistaken for it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDONLY)
        self._num_taken = 0

    def is_current(self) -> bool:
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def take(self) -> set[FrameId]:
        header = read_header(os.pread(self._fd, HEADER_BYTES, 0), path=self._path)
        if header is None or not header[1]:
            return set()
        dtype = row_dtype(header[1], version=header[0])
        size = os.fstat(self._fd).st_size
        os.fdatasync(self._fd)  # the trainer does not: what a power cut took from it, it computed again
        num = min((size - HEADER_BYTES) // dtype.itemsize - self._num_taken, _MAX_ROWS)
        if num <= 0:
            return set()
        raw = os.pread(self._fd, num * dtype.itemsize, HEADER_BYTES + self._num_taken * dtype.itemsize)
        rows = np.frombuffer(raw[: len(raw) // dtype.itemsize * dtype.itemsize], dtype)
        whole = [checksum(row) == int(row["sum"]) for row in rows]
        while whole and not whole[-1]:  # it may be under way
            whole.pop()
        if not self.is_current():  # written anew meanwhile: what was read may not be in the new file
            return set()
        self._num_taken += len(whole)
        return {
            FrameId(int(row["captured_at_ns"]), int(row["seq"]))
            for row, is_whole in zip(rows, whole, strict=False)
            if is_whole
        }

    def close(self) -> None:
        os.close(self._fd)
