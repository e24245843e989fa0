"""Which variant runs a model on this machine: measured once, remembered, and never taken on trust.

All that can run here is loaded in turn, held to the checkpoint's answers on its probes, and timed with one frame
and with eight. The choice is kept in a file under a key of the machine, onnxruntime and the architecture, so that
the next version of the same network asks no more. Whatever fails, fp32 on the CPU serves.
"""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime as ort
import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from api.models import providers
from api.models.classifier import Classifier, Probes, random_probes, read_probes
from api.models.providers import BATCH, CPU_FP32, VARIANTS, Variant
from services.core.errors import EchosightError
from services.core.files import write_atomically
from services.core.logs import Log
from services.core.registry import Manifest

FILE_NAME = "execution.json"
AUTO = "auto"
_MIN_GAIN = 1.1
"""A variant that is less exact has to be so many times faster."""
_MIN_SCALING = 0.75
"""A call takes all cores if that uses them so well; else calls at a time do."""
_SMALL_MS = 5.0
"""A call that is shorter does not gain from a second thread, and is not asked."""
_TIMED_S = 0.15
"""Per variant and batch size, at least three calls."""
_MIN_CALLS = 3
_LARGE_MS = 300.0


class Measurement(BaseModel):
    """frame_ms, batch_ms: the best of a few calls with one frame and with eight. problem: why it cannot serve."""

    model_config = ConfigDict(frozen=True)

    variant: str
    threads: Annotated[int, Field(ge=1)] = 1
    frame_ms: float = 0.0
    batch_ms: float = 0.0
    max_error: float = 0.0
    problem: str = ""

    def frames_s(self, *, cores: int) -> float:
        """Frames a second of all cores: the geometric mean of one frame a call and of eight."""
        one, eight = 1e3 / self.frame_ms, BATCH * 1e3 / self.batch_ms
        return max(1, cores // self.threads) * float(np.sqrt(one * eight))


class Choice(BaseModel):
    """What was chosen for a key, why, and all that was measured."""

    model_config = ConfigDict(frozen=True)

    variant: str
    threads: Annotated[int, Field(ge=1)]
    why: str
    at_s: float
    measurements: tuple[Measurement, ...] = ()


_CHOICES = TypeAdapter(dict[str, Choice])


class Execution:
    """Loads versions as the setting says, or as was measured. Calls from several threads at a time are fine."""

    def __init__(self, wanted: str, *, data_dir: Path, cores: int, log: Log) -> None:
        """wanted: `auto` or a variant's name. Raises SettingsError for one that cannot be had here."""
        self._wanted = None if wanted == AUTO else providers.wanted(wanted)
        self._path = data_dir / FILE_NAME
        self._cores = cores
        self._log = log
        self._measuring = threading.Lock()

    def load(self, model: Path, manifest: Manifest) -> Classifier:
        """A warm classifier. Raises ExportError if not even fp32 on the CPU answers well."""
        if self._candidates(model, manifest) == [CPU_FP32]:
            exact = Classifier.load(model, manifest, cores=self._cores)
            if self._cores == 1 or exact.frame_ms < _SMALL_MS:
                return exact  # there is nothing to choose
        with self._measuring:
            variant, threads = self._choose(model, manifest)
        try:
            return self._load(model, manifest, variant, threads, None)
        except EchosightError as error:
            if variant is CPU_FP32:
                raise
            self._log.warning(
                "fp32 on the CPU serves", version=manifest.version, asked=variant.name, why=error.what
            )
            return self._load(model, manifest, CPU_FP32, threads, None)

    def measure(self, model: Path, manifest: Manifest, *, variants: Sequence[Variant] | None = None) -> Choice:
        """Load and time the variants that can run the version, one after another; say which is best.

        variants: which, beside fp32 on the CPU, the more exact first; None: those that have a chance.
        Raises ExportError as `load` does.
        """
        tried = self._candidates(model, manifest) if variants is None else variants
        exact = Classifier.load(model, manifest, cores=self._cores)
        probes = read_probes(model.parent) or random_probes(exact)
        found = [_timed(exact, probes)]
        del exact  # one session at a time: a large network has half a gigabyte
        found += [self._measured(model, manifest, variant, 1, probes) for variant in tried if variant != CPU_FP32]
        best = found[0]
        for other in found[1:]:
            if not other.problem and (self._wanted is not None or self._gain(other, best) >= _MIN_GAIN):
                best = other
        if self._cores > 1 and best.frame_ms >= _SMALL_MS:
            wide = self._measured(model, manifest, VARIANTS[best.variant], self._cores, probes)
            found.append(wide)
            if not wide.problem and self._gain(wide, best) >= _MIN_SCALING:
                best = wide
        return Choice(
            variant=best.variant,
            threads=best.threads,
            why=_why(best, found[0], cores=self._cores),
            at_s=round(time.time(), 3),
            measurements=tuple(found),
        )

    def save(self, manifest: Manifest, choice: Choice) -> None:
        """Remember a choice for this machine and architecture. Raises OSError."""
        saved = self._saved() | {self.key(manifest): choice}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(
            self._path, orjson.dumps(_CHOICES.dump_python(saved, mode="json"), option=orjson.OPT_INDENT_2)
        )

    def key(self, manifest: Manifest) -> str:
        """What a measurement holds for."""
        architecture = manifest.architecture
        net = {name: architecture[name] for name in ("encoder", "width", "feature_dim") if name in architecture}
        names = sorted(name.removesuffix("ExecutionProvider") for name in ort.get_available_providers())
        parts = {
            "processor": providers.cpu_name(),
            "cores": self._cores,
            "onnxruntime": ort.__version__,
            "providers": ",".join(names),
            "network": " ".join(f"{name}={value}" for name, value in net.items()),
            "shape": "x".join(map(str, manifest.input.shape)),
            "int8": _has_int8(manifest),
            "asked": AUTO if self._wanted is None else self._wanted.name,
        }
        return "; ".join(f"{name} {value}" for name, value in parts.items())

    def _candidates(self, model: Path, manifest: Manifest) -> list[Variant]:
        can = providers.candidates(model.parent, has_int8=_has_int8(manifest))
        return can if self._wanted is None else [self._wanted]

    def _choose(self, model: Path, manifest: Manifest) -> tuple[Variant, int]:
        choice = self._saved().get(self.key(manifest))
        if choice is None or choice.variant not in VARIANTS or choice.threads > self._cores:
            choice = self.measure(model, manifest)
            self._log.info("execution chosen", variant=choice.variant, threads=choice.threads, why=choice.why)
            for row in choice.measurements:
                if row.problem:
                    self._log.warning("execution not possible", variant=row.variant, why=row.problem)
            try:
                self.save(manifest, choice)
            except OSError as error:
                self._log.warning("choice of execution not saved", path=str(self._path), error=str(error))
        return VARIANTS[choice.variant], choice.threads

    def _saved(self) -> dict[str, Choice]:
        try:
            return _CHOICES.validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValidationError) as error:
            self._log.warning(
                "saved choices of execution are not used", path=str(self._path), error=str(error)[:200]
            )
            return {}

    def _load(
        self, model: Path, manifest: Manifest, variant: Variant, threads: int, probes: Probes | None
    ) -> Classifier:
        if probes is None and variant is not CPU_FP32 and read_probes(model.parent) is None:
            probes = random_probes(Classifier.load(model, manifest))
        return Classifier.load(model, manifest, variant=variant, threads=threads, cores=self._cores, probes=probes)

    def _measured(
        self, model: Path, manifest: Manifest, variant: Variant, threads: int, probes: Probes
    ) -> Measurement:
        try:
            return _timed(self._load(model, manifest, variant, threads, probes), probes)
        except EchosightError as error:
            return Measurement(variant=variant.name, threads=threads, problem=error.what)

    def _gain(self, ours: Measurement, theirs: Measurement) -> float:
        return ours.frames_s(cores=self._cores) / theirs.frames_s(cores=self._cores)


