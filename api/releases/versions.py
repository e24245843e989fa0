"""Which model answers to the name of a version: the live one, or one of a few that somebody asked to load.

The live one is the registry's champion and is followed by the promoter; the others are loaded beside it so that
champion, candidate and previous can be compared, and the one that was not asked for longest goes first.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from api import problems
from api.answering.serving import not_ready
from api.models.classifier import Classifier
from api.models.live import LiveModel
from api.problems import ProblemError
from services.core.errors import EchosightError
from services.core.registry import MODEL_FILE, Manifest, Registry


class Versions:
    """The versions that can be asked."""

    def __init__(
        self,
        registry: Registry,
        live: LiveModel,
        *,
        max_loaded: int,
        load: Callable[[Path, Manifest], Classifier] = Classifier.load,
    ) -> None:
        """load: makes a warm classifier of a graph and its manifest, on a thread."""
        self._registry = registry
        self._live = live
        self._max_loaded = max_loaded
        self._load_model = load
        self._loaded: OrderedDict[int, Classifier] = OrderedDict()
        self._loading = asyncio.Lock()

    def loaded(self) -> list[Classifier]:
        """All that answer, the live one first."""
        current = self._live.current
        return [*([current] if current else []), *self._beside()]

    async def find(self, name: str) -> Classifier:
        """The model behind "" (the live one), a number, or an alias of the registry. Raises ProblemError."""
        if not name:
            if self._live.current is None:
                raise not_ready(self._live)
            return self._live.current
        version = await self.number(name)
        if self._live.current is not None and version == self._live.version:
            self._loaded.pop(version, None)  # it went live since: one copy is enough
            return self._live.current
        model = self._loaded.get(version)
        if model is None:
            raise ProblemError(
                problems.NOT_LOADED,
                f"version {name} of {self._registry.name} is not loaded",
                remedy=f"POST /v2/repository/models/{self._registry.name}/load with"
                f' {{"parameters": {{"version": "{version}"}}}}',
            )
        self._loaded.move_to_end(version)
        return model

    async def number(self, name: str) -> int:
        """The version that a number or an alias means; it need not exist. Raises ProblemError."""
        if name.isascii() and name.isdigit() and len(name) <= 18:
            return int(name)
        aliases = await asyncio.to_thread(self._registry.aliases)
        if name not in aliases:
            known = ", ".join(aliases) or "none yet"
            raise ProblemError(
                problems.NO_SUCH_MODEL,
                f"version is {name[:40]!r}",
                remedy=f"use a number of /v1/models, or one of the aliases: {known}",
            )
        return aliases[name]

    async def load(self, version: int) -> None:
        """Make `version` answer, beside the live one. Raises ProblemError."""
        async with self._loading:
            if version == self._live.version:
                return
            if version not in self._loaded:
                self._loaded[version] = await asyncio.to_thread(self._read, version)
            self._loaded.move_to_end(version)
            while len(self._loaded) > self._max_loaded:
                self._loaded.popitem(last=False)

    async def load_aliases(self) -> None:
        """Load what the aliases name and is exported, as far as there is room. Raises ProblemError."""
        aliases = await asyncio.to_thread(self._registry.aliases)
        named = dict.fromkeys(aliases[name] for name in ("previous", "candidate") if name in aliases)
        wanted = [version for version in named if version != self._live.version and self._is_exported(version)]
        for version in wanted[: self._max_loaded]:
            await self.load(version)

    def unload(self, version: int | None = None) -> None:
        """Drop `version`, or all that were loaded by hand. Raises ProblemError for the live one."""
        if version is None:
            self._loaded.clear()
        elif version == self._live.version:
            raise ProblemError(
                problems.CONFLICT,
                f"version {version} is live",
                remedy="promote another first; the live model follows the registry's champion",
            )
        else:
            self._loaded.pop(version, None)

    def _beside(self) -> list[Classifier]:
        return [model for version, model in self._loaded.items() if version != self._live.version]

    def _is_exported(self, version: int) -> bool:
        return (self._registry.dir / str(version) / MODEL_FILE).is_file()

    def _read(self, version: int) -> Classifier:
        if version not in self._registry.versions():
            raise ProblemError(
                problems.NO_SUCH_MODEL,
                f"model {self._registry.name} has no version {version}",
                remedy="GET /v1/models lists them",
            )
        if not self._is_exported(version):
            raise ProblemError(
                problems.CONFLICT,
                f"version {version} has not been exported",
                remedy=f"POST /v1/models/{version}/promote: the server exports what it serves",
            )
        try:
            manifest = self._registry.manifest(version)
            return self._load_model(self._registry.path(version) / MODEL_FILE, manifest)
        except EchosightError as error:
            raise ProblemError(problems.CONFLICT, error.what, remedy=error.remedy or "load another") from None
