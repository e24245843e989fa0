"""How the files of a segment begin: what they are, and of which version.

    NAME.seg   magic, version, token of the writer that made it, when it was opened; 64 bytes in all
    NAME.idx   magic, version; 64 bytes in all

Version 1 had no token, and 16 bytes before its data.
"""

import struct
from pathlib import Path

from services.core.errors import StoreError
from services.core.records import ROW

FORMAT_VERSION = 2
HEADER_BYTES = 64
_HEADER = struct.Struct("<7sBQQ40x")
_SEG, _IDX = b"ECHOSEG", b"ECHOIDX"


def data_header(*, token: int, opened_at_ns: int) -> bytes:
    return _HEADER.pack(_SEG, FORMAT_VERSION, token, opened_at_ns)


def index_header() -> bytes:
    return _IDX + bytes([FORMAT_VERSION]) + bytes(HEADER_BYTES - len(_IDX) - 1)


def index_bytes(num_rows: int) -> int:
    """Size of an index, which is where its next row goes."""
    return HEADER_BYTES + num_rows * ROW.itemsize


def version_of(header: bytes, *, path: Path) -> int:
    """The version that a header tells; 0 if it is missing or damaged. Raises StoreError if it is unknown."""
    if len(header) <= len(_SEG) or header[: len(_SEG)] not in (_SEG, _IDX):
        return 0
    version = header[len(_SEG)]
    if version == 0:  # no version ever was: a page that the disk did not take
        return 0
    if version not in (1, FORMAT_VERSION):
        raise StoreError(
            f"segment {path} starts with {header[:8]!r}, expected version {FORMAT_VERSION} or 1",
            remedy="it was written by another version; move it away or upgrade",
        )
    return version


def maker_of(header: bytes) -> tuple[int, int]:
    """(token, opened_at_ns) that the header of a version 2 data file tells; zeros if it is damaged."""
    if len(header) != HEADER_BYTES or not header.startswith(_SEG):
        return 0, 0
    _, _, token, opened_at_ns = _HEADER.unpack(header)
    return token, opened_at_ns
