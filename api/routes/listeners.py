"""GET /v1/events: what happens in the whole system, as server-sent events, for dashboards.

One task follows `echosight:events`, another the predictions of all sites while somebody wants them; each client
has a short queue of its own. Who reads too slowly gets fewer predictions; where that is not enough it is told so
and let go: it comes back with Last-Event-ID and gets the events that it missed, as far as the stream still has
them. Predictions have no id, and those of the past do not come again. It does not know what the events are about.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Header, Query
from pydantic import StringConstraints
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from api.access.gate import Gate
from api.models.live import LiveModel
from api.problems import BAD_REQUEST_VALUE, TOO_MANY_CLIENTS, ProblemError
from api.routes.labels import no_streams
from api.routes.openapi import problem_responses
from api.settings import ApiSettings
from services.core.errors import BadFrameError, StreamsError
from services.core.frames import SITE_PATTERN
from services.core.logs import logger
from services.core.predictions import decode_prediction
from services.core.streams import EventReader, NewestReader, StreamsLost, connect, disconnect

PATH = "/v1/events"
MEDIA_TYPE = "text/event-stream"
PREDICTION = "prediction"
_QUEUE_EVENTS = 256
_QUEUE_PREDICTIONS = 128
"""Fuller than this, a queue takes events alone."""
_READ_COUNT = 100
_BLOCK_MS = 1000
_LOOK_S = 0.5
"""How long a stopping server's clients may not notice."""
_PAUSE_S = 1.0
_LOOK_EVERY_S = 1.0
_RETRY = b"retry: 2000\n\n"
_ID = re.compile(r"\d{1,19}-\d{1,19}")
_Site = Annotated[str, StringConstraints(pattern=f"^{SITE_PATTERN.pattern}$")]

Event = tuple[str, dict[str, Any]]
"""An entry's id, and what it says. A prediction's id is ""."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a client wants. kinds: empty for all. sites: of what is about a site; empty for all."""

    kinds: frozenset[str] = frozenset()
    sites: frozenset[str] = frozenset()

    @property
    def has_predictions(self) -> bool:
        return not self.kinds or PREDICTION in self.kinds

    def takes(self, event: dict[str, Any]) -> bool:
        is_of_site = not self.sites or "site" not in event or event["site"] in self.sites
        return is_of_site and (not self.kinds or event.get("kind") in self.kinds)


