"""Cores are those of the cgroup, version 1 or 2, wherever on the way the quota is, and of the affinity mask."""

import os
from pathlib import Path

import pytest

from api.cores import available_cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


def write_v2(group: Path, text: str) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "cpu.max").write_text(text)


def write_v1(group: Path, quota_us: int, period_us: int = 100_000) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "cpu.cfs_quota_us").write_text(f"{quota_us}\n")
    (group / "cpu.cfs_period_us").write_text(f"{period_us}\n")


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("50000 100000", 1), ("150000 100000", 2), ("300000 100000", 3), ("9900000 100000", 8),
     ("nonsense", 8)],
)  # fmt: skip
def test_version_2(tmp_path: Path, quota: str, cores: int) -> None:
    write_v2(tmp_path, f"{quota}\n")
    assert available_cores(tmp_path, tmp_path / "none") == cores


@pytest.mark.parametrize(("quota_us", "cores"), [(-1, 8), (90_000, 1), (250_000, 3)])
def test_version_1(tmp_path: Path, quota_us: int, cores: int) -> None:
    write_v1(tmp_path / "cpu", quota_us)
    assert available_cores(tmp_path, tmp_path / "none") == cores


def test_the_smallest_quota_on_the_way_to_our_group_counts(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/system.slice/api.service\n")
    root = tmp_path / "cgroup"
    write_v2(root / "system.slice" / "api.service", "400000 100000\n")
    assert available_cores(root, own) == 4
    write_v2(root / "system.slice", "200000 100000\n")
    assert available_cores(root, own) == 2
    write_v2(root / "other.slice", "100000 100000\n")
    assert available_cores(root, own) == 2


def test_version_1_names_our_group_with_its_controllers(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("5:memory:/elsewhere\n4:cpu,cpuacct:/docker/abc\n")
    write_v1(tmp_path / "cgroup" / "cpu" / "docker" / "abc", 200_000)
    assert available_cores(tmp_path / "cgroup", own) == 2


def test_a_group_outside_of_the_mount_is_left_alone(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/../../other\n")
    write_v2(tmp_path / "other", "100000 100000\n")
    assert available_cores(tmp_path / "a" / "b", own) == 8


def test_the_affinity_mask_is_the_most(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    write_v2(tmp_path, "400000 100000\n")
    assert available_cores(tmp_path, tmp_path / "none") == 1
