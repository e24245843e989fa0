"""A real Redis Cluster for tests: a few servers on free ports of the loopback interface.

    from tests.clusters import cluster, cluster_url  # in a conftest: the fixtures

`cluster_url` is the address of an empty cluster of three primaries, started once a session.
"""

import asyncio
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import redis

from services.core.embedded import find_server

_BOUNDS = (0, 5461, 10923, 16384)  # each primary's first slot, and how many there are
_DEADLINE_S = 20.0
T = TypeVar("T")


@dataclass(slots=True)
class Node:
    """One server. client: to talk to it alone."""

    port: int
    bus_port: int
    process: "subprocess.Popen[bytes]"
    client: Any

    def kill(self) -> None:
        """As if its machine had gone."""
        self.process.kill()
        self.process.wait()


class Cluster:
    """Three primaries, and perhaps a replica of the first."""

    def __init__(self, directory: Path, *, has_replica: bool = False) -> None:
        self.nodes: list[Node] = []
        try:
            self._start(directory, num=3 + has_replica)
            self._join(has_replica)
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        return f"redis+cluster://127.0.0.1:{self.nodes[0].port},127.0.0.1:{self.nodes[1].port}"

    def stop(self) -> None:
        for node in self.nodes:
            node.client.close()
            node.process.kill()
            node.process.wait()

    def flush(self) -> None:
        for node in self.nodes:
            node.client.flushall()
            node.client.config_resetstat()

    def calls(self, command: str) -> int:
        """How often all nodes together have carried out `command` since the last flush."""
        found = [node.client.info("commandstats").get(f"cmdstat_{command}", {}) for node in self.nodes]
        return sum(stats.get("calls", 0) for stats in found)

    def node_of(self, key: str) -> Node:
        """The primary that has `key`, before any failover."""
        slot = int(self.nodes[0].client.execute_command("CLUSTER KEYSLOT", key))
        return self.nodes[sum(slot >= bound for bound in _BOUNDS[1:3])]

    def _start(self, directory: Path, *, num: int) -> None:
        for _ in range(num):
            port, bus_port = free_ports(2)
            node_dir = directory / str(port)
            node_dir.mkdir(parents=True)
            words = [str(find_server()), "--port", port, "--cluster-port", bus_port, "--dir", node_dir,
                     "--bind", "127.0.0.1", "--cluster-enabled", "yes", "--cluster-node-timeout", 1000,
                     "--cluster-replica-validity-factor", 0, "--save", "", "--appendonly", "no",
                     "--repl-diskless-sync-delay", 0]  # fmt: skip
            process = subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL)
            self.nodes.append(Node(port, bus_port, process, redis.Redis(port=port)))
        for node in self.nodes:
            wait_until(lambda node=node: answers(node.client))

    def _join(self, has_replica: bool) -> None:
        first = self.nodes[0]
        for number, node in enumerate(self.nodes[:3]):
            node.client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
            node.client.execute_command("CLUSTER ADDSLOTSRANGE", _BOUNDS[number], _BOUNDS[number + 1] - 1)
        for node in self.nodes[1:]:
            node.client.execute_command("CLUSTER MEET", "127.0.0.1", first.port, first.bus_port)
        wait_until(lambda: all(self._is_ready(node) for node in self.nodes))
        if has_replica:
            replica = self.nodes[3].client
            replica.execute_command("CLUSTER REPLICATE", first.client.execute_command("CLUSTER MYID"))
            wait_until(lambda: replica.info("replication").get("master_link_status") == "up")
            wait_until(lambda: all(self._num_slaves(node) == 1 for node in self.nodes))

    def _is_ready(self, node: Node) -> bool:
        info = node.client.execute_command("CLUSTER INFO")
        return info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == len(self.nodes)

    def _num_slaves(self, node: Node) -> int:
        found = node.client.execute_command("CLUSTER NODES").values()
        return sum("slave" in other["flags"] for other in found)


def free_ports(num: int) -> list[int]:
    probes = [socket.socket() for _ in range(num)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def answers(client: Any) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the cluster did not get there"
        time.sleep(0.02)  # nothing to wait on: the servers gossip among themselves


async def eventually(ask: Callable[[], Awaitable[T]]) -> T:
    """What `ask` answers, once that is true or something."""
    async with asyncio.timeout(_DEADLINE_S):
        while True:
            if found := await ask():
                return found
            await asyncio.sleep(0.01)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    started = Cluster(tmp_path_factory.mktemp("cluster"))
    yield started
    started.stop()


@pytest.fixture
def cluster_url(cluster: Cluster) -> str:
    """The address of an empty cluster."""
    cluster.flush()
    return cluster.url