class Listeners:
    """Everybody who listens, and the task that feeds them. send_timeout_s: after that, who reads nothing goes."""

    def __init__(self, settings: ApiSettings, live: LiveModel, gate: Gate) -> None:
        self._client = connect(settings.redis_url) if settings.redis_url else None
        self._max_clients = settings.max_event_clients
        self._heartbeat_s = settings.heartbeat_s
        self.send_timeout_s = settings.body_timeout_s
        self._live = live
        self.gate = gate
        self._metrics = gate.metrics
        self._queues: dict[asyncio.Queue[Event], Wish] = {}
        self._overflown: set[asyncio.Queue[Event]] = set()
        self._is_wanted = asyncio.Event()

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
                self._hand_out(event)

    async def follow_predictions(self) -> None:
        """As `run`, for the predictions of all sites; it reads none while nobody wants them."""
        if self._client is None:
            return
        reader, is_lost, look_at_s = NewestReader(self._client, kind="predictions"), False, 0.0
        while not self._live.is_stopping:
            if not any(wish.has_predictions for wish in self._queues.values()):
                for site in reader.sites:
                    reader.leave(site)
                self._is_wanted.clear()
                await self._is_wanted.wait()
                look_at_s = 0.0
            try:
                if time.monotonic() >= look_at_s:
                    await reader.look()
                    for site in await reader.find_sites() - set(reader.sites):
                        await reader.join(site)
                    look_at_s = time.monotonic() + _LOOK_EVERY_S
                arrivals = await reader.read(count=_READ_COUNT, block_ms=_BLOCK_MS)
            except Exception as error:  # as above
                if not is_lost:
                    logger("api").warning("predictions lost for now", error=str(error))
                is_lost = True
                await asyncio.sleep(_PAUSE_S)
                continue
            is_lost = False
            for arrival in arrivals:
                try:
                    said = decode_prediction(arrival.fields).model_dump(exclude={"v", "sensor"})
                except BadFrameError:  # somebody else wrote it
                    continue
                self._hand_out(("", {"kind": PREDICTION, "site": arrival.site, **said}))

    def _hand_out(self, event: Event) -> None:
        """To everybody who wants it. A prediction that finds no room is left out: the next one is newer."""
        for queue, wish in self._queues.items():
            if queue in self._overflown or not wish.takes(event[1]):
                continue
            if not event[0] and queue.qsize() >= _QUEUE_PREDICTIONS:
                self._metrics.unheard_predictions.inc()
                continue
            try:
                queue.put_nowait(event)
            except asyncio.QueueFull:
                self._overflown.add(queue)

    async def close(self) -> None:
        if self._client is not None:
            await disconnect(self._client)

    def join(self, wish: Wish) -> asyncio.Queue[Event]:
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
        self._queues[queue] = wish
        if wish.has_predictions:
            self._is_wanted.set()
        self._metrics.open_listeners.set(len(self._queues))
        return queue

    def leave(self, queue: asyncio.Queue[Event]) -> None:
        self._queues.pop(queue, None)
        self._overflown.discard(queue)
        self._metrics.open_listeners.set(len(self._queues))

    async def lines(self, queue: asyncio.Queue[Event], last_id: str) -> AsyncIterator[bytes]:
        """What a client that has joined is sent. last_id: what it has seen, "" for from now."""
        wish = self._queues[queue]
        yield _RETRY
        if last_id:
            try:
                async for event in self._past(last_id):
                    last_id = event[0]
                    if wish.takes(event[1]):
                        yield _line(event)
            except (*StreamsLost, StreamsError):
                return  # the client comes back with the last id that it has; going on would leave a gap
        async for news in self._next(queue):
            if news is None:
                yield b": alive\n\n"
            elif not news[0] or _order(news[0]) > _order(last_id):
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


class _NoLongerWelcomeError(Exception):
    """The key that a client began with is none any more."""


class EventStream(StreamingResponse):
    """The answer to one client, who leaves however it ends."""

    def __init__(self, listeners: Listeners, last_id: str, wish: Wish) -> None:
        self._listeners = listeners
        self._queue = listeners.join(wish)  # now: what comes while the past is read must not fall between
        lines = listeners.lines(self._queue, last_id)
        super().__init__(lines, media_type=MEDIA_TYPE, headers={"cache-control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            if not self._listeners.gate.is_welcome(scope):
                raise _NoLongerWelcomeError
            async with asyncio.timeout(self._listeners.send_timeout_s):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            logger("api").warning("a client of events reads nothing and is let go")
        except _NoLongerWelcomeError:
            logger("api").info("a client of events is let go: its API key is no longer valid")
            await send({"type": "http.response.body", "body": b""})  # it comes back, and is told why it may not
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
        "With Last-Event-ID, which browsers send by themselves, it begins after that event. Events of the kind "
        "`prediction` say what the live classification makes of each streamed frame; they have no id and do not "
        "come again. `?kind=prediction&site=north` for those of one site.",
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
        site: Annotated[list[_Site], Query(max_length=64, description="of what is about a site, only these")] = [],  # noqa: B006 - as above
        last_event_id: Annotated[str, Header(max_length=64)] = "",
    ) -> EventStream:
        if last_event_id and not _ID.fullmatch(last_event_id):
            raise ProblemError(
                BAD_REQUEST_VALUE,
                f"Last-Event-ID is {last_event_id!r}",
                remedy="send the id of an event, or leave it out",
            )
        return EventStream(listeners, last_event_id, Wish(frozenset(kind), frozenset(site)))

    return router


def _order(entry_id: str) -> tuple[int, int]:
    first, _, second = (entry_id or "0-0").partition("-")
    return int(first), int(second)


def _line(event: Event) -> bytes:
    name = re.sub(r"[^\w.-]", "_", str(event[1].get("kind", "event")))[:64]
    entry_id = f"id: {event[0]}\n" if event[0] else ""
    return f"{entry_id}event: {name}\ndata: ".encode() + orjson.dumps(event[1]) + b"\n\n"
