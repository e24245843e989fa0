"""Lua scripts on the server: what must happen whole or not at all, on one server as on a cluster.

It does not know what the scripts do. A script is sent by its digest; a server that has none of it (a new one, a
restart, a failover) says so before it has done anything, and gets the text.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import NoScriptError

from services.core.streams.client import Client, SyncClient, send_all, translated

MAX_VALUES = 6000
"""Lua's `unpack` hands on fewer than 8000 values."""


@dataclass(frozen=True, slots=True)
class Script:
    """One script. All its keys must be of one site: they lie on one shard then."""

    text: str
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "digest", digest)


@dataclass(frozen=True, slots=True)
class Call:
    """A script with its keys (at least one) and arguments."""

    script: Script
    keys: Sequence[str]
    arguments: Sequence[Any] = ()

    def by_digest(self) -> tuple[Any, ...]:
        return ("EVALSHA", self.script.digest, len(self.keys), *self.keys, *self.arguments)

    def by_text(self) -> tuple[Any, ...]:
        return ("EVAL", self.script.text, len(self.keys), *self.keys, *self.arguments)


async def call(client: Client, calls: Sequence[Call]) -> list[Any]:
    """What the scripts answer, one round trip to each server. Raises StreamsLost errors, and a script's error."""
    results = await send_all(client, [(one.keys[0], one.by_digest()) for one in calls])
    unknown = [i for i, result in enumerate(results) if isinstance(result, NoScriptError)]
    again = await send_all(client, [(calls[i].keys[0], calls[i].by_text()) for i in unknown])
    for i, result in zip(unknown, again, strict=True):
        results[i] = result
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def call_sync(client: SyncClient, one: Call) -> Any:
    """What the script answers. Raises StreamsLost errors, and the script's error."""
    with translated():
        try:
            return client.execute_command(*one.by_digest())  # type: ignore[no-untyped-call]
        except NoScriptError:
            return client.execute_command(*one.by_text())  # type: ignore[no-untyped-call]
