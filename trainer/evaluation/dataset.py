"""A rolling store as arrays, with the frozen encoder's view of every image; computed once, kept for the next run.

It only reads the store, which may be live; encodings go to a folder of the evaluation's own. It does not know what
is learnt from the arrays.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from services.core.encodings import DIRECTORY
from services.core.errors import StoreError
from services.core.frames import CLASSES, FrameId, RadarFrame
from services.core.registry import InputContract
from services.core.store import StoredPair, StoreReader
from trainer.encodings import Encoded, EncodingCache, Vector
from trainer.vision import VisionEncoder, decode_image

UNLABELLED: Final = -1
Rows = npt.NDArray[np.int64]
"""Indices of frames of a dataset."""
Bools = npt.NDArray[np.bool_]
Progress = Callable[[str, int, int], None]
"""What is being done, how much of it is done, how much there is."""
_ENCODED_AT_ONCE = 32
_GAP_S = 10.0
"""A site's stretch of time ends where nothing was stored for so long, or for ten times the usual interval."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """N pairs in order of site and time.

    heatmap: (N, C, R, A) float16, raw. site: (N,) int64, index into `sites`. at_ns: (N,) int64, capture time.
    session: (N,) int64, a stretch of time of one site; unique over sites. label: (N,) int64, index into CLASSES,
    or UNLABELLED. key, mirrored_key: (N, D) float16, what the frozen encoder makes of the image and of its mirror
    image; zero where `has_key`, `has_mirrored_key`: (N,) bool, do not hold. pairs: where each lies in the store.
    """

    contract: InputContract
    sites: tuple[str, ...]
    vision_id: str
    heatmap: npt.NDArray[np.float16]
    site: Rows
    at_ns: Rows
    session: Rows
    label: Rows
    key: npt.NDArray[np.float16]
    mirrored_key: npt.NDArray[np.float16]
    has_key: Bools
    has_mirrored_key: Bools
    pairs: tuple[StoredPair, ...]

    def __len__(self) -> int:
        return len(self.heatmap)

    @property
    def fingerprint(self) -> str:
        """Changes whenever what is in it does."""
        digest = hashlib.sha256(f"{self.vision_id} {self.sites} {self.heatmap.shape}".encode())
        for values in (self.at_ns, self.session, self.label, self.has_key, self.has_mirrored_key):
            digest.update(values.tobytes())
        digest.update(np.ascontiguousarray(self.heatmap[:: max(1, len(self) // 64)]).tobytes())
        return digest.hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """What is in it, for a report."""
        return {
            "frames": len(self),
            "labelled": int((self.label >= 0).sum()),
            "labels": {name: int((self.label == i).sum()) for i, name in enumerate(CLASSES)},
            "sites": {name: int((self.site == i).sum()) for i, name in enumerate(self.sites)},
            "sessions": len(np.unique(self.session)),
            "shape": list(self.contract.shape),
            "unit": self.contract.unit,
            "vision": self.vision_id,
            "fingerprint": self.fingerprint,
        }


def load_dataset(
    store_dir: Path,
    *,
    vision: VisionEncoder,
    cache_dir: Path,
    mirror_share: float = 0.5,
    session_s: float = 60.0,
    on_progress: Progress = lambda *_: None,
) -> Dataset:
    """Read all pairs of the most frequent kind of radar, and encode the images that were not encoded before.

    cache_dir: for encodings; they are known again by capture time and image, so that one folder serves all stores.
    mirror_share: of frames that get a mirrored encoding too; the same ones in every run.
    Raises StoreError when there is nothing to evaluate on.
    """
    reader = StoreReader(store_dir)
    reader.refresh()
    frames = _read(reader, on_progress)
    if not frames:
        raise StoreError(
            f"the store {store_dir} holds no pairs",
            remedy="run `echosight up` or `echosight import` first, or evaluate on --simulate or --recording PATH",
        )
    frames, contract = _of_one_kind(frames)
    encodings = _encode([pair for pair, _ in frames], store_dir, vision, cache_dir, mirror_share, on_progress)
    known = [at for at, both in enumerate(encodings) if any(vector is not None for vector in both)]
    if not known:
        raise StoreError(f"the store {store_dir} holds no images", remedy="evaluate on a store that keeps images")
    frames, encodings = [frames[at] for at in known], [encodings[at] for at in known]
    pairs = tuple(pair for pair, _ in frames)
    sites = tuple(sorted({pair.site for pair in pairs}))
    labels = [reader.label(pair) for pair in pairs]
    at_ns = np.array([pair.id.captured_at_ns for pair in pairs])
    site = np.array([sites.index(pair.site) for pair in pairs])
    plain, mirrored = zip(*encodings, strict=True)
    return Dataset(
        contract=contract,
        sites=sites,
        vision_id=vision.id,
        heatmap=np.stack([heatmap for _, heatmap in frames]),
        site=site,
        at_ns=at_ns,
        session=sessions_of(site, at_ns, session_s=session_s),
        label=np.array([UNLABELLED if label is None else CLASSES.index(label.label) for label in labels]),
        key=_stack(plain, vision.dim),
        mirrored_key=_stack(mirrored, vision.dim),
        has_key=np.array([vector is not None for vector in plain]),
        has_mirrored_key=np.array([vector is not None for vector in mirrored]),
        pairs=pairs,
    )


def sessions_of(site: Rows, at_ns: Rows, *, session_s: float) -> Rows:
    """(N,) int64: each site's stretches without a long gap, cut into blocks of `session_s`, counted from 0.

    site, at_ns: (N,), in order of site and time.
    """
    step_ns = np.diff(at_ns)
    same_site = np.diff(site) == 0
    usual_ns = float(np.median(step_ns[same_site])) if same_site.any() else 0.0
    is_first = np.concatenate([[True], ~same_site | (step_ns > max(_GAP_S * 1e9, 10 * usual_ns))])
    stretch = np.cumsum(is_first) - 1
    since_ns = at_ns - at_ns[is_first][stretch]
    block = since_ns // round(session_s * 1e9)
    is_new = np.concatenate([[False], (np.diff(stretch) != 0) | (np.diff(block) != 0)])
    return np.asarray(np.cumsum(is_new), np.int64)


def clutter_table(dataset: Dataset, train: Rows) -> npt.NDArray[np.float32]:
    """(1 + S, C, R, A) float32: the mean over training sites, then each site's map, in the order of `sites`.

    A training site's map is the mean of its training frames. An unseen site's is the mean of all its frames: what
    it would have in production after as long a time, for no label and no image goes into it.
    """
    table = np.zeros((1 + len(dataset.sites), *dataset.contract.shape), np.float32)
    train_sites = np.unique(dataset.site[train])
    for site in range(len(dataset.sites)):
        rows = train[dataset.site[train] == site] if site in train_sites else np.flatnonzero(dataset.site == site)
        table[1 + site] = _mean(dataset.heatmap, rows)
    table[0] = table[1 + train_sites].mean(0)
    return table


def _mean(heatmap: npt.NDArray[np.float16], rows: Rows) -> npt.NDArray[np.float64]:
    total = np.zeros(heatmap.shape[1:])
    for start in range(0, len(rows), 256):
        total += heatmap[rows[start : start + 256]].sum(0, dtype=np.float64)
    mean: npt.NDArray[np.float64] = total / len(rows)
    return mean


_Frames = list[tuple[StoredPair, npt.NDArray[np.float16]]]


def _read(reader: StoreReader, on_progress: Progress) -> _Frames:
    """Radar maps (C, R, A) with what they are of; damaged ones are left out."""
    frames: _Frames = []
    pairs = reader.pairs
    for number, pair in enumerate(pairs, 1):
        radar = pair.radar()
        if radar is not None:
            frames.append((pair, radar.heatmap.reshape(_shape(radar)).astype(np.float16)))
        if number % 256 == 0 or number == len(pairs):
            on_progress("reading", number, len(pairs))
    return frames


def _of_one_kind(frames: _Frames) -> tuple[_Frames, InputContract]:
    """Those of the most frequent shape, and what a model must expect of them."""
    shapes = [heatmap.shape for _, heatmap in frames]
    shape = max(set(shapes), key=shapes.count)
    kept = [frame for frame in frames if frame[1].shape == shape]
    radar = kept[0][0].radar()
    assert radar is not None
    return kept, InputContract(shape=_shape(radar), unit=radar.unit, channels=radar.channels)


def _shape(radar: RadarFrame) -> tuple[int, int, int]:
    *channels, num_ranges, num_azimuths = radar.heatmap.shape
    return (channels[0] if channels else 1, num_ranges, num_azimuths)


def _encode(
    pairs: list[StoredPair],
    store_dir: Path,
    vision: VisionEncoder,
    cache_dir: Path,
    mirror_share: float,
    on_progress: Progress,
) -> list[tuple[Vector | None, Vector | None]]:
    """Each pair's encoding and mirrored encoding, None where there is none to be had."""
    caches = {site: _Caches(store_dir, cache_dir, site, vision) for site in {pair.site for pair in pairs}}
    wanted = [(pair, False) for pair in pairs]
    wanted += [(pair, True) for pair in pairs if is_mirrored(pair.id, share=mirror_share)]
    missing = [(pair, flag) for pair, flag in wanted if caches[pair.site].get(pair, mirrored=flag) is None]
    for start in range(0, len(missing), _ENCODED_AT_ONCE):
        part = missing[start : start + _ENCODED_AT_ONCE]
        _encode_part(part, caches, vision)
        on_progress("encoding images", start + len(part), len(missing))
    return [
        (caches[pair.site].get(pair, mirrored=False), caches[pair.site].get(pair, mirrored=True)) for pair in pairs
    ]


