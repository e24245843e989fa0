"""One exported model in onnxruntime: load it, warm it and see that it answers well, then predict.

What runs it is a variant of `api.models.providers`; whatever it is, its answers are held to the checkpoint's.

Inputs of the graph: heatmap (B, C, R, A) float32, raw; site (B,) int64, an index into the manifest's sites.
Outputs: probabilities (B, classes) float32; embedding (B, D) float32; and where the manifest has a threshold for
it, unknown_score (B,) float32, larger for what is less like anything that the model knows.
"""

import math
import statistics
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from api.cores import available_cores
from api.models.providers import BATCH, CPU_FP32, FixedBatches, Session, Variant, open_session
from services.core.errors import ExportError
from services.core.registry import PROBES_FILE, Manifest

Probabilities = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float32]

INPUTS = ("heatmap", "site")
OUTPUTS = ("probabilities", "embedding")
UNKNOWN_SCORE = "unknown_score"
MAX_SUM_ERROR = 1e-3
_WARM_CALLS = 5
_PROBED_ALONE = 2
_WARM_BUDGET_S = 1.0
"""A large network is timed by fewer calls, at least one of a kind."""


@dataclass(frozen=True, slots=True)
class Probes:
    """Frames and what the checkpoint says of them: heatmaps (N, C, R, A) float32, sites (N,) int64,
    probabilities (N, classes) float32."""

    heatmaps: npt.NDArray[np.float32]
    sites: npt.NDArray[np.int64]
    probabilities: Probabilities


