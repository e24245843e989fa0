"""What can go wrong between a client and the server.

ClientError
├── UnreachableError    nobody answers at that address, or the answer is no answer of this server
├── RefusedError        the server says that the request is wrong (4xx): `remedy` says what to change
├── UnavailableError    429 or 503 until the last try: the server is busy, starting or stopping
├── ServerFailedError   any other 5xx
└── StreamClosedError   the server has closed the stream, and why
"""

from services.core.errors import EchosightError


class ClientError(EchosightError):
    """Root of these. status: the HTTP status, or 0. kind: the end of the problem's type, or ""."""

    def __init__(self, what: str, *, remedy: str = "", status: int = 0, kind: str = "") -> None:
        super().__init__(what, remedy=remedy)
        self.status = status
        self.kind = kind


class UnreachableError(ClientError):
    """Nobody answers at that address, or the answer is no answer of this server."""


class RefusedError(ClientError):
    """The server says that the request is wrong."""


class UnavailableError(ClientError):
    """The server is busy, starting or stopping, and stayed so."""


class ServerFailedError(ClientError):
    """The server failed."""


class StreamClosedError(ClientError):
    """The server has closed the stream."""


def error_from(status: int, problem: object) -> ClientError:
    """The error for a problem (RFC 9457) as the server sent it."""
    members = problem if isinstance(problem, dict) else {}
    kinds: dict[bool, type[ClientError]] = {True: UnavailableError, False: ServerFailedError}
    error = RefusedError if status < 500 and status != 429 else kinds[status in (429, 503)]
    return error(
        str(members.get("detail", f"the server answered {status}")),
        remedy=str(members.get("remedy", "")),
        status=status,
        kind=str(members.get("type", "")).rpartition(":")[2],
    )