def _encode_part(part: list[tuple[StoredPair, bool]], caches: "dict[str, _Caches]", vision: VisionEncoder) -> None:
    ready = []
    for pair, flag in part:
        camera = pair.camera()
        image = decode_image(camera) if camera is not None else None
        if image is not None:
            ready.append((pair, flag, image[:, ::-1] if flag else image))
    if not ready:
        return
    images = torch.from_numpy(np.stack([image for _, _, image in ready]))
    vectors = vision(images.to(vision.mean.device)).cpu().numpy().astype(np.float16)
    for site in {pair.site for pair, _, _ in ready}:
        rows = [(p, flag, v) for (p, flag, _), v in zip(ready, vectors, strict=True) if p.site == site]
        caches[site].append(rows)


class _Caches:
    """A site's encodings: those that the trainer keeps beside the store, which are read only, and our own."""

    def __init__(self, store_dir: Path, cache_dir: Path, site: str, vision: VisionEncoder) -> None:
        def of(directory: Path) -> EncodingCache:
            return EncodingCache(directory, site=site, encoder_id=vision.id, dim=vision.dim)

        is_there = (store_dir / site / DIRECTORY / f"{vision.id}.bin").exists()
        self._trainers = of(store_dir) if is_there else None
        self._own = of(cache_dir)

    def get(self, pair: StoredPair, *, mirrored: bool) -> Vector | None:
        found = self._own.get(_content_id(pair), mirrored=mirrored)
        if found is None and self._trainers is not None:
            found = self._trainers.get(pair.id, mirrored=mirrored)
        return found

    def append(self, rows: Iterable[tuple[StoredPair, bool, Vector]]) -> None:
        self._own.append([Encoded(_content_id(pair), mirrored, vector) for pair, mirrored, vector in rows])


def _content_id(pair: StoredPair) -> FrameId:
    """Two stores may hold different images of one site and time: the image's checksum tells them apart."""
    return FrameId(pair.id.captured_at_ns, int(pair.segment.rows[pair.row]["image_sum"]))


def is_mirrored(frame_id: FrameId, *, share: float) -> bool:
    """Whether this frame is among the `share` that is learnt mirrored; decided by the id alone."""
    digest = hashlib.blake2b(b"%d-%d" % frame_id, digest_size=4).digest()
    return int.from_bytes(digest, "big") < share * 2**32


def _stack(vectors: Iterable[Vector | None], dim: int) -> npt.NDArray[np.float16]:
    return np.stack([np.zeros(dim, np.float16) if vector is None else vector for vector in vectors])
