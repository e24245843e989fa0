"""How many cores this process may really use. The host's count is wrong in a container."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def available_cores(cgroup: Path = CGROUP, own: Path = OWN) -> int:
    """The affinity mask, cut to the smallest quota (cgroup version 2 or 1) on the way to our group; at least 1.

    A part of a core counts as one. own: says which group is ours; in a container the mount often begins there.
    """
    cores = len(os.sched_getaffinity(0))
    quotas = [quota for group in _groups(cgroup, own) if (quota := _quota_v2(group) or _quota_v1(group))]
    return max(1, min(cores, math.ceil(min(quotas)))) if quotas else cores


def share_of_cores(num_processes: int) -> int:
    """What one of several equal processes may use of `available_cores`; at least 1."""
    return max(1, available_cores() // num_processes)


def _groups(cgroup: Path, own: Path) -> Iterator[Path]:
    """The roots of version 2 and 1, and every group from there down to ours."""
    roots = {"": cgroup, "cpu": cgroup / "cpu"}
    yield from roots.values()
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = roots.get("cpu" if "cpu" in controllers.split(",") else controllers)
        names = path.strip("/").split("/")
        if root is not None and ".." not in names:
            yield from (root.joinpath(*names[: depth + 1]) for depth in range(len(names)))


def _quota_v2(group: Path) -> float:
    try:
        quota_us, period_us = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return 0.0
    return 0.0 if quota_us == "max" else int(quota_us) / int(period_us)


def _quota_v1(group: Path) -> float:
    try:
        quota_us = int((group / "cpu.cfs_quota_us").read_text())
        period_us = int((group / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return 0.0
    return max(0.0, quota_us / period_us)
