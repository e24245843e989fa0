"""The seal of a segment: how much of it counts, said once, by whoever says it first.

    NAME.end   32 bytes: magic and version, rows of the index that count, bytes of the data file, checksum

A writer that was paused may go on writing into a segment that it holds open after another has taken the site over.
What it adds lies behind the seal, and nobody reads there. Linked into place, a seal is never replaced: if two
writers seal, the second goes by what the first one said.
"""

import contextlib
import os
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

import xxhash

from services.core.errors import StoreError
from services.core.files import sync_directory

_VERSION = 2
_MAGIC = b"ECHOEND"
_SEAL = struct.Struct("<7sBQQQ")


@dataclass(frozen=True, slots=True)
class Seal:
    """num_rows: of the index. num_bytes: of the data file."""

    num_rows: int
    num_bytes: int


def read_seal(directory: Path, name: str) -> Seal | None:
    """The seal of a segment; None if it has none, or a damaged one. Raises StoreError for an unknown version."""
    path = directory / f"{name}.end"
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        data = os.pread(fd, _SEAL.size, 0)
    finally:
        os.close(fd)
    if len(data) != _SEAL.size or data[:7] != _MAGIC:
        return None
    _, version, num_rows, num_bytes, checksum = _SEAL.unpack(data)
    if version != _VERSION:
        raise StoreError(
            f"seal {path} has version {version}, expected {_VERSION}",
            remedy="it was written by another version; move its segment away or upgrade",
        )
    return Seal(num_rows, num_bytes) if checksum == xxhash.xxh3_64_intdigest(data[:24]) else None


def write_seal(directory: Path, name: str, seal: Seal) -> Seal:
    """Seal a segment durably; return the seal that holds, which is another if there was one. Raises OSError."""
    head = _SEAL.pack(_MAGIC, _VERSION, seal.num_rows, seal.num_bytes, 0)[:24]
    path = directory / f"{name}.end"
    aside = directory / f".{name}.end.{os.getpid()}.{threading.get_ident()}.aside"
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.write(fd, head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head)))
        os.fsync(fd)
    finally:
        os.close(fd)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_directory(directory)
    held = read_seal(directory, name)
    if held is None:  # a damaged one stood in the way
        path.unlink()
        return write_seal(directory, name, seal)
    return held
