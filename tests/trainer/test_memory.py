"""Freed memory is kept between steps, and given back after a release."""

import subprocess
import sys

HOLD = """
import numpy as np
from pathlib import Path
from trainer.memory import give_back_freed_memory, keep_freed_memory

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

keep_freed_memory()
before = resident_mib()
pieces = [(np.ones(2**17), np.ones(64)) for _ in range(200)]  # 1 MiB each, and what keeps them apart
small = [piece for _, piece in pieces]
del pieces
kept = resident_mib()
give_back_freed_memory()
print(kept - before, resident_mib() - before)
"""


def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", HOLD], capture_output=True, text=True, check=True)
    kept_mib, left_mib = map(float, done.stdout.split())
    assert kept_mib > 150
    assert left_mib < 50
