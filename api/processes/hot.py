"""Which requests any process can answer: those that need the live model and nothing else."""

from api.routes.classify import PATH as CLASSIFY_PATH
from api.routes.embed import PATH as EMBED_PATH

_PATHS = frozenset({CLASSIFY_PATH.encode(), EMBED_PATH.encode()})


def is_hot(method: bytes, target: bytes) -> bool:
    """target: path and query as they were sent.

    A version that is named, or an alias, may be loaded in the first process alone; an escape may hide its name.
    """
    if method != b"POST":
        return False
    path = target.partition(b"?")[0]
    return path in _PATHS or (
        path.startswith(b"/v2/models/")
        and path.endswith(b"/infer")
        and not (b"/versions/" in path or b"%" in path)
    )
