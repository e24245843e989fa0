"""A client of the model server: numpy and the standard library alone, so that it fits beside any application.

with Client("http://127.0.0.1:8000") as client:
    print(client.classify(heatmap, site="north").label)
"""

from services.client.client import Client, Prediction, Stream
from services.client.errors import (
    ClientError,
    RefusedError,
    ServerFailedError,
    StreamClosedError,
    UnavailableError,
    UnreachableError,
)
from services.client.events import EventStream

__all__ = [
    "Client",
    "ClientError",
    "EventStream",
    "Prediction",
    "RefusedError",
    "ServerFailedError",
    "Stream",
    "StreamClosedError",
    "UnavailableError",
    "UnreachableError",
]
