"""Files that other processes read: written aside, synced, renamed into place."""

import os
from collections.abc import Iterable
from pathlib import Path

Bytes = bytes | memoryview


def write_atomically(path: Path, data: Bytes | Iterable[Bytes], *, mode: int = 0o666) -> None:
    """Replace `path` by `data` or by its parts: a reader sees the old file or the new one, after any crash too.

    mode: who may do what with it, less the umask.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    with open(aside, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.writelines([data] if isinstance(data, Bytes) else data)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    sync_directory(path.parent)


def remove_asides(path: Path) -> None:
    """Remove what writers of `path` that were killed have left beside it; nobody else may be writing it."""
    for aside in path.parent.glob("*.aside"):
        if aside.name.startswith(f".{path.name}."):
            aside.unlink(missing_ok=True)


def sync_tree(directory: Path) -> None:
    """Sync every file in `directory`, then the directory itself."""
    for path in directory.iterdir():
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Make a rename or a new file in `directory` survive a power cut."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
