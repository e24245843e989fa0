"""Bad faith at the server's door, in small; benchmarks/hostile.py is the long version."""

import asyncio
from contextlib import ExitStack
from pathlib import Path

from services.core.embedded import start_embedded_server
from tests.api.hostile import ATTACKS, besiege, resident_bytes
from tests.api.test_process import api_process
from tests.api.tiny import publish_champion, registry_of

NUM_ATTACKS = 600
MAX_GROWTH_BYTES = 64 * 2**20


def test_no_body_makes_the_server_fail_fall_or_grow(tmp_path: Path) -> None:
    publish_champion(registry_of(tmp_path))
    publish_champion(registry_of(tmp_path))
    with ExitStack() as stack:
        server = start_embedded_server(tmp_path / "redis")
        stack.callback(server.stop)
        environment = {
            "REDIS_URL": server.url,
            "ECHOSIGHT_MAX_BODY_BYTES": "1000000",
            "ECHOSIGHT_BODY_TIMEOUT_S": "0.5",
            "ECHOSIGHT_LOG_LEVEL": "info",
        }
        process, port = stack.enter_context(api_process(tmp_path, **environment))
        siege = asyncio.run(besiege(port, num_attacks=NUM_ATTACKS // 2, seed=1))
        before = resident_bytes(process.pid)
        again = asyncio.run(besiege(port, num_attacks=NUM_ATTACKS // 2, seed=2))
        grown = resident_bytes(process.pid) - before
        assert process.poll() is None
    assert not siege.faults + again.faults
    assert {name for name, _ in siege.outcomes + again.outcomes} == {*ATTACKS, "good"}
    assert grown < MAX_GROWTH_BYTES
