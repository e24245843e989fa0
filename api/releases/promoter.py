"""Watches the registry and makes the right version live: new candidates, and a champion moved by somebody else.

The order is the correctness: export -> load and warm (off the request path) -> swap -> promote. Whatever fails
before the swap leaves the live model alone. It does not know HTTP.
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from api.answering.serving import Serving
from api.events import Events
from api.metrics import Metrics
from api.models.classifier import Classifier
from api.models.live import LiveModel
from api.releases.exporter import ExportDelayedError, Exporter, ExportKilledError
from services.core.errors import EchosightError, ExportError, RegistryError
from services.core.logs import logger
from services.core.registry import MODEL_FILE, Manifest, Registry

ACTOR = "api"
MAX_KILLED_EXPORTS = 3
RETRY_POLLS = 10
"""After so many polls a version that did not load, or whose export was put off, is tried again."""
MAX_PUT_OFF_S = 600.0


class Trial(NamedTuple):
    """What a candidate must stand before it goes live; see ApiSettings. shadow_frames 0: no live traffic."""

    max_frame_ms: float
    shadow_frames: int
    shadow_timeout_s: float
    shadow_min_agreement: float


class Promoter:
    """The one task that changes which model is live."""

    def __init__(
        self,
        registry: Registry,
        exporter: Exporter,
        *,
        serving: Serving,
        metrics: Metrics,
        events: Events,
        poll_interval_s: float,
        trial: Trial,
        load: Callable[[Path, Manifest], Classifier] = Classifier.load,
    ) -> None:
        """load: makes a warm classifier of a graph and its manifest, on a thread."""
        self._registry = registry
        self._exporter = exporter
        self._serving = serving
        self._live: LiveModel = serving.live
        self._trial = trial
        self._metrics = metrics
        self._events = events
        self._poll_interval_s = poll_interval_s
        self._load_model = load
        self._unpromoted = 0  # the version that is live though the registry could not be told yet
        self._retry_at: dict[int, float] = {}  # monotonic seconds
        self._num_delays: dict[int, int] = {}  # exports that were put off, one after another
        self._log = logger(ACTOR)

    async def run(self) -> None:
        """Until cancelled. A registry that cannot be read or written is tried again."""
        while True:
            try:
                await self.step()
            except (EchosightError, OSError) as error:
                self._log.warning("registry trouble", error=str(error))
                if self._live.current is None:
                    self._live.waiting_for = f"the registry: {error}"
            except Exception as error:  # never stop following the registry; the live model answers meanwhile
                self._log.error("promoter failed", exc_info=error)
            await asyncio.sleep(self._poll_interval_s)

    async def step(self) -> None:
        """One look into the registry, and all that follows from it."""
        aliases = await asyncio.to_thread(self._registry.aliases)
        self._live.has_looked = True
        champion, candidate = aliases.get("champion"), aliases.get("candidate")
        if champion is None and candidate is None:
            self._live.waiting_for = await asyncio.to_thread(self._first_version)
        if candidate is not None and not (
            candidate > (champion or 0) and await asyncio.to_thread(self._is_new, candidate)
        ):
            candidate = None
        if candidate is None:
            self._unpromoted = 0  # somebody else has decided meanwhile
        if champion is not None and self._live.version not in (champion, self._unpromoted):
            await self._follow(champion, aliases.get("previous"))
        if candidate is not None:
            await self._advance(candidate)

    async def _follow(self, champion: int, previous: int | None) -> None:
        """Serve what the registry says. Until that works, what is live stays; from nothing, `previous` serves."""
        if await self._is_exported(champion) and await self._try_serve(champion):
            return
        if self._live.current is None and previous is not None and await self._is_exported(previous):
            await self._try_serve(previous)
        if not self._is_due(champion):
            return
        if not await self._is_exported(champion) and await asyncio.to_thread(self._may_export, champion):
            try:
                await self._export(champion)
            except ExportDelayedError as error:
                self._put_off(champion, error)
                return
            except ExportError as error:
                await self._refuse(champion, error)
                return
            await self._try_serve(champion)

    async def _advance(self, candidate: int) -> None:
        """1. export, 2. load, warm and try, 3. swap, 4. promote; a bad model in 1 or 2 refuses the version."""
        why = "exported, warmed and answering well"
        if self._live.version != candidate:
            if not self._is_due(candidate):
                return
            try:
                if not await self._is_exported(candidate):
                    await self._export(candidate)
                classifier = await self._load(candidate)
                self._check_time(classifier)
                if self._live.current is not None and self._trial.shadow_frames:
                    why += f"; {await self._compare(classifier)}"
            except ExportDelayedError as error:
                self._put_off(candidate, error)
                return
            except EchosightError as error:
                await self._refuse(candidate, error)
                return
            if not await asyncio.to_thread(self._is_new, candidate):
                return  # it took minutes, in which a person may have moved the champion
            self._unpromoted = candidate
            self._swap(classifier)
        await asyncio.to_thread(self._registry.promote, candidate, by=ACTOR, why=why)
        self._unpromoted = 0
        await self._announce(why)

    async def _try_serve(self, version: int) -> bool:
        """Load and swap in a version that the registry names; what does not load is left alone for a while."""
        if not self._is_due(version):
            return False
        try:
            classifier = await self._load(version)
        except EchosightError as error:
            if version not in self._retry_at:
                self._log.error("model does not load", version=version, error=str(error))
                await self._events.emit("model_refused", version=version, why=error.what)
            self._retry_at[version] = time.monotonic() + RETRY_POLLS * self._poll_interval_s
            if self._live.current is None:
                self._live.waiting_for = f"a model that loads: {error.what}"
            return False
        self._retry_at.pop(version, None)
        self._swap(classifier)
        await self._announce("the registry names it")
        return True

    async def _export(self, version: int) -> None:
        if self._live.current is None:
            self._live.waiting_for = f"the export of version {version}"
        self._log.info("exporting", version=version)
        started_s = time.monotonic()
        for attempt in range(1, MAX_KILLED_EXPORTS + 1):
            try:
                await self._exporter.export(version)
                break
            except ExportDelayedError as error:
                if await self._is_exported(version):
                    self._log.warning("export ended before int8 was done", version=version, error=str(error))
                    break
                if not isinstance(error, ExportKilledError) or attempt == MAX_KILLED_EXPORTS:
                    raise
                self._log.warning("export was killed; trying again", version=version)
        if not await self._is_exported(version):
            raise ExportError(f"export of version {version} left no {MODEL_FILE} with its parity")
        self._retry_at.pop(version, None)
        self._num_delays.pop(version, None)
        self._log.info("exported", version=version, seconds=round(time.monotonic() - started_s, 1))

    async def _load(self, version: int) -> Classifier:
        """A warm classifier, made on a thread. Raises ExportError or RegistryError."""
        if self._live.current is None:
            self._live.waiting_for = f"version {version} to load and warm up"
        manifest = await asyncio.to_thread(self._registry.manifest, version)
        return await asyncio.to_thread(self._load_model, self._registry.path(version) / MODEL_FILE, manifest)

    def _check_time(self, model: Classifier) -> None:
        if model.frame_ms > self._trial.max_frame_ms:
            raise ExportError(
                f"takes {model.frame_ms:.0f} ms for a frame, {self._trial.max_frame_ms:.0f} are allowed",
                remedy="publish a smaller encoder, or raise ECHOSIGHT_MAX_FRAME_MS",
            )

    async def _compare(self, classifier: Classifier) -> str:
        """The candidate beside the live model on live traffic. Raises ExportError if they agree too little."""
        trial = self._trial
        self._log.info("comparing on live frames", version=classifier.version, frames=trial.shadow_frames)
        seen = await self._serving.compare(classifier, trial.shadow_frames, timeout_s=trial.shadow_timeout_s)
        if seen.agreement < trial.shadow_min_agreement:
            raise ExportError(
                f"{seen}, less than {trial.shadow_min_agreement:.0%}", remedy="promote it by hand if it is right"
            )
        return str(seen)

    def _swap(self, classifier: Classifier) -> None:
        self._live.swap(classifier)
        self._metrics.model_went_live(classifier.version, classifier.manifest.created_at_s)
        self._metrics.set_execution(classifier.variant, threads=classifier.threads)

    async def _announce(self, why: str) -> None:
        model = self._live.current
        assert model is not None
        frame_ms = round(model.frame_ms, 3)
        execution = {"variant": model.variant, "threads": model.threads}
        self._log.info("model live", version=model.version, frame_ms=frame_ms, **execution, why=why)
        await self._events.emit(
            "model_live",
            version=model.version,
            why=why,
            frame_ms=frame_ms,
            metrics=model.manifest.metrics,
            **execution,
        )

    def _is_due(self, version: int) -> bool:
        return self._retry_at.get(version, 0.0) <= time.monotonic()

    def _put_off(self, version: int, error: ExportDelayedError) -> None:
        """Try the export again later, each time twice as much later: it says nothing about the model."""
        num_delays = self._num_delays[version] = self._num_delays.get(version, 0) + 1
        doubled = 2.0 ** min(num_delays - 1, 16)
        delay_s = min(RETRY_POLLS * self._poll_interval_s * doubled, MAX_PUT_OFF_S)
        self._retry_at[version] = time.monotonic() + delay_s
        self._log.warning("export put off", version=version, delay_s=delay_s, error=str(error))
        if self._live.current is None:
            self._live.waiting_for = f"the export of version {version}, put off for {delay_s:.0f} s: {error.what}"

    async def _refuse(self, version: int, error: EchosightError) -> None:
        if not await asyncio.to_thread(self._is_there, version):
            return  # pruned under our hands: nothing is left to refuse
        self._metrics.refusals.inc()
        self._log.warning("version refused", version=version, why=error.what)
        await asyncio.to_thread(self._registry.refuse, version, by=ACTOR, why=error.what)
        await self._events.emit("model_refused", version=version, why=error.what)
        if self._live.current is None:
            self._live.waiting_for = f"another version: {version} was refused: {error.what}"

    async def _is_exported(self, version: int) -> bool:
        """There is a graph, and a manifest that vouches for it."""

        def look() -> bool:
            try:
                has_model = (self._registry.path(version) / MODEL_FILE).is_file()
                return has_model and self._registry.manifest(version).parity is not None
            except EchosightError:  # gone or damaged: whoever asks finds another version or says so
                return False

        return await asyncio.to_thread(look)

    def _is_new(self, version: int) -> bool:
        """Never refused, never champion before, and let through by the trainer's gate.

        A version that somebody rolled back stays down, and one that is held waits for a person to promote it. Who
        moves the champion by hand decides against the candidate of that moment, too: the next is judged anew.
        """
        if not self._is_there(version):
            return False
        rows = self._registry.history()
        # `previous`, too: a crash may have cost the row that made it champion.
        if any(version == row["moved"].get(what) for row in rows for what in ("refused", "champion", "previous")):
            return False
        for row in reversed(rows):
            if row["moved"].get("candidate") == version:
                break
            if "champion" in row["moved"] and row["by"] != ACTOR:
                return False
        try:
            return self._registry.manifest(version).verdict == "promote"
        except RegistryError:
            return True  # whoever exports it says what is wrong with it

    def _first_version(self) -> str:
        """What the server waits for while nothing may be served."""
        held = self._registry.held()
        if held:
            version = max(held)
            return f"somebody to promote version {version}, which is held: {held[version]}"
        return f"the trainer to publish a first version of {self._registry.name}"

    def _may_export(self, version: int) -> bool:
        return self._is_there(version) and version not in self._registry.refused()

    def _is_there(self, version: int) -> bool:
        return version in self._registry.versions()
