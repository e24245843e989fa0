"""On which terms a request waits for the model: whom it is for, and until when its answer is of use."""

from collections.abc import Mapping

from starlette.types import Scope

from api.access.keys import caller_of
from api.answering.calls import Terms
from api.problems import BAD_REQUEST_VALUE, ProblemError

TIMEOUT_HEADER = b"x-timeout-ms"
_MAX_DIGITS = 9


def terms_of(scope: Scope, headers: Mapping[bytes, bytes], started_ns: int) -> Terms:
    """headers: by their names in lower case; started_ns: on time.monotonic_ns, when the request came.

    Raises ProblemError for a time-out that is none.
    """
    text = headers.get(TIMEOUT_HEADER)
    if text is None:
        return Terms(caller_of(scope))
    if not text.isdigit() or not 0 < len(text) <= _MAX_DIGITS or int(text) == 0:
        raise ProblemError(
            BAD_REQUEST_VALUE,
            f"x-timeout-ms is {text[:20].decode('latin-1')!r}",
            remedy="send whole milliseconds, 1 or more",
        )
    return Terms(caller_of(scope), started_ns + int(text) * 1_000_000)
