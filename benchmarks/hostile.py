"""Requests in bad faith, as many as one likes: the long version of tests/api/test_hostile.py.

    python benchmarks/hostile.py                     10,000
    python benchmarks/hostile.py --bodies 100000
    python benchmarks/hostile.py --processes 2       at a server of two processes

Truncated and lying bodies, bombs, broken HTTP and WebSockets, slow clients and vanishing ones, sixteen at a time,
at one server with the model of the tests; every hundredth request is a good one. Ends with status 1 if any answer
is a 5xx, if any request is left without an answer, if the server ends, or if the second half of the attacks has
taken 32 MiB more memory than the first.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the rig is the tests'

from serve_processes import family

from services.core.embedded import start_embedded_server
from tests.api.hostile import ATTACKS, besiege, resident_bytes
from tests.api.tiny import publish_champion, registry_of

MAX_GROWTH_BYTES = 32 * 2**20
ROUNDS = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bodies", type=int, default=10_000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="of the server (default: %(default)s)")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="echosight-hostile-") as directory:
        data_dir = Path(directory)
        publish_champion(registry_of(data_dir))
        publish_champion(registry_of(data_dir))
        server = start_embedded_server(data_dir / "redis")
        log_path = data_dir / "api.log"
        environment = os.environ | {
            "ECHOSIGHT_DATA_DIR": str(data_dir),
            "REDIS_URL": server.url,
            "ECHOSIGHT_BODY_TIMEOUT_S": "1",
            "ECHOSIGHT_MAX_BODY_BYTES": "1000000",
        }
        with log_path.open("wb") as log:
            command = [sys.executable, "-m", "api", "--port", "0", "--processes", str(options.processes)]
            api = subprocess.Popen(command, env=environment, stderr=log)
        try:
            port = _port(log_path, api, num_others=options.processes - 1)
            faults = _run(api, port, options)
        finally:
            api.terminate()
            api.wait(30)
            server.stop()
        log_text = log_path.read_text(errors="replace")
        num_failures = log_text.count("failed") + log_text.count("process lost")
        if num_failures:
            faults.append(f"the log tells of {num_failures} failures")
            print(log_text[-4000:])
    for fault, count in Counter(faults).items():
        print(f"wrong: {fault} ({count} times)")
    return 1 if faults else 0


def _run(api: "subprocess.Popen[bytes]", port: int, options: argparse.Namespace) -> list[str]:
    outcomes: Counter[tuple[str, str]] = Counter()
    faults: list[str] = []
    sizes: list[int] = []
    started_s = time.monotonic()
    print(f"{'seconds':>8}{'sent':>9}{'MiB resident':>14}")
    for number in range(ROUNDS):
        siege = asyncio.run(besiege(port, num_attacks=options.bodies // ROUNDS, seed=options.seed + number))
        outcomes += siege.outcomes
        faults += siege.faults
        if api.poll() is not None:
            return [*faults, f"the server ended with {api.returncode}"]
        sizes.append(sum(resident_bytes(pid) for pid in family(api.pid)))
        print(
            f"{time.monotonic() - started_s:8.0f}{sum(outcomes.values()):9}{sizes[-1] / 2**20:14.1f}", flush=True
        )
    print()
    for name in (*ATTACKS, "good"):
        found = sorted((outcome, count) for (attack, outcome), count in outcomes.items() if attack == name)
        print(f"{name:20} {', '.join(f'{outcome}: {count:,}' for outcome, count in found)}")
    half = len(sizes) // 2
    grown_bytes = max(sizes[half:]) - max(sizes[:half])
    print(f"\nmemory has grown by {grown_bytes / 2**20:.1f} MiB from the first half to the second")
    if grown_bytes > MAX_GROWTH_BYTES:
        faults.append("memory has grown")
    return faults


def _port(log_path: Path, api: "subprocess.Popen[bytes]", *, num_others: int) -> int:
    """Once all processes answer."""
    deadline_s = time.monotonic() + 120.0
    while time.monotonic() < deadline_s and api.poll() is None:
        text = log_path.read_text(errors="replace")
        is_up = "model live" in text and text.count("process serves") == num_others
        if is_up and "http://127.0.0.1:" in text:
            return int(text.split("http://127.0.0.1:")[1].split()[0])
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start: {log_path.read_text(errors='replace')[-800:]}")


if __name__ == "__main__":
    sys.exit(main())
