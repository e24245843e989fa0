"""From the rolling store to training batches: encode each image once, keep the site profiles, sample with replay.

The feed does not know the radar encoder or the loss.
"""

import hashlib
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.core.frames import FrameId, Label, RadarFrame
from services.core.profiles import SiteProfile, load_profile
from services.core.registry import InputContract
from services.core.store import StoredPair, StoreReader
from trainer.encodings import EncodingCache, Vector
from trainer.heldout import is_held_out, may_learn, thinned
from trainer.queue import Scenes
from trainer.vision import VisionEncoder, decode_image

_NUM_PROFILE_FRAMES = 256


@dataclass(frozen=True, slots=True)
class Sample:
    """One encoded pair. uid: unique over sites. site: index into `Feed.sites`. vector: (D,) float16.

    may_learn, is_held_out: see `trainer.heldout`; a pair in a guard between is neither.
    """

    uid: int
    pair: StoredPair
    site: int
    mirrored: bool
    vector: Vector
    may_learn: bool = True
    is_held_out: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """heatmap: (B, C, R, A) float32, raw. site: (B,) int64, row of the clutter table (0: no known site).

    mirrored: (B,) bool. k: (B, D) float32, image encodings, centred if so asked.
    """

    heatmap: Tensor
    site: Tensor
    mirrored: Tensor
    k: Tensor
    scenes: Scenes

    def first(self, num: int) -> "Batch":
        """The first `num` pairs."""
        scenes = Scenes(self.scenes.id[:num], self.scenes.site[:num], self.scenes.at_ns[:num])
        return Batch(self.heatmap[:num], self.site[:num], self.mirrored[:num], self.k[:num], scenes)