def _timed(classifier: Classifier, probes: Probes) -> Measurement:
    """The best of a few calls: what a call costs while nothing else has the core.

    What the warm-up found has to do for a large network.
    """
    times_ms = {1: classifier.frame_ms, BATCH: classifier.batch_ms}
    for size in times_ms if classifier.batch_ms < _LARGE_MS else ():
        heatmaps = np.resize(probes.heatmaps, (size, *probes.heatmaps.shape[1:]))
        best_s, num, ends_s = float("inf"), 0, time.perf_counter() + _TIMED_S
        while num < _MIN_CALLS or time.perf_counter() < ends_s:
            started_s = time.perf_counter()
            classifier.predict(heatmaps, 0)
            best_s = min(best_s, time.perf_counter() - started_s)
            num += 1
        times_ms[size] = best_s * 1e3
    return Measurement(
        variant=classifier.variant,
        threads=classifier.threads,
        frame_ms=round(times_ms[1], 4),
        batch_ms=round(times_ms[BATCH], 4),
        max_error=classifier.max_probe_error,
    )


def _why(best: Measurement, exact: Measurement, *, cores: int) -> str:
    if best.variant == exact.variant and best.threads == exact.threads:
        return f"nothing else is {_MIN_GAIN}x faster than {exact.variant}"
    return (
        f"a frame in {best.frame_ms:.2f} ms instead of {exact.frame_ms:.2f} by {exact.variant}, eight in"
        f" {best.batch_ms:.2f} instead of {exact.batch_ms:.2f}, {best.threads} of {cores} cores a call"
    )


def _has_int8(manifest: Manifest) -> bool:
    return manifest.int8 is not None and manifest.int8.is_kept
