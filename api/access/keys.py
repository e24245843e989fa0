"""Who asks, and may they: API keys with scopes. It knows the file of keys and which route needs which scope.

    predict   answers, and all that can be read: models, metrics, events, documentation
    label     POST /v1/labels
    admin     everything: promote, roll back, load, unload

Probes are open. The keys are read again when their file changes; a file that has become unreadable leaves the last
good ones in force.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from api.asked import Asked, asked_of
from api.problems import MISSING_SCOPE, NO_KEY, ProblemError
from api.settings import ApiSettings
from services.core.errors import SettingsError
from services.core.keys import Key, Keys, Scope, changed_at, read_keys
from services.core.logs import logger

PROBES = frozenset({"/livez", "/startupz", "/readyz", "/v2/health/live", "/v2/health/ready"})
MAX_KNOWN = 1024
"""Headers whose key has been verified, so that the hash is made once."""
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_ASKING = frozenset({"/v1/classify", "/v1/embed", "/v2/repository/index"})
_HEADERS = (b"authorization", b"x-api-key")
_REALM = 'Bearer realm="echosight"'
_SEND_KEY = "send it as `Authorization: Bearer KEY`; `echosight keys add` makes one"


def caller_of(scope: Any) -> str:
    """Whom an answer is for: the name of the key, or else the peer's address."""
    return asked_of(scope).caller


def needed_scope(method: str, path: str) -> Scope | None:
    """What a key needs for a route; None: nothing, not even a key. What is not listed needs admin."""
    if method in _READING:
        is_probe = path in PROBES or (path.startswith("/v2/models/") and path.endswith("/ready"))
        return None if is_probe else "predict"
    if path in _ASKING or (path.startswith("/v2/models/") and path.endswith("/infer")):
        return "predict"
    return "label" if path == "/v1/labels" else "admin"


class Access:
    """The keys in force. Raises SettingsError for keys that cannot be read, or none where others could ask."""

    def __init__(self, settings: ApiSettings) -> None:
        self._poll_interval_s = settings.poll_interval_s
        self._path = Path(settings.api_keys_file) if settings.api_keys_file else None
        self._known: dict[bytes, Key] = {}
        self._keys: Keys | None = None
        if self._path is not None:
            self._seen = changed_at(self._path)
            self._keys = Keys(read_keys(self._path))
        elif not settings.api_open and not settings.is_on_loopback:
            raise SettingsError(
                f"ECHOSIGHT_API_HOST is {settings.reached_at!r}, where others can ask, and there are no API keys",
                remedy="make some (`echosight keys`) and set ECHOSIGHT_API_KEYS_FILE; or ECHOSIGHT_API_OPEN=true",
            )

    @property
    def is_on(self) -> bool:
        """Whether there are keys; without them everybody may do everything."""
        return self._keys is not None

    async def run(self) -> None:
        """Follow the file, until cancelled."""
        while self._path is not None:
            await asyncio.sleep(self._poll_interval_s)
            keys = await asyncio.to_thread(self._news, self._path)
            if keys is not None:  # here, not on the thread: no request is between these two
                self._keys = keys
                self._known.clear()

    def key_of(self, headers: Mapping[bytes, bytes]) -> Key | None:
        """The key that a request was sent with, None if there is none that is valid."""
        if self._keys is None:
            return None
        for name in _HEADERS:  # a proxy may have its own say in the first
            sent = headers.get(name)
            if sent is not None:
                key = self._known.get(sent) or self._verify(self._keys, sent)
                if key is not None:
                    return key
        return None

    def check(self, asked: Asked, headers: Mapping[bytes, bytes], method: str, path: str) -> bool:
        """Whether it is no probe, which are open. Raises ProblemError for who may not do this."""
        needed = needed_scope(method, path)
        if self._keys is None or needed is None:
            return needed is not None
        key = asked.key
        if key is None:
            is_wrong = any(name in headers for name in _HEADERS)
            raise ProblemError(
                NO_KEY,
                "the API key that was sent is none of this server's" if is_wrong else "no API key was sent",
                remedy=_SEND_KEY,
                headers={"www-authenticate": f'{_REALM}, error="invalid_token"' if is_wrong else _REALM},
            )
        if not key.allows(needed):
            raise ProblemError(
                MISSING_SCOPE,
                f"key {key.name!r} has {' and '.join(key.scopes)}, {method} {path[:200]} needs {needed}",
                remedy=f"use a key with it: echosight keys add NAME --scope {needed}",
                headers={"www-authenticate": f'{_REALM}, error="insufficient_scope", scope="{needed}"'},
            )
        return True

    def is_current(self, key: Key | None) -> bool:
        """Whether a key that was valid is so still."""
        return self._keys is None or (key is not None and key in self._keys)

    def _verify(self, keys: Keys, sent: bytes) -> Key | None:
        """As `key_of` for the value of one header, by the hash. What is not valid is never kept."""
        scheme, _, token = sent.partition(b" ")
        key = keys.find(token.strip() if scheme.lower() == b"bearer" else sent)
        if key is not None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[sent] = key
        return key

    def _news(self, path: Path) -> Keys | None:
        """The keys if their file has changed and is good."""
        seen = changed_at(path)
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            keys = Keys(read_keys(path))
        except SettingsError as error:
            logger("api").error("keys stay as they were", error=str(error))
            return None
        logger("api").info("keys read", file=str(path), num_keys=len(keys))
        return keys