class Feed:
    """All encoded pairs of the store that fit the model's input contract; some are held out and never in a batch.

    num_seen: pairs that were ever learnt from or could have been; the store has dropped some since.
    num_encoded: images that were encoded by this process.
    misfits: sites whose radar is another one than the model's, with what it delivers.
    """

    def __init__(
        self,
        store_dir: Path,
        *,
        vision: VisionEncoder,
        mirror_share: float,
        centre: bool,
        seed: int,
        held_out_share: float = 0.0,
    ) -> None:
        self._dir = store_dir
        self._vision = vision
        self._mirror_share = mirror_share
        self._centre = centre
        self.held_out_share = held_out_share
        self._rng = np.random.default_rng(seed)
        self.num_seen = 0
        self.num_encoded = 0
        self.reader = StoreReader(store_dir)
        self.contract: InputContract | None = None
        self.sites: list[str] = []
        self.profiles: dict[str, SiteProfile] = {}
        self._caches: dict[str, EncodingCache] = {}
        self._samples: dict[tuple[str, FrameId], Sample] = {}
        self._in_order: list[Sample] = []
        self._order: list[Sample] = []
        self._held_out: list[Sample] = []
        self._skipped: set[tuple[str, FrameId]] = set()
        self.misfits: set[str] = set()
        self._pending: list[StoredPair] = []
        self._sums: dict[tuple[int, bool], tuple[npt.NDArray[np.float64], int]] = {}

    @property
    def num_pending(self) -> int:
        """Pairs whose image is not encoded yet."""
        return len(self._pending)

    @property
    def num_skipped(self) -> int:
        """Pairs of another shape, or damaged."""
        return len(self._skipped)

    def __len__(self) -> int:
        return len(self._order)

    def refresh(self) -> None:
        """Look what came to the store and what left it."""
        self.reader.refresh()
        live = {(pair.site, pair.id) for pair in self.reader}
        self._samples = {at: sample for at, sample in self._samples.items() if at in live}
        self._skipped &= live
        for site, cache in self._caches.items():
            cache.forget_all_but({frame_id for at, frame_id in live if at == site})
        self._pending = []
        self._settle_contract()
        for pair in self.reader:
            at = (pair.site, pair.id)
            if at in self._skipped:
                continue
            sample = self._samples.get(at)
            if sample is not None:
                if sample.pair is not pair:  # moved to another segment
                    self._samples[at] = replace(sample, pair=pair)
                continue
            vector = self._cache(pair.site).get(pair.id, mirrored=self._is_mirrored(pair))
            if vector is None:
                self._pending.append(pair)
            else:
                self._admit(pair, vector)
        self._pending.sort(key=lambda pair: pair.id)  # over all sites: the newest are encoded first
        self._remake_lost_profiles()
        self._sort()
        self.num_seen = max(self.num_seen, len(self._order))

    def encode(self, num_images: int) -> int:
        """Encode up to `num_images` pending pairs, newest first; return how many."""
        todo = self._pending[-num_images:]
        del self._pending[-num_images:]
        ready: list[tuple[StoredPair, npt.NDArray[np.float32], Any]] = []
        for pair in todo:
            radar, camera = pair.radar(), pair.camera()
            image = decode_image(camera) if camera is not None else None
            if radar is None or image is None or not self._fits(radar):
                self._skipped.add((pair.site, pair.id))
                continue
            ready.append((pair, _three_axes(radar), image[:, ::-1] if self._is_mirrored(pair) else image))
        if ready:
            images = torch.from_numpy(np.stack([image for _, _, image in ready]))
            vectors = self._vision(images.to(self._vision.mean.device)).cpu().numpy().astype(np.float16)
            news: dict[str, list[tuple[FrameId, bool, Vector]]] = {}
            for (pair, heatmap, _), vector in zip(ready, vectors, strict=True):
                cache_rows = news.setdefault(pair.site, [])
                cache_rows.append((pair.id, self._is_mirrored(pair), vector))
                self._profile(pair.site).take_in(heatmap)
                self.num_encoded += 1
                self.num_seen += self._admit(pair, vector).may_learn
            for site, rows in news.items():
                self._cache(site).append(rows)
            self._sort()
        return len(todo)

    def heldout(self, *, every_s: float, newest: int) -> list[Sample]:
        """Encoded pairs that are never learnt from, none mirrored: one an `every_s`, the `newest` of each site."""
        return thinned(
            reversed(self._held_out),
            where=lambda sample: (sample.site, sample.pair.id.captured_at_ns),
            every_s=every_s,
            newest=newest,
        )

    def batch(self, size: int, *, fresh_share: float, fresh_pairs: int, rng: np.random.Generator) -> Batch:
        """`size` samples: a share from the newest pairs, the rest from all, different ones if possible."""
        num_fresh = min(round(fresh_share * size), len(self._order))
        newest = max(0, len(self._order) - fresh_pairs)
        at = np.concatenate(
            [
                rng.integers(newest, len(self._order), num_fresh),
                rng.choice(
                    len(self._order), size - num_fresh, replace=size - num_fresh > len(self._order), shuffle=False
                ),
            ]
        )
        return self.collate([self._order[i] for i in at])

    def collate(self, samples: list[Sample]) -> Batch:
        """Read the samples' heatmaps; a sample whose bytes got damaged is left out."""
        whole = [(s, frame) for s in samples if (frame := s.pair.radar()) is not None]
        heatmap = np.stack([_three_axes(frame) for _, frame in whole])
        k = np.stack([sample.vector.astype(np.float32) - self._mean(sample) for sample, _ in whole])
        column = [(s.uid, s.site, s.pair.id.captured_at_ns, s.mirrored) for s, _ in whole]
        uid, site, at_ns, mirrored = (torch.tensor(values) for values in zip(*column, strict=True))
        return Batch(
            heatmap=torch.from_numpy(heatmap),
            site=site + 1,
            mirrored=mirrored,
            k=torch.from_numpy(k),
            scenes=Scenes(id=uid, site=site, at_ns=at_ns),
        )

    def recent(self, site: str, *, after_ns: int, newest: int) -> list[Sample]:
        """A site's encoded pairs captured after `after_ns`, none mirrored: the `newest`, in order of time."""
        found: list[Sample] = []
        for sample in reversed(self._in_order):
            if sample.pair.id.captured_at_ns <= after_ns or len(found) == newest:
                break
            if sample.pair.site == site and not sample.mirrored:
                found.append(sample)
        return found[::-1]

    def is_held_out(self, pair: StoredPair) -> bool:
        """Whether a pair is for judging only."""
        return is_held_out(pair.site, pair.id.captured_at_ns, share=self.held_out_share)

    def may_learn(self, pair: StoredPair) -> bool:
        """Whether a pair is neither held out nor too close to what is."""
        return may_learn(pair.site, pair.id.captured_at_ns, share=self.held_out_share)

    def labelled(self) -> list[tuple[StoredPair, Label]]:
        """Labelled pairs that fit the contract, in order of time within a site."""
        found = [(pair, label) for pair, label in self.reader.labelled() if (pair.site, pair.id) in self._samples]
        return sorted(found, key=lambda item: (item[0].site, item[0].id))

    @property
    def num_labels(self) -> int:
        return len(self.reader.labelled())

    def clutter_table(self) -> npt.NDArray[np.float32]:
        """(1 + S, C, R, A): the mean over sites, then each site's map in the order of `sites`.

        A site that the store has dropped keeps its place, with an empty map.
        """
        profiles = [self._profile(site) for site in self.sites]
        known = [profile.clutter for profile in profiles if profile.num_frames] or [profiles[0].clutter]
        return np.stack([np.mean(known, axis=0), *(profile.clutter for profile in profiles)])

    def save_profiles(self) -> None:
        for profile in self.profiles.values():
            if (self._dir / profile.site).is_dir():
                profile.save(self._dir)

    def _sort(self) -> None:
        """Part what may be learnt from what is held out, each in order of time; a guard between is in neither."""
        self._in_order = sorted(self._samples.values(), key=lambda sample: sample.pair.id)
        self._order = [sample for sample in self._in_order if sample.may_learn]
        self._held_out = [sample for sample in self._in_order if sample.is_held_out]

    def _admit(self, pair: StoredPair, vector: Vector) -> Sample:
        if pair.site not in self.sites:
            self.sites.append(pair.site)
        self._profile(pair.site)
        site, mirrored = self.sites.index(pair.site), self._is_mirrored(pair)
        total, num = self._sums.get((site, mirrored), (np.zeros(len(vector)), 0))
        self._sums[site, mirrored] = (total + vector, num + 1)
        at, share = (pair.site, pair.id.captured_at_ns), self.held_out_share
        sample = Sample(
            _uid(pair),
            pair,
            site,
            mirrored,
            vector,
            may_learn=may_learn(*at, share=share),
            is_held_out=is_held_out(*at, share=share),
        )
        self._samples[pair.site, pair.id] = sample
        return sample

    def _mean(self, sample: Sample) -> npt.NDArray[np.float32] | float:
        if not self._centre:
            return 0.0
        total, num = self._sums[sample.site, sample.mirrored]
        return (total / num).astype(np.float32)

    def _is_mirrored(self, pair: StoredPair) -> bool:
        """Decided by site and id alone, so that a restart agrees. What is held out is seen as it is served."""
        if self.is_held_out(pair):
            return False
        return zlib.crc32(b"%d-%d" % pair.id) < self._mirror_share * 2**32

    def _settle_contract(self) -> None:
        """The first pair decides what the model expects; pairs of other radars are counted, not learnt."""
        if self.contract is not None:
            return
        radar = next((found for pair in self.reader if (found := pair.radar()) is not None), None)
        if radar is not None:
            self.contract = InputContract(shape=_three_axes(radar).shape, unit=radar.unit, channels=radar.channels)

    def _fits(self, radar: RadarFrame) -> bool:
        assert self.contract is not None
        of = (_three_axes(radar).shape, radar.unit, radar.channels)
        fits = of == (self.contract.shape, self.contract.unit, self.contract.channels)
        if not fits:
            self.misfits.add(f"{radar.site}: {of[0]} {radar.unit} {' '.join(radar.channels)}".strip())
        return fits

    def _cache(self, site: str) -> EncodingCache:
        if site not in self._caches:
            self._caches[site] = EncodingCache(
                self._dir, site=site, encoder_id=self._vision.id, dim=self._vision.dim
            )
        return self._caches[site]

    def _profile(self, site: str) -> SiteProfile:
        """The site's profile: as saved, or a new one."""
        if site in self.profiles:
            return self.profiles[site]
        assert self.contract is not None
        profile = load_profile(self._dir, site)
        if profile is None or profile.clutter.shape != self.contract.shape:
            profile = SiteProfile(site, np.zeros(self.contract.shape, np.float32))
        self.profiles[site] = profile
        return profile

    def _remake_lost_profiles(self) -> None:
        """A profile that vanished while the encodings stayed is made from stored pairs."""
        for site in [site for site, profile in self.profiles.items() if not profile.num_frames]:
            known = [sample.pair for sample in self._samples.values() if sample.pair.site == site]
            for i in self._rng.permutation(len(known))[:_NUM_PROFILE_FRAMES]:
                radar = known[i].radar()
                if radar is not None:
                    self.profiles[site].take_in(_three_axes(radar))


def _uid(pair: StoredPair) -> int:
    """The same in every process; 63 bits."""
    name = f"{pair.site}/{pair.id.captured_at_ns}/{pair.id.seq}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1


def _three_axes(radar: RadarFrame) -> npt.NDArray[np.float32]:
    """(C, R, A) float32; a map without channels is one channel."""
    heatmap: npt.NDArray[np.float32] = radar.heatmap.astype(np.float32)
    return heatmap if heatmap.ndim == 3 else heatmap[None]
