"""GET /v1/events: what happens in the whole system, as server-sent events, for dashboards.

One task follows `echosight:events`; each client has a short queue of its own. Who reads too slowly is told so and
let go: it comes back with Last-Event-ID and gets what it missed, as far as the stream still has it. It does not
know what the events are about.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Header, Query
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from api.labels import no_streams
from api.metrics import Metrics
from api.models import LiveModel
from api.openapi import problem_responses
from api.problems import BAD_REQUEST_VALUE, TOO_MANY_CLIENTS, ProblemError
from api.settings import ApiSettings
from services.core.errors import StreamsError
from services.core.logs import logger
from services.core.streams import EventReader, StreamsLost, connect, disconnect

PATH = "/v1/events"
MEDIA_TYPE = "text/event-stream"
_QUEUE_EVENTS = 256
_BLOCK_MS = 1000
_LOOK_S = 0.5
"""How long a stopping server's clients may not notice."""
_PAUSE_S = 1.0
_RETRY = b"retry: 2000\n\n"
_ID = re.compile(r"\d{1,19}-\d{1,19}")

Event = tuple[str, dict[str, Any]]
"""An entry's id, and what it says."""


class Listeners:
    """Everybody who listens, and the task that feeds them. send_timeout_s: after that, who reads nothing goes."""

    def __init__(self, settings: ApiSettings, live: LiveModel, metrics: Metrics) -> None:
        self._client = connect(settings.redis_url) if settings.redis_url else None
        self._max_clients = settings.max_event_clients
        self._heartbeat_s = settings.heartbeat_s
        self.send_timeout_s = settings.body_timeout_s
        self._live = live
        self._metrics = metrics
        self._queues: set[asyncio.Queue[Event]] = set()
        self._overflown: set[asyncio.Queue[Event]] = set()

    async def run(self) -> None:
        """Feed the clients, until cancelled. A lost server is waited for.

        It looks for itself whether the server stops: a cancellation that meets the end of a read can be lost.
        """
        if self._client is None:
            return
        reader, last_id, is_lost = EventReader(self._client), "", False
        while not self._live.is_stopping:
            try:
                last_id = last_id or await reader.newest_id()
                last_id, events = await reader.after(last_id, block_ms=_BLOCK_MS)
            except Exception as error:  # a refusal too: the clients have their heartbeats meanwhile
                if not is_lost:
                    logger("api").warning("events lost for now", error=str(error))
                is_lost = True
                await asyncio.sleep(_PAUSE_S)
                continue
            is_lost = False
            for event in events:
                for queue in self._queues - self._overflown:
                    try:
                        queue.put_nowait(event)
                    except asyncio.QueueFull:
                        self._overflown.add(queue)

    async def close(self) -> None:
        if self._client is not None:
            await disconnect(self._client)

    def join(self) -> asyncio.Queue[Event]:
        """A client's queue; whoever joins must leave. Raises ProblemError where there is nothing, or no place."""
        if self._client is None:
            raise no_streams("REDIS_URL is not set", "set it to the server that the other processes report to")
        if len(self._queues) >= self._max_clients:
            raise ProblemError(
                TOO_MANY_CLIENTS,
                f"{len(self._queues)} clients listen already",
                remedy="raise ECHOSIGHT_MAX_EVENT_CLIENTS",
                headers={"retry-after": "10"},
            )
        queue: asyncio.Queue[Event] = asyncio.Queue(_QUEUE_EVENTS)
        self._queues.add(queue)
        self._metrics.open_listeners.set(len(self._queues))
        return queue

    def leave(self, queue: asyncio.Queue[Event]) -> None:
        self._queues.discard(queue)
        self._overflown.discard(queue)
        self._metrics.open_listeners.set(len(self._queues))

    async def lines(
        self, queue: asyncio.Queue[Event], last_id: str, kinds: frozenset[str]
    ) -> AsyncIterator[bytes]:
        """What a client is sent. last_id: what it has seen, "" for from now; kinds: empty for all."""
        yield _RETRY
        if last_id:
            try:
                async for event in self._past(last_id):
                    last_id = event[0]
                    if not kinds or event[1].get("kind") in kinds:
                        yield _line(event)
            except (*StreamsLost, StreamsError):
                return  # the client comes back with the last id that it has; going on would leave a gap
        async for news in self._next(queue):
            if news is None:
                yield b": alive\n\n"
            elif _order(news[0]) > _order(last_id) and (not kinds or news[1].get("kind") in kinds):
                yield _line(news)
        if queue in self._overflown:
            yield b"event: too_slow\ndata: {}\n\n"

    async def _past(self, last_id: str) -> AsyncIterator[Event]:
        """What the stream has after `last_id`. Raises StreamsLost, StreamsError."""
        assert self._client is not None
        reader = EventReader(self._client)
        while True:
            last_id, events = await reader.after(last_id)
            if not events:
                return
            for event in events:
                yield event

    async def _next(self, queue: asyncio.Queue[Event]) -> AsyncIterator[Event | None]:
        """Events as they come, None after each silence, until the server stops or the queue has run over."""
        spoke_s = time.monotonic()
        while not self._live.is_stopping:
            try:
                async with asyncio.timeout(_LOOK_S):
                    event = await queue.get()
            except TimeoutError:
                if time.monotonic() - spoke_s < self._heartbeat_s:
                    continue
                yield None
            else:
                yield event
            spoke_s = time.monotonic()
            if queue in self._overflown and queue.empty():
                return


