"""Small events for the people who watch, off the event loop; without a Redis URL they go nowhere."""

import asyncio
from typing import Any

from services.core.streams import EventLog


class Events:
    """Best effort: a lost server costs events, never an answer."""

    def __init__(self, redis_url: str) -> None:
        self._log = EventLog(redis_url, source="api") if redis_url else None

    async def emit(self, kind: str, **values: Any) -> None:
        if self._log is not None:
            await asyncio.to_thread(self._log.emit, kind, **values)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
