"""Who may write a site: whoever gave its directory the highest token.

    store/SITE/writer-TOKEN/   the segments and labels of the site, in the directory of its one writer

A writer takes a site over by renaming that directory to its own name. The rename is one step for the file system,
and from then on nothing that the writer before does by path succeeds: it makes, removes and replaces no file.
What it may still do, after a pause of any length, is write into files that it holds open. Those are never
written, nor trusted further, by anyone else: the new writer says once and for all how much of each counts
(`services.core.sealing`). `check` tells a writer whether its directory still has its name. Checked after the
bytes are on disk, a yes means that they were there before any take-over, so that the next writer finds them.

No lock is held, so a paused process blocks nobody. It works on one host's file systems only: others may show a
rename late.
"""

import contextlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import orjson

from services.core.errors import StoreError, StoreFencedError
from services.core.files import sync_directory

_NAME = re.compile(r"writer-([0-9]{1,19})")
_OWNER = "owner.json"
_MAX_TRIES = 100


@dataclass(frozen=True, slots=True)
class Fence:
    """The right to write a site, until someone with a higher token takes it."""

    site_dir: Path
    token: int

    @classmethod
    def take(cls, site_dir: Path, *, token: int | None, owner: str) -> "Fence":
        """Take the site over. token None: one more than the newest.

        Raises StoreFencedError if this token or a higher one was seen, OSError.
        """
        site_dir.mkdir(parents=True, exist_ok=True)
        fence = cls(site_dir, _rename(site_dir, token))
        try:
            fence._absorb()
            fence._sign(owner)
            sync_directory(site_dir)
        except FileNotFoundError:
            fence.check()  # a higher token was at our heels
            raise
        return fence

    @property
    def directory(self) -> Path:
        return _path(self.site_dir, self.token)

    def check(self) -> None:
        """Raise StoreFencedError once another writer has the site."""
        if not is_held(self.site_dir, token=self.token):
            _refuse(self.site_dir, self.token, newest=newest_token(self.site_dir.parent, self.site_dir.name))

    def _absorb(self) -> None:
        """Let no lower token stand beside ours: two takers of a new site may each have made a directory."""
        seen = None
        while (tokens := _tokens(self.site_dir)) != {self.token} or tokens != seen:
            seen = tokens  # asked until two answers agree: a listing may miss both names of a rename under way
            if max(tokens, default=0) > self.token:
                with contextlib.suppress(OSError):
                    self.directory.rmdir()
                _refuse(self.site_dir, self.token, newest=max(tokens))
            self.check()
            for lower in sorted(tokens - {self.token}):
                _merge(_path(self.site_dir, lower), self.directory)

    def _sign(self, owner: str) -> None:
        said = {"token": self.token, "owner": owner, "pid": os.getpid(), "since_s": round(time.time(), 3)}
        fd = os.open(self.directory / _OWNER, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.write(fd, orjson.dumps(said))
        finally:
            os.close(fd)


def newest_token(store_dir: Path, site: str) -> int:
    """The highest token that a site's store has seen; 0 for none."""
    return max(_tokens(store_dir / site) or _tokens(store_dir / site), default=0)


def is_held(site_dir: Path, *, token: int) -> bool:
    """Whether the writer with this token has the site. Token 0 is that of version 1, which knew no tokens."""
    if token == 0:
        return not _tokens(site_dir)
    try:
        os.stat(_path(site_dir, token))  # noqa: PTH116 (asked at each append)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def data_dir(site_dir: Path) -> Path:
    """Where a site's segments are now: with its newest writer, or beside it in a store of version 1."""
    token = newest_token(site_dir.parent, site_dir.name)
    return _path(site_dir, token) if token else site_dir


def owner_of(site_dir: Path) -> str:
    """Who took the site last; "" if that is not known."""
    try:
        return str(orjson.loads((data_dir(site_dir) / _OWNER).read_bytes())["owner"])
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return ""


def _rename(site_dir: Path, token: int | None) -> int:
    """Give the newest directory our name, or make the first one; return our token."""
    for _ in range(_MAX_TRIES):
        newest = newest_token(site_dir.parent, site_dir.name)
        mine = newest + 1 if token is None else token
        if newest >= mine:
            _refuse(site_dir, mine, newest=newest)
        try:
            if newest:
                os.rename(_path(site_dir, newest), _path(site_dir, mine))  # noqa: PTH104 (one system call)
            else:
                _path(site_dir, mine).mkdir()
        except (FileNotFoundError, FileExistsError):
            continue  # another taker was faster: look again
        return mine
    raise StoreError(f"{site_dir} changed hands {_MAX_TRIES} times in a row", remedy="try again")


def _merge(lower: Path, own: Path) -> None:
    """Take over what a lower directory has; it has nothing if its maker was fenced at once."""
    try:
        lower.rmdir()
    except FileNotFoundError:
        return
    except OSError:
        try:
            os.rename(lower, own)  # noqa: PTH104 (replaces an empty directory in one step)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StoreError(
                f"{lower} and {own} both have segments", remedy="stop ingest and move the older one away"
            ) from error


def _refuse(site_dir: Path, token: int, *, newest: int) -> None:
    raise StoreFencedError(
        f"site {site_dir.name} is written under token {newest}, ours is {token}",
        remedy="another process has taken it over; this one must leave it alone",
    )


def _tokens(site_dir: Path) -> set[int]:
    try:
        names = os.listdir(site_dir)  # noqa: PTH208 (asked often)
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise StoreError(
            f"cannot look into {site_dir}: {error.strerror}", remedy="repair it, or move it away"
        ) from error
    return {int(match[1]) for name in names if (match := _NAME.fullmatch(name))}


def _path(site_dir: Path, token: int) -> Path:
    return site_dir / f"writer-{token}"
