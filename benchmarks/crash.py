"""Kill everything, hundreds of times, and account for every frame: the long version of tests/system/test_crash.py.

    python benchmarks/crash.py                          60 troubles of all sorts, about two minutes
    python benchmarks/crash.py --kills 300 --seed 7     more of them
    python benchmarks/crash.py --fsync everysec         the server's default: does it lose what it took?

Three sites send through one server to two or three ingest processes, while a reader reads pairs at random. Rounds
of 20 troubles each, on an empty directory each: a worker is killed, paused for longer than its lease, joined by
another, asked to leave; the server is killed and started again on its append-only file. Then all is drained, and
every frame that the server had taken must be where it belongs: a pair on disk once, byte for byte, or alone.

A round is told by its seed: --seed S --kills 20 plays it again, as far as a machine can. Recovery is the time from
a moment after a trouble until every site has a new pair. Ends with status 1 if anything was lost, doubled or torn.
"""

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the rig is the tests'

from tests.system.chaos import Outcome, Rig, Trouble

KILLS_A_ROUND = 20
KINDS: tuple[Trouble, ...] = get_args(Trouble)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="troubles in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; the next has one more")
    parser.add_argument("--replicas", type=int, default=2, help="ingest processes (default: %(default)s)")
    parser.add_argument("--only", choices=KINDS, action="append", help="this trouble, and others named so")
    parser.add_argument("--fsync", choices=("always", "everysec"), default="always", help="the server's policy")
    parser.add_argument("--rate", type=float, default=60.0, help="instants a second (default: %(default)s)")
    parser.add_argument(
        "--dir", type=Path, default=None, help="where the rounds' directories are made, and kept if one fails"
    )
    options = parser.parse_args()

    print(
        f"{'seed':>6}{'troubles':>10}{'entries':>10}{'sent again':>12}{'pairs':>8}{'reads':>9}"
        f"{'slowest recovery':>18}  result"
    )
    outcomes: list[Outcome] = []
    num_failed = 0
    for number in range(-(-options.kills // KILLS_A_ROUND)):
        seed, num = options.seed + number, min(KILLS_A_ROUND, options.kills - number * KILLS_A_ROUND)
        work_dir = Path(tempfile.mkdtemp(prefix=f"echosight-crash-{seed}-", dir=options.dir))
        try:
            outcome = _play(work_dir, options, seed=seed, num=num)
        except AssertionError as error:  # it did not recover, or was not finished in time
            num_failed += 1
            print(f"{seed:>6}  {error}\n  kept: {work_dir}", flush=True)
            continue
        outcomes.append(outcome)
        num_failed += bool(outcome.faults())
        _print_row(outcome, work_dir)
        if not outcome.faults():
            shutil.rmtree(work_dir)
    _print_sum(outcomes)
    return 1 if num_failed else 0


def _play(work_dir: Path, options: argparse.Namespace, *, seed: int, num: int) -> Outcome:
    with Rig(
        work_dir, seed=seed, num_replicas=options.replicas, fsync=options.fsync, instants_per_s=options.rate
    ) as rig:
        rig.suffer(num, kinds=options.only or KINDS)
        return rig.settle()


def _print_row(one: Outcome, work_dir: Path) -> None:
    result = f"{one.faults()}, kept: {work_dir}" if one.faults() else "all accounted for"
    print(
        f"{one.seed:>6}{sum(one.troubles.values()):>10}{one.num_entries:>10}{one.num_retries:>12}"
        f"{one.account.num_pairs:>8}{one.num_reads:>9}{one.slowest_progress_s:>16.1f} s  {result}",
        flush=True,
    )


def _print_sum(outcomes: list[Outcome]) -> None:
    total: Counter[str] = Counter()
    for one in outcomes:
        total.update(one.troubles)
    wrong: Counter[str] = Counter()
    for one in outcomes:
        wrong.update({name: len(getattr(one.account, name)) for name in ("lost", "doubled", "foreign", "torn")})
    told = ", ".join(f"{num} x {name}" for name, num in sorted(total.items()))
    print(f"\n{sum(total.values())} troubles: {told}")
    print(
        f"{sum(one.num_entries for one in outcomes)} entries, "
        f"{sum(one.account.num_pairs for one in outcomes)} pairs, "
        f"{sum(one.num_reads for one in outcomes)} pairs read meanwhile: "
        f"{', '.join(f'{num} {name}' for name, num in wrong.items())}"
    )


if __name__ == "__main__":
    sys.exit(main())
