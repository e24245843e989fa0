"""Under which names an open server may be asked: against DNS rebinding.

A page of evil.example whose name has come to mean 127.0.0.1 is of the server's origin to a browser, so no check of
origins helps; but the browser says `Host: evil.example`. Names that no page of the Internet can have are
fine: addresses, names without a dot (of a container, or in a hosts file), and those of zones that public DNS does
not have. Where there are keys, a page has none and nothing is asked of names.
"""

import ipaddress
from collections.abc import Mapping

from api.problems import UNKNOWN_HOST, ProblemError

ANY = "*"
_PRIVATE_ZONES = (".localhost", ".local", ".internal")
"""RFC 6761, RFC 6762, and what ICANN has set aside for private use."""
_MAX_KNOWN = 256


class Hosts:
    """allowed: names in lower case, beyond those that are fine; "*": any name."""

    def __init__(self, allowed: frozenset[str], *, is_open: bool) -> None:
        self._allowed = allowed
        self._is_asked = is_open and ANY not in allowed
        self._known: set[bytes] = set()

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """headers: the request's. Raises ProblemError for a name that a page could have brought along."""
        if not self._is_asked:
            return
        sent = headers.get(b"host", b"")
        if sent in self._known:
            return
        name = name_in(sent)
        if not (name in self._allowed or is_private(name)):
            raise ProblemError(
                UNKNOWN_HOST,
                f"host is {name[:80]!r}, and this server asks for no keys",
                remedy="ask by address or as localhost, list it in ECHOSIGHT_ALLOWED_HOSTS, or use API keys",
            )
        if len(self._known) < _MAX_KNOWN:
            self._known.add(sent)


def name_in(host: bytes) -> str:
    """The name in a Host header, without port, brackets and the dot of the root, in lower case."""
    text = host.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    name, _, port = text.rpartition(":")
    return (name if name and port.isdigit() else text).rstrip(".")


def is_private(name: str) -> bool:
    """Whether no page of the Internet can have this name. "": whoever sends none is no browser."""
    if "." not in name and ":" not in name:
        return True
    if name.endswith(_PRIVATE_ZONES):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