class EventStream(StreamingResponse):
    """The answer to one client, who leaves however it ends."""

    def __init__(self, listeners: Listeners, last_id: str, kinds: frozenset[str]) -> None:
        self._listeners = listeners
        self._queue = listeners.join()  # now: what comes while the past is read must not fall between
        lines = listeners.lines(self._queue, last_id, kinds)
        super().__init__(lines, media_type=MEDIA_TYPE, headers={"cache-control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self._listeners.send_timeout_s):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            logger("api").warning("a client of events reads nothing and is let go")
        finally:
            self._listeners.leave(self._queue)


def make_router(listeners: Listeners) -> APIRouter:
    router = APIRouter(tags=["events"])
    shown = 'id: 1712000000123-0\nevent: model_live\ndata: {"source":"api","kind":"model_live","version":7}\n\n'

    @router.get(
        PATH,
        summary="Follow what happens",
        description="Server-sent events: each has the id of its entry in `echosight:events`, its kind as the "
        "event's name and the JSON object as data (docs/asyncapi.yaml). A comment line comes in a silence. "
        "With Last-Event-ID, which browsers send by themselves, it begins after that event.",
        response_class=StreamingResponse,
        responses=problem_responses(422, 500, 503)
        | {
            200: {
                "description": "Events, until one side ends it",
                "content": {MEDIA_TYPE: {"schema": {"type": "string"}, "examples": {"one": {"value": shown}}}},
            }
        },
    )
    async def events(
        kind: Annotated[list[str], Query(max_length=16, description="only events of these kinds")] = [],  # noqa: B006 - FastAPI copies it
        last_event_id: Annotated[str, Header(max_length=64)] = "",
    ) -> EventStream:
        if last_event_id and not _ID.fullmatch(last_event_id):
            raise ProblemError(
                BAD_REQUEST_VALUE,
                f"Last-Event-ID is {last_event_id!r}",
                remedy="send the id of an event, or leave it out",
            )
        return EventStream(listeners, last_event_id, frozenset(kind))

    return router


def _order(entry_id: str) -> tuple[int, int]:
    first, _, second = (entry_id or "0-0").partition("-")
    return int(first), int(second)


def _line(event: Event) -> bytes:
    name = re.sub(r"[^\w.-]", "_", str(event[1].get("kind", "event")))[:64]
    return f"id: {event[0]}\nevent: {name}\ndata: ".encode() + orjson.dumps(event[1]) + b"\n\n"
