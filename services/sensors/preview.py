"""A simulated site to look at: radar and camera side by side, as a picture or a short video."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from services.core.errors import SettingsError
from services.core.frames import CLASSES
from services.sensors.simulator import Scene, Truth, preview_row, save_preview

PICTURE, VIDEO = ".png", ".mp4"

_MOMENTS_PER_CLASS = 2
_LOOK_EVERY_S = 0.5
_SOMEBODY_ELSE_S = 5.0


def preview(
    scene: Scene, path: Path, *, seconds: float, on_progress: Callable[[float], None] = lambda _: None
) -> None:
    """Draw the first `seconds` of a scene into a .png (two moments of each class) or an .mp4 (all of it).

    on_progress: gets the seconds done. Raises SettingsError for another kind of file.
    """
    match path.suffix:
        case ".png":
            save_preview(scene, path, times_s=[t_s for t_s, _ in pick_moments(scene, seconds=seconds)])
        case ".mp4":
            _film(scene, path, seconds=seconds, on_progress=on_progress)
        case _:
            raise SettingsError(f"preview is {path.name}", remedy=f"name a file ending in {PICTURE} or {VIDEO}")


def pick_moments(scene: Scene, *, seconds: float) -> list[tuple[float, Truth]]:
    """A few moments of each class that occurs, in the order of CLASSES, seen in full where that happens."""
    in_full: dict[str, list[tuple[float, Truth]]] = {name: [] for name in CLASSES}
    in_part: dict[str, list[tuple[float, Truth]]] = {name: [] for name in CLASSES}
    for t_s in map(float, np.arange(0.0, seconds, _LOOK_EVERY_S)):
        truth = scene.truth(t_s)
        taken = (in_full if _is_clear(truth) else in_part)[truth.label]
        if not taken or t_s - taken[-1][0] > _SOMEBODY_ELSE_S:
            taken.append((t_s, truth))
    return [moment for name in CLASSES for moment in (in_full[name] or in_part[name])[:_MOMENTS_PER_CLASS]]


def _is_clear(truth: Truth) -> bool:
    if truth.label == "empty":
        return not truth.objects
    return max(found.visible_share for found in truth.objects if found.label == truth.label) > 0.95


def _film(scene: Scene, path: Path, *, seconds: float, on_progress: Callable[[float], None]) -> None:
    fps = scene.settings.camera_delivery.rate_hz
    height, width = preview_row(scene, 0.0).shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (width, height))
    if not writer.isOpened():
        raise SettingsError(f"video {path} cannot be written", remedy="check the folder, or preview a .png")
    try:
        for t_s in map(float, np.arange(0.0, seconds, 1 / fps)):
            writer.write(np.ascontiguousarray(preview_row(scene, t_s)[..., ::-1]))
            on_progress(t_s)
    finally:
        writer.release()