class Classifier:
    """A model version that has answered. Calls from several threads at a time are fine."""

    def __init__(
        self, session: Session, manifest: Manifest, *, variant: Variant = CPU_FP32, threads: int = 1
    ) -> None:
        self.manifest = manifest
        self.version = manifest.version
        self.contract = manifest.input
        self.classes = manifest.classes
        self.variant = variant.name
        """What runs it."""
        self.threads = threads
        """Cores that one call keeps busy."""
        self.max_probe_error = 0.0
        """How far its probabilities are from the checkpoint's on the probes; known once it is warm."""
        self.frame_ms = 0.0
        """Median time of a call with one frame; known once it is warm."""
        self.batch_ms = 0.0
        """Median time of a call with BATCH (8) frames; known once it is warm."""
        self.outputs: dict[str, npt.NDArray[Any]] = {node.name: np.empty(0) for node in session.get_outputs()}
        """Every output of the graph, as it is for no frames: (0, ...), of its dtype; known once it is warm."""
        self.unknown_threshold = manifest.unknown_threshold
        self._max_error = variant.max_error
        self._session = session
        self._run = session.run
        self.answers: tuple[str, ...] = ("probabilities",)
        """What a classification needs of the outputs."""
        if self.unknown_threshold is not None:
            self.answers = ("probabilities", UNKNOWN_SCORE)
        self._site_index = {site: index for index, site in enumerate(manifest.sites) if site}
        self._one_site = [np.array([index], dtype=np.int64) for index in range(max(1, len(manifest.sites)))]

    @classmethod
    def load(
        cls,
        model: Path,
        manifest: Manifest,
        *,
        variant: Variant = CPU_FP32,
        threads: int = 1,
        cores: int = 0,
        probes: Probes | None = None,
    ) -> Self:
        """Load the version that `model` lies in and warm it. Takes as long as it takes: never on the request path.

        threads: of one call; small nets scale by calls at a time, not by threads within a call. cores: 0: all that
        there are. probes: what to compare with; None: what the export left there, nothing if it left none.

        Raises ExportError if the graph does not load, breaks the contract, or answers badly or otherwise than the
        probes say.
        """
        directory = model.parent
        session = open_session(directory, variant, threads=threads, cores=cores or available_cores())
        _check_names(session, directory / variant.file, has_unknown=manifest.unknown_threshold is not None)
        classifier = cls(session, manifest, variant=variant, threads=threads)
        classifier._warm()
        probes = probes or read_probes(directory)
        if probes is not None:
            classifier._compare(probes)
        return classifier

    @property
    def batch_gain(self) -> float:
        """How much faster a frame is in a batch of BATCH than alone: 1.0 where batching is worth nothing."""
        return BATCH * self.frame_ms / self.batch_ms if self.batch_ms else 1.0

    def site(self, name: str) -> tuple[int, bool]:
        """The graph's index of a site, and whether it is known. Index 0 is any other site."""
        index = self._site_index.get(name)
        return (0, False) if index is None else (index, True)

    def sites(self, index: int, num_frames: int) -> npt.NDArray[np.int64]:
        """(num_frames,) int64 of one site's index, not to be written to."""
        one = self._one_site[index]
        return one if num_frames == 1 else np.repeat(one, num_frames)

    def predict(self, heatmaps: npt.NDArray[np.float32], site_index: int) -> Probabilities:
        """Class probabilities. heatmaps: (B, C, R, A) float32, raw. returns: (B, classes) float32."""
        return self.run(heatmaps, self.sites(site_index, len(heatmaps)), self.answers)[0]

    def run(
        self, heatmaps: npt.NDArray[np.float32], sites: npt.NDArray[np.int64], outputs: Sequence[str]
    ) -> list[npt.NDArray[Any]]:
        """The named outputs. heatmaps: (B, C, R, A) float32, raw; sites: (B,) int64, as `site` gives them."""
        answer: list[npt.NDArray[Any]] = self._run(outputs, {"heatmap": heatmaps, "site": sites})
        return answer

    def _warm(self) -> None:
        """Answer probes of one and of two frames, and time them. Raises ExportError for a bad answer."""
        rng = np.random.default_rng(0)
        last_site = len(self._one_site) - 1
        for num_frames in (2, 1):
            shape = (num_frames, *self.contract.shape)
            probe = rng.uniform(-100.0, 100.0, size=shape).astype(np.float32)  # dB and counts both lie within
            for heatmaps, site_index in ((np.zeros_like(probe), 0), (probe, last_site)):
                self._probe(heatmaps, site_index)
        values = self.run(probe, self._one_site[0], tuple(self.outputs))
        self.outputs = {name: value[:0] for name, value in zip(self.outputs, values, strict=True)}
        self.frame_ms = self._median_ms(probe)
        self.batch_ms = self._median_ms(np.repeat(probe, BATCH, axis=0))
        if isinstance(self._session, FixedBatches):
            self._session.fill_from = max(2, math.ceil(self.batch_ms / self.frame_ms))

    def _compare(self, probes: Probes) -> None:
        for size, num in ((1, _PROBED_ALONE), (BATCH, len(probes.sites))):
            for start in range(0, num, size):
                part = slice(start, start + size)
                found = self.run(probes.heatmaps[part], probes.sites[part], ["probabilities"])[0]
                error = float(np.abs(found - probes.probabilities[part]).max())
                self.max_probe_error = max(self.max_probe_error, error if np.isfinite(error) else math.inf)
        if self.max_probe_error > self._max_error:
            raise self._bad(
                f"differs by {self.max_probe_error:.3f} in probability from its checkpoint, run as {self.variant};"
                f" allowed is {self._max_error:g}"
            )

    def _median_ms(self, heatmaps: npt.NDArray[np.float32]) -> float:
        """Of a few calls, after one that does not count: it sizes the buffers for the batch."""
        self.predict(heatmaps, 0)
        times_s: list[float] = []
        while len(times_s) < _WARM_CALLS and sum(times_s) < _WARM_BUDGET_S:
            started_s = time.perf_counter()
            self.predict(heatmaps, 0)
            times_s.append(time.perf_counter() - started_s)
        return statistics.median(times_s) * 1e3

    def _probe(self, heatmaps: npt.NDArray[np.float32], site_index: int) -> None:
        num_frames = len(heatmaps)
        sites = np.full(num_frames, site_index, dtype=np.int64)
        try:
            wanted_outputs = [*OUTPUTS, *self.answers[1:]]
            outputs: list[Any] = self._run(wanted_outputs, {"heatmap": heatmaps, "site": sites})
        except Exception as error:  # as above
            raise self._bad(f"fails on {num_frames} frames: {_first_line(error)}") from None
        probabilities, embedding, *scores = outputs
        wanted = (num_frames, len(self.classes))
        if probabilities.shape != wanted or probabilities.dtype != np.float32:
            got = f"{probabilities.shape} {probabilities.dtype.name}"
            raise self._bad(f"probabilities are {got}, expected {wanted} float32")
        if embedding.ndim != 2 or len(embedding) != num_frames:
            raise self._bad(f"embedding is {embedding.shape}, expected ({num_frames}, D)")
        for score in scores:
            if score.shape != (num_frames,) or score.dtype != np.float32:
                raise self._bad(
                    f"{UNKNOWN_SCORE} is {score.shape} {score.dtype.name}, expected ({num_frames},) float32"
                )
        if not all(np.isfinite(output).all() for output in outputs):
            raise self._bad("answers NaN or infinity to a finite heatmap")
        sums = probabilities.sum(axis=1)
        if np.abs(sums - 1.0).max() > MAX_SUM_ERROR or probabilities.min() < 0.0:
            raise self._bad(f"probabilities sum to {float(sums[np.abs(sums - 1.0).argmax()]):.4f}, expected 1")

    def _bad(self, what: str) -> ExportError:
        return ExportError(f"model {self.version} {what}", remedy="look at the checkpoint and export it again")


def read_probes(directory: Path) -> Probes | None:
    """What the export of a version left to compare with; None if that was before there were probes, or they are
    damaged: they say nothing then."""
    try:
        with np.load(directory / PROBES_FILE, allow_pickle=False) as file:
            heatmaps, sites, probabilities = file["heatmap"], file["site"], file["probabilities"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return Probes(heatmaps.astype(np.float32), sites, probabilities)


def random_probes(classifier: Classifier, num: int = BATCH) -> Probes:
    """Frames of noise and what `classifier` says of them: for a version without probes of its own."""
    shape = (num, *classifier.contract.shape)
    heatmaps = np.random.default_rng(1).uniform(-100.0, 100.0, size=shape).astype(np.float32)
    return Probes(heatmaps, classifier.sites(0, num), classifier.predict(heatmaps, 0))


def _check_names(session: Session, model: Path, *, has_unknown: bool) -> None:
    inputs = {node.name for node in session.get_inputs()}
    outputs = {node.name for node in session.get_outputs()}
    wanted = (*OUTPUTS, UNKNOWN_SCORE) if has_unknown else OUTPUTS
    if inputs != set(INPUTS) or not outputs.issuperset(wanted):
        raise ExportError(
            f"{model} takes {sorted(inputs)} and gives {sorted(outputs)}",
            remedy=f"export it with inputs {', '.join(INPUTS)} and outputs {', '.join(wanted)}",
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
