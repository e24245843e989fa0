"""The producers' side: frames into their sites' streams, each stream capped. It does not know who reads."""

from collections.abc import Sequence
from typing import Any, Self, cast

import redis
import redis.asyncio
from redis.exceptions import (
    ResponseError,
)

from services.core import codec
from services.core.frames import CameraFrame, Frame, Label, RadarFrame, check_site
from services.core.streams.client import (
    INGEST_GROUP,
    KINDS,
    Kind,
    connect,
    passing_as_lost,
    stream_key,
    wait_for_server,
)


class Publisher:
    """Writes frames to their sites' streams, pipelined, each stream capped."""

    def __init__(self, client: "redis.asyncio.Redis", *, max_entries: int) -> None:
        self._client = client
        self._max_entries = max_entries

    @classmethod
    async def connect(cls, url: str, *, max_entries: int = 2000, timeout_s: float = 30.0) -> Self:
        """A publisher on a server that answers. Raises StreamsError."""
        client = connect(url)
        await wait_for_server(client, timeout_s=timeout_s)
        return cls(client, max_entries=max_entries)

    @passing_as_lost()
    async def publish(self, frames: Sequence[Frame]) -> None:
        """Append `frames` to their streams in one round trip. Raises BadFrameError before anything is sent."""
        if not frames:
            return
        pipeline = self._client.pipeline(transaction=False)
        for frame in frames:
            key = stream_key(check_site(frame.site), kind_of(frame))
            entry = cast(dict[Any, Any], codec.encode(frame))
            pipeline.xadd(key, entry, maxlen=self._max_entries, approximate=True)
        await pipeline.execute()

    async def backlog(self, site: str) -> int:
        """Entries of `site` that the ingest group has not acknowledged yet: unread plus pending."""
        return sum([await self._backlog_of(stream_key(site, kind)) for kind in KINDS])

    async def _backlog_of(self, key: str) -> int:
        try:
            groups = await self._client.xinfo_groups(key)
        except ResponseError:  # no such stream: nothing waits
            return 0
        for group in groups:
            if group["name"] == INGEST_GROUP.encode():
                lag = group.get("lag")  # None after deletions: the server cannot tell
                return int(group["pending"]) + int(lag or 0)
        return int(await self._client.xlen(key))

    async def close(self) -> None:
        await self._client.aclose()


def kind_of(frame: Frame) -> Kind:
    """The stream that a frame belongs in."""
    match frame:
        case RadarFrame():
            return "radar"
        case CameraFrame():
            return "camera"
        case Label():
            return "labels"
