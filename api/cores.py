"""How many cores this process may really use. The host's count is wrong in a container."""

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_cores(cgroup: Path = CGROUP) -> int:
    """The affinity mask, cut to the cgroup's CPU quota (version 2 or 1) where there is one; at least 1."""
    cores = len(os.sched_getaffinity(0))
    quota = _quota_v2(cgroup) or _quota_v1(cgroup)
    return max(1, min(cores, math.ceil(quota))) if quota else cores


def _quota_v2(cgroup: Path) -> float:
    try:
        quota_us, period_us = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return 0.0
    return 0.0 if quota_us == "max" else int(quota_us) / int(period_us)


def _quota_v1(cgroup: Path) -> float:
    try:
        quota_us = int((cgroup / "cpu" / "cpu.cfs_quota_us").read_text())
        period_us = int((cgroup / "cpu" / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return 0.0
    return max(0.0, quota_us / period_us)
