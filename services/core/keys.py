"""The file of API keys: who may ask the model server what. `echosight keys` writes it, the API reads it.

    {"version": 1, "keys": [{"id": "3f9a0c17d2b4", "name": "north-radar", "sha256": "9c1e...",
                             "scopes": ["predict"], "created_at_s": 1712000000.25, "requests_per_s": null}]}

A key is `es_ID_SECRET`. The file has its SHA-256 alone: whoever reads the file cannot ask with it. A slow hash, as
for passwords, would add nothing: the secret is 256 random bits, which nobody finds by trying, and every request
would pay for it. The id finds the row, and the digest is compared in constant time.
"""

import hashlib
import hmac
import os
import secrets
import time
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from services.core.errors import SettingsError
from services.core.files import write_atomically

MAX_FILE_BYTES = 1024 * 1024
Scope = Literal["predict", "label", "admin"]
SCOPES: tuple[Scope, ...] = ("predict", "label", "admin")
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"

_PREFIX = "es"
_ID_BYTES, _SECRET_BYTES = 6, 32
_ID_CHARACTERS = slice(len(_PREFIX) + 1, len(_PREFIX) + 1 + 2 * _ID_BYTES)


class Key(BaseModel):
    """One key as the file has it. requests_per_s: of this key; None: as the server's setting says; 0: no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    name: str = Field(pattern=NAME_PATTERN)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: tuple[Scope, ...] = Field(min_length=1)
    created_at_s: float
    requests_per_s: float | None = Field(default=None, ge=0)

    def allows(self, scope: Scope) -> bool:
        """Whether it may do what needs `scope`: admin may do everything."""
        return scope in self.scopes or "admin" in self.scopes


class KeyFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def _check_unique(self) -> Self:
        for what in ("id", "name"):
            values = [getattr(key, what) for key in self.keys]
            if len(set(values)) < len(values):
                raise ValueError(f"two keys have one {what}")
        return self

    def added(self, name: str, scopes: tuple[Scope, ...], *, requests_per_s: float | None) -> tuple[Self, str]:
        """The file with one key more, and that key, which nothing keeps. Raises SettingsError."""
        if any(key.name == name for key in self.keys):
            raise SettingsError(
                f"there is a key {name!r} already", remedy="remove it first, or choose another name"
            )
        key_id = secrets.token_hex(_ID_BYTES)
        text = f"{_PREFIX}_{key_id}_{secrets.token_urlsafe(_SECRET_BYTES)}"
        try:
            key = Key(
                id=key_id,
                name=name,
                sha256=digest(text.encode()).hex(),
                scopes=scopes,
                created_at_s=time.time(),
                requests_per_s=requests_per_s,
            )
        except ValidationError as error:
            raise SettingsError(f"key {name!r} cannot be: {_first(error)}", remedy="see --help") from None
        return self.model_copy(update={"keys": (*self.keys, key)}), text

    def removed(self, name: str) -> Self:
        """The file without one key. Raises SettingsError."""
        kept = tuple(key for key in self.keys if key.name != name)
        if len(kept) == len(self.keys):
            known = ", ".join(key.name for key in self.keys) or "none"
            raise SettingsError(f"there is no key {name!r}", remedy=f"there are: {known}")
        return self.model_copy(update={"keys": kept})


class Keys:
    """The keys of a file, to be found by what a client sends."""

    def __init__(self, file: KeyFile) -> None:
        self._rows = {key.id.encode(): (key, bytes.fromhex(key.sha256)) for key in file.keys}

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: Key) -> bool:
        return self._rows.get(key.id.encode(), (None,))[0] == key

    def find(self, sent: bytes) -> Key | None:
        """The key that was sent, None if it is none of these."""
        row = self._rows.get(sent[_ID_CHARACTERS])
        if row is None:
            return None
        key, expected = row
        return key if hmac.compare_digest(digest(sent), expected) else None


def digest(key: bytes) -> bytes:
    """What the file keeps of a key."""
    return hashlib.sha256(key).digest()


def read_keys(path: Path) -> KeyFile:
    """Raises SettingsError if it cannot be read or is no file of keys."""
    make = "make one: echosight keys add NAME --scope predict"
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        remedy = make if isinstance(error, FileNotFoundError) else "let this user read it"
        raise SettingsError(f"keys file {str(path)!r}: {error.strerror}", remedy=remedy) from None
    if len(content) > MAX_FILE_BYTES:
        raise SettingsError(f"keys file {str(path)!r} is larger than {MAX_FILE_BYTES} bytes", remedy=make)
    try:
        return KeyFile.model_validate_json(content)
    except ValidationError as error:
        raise SettingsError(
            f"keys file {str(path)!r} is damaged: {_first(error)}", remedy=f"put it right, or {make}"
        ) from None


def write_keys(path: Path, file: KeyFile) -> None:
    """Replace the file whole, for its owner alone to read and write. Raises OSError."""
    write_atomically(path, file.model_dump_json(indent=1).encode() + b"\n", mode=0o600)


def changed_at(path: Path) -> tuple[int, int, int] | None:
    """What is another once the file is another; None: there is no file. A link counts as what it leads to."""
    try:
        found = os.stat(path)  # noqa: PTH116 - as fast as it can be: it is asked for again and again
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])
