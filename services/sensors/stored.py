"""A simulated site straight into a rolling store: radar and camera of the same instant, with the truth as label.

Faster than real time and exact, because no stream and no pairing lies between. It is for evaluation: a live store
belongs to ingest. It does not know the command line.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg

from services.core.frames import CLASSES, CameraFrame, FrameId, Label, RadarFrame
from services.core.store import Pair, StoreLimits, StoreWriter
from services.sensors.simulator import LabelSettings, Scene

START_NS = 1_767_225_600_000_000_000
"""What the clock says at scene time 0, the start of 2026: the same command makes the same store."""
_LABEL_STREAM = 3
_APPENDED_AT_ONCE = 64
_NEVER_S = 100 * 365 * 86400.0


def store_scene(
    scene: Scene,
    store_dir: Path,
    *,
    num_frames: int,
    interval_s: float,
    labels: LabelSettings,
    on_progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Append `num_frames` pairs, one every `interval_s` of scene time; return how many the store did not have.

    What it has is not made again. Whoever writes this site's store now is fenced off. Raises StoreError if the
    disk refuses.
    """
    limits = StoreLimits(max_bytes=2**50, max_age_s=_NEVER_S)
    writer = StoreWriter(store_dir, scene.site.name, limits=limits, owner="simulate")
    num_new = 0
    try:
        for start in range(0, num_frames, _APPENDED_AT_ONCE):
            seqs = range(start, min(start + _APPENDED_AT_ONCE, num_frames))
            missing = [seq for seq in seqs if FrameId(_at_ns(seq * interval_s), seq) not in writer]
            num_new += writer.append([_pair(scene, seq, t_s=seq * interval_s) for seq in missing])
            found = (_label(scene, seq, t_s=seq * interval_s, labels=labels) for seq in seqs)
            writer.append_labels([label for label in found if label is not None])
            on_progress(seqs.stop)
    finally:
        writer.close()
    return num_new


def _pair(scene: Scene, seq: int, *, t_s: float) -> Pair:
    site, at_ns, camera = scene.site.name, _at_ns(t_s), scene.settings.camera
    heatmap = scene.radar(t_s)
    image = simplejpeg.encode_jpeg(scene.camera(t_s), quality=camera.jpeg_quality, colorspace="RGB")
    axes = ("channel", "range", "azimuth")
    return Pair(
        RadarFrame(site, seq, at_ns, heatmap=heatmap, axes=axes, channels=scene.settings.radar.channels),
        CameraFrame(site, seq, at_ns, image=image, shape=(camera.size_px, camera.size_px, 3)),
    )


def _label(scene: Scene, seq: int, *, t_s: float, labels: LabelSettings) -> Label | None:
    rng = np.random.default_rng((scene.seed, scene.site.seed, _LABEL_STREAM, seq))
    chosen, mistaken = rng.random(2) < (labels.share, labels.mistakes)
    if not chosen:
        return None
    said = scene.truth(t_s).label
    if mistaken:
        said = str(rng.choice([name for name in CLASSES if name != said]))
    return Label(scene.site.name, seq, _at_ns(t_s), label=said, source="truth")


def _at_ns(t_s: float) -> int:
    return START_NS + round(t_s * 1e9)
