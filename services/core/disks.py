"""What the store asks of a disk: which file system it is, what files take of it, and holes in files.

Knows files and bytes, not pairs.
"""

import ctypes
import errno
import os
import re
import resource
import shutil
from pathlib import Path

from services.core.errors import StoreError

NETWORK_FILE_SYSTEMS = frozenset(
    (
        *("afs", "beegfs", "ceph", "cifs", "coda", "glusterfs", "lustre", "ncpfs", "nfs", "nfs4", "orangefs"),
        *("smb3", "smbfs", "fuse.ceph", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs"),
    )
)
_MOUNTS = Path("/proc/self/mountinfo")
_MAX_DESCRIPTORS = 65536
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02
_BLOCK = 512  # of st_blocks, whatever the file system's own blocks are
_ZEROS = bytes(1024 * 1024)


def require_local_disk(path: Path, *, mounts: Path = _MOUNTS) -> None:
    """Raise StoreError if `path` lies on a network file system: another host would see a take-over too late."""
    try:
        found = file_system_of(path.resolve(), mountinfo=mounts.read_text(errors="surrogateescape"))
    except OSError:  # no such list on this system
        return
    if found is not None and found[0] in NETWORK_FILE_SYSTEMS:
        raise StoreError(
            f"the store {path} lies on a network file system ({found[0]}, mounted at {found[1]})",
            remedy="put it on a disk of this machine, by ECHOSIGHT_DATA_DIR or a volume",
        )


def file_system_of(path: Path, *, mountinfo: str) -> tuple[str, str] | None:
    """(type, mount point) of the file system that holds `path`, an absolute path without links.

    mountinfo: as /proc/self/mountinfo has it; see proc(5).
    """
    found = None
    for line in mountinfo.splitlines():
        fields, separator, source = line.partition(" - ")
        columns = fields.split(" ")
        if not separator or len(columns) < 5 or not source:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), columns[4])
        # The longest wins; of two mounts on one point the later one lies on top.
        if path.is_relative_to(point) and (found is None or len(point) >= len(found[1])):
            found = (source.split(" ")[0], point)
    return found


def file_bytes(stat: os.stat_result) -> int:
    """What a file takes of the disk: holes take nothing."""
    return min(stat.st_size, stat.st_blocks * _BLOCK)


def tree_bytes(path: Path) -> int:
    """What a file, or all files under a directory, take of the disk. Files may come and go meanwhile."""
    try:
        if not path.is_dir():
            return file_bytes(path.lstat())
        with os.scandir(path) as entries:
            return sum(tree_bytes(Path(entry.path)) for entry in entries)
    except FileNotFoundError:
        return 0


def free_bytes(directory: Path) -> int:
    return shutil.disk_usage(directory).free


def erase(fd: int, offset: int, num_bytes: int) -> None:
    """Make bytes of a file read as zeros, and give their blocks back where the file system can.

    Raises OSError. Not synced.
    """
    if num_bytes <= 0:
        return
    if _fallocate is not None:
        if _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, num_bytes) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code))
    end = offset + num_bytes
    while offset < end:
        offset += os.pwrite(fd, _ZEROS[: end - offset], offset)


def allow_descriptors() -> None:
    """Raise this process's soft limit of open files: many sites have many segments, many clients many sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _find_fallocate() -> "ctypes._NamedFuncPointer | None":
    """fallocate(2), which Python has no name for."""
    try:
        function = ctypes.CDLL(None, use_errno=True).fallocate
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int
    return function


_fallocate = _find_fallocate()
