"""Handoff 1: Redis streams. The only package that knows redis, and the only one that spells a key.

Producers cap their streams (MAXLEN); the consumer group acknowledges after the caller has stored; the janitor
trims what is finished; what cannot be decoded is buried in the site's dead-letter stream with its reason. A site
is read by the process that holds its lease. docs/asyncapi.yaml is the contract.
"""

from services.core.streams.client import (
    DEAD_MAX_ENTRIES,
    EVENTS,
    EVENTS_MAX_ENTRIES,
    INGEST_GROUP,
    KINDS,
    PREDICTIONS_MAX_BYTES,
    PREDICTIONS_MAX_ENTRIES,
    Client,
    Kind,
    StreamsLost,
    check_server,
    check_url,
    connect,
    disconnect,
    masked,
    process_name,
    stream_key,
    wait_for_server,
)
from services.core.streams.consumer import Consumer
from services.core.streams.dead import DeadLetter, DeadLetters
from services.core.streams.delivery import Delivery
from services.core.streams.events import EventLog, EventReader
from services.core.streams.janitor import Janitor, Tidied
from services.core.streams.leases import LIVE_REPLICAS, REPLICAS, Replica, SiteLeases
from services.core.streams.newest import Arrival, NewestReader
from services.core.streams.predictions import PredictionLog
from services.core.streams.publisher import Publisher, kind_of

__all__ = [
    "DEAD_MAX_ENTRIES",
    "EVENTS",
    "EVENTS_MAX_ENTRIES",
    "INGEST_GROUP",
    "KINDS",
    "LIVE_REPLICAS",
    "PREDICTIONS_MAX_BYTES",
    "PREDICTIONS_MAX_ENTRIES",
    "REPLICAS",
    "Arrival",
    "Client",
    "Consumer",
    "DeadLetter",
    "DeadLetters",
    "Delivery",
    "EventLog",
    "EventReader",
    "Janitor",
    "Kind",
    "NewestReader",
    "PredictionLog",
    "Publisher",
    "Replica",
    "SiteLeases",
    "StreamsLost",
    "Tidied",
    "check_server",
    "check_url",
    "connect",
    "disconnect",
    "kind_of",
    "masked",
    "process_name",
    "stream_key",
    "wait_for_server",
]
