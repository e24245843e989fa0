"""Rubbish for as long as one likes: the long version of tests/system/test_soak.py.

    python benchmarks/soak.py                  one minute
    python benchmarks/soak.py --minutes 60     an hour

Two sites get every kind of bad entry that tests/system/bad_input.py knows, each with good pairs between; a third
one gets far more than its dead letters keep. After every drain: is each bad entry in the dead letters as it came,
with a reason; does the worker's count of reasons add up to what was sent; how much memory does the worker take. In
the end every good pair must be on disk. Ends with status 1 if anything is not as it should be, or if the second
half of the time has taken 64 MiB more memory than the first: an allocator keeps what huge frames once needed, but
no more than that.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the rig is the tests'

from tests.system.soak import Soak

MAX_GROWTH_BYTES = 64 * 2**20
MIN_DRAINS = 4
ROUNDS_A_DRAIN = 6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dir", type=Path, default=None, help="where the directory is made, and kept after a failure"
    )
    options = parser.parse_args()

    work_dir = Path(tempfile.mkdtemp(prefix="echosight-soak-", dir=options.dir))
    started_s = time.monotonic()
    sizes: list[int] = []
    print(f"{'minutes':>8}{'good':>10}{'bad':>10}{'MiB sent':>10}{'MiB resident':>14}")
    with Soak(work_dir, seed=options.seed) as soak:
        soak.send_odd_keys()
        while len(sizes) < MIN_DRAINS or time.monotonic() - started_s < options.minutes * 60:
            for number in range(ROUNDS_A_DRAIN):
                soak.send_round(with_huge=number == 1)
                soak.send_flood(200, num_bytes=32 * 1024)
            soak.drain()
            soak.check_letters()
            sizes.append(soak.resident_bytes())
            print(f"{(time.monotonic() - started_s) / 60:8.1f}{soak.num_good:10}{soak.num_bad:10}"
                  f"{soak.num_bytes / 2**20:10.0f}{sizes[-1] / 2**20:14.1f}", flush=True)  # fmt: skip
        faults = soak.finish()
        print(f"\n{soak.reasons()}")
    half = len(sizes) // 2
    grown_bytes = max(sizes[half:]) - max(sizes[:half])
    if grown_bytes > MAX_GROWTH_BYTES:
        faults.append(f"memory has grown by {grown_bytes / 2**20:.1f} MiB")
    for fault in faults:
        print(f"wrong: {fault}")
    if faults:
        print(f"kept: {work_dir}")
        return 1
    shutil.rmtree(work_dir)
    print(
        f"all accounted for; memory has grown by {grown_bytes / 2**20:.1f} MiB from the first half to the second"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
