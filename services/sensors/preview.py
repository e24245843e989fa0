"""A simulated site to look at: radar and camera side by side, as a picture or a short video."""

from collections.abc import Callable
from pathlib import Path

import cv2
import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from services.core.errors import SettingsError
from services.core.frames import CLASSES
from services.sensors.simulator import CHANNELS, Scene, Truth

PICTURE, VIDEO = ".png", ".mp4"

_MOMENTS_PER_CLASS = 2
_LOOK_EVERY_S = 0.5
_SOMEBODY_ELSE_S = 5.0
_PANEL_PX = 448
_LOW_DB, _HIGH_DB = -5.0, 45.0


def preview(
    scene: Scene, path: Path, *, seconds: float, on_progress: Callable[[float], None] = lambda _: None
) -> None:
    """Draw the first `seconds` of a scene into a .png (two moments of each class) or an .mp4 (all of it).

    on_progress: gets the seconds done. Raises SettingsError for another kind of file.
    """
    match path.suffix:
        case ".png":
            _draw(scene, path, seconds=seconds)
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


def _draw(scene: Scene, path: Path, *, seconds: float) -> None:
    moments = pick_moments(scene, seconds=seconds)
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(12, 2.3 * len(moments) / 2 + 0.6), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(
            f"{scene.site.name}, seed {scene.seed}: camera, and radar in dB over noise (range up, azimuth right)"
        )
        columns = 2 * (1 + len(CHANNELS))
        axes = figure.subplots((len(moments) + 1) // 2, columns, squeeze=False).ravel()
        for axis in axes:
            axis.set_axis_off()
        for number, (t_s, truth) in enumerate(moments):
            cells = axes[number * columns // 2 :]
            nearest = f" at {truth.objects[0].range_m:.1f} m" if truth.label != "empty" else ""
            cells[0].imshow(scene.camera(t_s))
            cells[0].set_title(f"{t_s:.1f} s: {truth.label}{nearest}", loc="left")
            for cell, name, heatmap in zip(cells[1:], CHANNELS, scene.radar(t_s), strict=False):
                cell.imshow(
                    heatmap.astype(np.float32),
                    origin="lower",
                    aspect="auto",
                    cmap="magma",
                    vmin=_LOW_DB,
                    vmax=_HIGH_DB,
                )
                cell.set_title(name, loc="left")
        figure.savefig(path, dpi=110, format="png")


def _film(scene: Scene, path: Path, *, seconds: float, on_progress: Callable[[float], None]) -> None:
    fps = scene.settings.camera_delivery.rate_hz
    size = (_PANEL_PX * (1 + len(CHANNELS)), _PANEL_PX)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
    if not writer.isOpened():
        raise SettingsError(f"video {path} cannot be written", remedy="check the folder, or preview a .png")
    try:
        for t_s in np.arange(0.0, seconds, 1 / fps):
            panels = [scene.camera(float(t_s))[:, :, ::-1], *map(_colored, scene.radar(float(t_s)))]
            row = [cv2.resize(panel, (_PANEL_PX, _PANEL_PX), interpolation=cv2.INTER_NEAREST) for panel in panels]
            frame = np.ascontiguousarray(np.hstack(row))
            label = f"{t_s:.1f} s  {scene.truth(float(t_s)).label}"
            cv2.putText(frame, label, (12, 30), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (255, 255, 255), 2, cv2.LINE_AA)
            writer.write(frame)
            on_progress(float(t_s))
    finally:
        writer.release()


def _colored(heatmap: npt.NDArray[np.float16]) -> npt.NDArray[np.uint8]:
    """heatmap: (R, A) dB. returns: (R, A, 3) uint8, blue first; far is up."""
    level = (heatmap.astype(np.float32) - _LOW_DB) / (_HIGH_DB - _LOW_DB)
    grey = (255 * np.clip(level, 0, 1)).astype(np.uint8)
    return np.asarray(cv2.applyColorMap(grey[::-1], cv2.COLORMAP_MAGMA), dtype=np.uint8)
