"""A recording at one glance: when its sensors spoke, how they pair, what they saw. Drawn off screen."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from services.core.frames import CameraFrame, RadarFrame
from services.sensors.recordings.doctor import Examination, Examples, Times
from services.sensors.recordings.files import decode_image

_RADAR, _CAMERA, _ALONE = "#1f6feb", "#2da44e", "#d1242f"


def draw(found: Examination, examples: Examples, path: Path, *, title: str) -> None:
    """Write the picture to `path` as PNG."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 9), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontweight="bold")
        rows = figure.add_gridspec(4, 12, height_ratios=[1.1, 2.4, 1.9, 1.5])
        _draw_timeline(figure.add_subplot(rows[0, :]), found, examples)
        for column in range(3):
            cells = slice(4 * column, 4 * column + 4)
            if column < len(examples.scenes):
                radar, camera = examples.scenes[column]
                _draw_heatmap(figure.add_subplot(rows[1, cells]), radar, at_s=_at_s(radar, examples))
                if camera is not None:
                    _draw_image(figure.add_subplot(rows[2, cells]), camera, at_s=_at_s(camera, examples))
        _draw_steps(figure.add_subplot(rows[3, 0:4]), examples)
        _draw_offsets(figure.add_subplot(rows[3, 4:8]), found, examples)
        _draw_values(figure.add_subplot(rows[3, 8:12]), found, examples)
        figure.savefig(path, dpi=110, format="png")


def _draw_timeline(axes: Axes, found: Examination, examples: Examples) -> None:
    radar_s, camera_s = _seconds(examples.radar_ns, examples), _seconds(examples.camera_ns, examples)
    paired_radar = [radar for radar, _ in examples.pairs]
    paired_camera = [camera for _, camera in examples.pairs]
    for row, times, color, paired in ((1, radar_s, _RADAR, paired_radar), (0, camera_s, _CAMERA, paired_camera)):
        alone = np.ones(len(times), dtype=bool)
        alone[paired] = False
        axes.plot(times[alone], np.full(alone.sum(), row), "|", color=_ALONE, markersize=13, alpha=0.55)
        axes.plot(times[~alone], np.full((~alone).sum(), row), "|", color=color, markersize=13)
    for radar, camera in examples.pairs[:500]:
        axes.plot([radar_s[radar], camera_s[camera]], [0.85, 0.15], color="0.75", linewidth=0.6, zorder=0)
    axes.set_yticks([0, 1], ["camera", "radar"])
    axes.set_ylim(-0.5, 1.5)
    axes.set_xlabel("seconds")
    pairing = found.pairing
    axes.set_title(
        f"{pairing.num_pairs} pairs within {pairing.window_ms:g} ms; "
        f"red stays alone ({pairing.num_unpaired_radar} radar, {pairing.num_unpaired_camera} camera)",
        loc="left",
    )


def _draw_heatmap(axes: Axes, frame: RadarFrame, *, at_s: float) -> None:
    heatmap = frame.heatmap[0] if frame.heatmap.ndim == 3 else frame.heatmap
    low, high = np.percentile(heatmap.astype(np.float32), [2, 99.8])
    is_polar = frame.axes[-1] == "azimuth"
    axes.imshow(
        heatmap,
        origin="lower" if is_polar else "upper",
        aspect="auto" if is_polar else "equal",
        vmin=low,
        vmax=max(high, low + 1e-6),
        cmap="magma",
        interpolation="nearest",
    )
    axes.set_xlabel(f"{frame.axes[-1]} bin")
    axes.set_ylabel(f"{frame.axes[-2]} bin")
    channel = f" ({frame.channels[0]})" if frame.channels else ""
    axes.set_title(f"radar {frame.seq} at {at_s:.2f} s{channel}", loc="left")


def _draw_image(axes: Axes, frame: CameraFrame, *, at_s: float) -> None:
    axes.axis("off")
    axes.imshow(decode_image(frame.image))
    axes.set_title(f"camera {frame.seq} at {at_s:.2f} s", loc="left")


def _draw_steps(axes: Axes, examples: Examples) -> None:
    for name, times, color in (("radar", examples.radar_ns, _RADAR), ("camera", examples.camera_ns, _CAMERA)):
        if len(times) > 1:
            axes.plot(_seconds(times[1:], examples), np.diff(times) / 1e6, ".-", color=color, label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds")
    axes.set_title("step to the frame before, ms", loc="left")
    if axes.lines:
        axes.legend(frameon=False)


def _draw_offsets(axes: Axes, found: Examination, examples: Examples) -> None:
    window_ms = found.pairing.window_ms
    offsets = [(examples.camera_ns[camera] - examples.radar_ns[radar]) / 1e6 for radar, camera in examples.pairs]
    axes.hist(offsets, bins=31, range=(-window_ms, window_ms), color=_CAMERA)
    axes.set_xlabel("ms")
    axes.set_title("camera - radar, of the pairs", loc="left")


def _draw_values(axes: Axes, found: Examination, examples: Examples) -> None:
    axes.hist(examples.sample, bins=64, color=_RADAR, log=len(examples.sample) > 0)
    axes.set_xlabel(found.values.unit)
    axes.set_title("values of the heatmaps", loc="left")


def _origin_ns(examples: Examples) -> int:
    return int(min([*examples.radar_ns[:1], *examples.camera_ns[:1]], default=0))


def _seconds(times_ns: Times, examples: Examples) -> npt.NDArray[np.float64]:
    return (times_ns - _origin_ns(examples)) / 1e9


def _at_s(frame: RadarFrame | CameraFrame, examples: Examples) -> float:
    return (frame.captured_at_ns - _origin_ns(examples)) / 1e9
