"""From the rolling store to training batches: encode each image once, keep the site profiles, sample with replay.

The feed does not know the radar encoder or the loss. One thread looks and encodes; another may draw batches
meanwhile: `lock` is held while what they share changes, never while an image is encoded.
"""

import bisect
import hashlib
import threading
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from services.core.encodings import UNKNOWN_DIGEST, digest_of
from services.core.errors import NoPairsError
from services.core.frames import FrameId, Label, RadarFrame
from services.core.logs import Log, logger
from services.core.profiles import SiteProfile, load_profile
from services.core.registry import InputContract
from services.core.store import StoredPair, StoreReader
from trainer.batches import Batch, Sample, stack_heatmaps
from trainer.centring import Mean
from trainer.encodings import Encoded, EncodingCache
from trainer.feed_settings import FeedSettings
from trainer.heldout import is_held_out, may_learn, thinned
from trainer.pending import Key, Pending
from trainer.queue import Scenes
from trainer.sampling import Pool, Sampler
from trainer.vectors import Vector
from trainer.vision import Images, VisionEncoder, decode_image

__all__ = ["Batch", "Feed", "Sample"]

_NUM_PROFILE_FRAMES = 256
Kind = tuple[str, str, int]
"""A site, a segment, and how many bytes a heatmap has: what looks like one radar's."""


@dataclass(slots=True)
class _Site:
    """What is known of one site's stored pairs.

    sums: of the vectors of either orientation. in_order: all samples, oldest first. held_out: those that are never
    learnt from. came_ns: when the newest of the pairs that came last was captured.
    """

    cache: EncodingCache
    sums: tuple[Mean, Mean]
    samples: dict[FrameId, Sample] = field(default_factory=dict)
    in_order: list[Sample] = field(default_factory=list)
    held_out: list[Sample] = field(default_factory=list)
    came_ns: int = 0


