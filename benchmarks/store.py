"""Which engine should hold the pairs: our segments against SQLite, LMDB, RocksDB and a file per pair, in one run.

    python benchmarks/store.py                      three rounds, under three minutes, under 1 GB of disk
    python benchmarks/store.py --dir /data          on the disk that will carry the store: results differ by disk
    python benchmarks/store.py --engines LMDB       ours against one other

Pairs of a 64 KiB float32 heatmap (128x128) and a 60 KiB image that does not compress. Engines take turns within
a round, each on an empty directory; tables show medians over rounds.

    append    groups of 1, 16 and 64 pairs, each durable before the next starts. The floor is a bare write and
              fdatasync of the same bytes. The syncs' part is what is saved when the same run leaves them out.
    random    64 radar heatmaps at random into one array, in another process than the writer, which meanwhile
              appends at --write-rate. Warm; and cold: a new handle after posix_fadvise(DONTNEED) on every file.
              The MiB that then come from the disk show that it worked.
    eviction  twice the byte cap is written. Disk is what the files occupy: at most, at the end, and after the
              cap was halved. Kept is what can still be read.
    recovery  the writer is killed with signal 9 amid its appends. Time runs from its death until the store is
              open for writing and its newest pair has been read. Then every pair is compared byte for byte. A
              kill leaves the page cache alone: this tests the engine's order of writes, not the disk's.

The directory must be on a disk: a file system in memory makes every sync free. Quiet the machine first. Ends with
status 1 if an engine lost or damaged a pair that it had called durable. store_engines.py and store_databases.py
have how each engine is set up, store_measures.py what is measured.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from store_databases import Lmdb, Rocks, Sqlite
from store_engines import PAIR_BYTES, Engine, Files, Segments
from store_measures import (
    BATCH,
    COUNTS,
    GROUPS,
    Load,
    Measure,
    Row,
    append,
    append_floor,
    empty_directory,
    evict,
    read_random,
    recover,
)

ENGINES: tuple[type[Engine], ...] = (Segments, Sqlite, Lmdb, Rocks, Files)
MEASURES: dict[str, Measure] = {"append": append, "random": read_random, "eviction": evict, "recovery": recover}
FLOOR = "floor: write + fdatasync"


def main() -> int:
    names = [engine.name for engine in ENGINES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=768, help="pairs in each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each engine (default: %(default)s)")
    parser.add_argument("--write-rate", type=int, default=300, help="pairs/s during reads (default: %(default)s)")
    parser.add_argument("--engines", nargs="+", choices=names, default=names, help="only ours and these")
    parser.add_argument("--dir", type=Path, default=None, help="disk to use (default: that of temporary files)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args()
    if options.pairs < 4 * BATCH or options.rounds < 1:
        parser.error(f"--pairs must be {4 * BATCH} or more, --rounds 1 or more")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the directory is removed then too
    chosen = [engine for engine in ENGINES if engine is ENGINES[0] or engine.name in options.engines]
    work_dir = Path(tempfile.mkdtemp(prefix="echosight-bench-", dir=options.dir))
    started_s, before = time.monotonic(), os.getloadavg()[0]
    load = Load(num_pairs=options.pairs // 64 * 64, write_rate=options.write_rate)
    rows: dict[str, dict[str, list[Row]]] = {name: {} for name in MEASURES}
    try:
        for number in range(options.rounds):
            turn = number % len(chosen)
            for name, measure in MEASURES.items():
                for engine in chosen[turn:] + chosen[:turn]:
                    with empty_directory(work_dir / "store") as directory:
                        row = measure(engine, directory, load)
                    if name == "append":  # the floor has its turn beside each: a disk's speed wanders
                        floor = append_floor(work_dir / "floor", load)
                        rows[name].setdefault(FLOOR, []).append(floor | {"of_floor": 1.0})
                        row["of_floor"] = row["pairs_per_s_64"] / floor["pairs_per_s_64"]
                    rows[name].setdefault(engine.name, []).append(row)
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)
    order = [FLOOR, *names]
    medians = {name: {of: _medians(found[of]) for of in order if of in found} for name, found in rows.items()}
    if options.json:
        print(json.dumps({"load_before": before, "medians": medians, "rounds": rows}, indent=2))
    else:
        print(f"{options.pairs} pairs of 64 KiB + 60 KiB, {options.rounds} rounds, {os.cpu_count()} cores, "
              f"load {before:.1f} before, {time.monotonic() - started_s:.0f} s")  # fmt: skip
        _print_tables(medians)
    is_whole = all(not row["num_lost"] and not row["num_damaged"] for row in medians["recovery"].values())
    return 0 if is_whole else 1


def _medians(rows: list[Row]) -> Row:
    return {
        key: sum(row[key] for row in rows) if key in COUNTS else statistics.median(row[key] for row in rows)
        for key in rows[0]
    }


def _print_tables(medians: dict[str, dict[str, Row]]) -> None:
    print(f"\n| durable appends, pairs/s (part of the syncs) | {' | '.join(f'groups of {n}' for n in GROUPS)} "
          "| MB/s at 64 | of the floor | CPU, ms a pair |\n|" + " --- |" * (len(GROUPS) + 4))  # fmt: skip
    for name, row in medians["append"].items():
        rates = [f"{row[f'pairs_per_s_{n}']:,.0f} ({100 * row[f'sync_share_{n}']:.0f} %)" for n in GROUPS]
        mb_per_s = row["pairs_per_s_64"] * PAIR_BYTES / 1e6
        print(
            f"| {name} | {' | '.join(rates)} | {mb_per_s:.0f} | {row['of_floor']:.2f} | {row['cpu_ms_64']:.2f} |"
        )
    print(f"\n| {BATCH} radars at random | warm, ms | its slowest | cold, ms | MiB from disk | warm, ours = 1 |\n"
          "| --- | --- | --- | --- | --- | --- |")  # fmt: skip
    ours = next(iter(medians["random"].values()))
    for name, row in medians["random"].items():
        print(f"| {name} | {row['warm_ms']:.2f} | {row['warm_max_ms']:.1f} | {row['cold_ms']:.1f} | "
              f"{row['cold_mib']:.1f} | {row['warm_ms'] / ours['warm_ms']:.2f} |")  # fmt: skip
    print("\n| twice the cap written | pairs/s | disk, peak / cap | disk, end / cap | kept / cap "
          "| cap halved: disk | kept |\n| --- | --- | --- | --- | --- | --- | --- |")  # fmt: skip
    for name, row in medians["eviction"].items():
        shares = ["peak_share", "after_share", "kept_share", "halved_share", "halved_kept_share"]
        print(f"| {name} | {row['pairs_per_s']:,.0f} | {' | '.join(f'{row[key]:.2f}' for key in shares)} |")
    print("\n| killed amid appends | open and readable after, ms | reported durable | lost | damaged |\n"
          "| --- | --- | --- | --- | --- |")  # fmt: skip
    for name, row in medians["recovery"].items():
        print(f"| {name} | {row['open_ms']:.1f} | {row['num_durable']:.0f} | {row['num_lost']:.0f} "
              f"| {row['num_damaged']:.0f} |")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
