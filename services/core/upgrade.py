"""A store of version 1, made one of version 2: its segments move to where the writer is, and stay as they are.

    store/SITE/*.seg *.idx labels.jsonl   ->   store/SITE/writer-TOKEN/

Its writers held a lock on writer.lock. One that still runs must be stopped first: it knows no fence.
"""

import contextlib
import fcntl
from pathlib import Path

from services.core.errors import StoreError
from services.core.files import sync_directory
from services.core.labels import FILE_NAME

_LOCK = "writer.lock"


def move_version_1(site_dir: Path, directory: Path) -> int:
    """Move what lies beside the writer's directory into it; return how many files. Begun twice, it goes on.

    Raises StoreError if a writer of version 1 still runs, or a name is taken; OSError.
    """
    _refuse_old_writer(site_dir)
    # A reader finds a segment by its index: that moves last.
    found = [*sorted(site_dir.glob("*.seg")), *sorted(site_dir.glob("*.idx")), *site_dir.glob(FILE_NAME)]
    for path in found:
        if (directory / path.name).exists():
            raise StoreError(
                f"{path} and {directory / path.name} are both there",
                remedy="an older Echosight wrote beside this one; move one of the two away",
            )
        path.rename(directory / path.name)
    if found:
        sync_directory(directory)
        sync_directory(site_dir)
    return len(found)


def _refuse_old_writer(site_dir: Path) -> None:
    path = site_dir / _LOCK
    with contextlib.suppress(FileNotFoundError), path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"a process of an older version writes site {site_dir.name} ({path} is locked)",
                remedy="stop it first: it does not know when it was replaced",
            ) from None
        path.unlink()
