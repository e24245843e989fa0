"""Handoff 1: Redis streams. The only package that knows redis, and the only one that spells a key.

Producers cap their streams (MAXLEN); the consumer group acknowledges after the caller has stored; what cannot
be decoded is buried in the site's dead-letter stream with its reason. docs/asyncapi.yaml is the contract.
"""

from services.core.streams.client import (
    DEAD_MAX_ENTRIES,
    EVENTS,
    EVENTS_MAX_ENTRIES,
    INGEST_GROUP,
    KINDS,
    Kind,
    StreamsLost,
    check_server,
    connect,
    stream_key,
    wait_for_server,
)
from services.core.streams.consumer import Consumer, Delivery
from services.core.streams.events import EventLog
from services.core.streams.publisher import Publisher, kind_of

__all__ = [
    "DEAD_MAX_ENTRIES",
    "EVENTS",
    "EVENTS_MAX_ENTRIES",
    "INGEST_GROUP",
    "KINDS",
    "Consumer",
    "Delivery",
    "EventLog",
    "Kind",
    "Publisher",
    "StreamsLost",
    "check_server",
    "connect",
    "kind_of",
    "stream_key",
    "wait_for_server",
]
