"""The producers' side: frames into their sites' streams, each stream capped. It does not know who reads."""

from collections.abc import Sequence
from typing import Any, Self

from services.core import codec
from services.core.frames import CameraFrame, Frame, Label, RadarFrame, check_site
from services.core.streams.client import (
    INGEST_GROUP,
    KINDS,
    Client,
    Command,
    Kind,
    connect,
    disconnect,
    passing_as_lost,
    send_all,
    stream_key,
    wait_for_server,
)


class Publisher:
    """Writes frames to their sites' streams, pipelined, each stream capped."""

    def __init__(self, client: Client, *, max_entries: int) -> None:
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
        commands: list[Command] = []
        for frame in frames:
            key = stream_key(check_site(frame.site), kind_of(frame))
            fields = [part for item in codec.encode(frame).items() for part in item]
            commands.append((key, ("XADD", key, "MAXLEN", "~", self._max_entries, "*", *fields)))
        _raise_first(await send_all(self._client, commands))

    @passing_as_lost()
    async def knows(self, site: str) -> bool:
        """Whether `site` exists: some sensor has published radar frames of it. Raises StreamsLost errors."""
        key = stream_key(check_site(site), "radar")
        [found] = await send_all(self._client, [(key, ("EXISTS", key))])
        _raise_first([found])
        return bool(found)

    @passing_as_lost()
    async def backlog(self, site: str) -> int:
        """Entries of `site` that the ingest group has not acknowledged yet: unread plus pending."""
        keys = [stream_key(site, kind) for kind in KINDS]
        lengths = await send_all(self._client, [(key, ("XLEN", key)) for key in keys])
        _raise_first(lengths)
        groups = await send_all(self._client, [(key, ("XINFO GROUPS", key)) for key in keys])
        return sum(_backlog(length, found) for length, found in zip(lengths, groups, strict=True))

    async def close(self) -> None:
        await disconnect(self._client)


def _backlog(length: int, groups: Any) -> int:
    if isinstance(groups, Exception):  # no such stream: nothing waits
        return 0
    for group in groups:
        if group["name"] == INGEST_GROUP.encode():
            lag = group.get("lag")  # None after deletions: the server cannot tell
            return int(group["pending"]) + int(lag or 0)
    return length


def _raise_first(results: Sequence[Any]) -> None:
    for result in results:
        if isinstance(result, Exception):
            raise result


def kind_of(frame: Frame) -> Kind:
    """The stream that a frame belongs in."""
    match frame:
        case RadarFrame():
            return "radar"
        case CameraFrame():
            return "camera"
        case Label():
            return "labels"
