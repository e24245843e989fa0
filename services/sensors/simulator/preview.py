"""Radar and camera side by side, for a person: one picture of several instants.

It draws with OpenCV alone, so that it runs wherever the simulator does.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from services.core.errors import SettingsError
from services.sensors.simulator.scene import Scene

Picture = npt.NDArray[np.uint8]

_PANEL_PX = 288
_BAR_PX = 26
_WHITE, _GREY, _MARK = (240, 240, 240), (150, 150, 150), (255, 90, 90)


def save_preview(scene: Scene, path: Path, *, times_s: Sequence[float]) -> None:
    """Write a PNG, one row per instant: camera with boxes, integrated map, moving map, range-Doppler map.

    Raises SettingsError where there is no instant, or the file cannot be written.
    """
    if not times_s:
        raise SettingsError("a preview of no instants", remedy="name at least one time")
    sheet = np.vstack([preview_row(scene, t_s) for t_s in times_s])
    done, png = cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
    assert done
    try:
        path.write_bytes(png.tobytes())
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}", remedy="choose another path") from None


def preview_row(scene: Scene, t_s: float) -> Picture:
    """(H, W, 3) uint8 RGB of one instant."""
    truth, maps = scene.truth(t_s), scene.radar_maps(t_s)
    panels = [
        _titled(_camera(scene, t_s), f"{scene.site.name}  t = {t_s:.1f} s  {truth.label}"),
        _titled(_range_azimuth(scene, maps.integrated, t_s, top_db=45), "integrated, dB over noise"),
        _titled(_range_azimuth(scene, maps.moving, t_s, top_db=50), "moving"),
        _titled(
            _colored(maps.range_doppler, top_db=50),
            f"range-Doppler, +-{scene.settings.radar.max_speed_mps:.1f} m/s",
        ),
    ]
    return np.hstack(panels)


def _camera(scene: Scene, t_s: float) -> Picture:
    picture = scene.camera(t_s)
    scale = _PANEL_PX / len(picture)
    panel = cv2.resize(picture, (_PANEL_PX, _PANEL_PX), interpolation=cv2.INTER_CUBIC)
    for found in scene.truth(t_s).objects:
        left, top, right, bottom = (round(edge * scale) for edge in found.box_px)
        cv2.rectangle(panel, (left, top), (right, bottom), _MARK, 1, cv2.LINE_AA)
        text = f"{found.range_m:.1f} m  {found.radial_speed_mps:+.1f} m/s"
        cv2.putText(
            panel, text, (max(2, left), max(10, top - 4)), cv2.FONT_HERSHEY_SIMPLEX, 0.36, _WHITE, 1, cv2.LINE_AA
        )
    return np.asarray(panel, np.uint8)


def _range_azimuth(scene: Scene, map_db: npt.NDArray[np.float32], t_s: float, *, top_db: float) -> Picture:
    """Far ranges up, azimuth to the right, a cross where the truth has someone."""
    panel = _colored(map_db, top_db=top_db)
    radar = scene.settings.radar
    for found in scene.truth(t_s).objects:
        x = round((np.sin(np.radians(found.azimuth_deg)) + 1) / 2 * _PANEL_PX)
        y = round((1 - found.range_m / radar.max_range_m) * _PANEL_PX)
        cv2.drawMarker(panel, (x, y), _MARK, cv2.MARKER_TILTED_CROSS, 11, 1, cv2.LINE_AA)
    for range_m in range(10, int(radar.max_range_m), 10):
        y = round((1 - range_m / radar.max_range_m) * _PANEL_PX)
        cv2.putText(panel, f"{range_m} m", (3, y), cv2.FONT_HERSHEY_SIMPLEX, 0.34, _GREY, 1, cv2.LINE_AA)
    return panel


def _colored(map_db: npt.NDArray[np.float32], *, top_db: float) -> Picture:
    level = np.clip((map_db[::-1] + 3) / (top_db + 3), 0, 1)
    colors = cv2.applyColorMap((level * 255).astype(np.uint8), cv2.COLORMAP_VIRIDIS)
    panel = cv2.resize(colors, (_PANEL_PX, _PANEL_PX), interpolation=cv2.INTER_NEAREST)
    return np.asarray(cv2.cvtColor(panel, cv2.COLOR_BGR2RGB), np.uint8)


def _titled(panel: Picture, title: str) -> Picture:
    framed = np.full((_PANEL_PX + _BAR_PX, _PANEL_PX + 4, 3), 24, np.uint8)
    framed[_BAR_PX:, :-4] = panel
    cv2.putText(framed, title, (4, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.4, _WHITE, 1, cv2.LINE_AA)
    return framed
