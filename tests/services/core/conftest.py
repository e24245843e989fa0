"""One server, or a cluster: what must hold on both is asked of both."""

from collections.abc import AsyncIterator, Iterator

import pytest

from services.core.streams import Client, Consumer, Publisher, connect, disconnect
from services.core.streams.client import SyncClient, connect_sync, disconnect_sync
from tests.clusters import cluster, cluster_url

__all__ = ["cluster", "cluster_url"]


@pytest.fixture(params=["server", "cluster"])
def any_url(request: pytest.FixtureRequest) -> str:
    """The address of an empty server, and of an empty cluster."""
    return str(request.getfixturevalue("redis_url" if request.param == "server" else "cluster_url"))


@pytest.fixture
def server(any_url: str) -> Iterator[SyncClient]:
    """What a person would type there."""
    client = connect_sync(any_url, timeout_s=5.0)
    yield client
    disconnect_sync(client)


@pytest.fixture
async def client(any_url: str) -> AsyncIterator[Client]:
    client = connect(any_url)
    yield client
    await disconnect(client)


@pytest.fixture
async def feed(any_url: str) -> AsyncIterator[Publisher]:
    publisher = await Publisher.connect(any_url)
    yield publisher
    await publisher.close()


@pytest.fixture
async def reader(client: Client) -> Consumer:
    return Consumer(client, name="first")


@pytest.fixture
async def heir(client: Client) -> Consumer:
    """Who takes a site over from `reader`."""
    return Consumer(client, name="second")