class Feed:
    """All encoded pairs of the store that fit the model's input contract; some are held out and never in a batch.

    Clutter maps and the means that encodings are centred by are a site's own, of all its pairs, held out or not.

    num_seen: pairs that were ever learnt from or could have been; the store has dropped some since.
    num_encoded: images that were encoded by this process.
    num_found: pairs whose image was known by its content, and not encoded again.
    misfits: sites whose radar is another one than the model's, with what it delivers.
    lock: to be held by whoever draws and reads samples beside the thread that looks.
    """

    def __init__(
        self,
        store_dir: Path,
        *,
        vision: VisionEncoder,
        settings: FeedSettings,
        centre: bool,
        seed: int,
        held_out_share: float = 0.0,
        log: Log | None = None,
    ) -> None:
        self._dir = store_dir
        self._vision = vision
        self._settings = settings
        self._centre = centre
        self.held_out_share = held_out_share
        self._log = log or logger("trainer")
        self.lock = threading.RLock()
        self.num_seen = 0
        self.num_encoded = 0
        self.num_found = 0
        self.reader = StoreReader(store_dir, tracks_changes=True)
        self.contract: InputContract | None = None
        self.sites: list[str] = []
        self.profiles: dict[str, SiteProfile] = {}
        self.misfits: set[str] = set()
        self.pool = Pool(settings)
        self.sampler = Sampler(self.pool, settings, seed=seed)
        self._sites: dict[str, _Site] = {}
        self._skipped: set[Key] = set()
        self._pending = Pending()
        self._table: npt.NDArray[np.float32] | None = None
        self._unsaved: set[str] = set()

    @property
    def num_pending(self) -> int:
        """Pairs whose image is not encoded yet."""
        return len(self._pending)

    @property
    def num_skipped(self) -> int:
        """Pairs of another shape, or damaged."""
        return len(self._skipped)

    def __len__(self) -> int:
        return len(self.pool)

    def refresh(self) -> None:
        """Look what came to the store and what left it; costs what changed."""
        with self.lock:
            self.reader.refresh()
            self._settle_contract()
            fitting: set[Kind] = set()
            for name, pairs in self.reader.changes().items():
                self._let_go(name, [at for at, pair in pairs.items() if pair is None])
                for pair in pairs.values():
                    if pair is not None:
                        self._take_up(pair, fitting)
            self._remake_lost_profiles()
            self.num_seen = max(self.num_seen, len(self))

    def encode(self, num_images: int) -> int:
        """Encode up to `num_images` pending pairs, newest first; return how many were dealt with."""
        todo = self._pending.take(num_images)
        try:
            self._encode_all(todo)
        except BaseException:
            for pair in todo:
                if self._sample(pair) is None and (pair.site, pair.id) not in self._skipped:
                    self._pending.put(pair)
            raise
        return len(todo)

    def batch(self, size: int, *, sampler: Sampler | None = None) -> Batch:
        """`size` samples as the sampler draws them; fewer where bytes got damaged, which are not drawn again.

        sampler: another than the feed's own, over its pool.
        Raises NoPairsError if there is nothing to draw.
        """
        with self.lock:
            while True:
                whole = self._read((sampler or self.sampler).draw(size))
                if whole:
                    return self._collate(whole)

    def collate(self, samples: list[Sample]) -> Batch:
        """A batch of these samples; those whose bytes got damaged are left out.

        Raises NoPairsError if none is left.
        """
        with self.lock:
            whole = self._read(samples)
            if not whole:
                raise NoPairsError(
                    f"none of {len(samples)} encoded pairs can be read any more",
                    remedy=f"run `echosight store verify` on {self._dir}; they are passed over from now on",
                )
            return self._collate(whole)

    def heldout(self, *, every_s: float, newest: int) -> list[Sample]:
        """Encoded pairs that are never learnt from, none mirrored: one an `every_s`, the `newest` of each site."""
        return thinned(
            (sample for site in self._sites.values() for sample in reversed(site.held_out)),
            where=lambda sample: (sample.site, sample.pair.id.captured_at_ns),
            every_s=every_s,
            newest=newest,
        )

    def came_ns(self, site: str) -> int:
        """When the newest of the pairs that came last was captured: it falls back with the site's clock; or 0."""
        return self._sites[site].came_ns if site in self._sites else 0

    def recent(self, site: str, *, after_ns: int, newest: int) -> list[Sample]:
        """A site's encoded pairs captured after `after_ns`, none mirrored: the `newest`, in order of time.

        None is newer than what came last: a clock that was ahead leaves pairs behind that seem newer.
        """
        found: list[Sample] = []
        came_ns = self.came_ns(site)
        for sample in reversed(self._sites[site].in_order if site in self._sites else []):
            if sample.pair.id.captured_at_ns <= after_ns or len(found) == newest:
                break
            if not sample.mirrored and sample.pair.id.captured_at_ns <= came_ns:
                found.append(sample)
        return found[::-1]

    def is_held_out(self, pair: StoredPair) -> bool:
        """Whether a pair is for judging only."""
        return is_held_out(pair.site, pair.id.captured_at_ns, share=self.held_out_share)

    def may_learn(self, pair: StoredPair) -> bool:
        """Whether a pair is neither held out nor too close to what is."""
        return may_learn(pair.site, pair.id.captured_at_ns, share=self.held_out_share)

    def admitted(self) -> list[StoredPair]:
        """Encoded pairs that fit the contract, in order of time within a site."""
        with self.lock:
            return [sample.pair for name in sorted(self._sites) for sample in self._sites[name].in_order]

    def labelled(self) -> list[tuple[StoredPair, Label]]:
        """Labelled pairs that fit the contract, in order of time within a site."""
        found = [item for item in self.reader.labelled() if self._sample(item[0]) is not None]
        return sorted(found, key=lambda item: (item[0].site, item[0].id))

    @property
    def num_labels(self) -> int:
        return len(self.reader.labelled())

    def clutter_table(self) -> npt.NDArray[np.float32]:
        """(1 + S, C, R, A): the mean over sites, then each site's map in the order of `sites`.

        The same array until a map changes. A site that the store has dropped keeps its place, with an empty map.
        """
        if self._table is None or len(self._table) != 1 + len(self.sites):
            profiles = [self._profile(site) for site in self.sites]
            known = [profile.clutter for profile in profiles if profile.num_frames] or [profiles[0].clutter]
            self._table = np.stack([np.mean(known, axis=0), *(profile.clutter for profile in profiles)])
        return self._table

    def save_profiles(self) -> None:
        """Those that changed since they were saved."""
        for site in sorted(self._unsaved):
            if (self._dir / site).is_dir():
                self.profiles[site].save(self._dir)
        self._unsaved.clear()

    def state(self) -> dict[str, Any]:
        """What enters a step and is not in the store: plain values and tensors. The sampler's is its own."""
        return {
            "sites": list(self.sites),
            "num_seen": self.num_seen,
            "profiles": {
                site: {"clutter": torch.from_numpy(profile.clutter), "num_frames": profile.num_frames}
                for site, profile in self.profiles.items()
            },
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, before the store is first looked at; `contract` is set."""
        self.sites = list(state["sites"])
        self.num_seen = max(self.num_seen, state["num_seen"])
        for site, values in state["profiles"].items():
            profile = self._profile(site)
            profile.clutter, profile.num_frames = values["clutter"].numpy().copy(), values["num_frames"]
        self._table = None

    def _take_up(self, pair: StoredPair, fitting: set[Kind]) -> None:
        """A pair that is new, or moved to another segment. fitting: of which one was seen to fit the contract."""
        if (pair.site, pair.id) in self._skipped:
            return
        site = self._site(pair.site)
        sample = site.samples.get(pair.id)
        if sample is not None:
            self._put(site, replace(sample, pair=pair))
            return
        site.came_ns = pair.id.captured_at_ns  # what came together comes oldest first
        digest = site.cache.digest(pair.id)
        mirrored = digest is not None and self._is_mirrored(pair, digest)
        if digest is None or site.cache.slot(pair.id, mirrored=mirrored) is None:
            self._pending.put(pair)
        elif self._seems_to_fit(pair, fitting):
            self._admit(pair, mirrored=mirrored)
        else:  # encoded for a model of another radar
            self._skipped.add((pair.site, pair.id))

    def _seems_to_fit(self, pair: StoredPair, fitting: set[Kind]) -> bool:
        """Reads one pair of a kind; another unit of the same size is seen once it is read to be learnt from."""
        kind = (pair.site, pair.segment.name, int(pair.segment.rows[pair.row]["radar_bytes"]))
        if kind not in fitting:
            radar = pair.radar()
            if radar is None or not self._fits(radar):
                return False
            fitting.add(kind)
        return True

    def _let_go(self, name: str, frame_ids: list[FrameId]) -> None:
        site = self._sites.get(name)
        for frame_id in frame_ids:
            self._skipped.discard((name, frame_id))
            self._pending.discard((name, frame_id))
            if site is not None:
                self._dismiss(site, frame_id)
        if site is not None:
            site.cache.forget(frame_ids)

    def _dismiss(self, site: _Site, frame_id: FrameId) -> None:
        """No sample any more, if it was one; its vector stays as long as the pair, for whoever holds it."""
        sample = site.samples.pop(frame_id, None)
        if sample is not None:
            site.sums[sample.mirrored].add(sample.vector, -1)
            self.pool.remove(sample)
            del site.in_order[_place(site.in_order, sample)]
            if sample.is_held_out:
                del site.held_out[_place(site.held_out, sample)]

    def _admit(self, pair: StoredPair, *, mirrored: bool) -> Sample:
        """Its vector is in the cache: from now on it is a sample."""
        if pair.site not in self.sites:
            self.sites.append(pair.site)
        self._profile(pair.site)
        site = self._site(pair.site)
        slot = site.cache.slot(pair.id, mirrored=mirrored)
        assert slot is not None
        sample = Sample(
            _uid(pair),
            pair,
            self.sites.index(pair.site),
            mirrored,
            site.cache.vectors,
            slot,
            may_learn=self.may_learn(pair),
            is_held_out=self.is_held_out(pair),
        )
        site.sums[mirrored].add(sample.vector, 1)
        self._put(site, sample)
        return sample

    def _put(self, site: _Site, sample: Sample) -> None:
        """Where it is found from now on: to learn from, to judge by, or in a guard between."""
        site.samples[sample.pair.id] = sample
        if sample.may_learn:
            self.pool.put(sample)
        for samples in (site.in_order, site.held_out) if sample.is_held_out else (site.in_order,):
            at = _place(samples, sample)
            is_known = at < len(samples) and samples[at].uid == sample.uid
            samples[at : at + is_known] = [sample]

    def _encode_all(self, todo: list[StoredPair]) -> None:
        known: list[tuple[StoredPair, RadarFrame, Encoded]] = []
        ready: list[tuple[StoredPair, RadarFrame, int, Images]] = []
        for pair in todo:
            radar, camera = pair.radar(), pair.camera()
            if radar is None or camera is None or not self._fits(radar):
                self._skipped.add((pair.site, pair.id))
                continue
            digest = digest_of(camera.image)
            mirrored = self._is_mirrored(pair, digest)
            vector = self._find(digest, mirrored=mirrored)
            if vector is not None:
                known.append((pair, radar, Encoded(pair.id, mirrored, vector, digest)))
                self.num_found += 1
            elif (image := decode_image(camera)) is not None:
                ready.append((pair, radar, digest, image))
            else:
                self._skipped.add((pair.site, pair.id))
        self._keep(known + self._encode(ready))

    def _encode(self, ready: list[tuple[StoredPair, RadarFrame, int, Images]]) -> list[Any]:
        """Run the frozen encoder on decoded images."""
        if not ready:
            return []
        mirrored = [self._is_mirrored(pair, digest) for pair, _, digest, _ in ready]
        images = np.stack(
            [
                item[3][:, ::-1] if is_mirrored else item[3]
                for item, is_mirrored in zip(ready, mirrored, strict=True)
            ]
        )
        vectors = self._vision(torch.from_numpy(images).to(self._vision.mean.device)).cpu().numpy()
        self.num_encoded += len(images)
        return [
            (pair, radar, Encoded(pair.id, is_mirrored, vector.astype(np.float16), digest))
            for (pair, radar, digest, _), is_mirrored, vector in zip(ready, mirrored, vectors, strict=True)
        ]

    def _keep(self, encoded: list[tuple[StoredPair, RadarFrame, Encoded]]) -> None:
        with self.lock:
            news: dict[str, list[Encoded]] = {}
            for pair, _, encoding in encoded:
                news.setdefault(pair.site, []).append(encoding)
            for name, rows in news.items():
                self._site(name).cache.append(rows)
            for pair, radar, encoding in encoded:
                self._profile(pair.site).take_in(_three_axes(radar))
                self._unsaved.add(pair.site)
                self.num_seen += self._admit(pair, mirrored=encoding.mirrored).may_learn
            if encoded:
                self._table = None

    def _read(self, samples: list[Sample]) -> list[tuple[Sample, RadarFrame]]:
        """Samples with their frames; what is damaged, or of another radar after all, is a sample no more."""
        whole = []
        for sample in samples:
            radar = sample.pair.radar()
            if radar is not None and self._fits(radar):
                whole.append((sample, radar))
            else:
                self._skipped.add((sample.pair.site, sample.pair.id))
                self._dismiss(self._sites[sample.pair.site], sample.pair.id)
        return whole

    def _collate(self, whole: list[tuple[Sample, RadarFrame]]) -> Batch:
        assert self.contract is not None
        k = np.stack([sample.vector for sample, _ in whole]).astype(np.float32)
        if self._centre:
            for row, (sample, _) in zip(k, whole, strict=True):
                row -= self._sites[sample.pair.site].sums[sample.mirrored].mean()
        column = [(s.uid, s.site, s.pair.id.captured_at_ns, s.mirrored) for s, _ in whole]
        uid, site, at_ns, mirrored = (torch.tensor(values) for values in zip(*column, strict=True))
        return Batch(
            heatmap=stack_heatmaps([radar for _, radar in whole], shape=self.contract.shape),
            site=site + 1,
            mirrored=mirrored,
            k=torch.from_numpy(k),
            scenes=Scenes(id=uid, site=site, at_ns=at_ns),
        )

    def _sample(self, pair: StoredPair) -> Sample | None:
        site = self._sites.get(pair.site)
        return site.samples.get(pair.id) if site is not None else None

    def _find(self, digest: int, *, mirrored: bool) -> Vector | None:
        """What was made of an image with this content, at any site."""
        found = (site.cache.find(digest, mirrored=mirrored) for site in self._sites.values())
        return next((vector for vector in found if vector is not None), None)

    def _is_mirrored(self, pair: StoredPair, digest: int) -> bool:
        """Decided by the image alone, so that a restart agrees; by the id where an earlier version did.

        What is held out is seen as it is served.
        """
        if self.is_held_out(pair):
            return False
        name = b"%d" % digest if digest != UNKNOWN_DIGEST else b"%d-%d" % pair.id
        return zlib.crc32(name) < self._settings.mirror_share * 2**32

    def _settle_contract(self) -> None:
        """The first pair decides what the model expects; pairs of other radars are counted, not learnt."""
        if self.contract is not None:
            return
        radar = next((found for pair in self.reader if (found := pair.radar()) is not None), None)
        if radar is not None:
            self.contract = InputContract(shape=radar.shape, unit=radar.unit, channels=radar.channels)

    def _fits(self, radar: RadarFrame) -> bool:
        assert self.contract is not None
        of = (radar.shape, radar.unit, radar.channels)
        fits = of == (self.contract.shape, self.contract.unit, self.contract.channels)
        if not fits:
            self.misfits.add(f"{radar.site}: {of[0]} {radar.unit} {' '.join(radar.channels)}".strip())
        return fits

    def _site(self, name: str) -> _Site:
        if name not in self._sites:
            cache = EncodingCache(
                self._dir,
                site=name,
                encoder_id=self._vision.id,
                dim=self._vision.dim,
                is_live=lambda frame_id: self.reader.find(name, frame_id) is not None,
            )
            if cache.num_taken_over:
                self._log.info("encodings_taken_over", site=name, rows=cache.num_taken_over, from_version=2)
            self._sites[name] = _Site(cache, (Mean(cache.vectors.dim), Mean(cache.vectors.dim)))
        return self._sites[name]

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
        for name in [name for name, profile in self.profiles.items() if not profile.num_frames]:
            known = sorted(self._sites[name].samples) if name in self._sites else []
            for frame_id in known[:: 1 + len(known) // _NUM_PROFILE_FRAMES]:
                radar = self._sites[name].samples[frame_id].pair.radar()
                if radar is not None and self._fits(radar):
                    self.profiles[name].take_in(_three_axes(radar))
                    self._unsaved.add(name)
                    self._table = None


def _place(samples: list[Sample], sample: Sample) -> int:
    return bisect.bisect_left(samples, sample.pair.id, key=lambda other: other.pair.id)


def _uid(pair: StoredPair) -> int:
    """The same in every process; 63 bits."""
    name = f"{pair.site}/{pair.id.captured_at_ns}/{pair.id.seq}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1


def _three_axes(radar: RadarFrame) -> npt.NDArray[np.float32]:
    """(C, R, A) float32."""
    heatmap: npt.NDArray[np.float32] = radar.heatmap.astype(np.float32).reshape(radar.shape)
    return heatmap
