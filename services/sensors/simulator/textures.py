"""Surfaces made from noise and rules: ground, facades, leaves, sky. They do not know where they will hang."""

import cv2
import numpy as np
import numpy.typing as npt

from services.sensors.simulator.sites import GroundKind, Wall

Picture = npt.NDArray[np.uint8]
Float = npt.NDArray[np.float32]

GROUND_PX = 1024
GROUND_M = 8.0


def noise(rng: np.random.Generator, shape: tuple[int, int], *, octaves: int = 5, coarsest: int = 4) -> Float:
    """(H, W) float32 of mean 0 and deviation 1: white noise at several scales, the coarse ones strongest.

    Its left edge continues its right one, its top its bottom.
    """
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        rows, columns = (min(coarsest * 2**octave, size) for size in shape)
        grid = np.pad(rng.standard_normal((rows, columns), dtype=np.float32), 1, mode="wrap")
        tall, wide = shape[0] + 2 * (shape[0] // rows), shape[1] + 2 * (shape[1] // columns)
        smooth = cv2.resize(grid, (wide, tall), interpolation=cv2.INTER_CUBIC)
        top, left = shape[0] // rows, shape[1] // columns
        total += smooth[top : top + shape[0], left : left + shape[1]] * 0.6**octave
    return np.asarray((total - total.mean()) / max(float(total.std()), 1e-6), np.float32)


def _blurred(grain: Float, *, wide: float, tall: float) -> Float:
    """Blurred as if tiled."""
    pad = 16
    soft = cv2.GaussianBlur(np.pad(grain, pad, mode="wrap"), (0, 0), sigmaX=wide, sigmaY=tall)
    return np.asarray(soft[pad:-pad, pad:-pad])


def ground(rng: np.random.Generator, kind: GroundKind, tone: tuple[int, int, int]) -> Float:
    """(G, G, 3) float32 0..255: a tile of GROUND_M metres, seen from above."""
    size = (GROUND_PX, GROUND_PX)
    base = np.empty((*size, 3), np.float32)
    base[:] = tone
    fine = rng.standard_normal(size, dtype=np.float32)
    match kind:
        case "asphalt":
            level = 0.05 * noise(rng, size) + 0.11 * _blurred(fine, wide=0.8, tall=0.8) * 2
            base *= (1 + level)[..., None]
            for _ in range(3):
                way = np.cumsum(rng.normal((0, 4), 5, (90, 2)), axis=0) + rng.uniform(0.2, 0.5, 2) * GROUND_PX
                cv2.polylines(
                    base, [np.rint(way).astype(np.int32)], False, [0.62 * c for c in tone], 2, cv2.LINE_AA
                )
        case "paving":
            slab = GROUND_PX // 16
            tint = cv2.resize(
                rng.normal(0, 0.055, (16, 16)).astype(np.float32), size, interpolation=cv2.INTER_NEAREST
            )
            base *= (1 + tint + 0.03 * noise(rng, size) + 0.05 * fine)[..., None]
            base[::slab] *= 0.62
            base[1::slab] *= 0.78
            base[:, ::slab] *= 0.62
            base[:, 1::slab] *= 0.78
        case "grass":
            blades = _blurred(fine, wide=0.8, tall=2.4) * 3
            base *= (1 + 0.12 * noise(rng, size) + 0.17 * blades)[..., None]
            base[..., 0] *= 1 + 0.10 * noise(rng, size, coarsest=3, octaves=3)
        case "gravel":
            stones = _blurred(fine, wide=1.6, tall=1.6) * 4
            base *= (1 + 0.06 * noise(rng, size) + 0.14 * stones + 0.05 * fine)[..., None]
    return np.clip(base, 0, 255)


def wall(rng: np.random.Generator, part: Wall, *, length_m: float) -> tuple[Picture, Picture]:
    """A wall seen square on, 32 px a metre, (H, W, 4) RGBA uint8, and what of it shines at night, (H, W, 3)."""
    scale = 32
    height, width = max(8, int(part.height_m * scale)), max(8, int(min(length_m, 60) * scale))
    base = np.empty((height, width, 3), np.float32)
    base[:] = part.color
    base *= (1 + 0.05 * noise(rng, (height, width)))[..., None]
    alpha = np.full((height, width), 255, np.uint8)
    glow = np.zeros((height, width, 3), np.uint8)
    match part.kind:
        case "brick":
            _bricks(rng, base)
            _windows(rng, base, glow, scale=scale)
        case "plaster":
            base[-int(0.7 * scale) :] *= 0.72
            _windows(rng, base, glow, scale=scale)
        case "concrete":
            base *= (1 + 0.05 * rng.standard_normal((height, width), dtype=np.float32))[..., None]
            base[:, :: 3 * scale] *= 0.6
            base[:: int(1.3 * scale)] *= 0.78
            streaks = cv2.resize(rng.random((1, width // 6 + 1)).astype(np.float32), (width, height))
            base *= (0.86 + 0.14 * streaks)[..., None]
        case "glass":
            _panes(rng, base, glow, scale=scale)
        case "fence":
            _fence(base, alpha, scale=scale)
        case "hedge":
            leaves = rng.standard_normal((height, width), dtype=np.float32)
            base *= (0.85 + 0.16 * noise(rng, (height, width)) + 0.22 * leaves)[..., None]
            edge = (6 + 4 * noise(rng, (1, width), octaves=4, coarsest=16)[0]).astype(int)
            alpha[np.arange(height)[:, None] < edge] = 0
    if part.kind != "fence":  # the foot of a wall is darker
        base *= np.linspace(1.04, 0.86, height, dtype=np.float32)[:, None, None]
    return np.dstack((np.clip(base, 0, 255).astype(np.uint8), alpha)), glow


def _bricks(rng: np.random.Generator, base: Float) -> None:
    height, width = base.shape[:2]
    rows, columns = height // 4 + 1, width // 10 + 2
    tint = 1 + rng.normal(0, 0.10, (rows, columns)).astype(np.float32)
    y, x = np.mgrid[:height, :width]
    row, column = y // 4, (x + 5 * ((y // 4) % 2)) // 10
    base *= tint[row, column][..., None]
    mortar = (y % 4 == 3) | ((x + 5 * ((y // 4) % 2)) % 10 == 9)
    base[mortar] = 0.5 * base[mortar] + 82


def _windows(rng: np.random.Generator, base: Float, glow: Picture, *, scale: int) -> None:
    """Rows of windows with frames, sills and curtains; some are lit at night. Low walls have none."""
    height, width = base.shape[:2]
    if height < 3.5 * scale:
        return
    step, tall, wide = int(rng.uniform(2.2, 3.2) * scale), int(1.45 * scale), int(rng.uniform(0.9, 1.3) * scale)
    for storey in range(int(height // (2.8 * scale)) + 1):
        bottom = height - int((1.0 + 2.8 * storey) * scale)
        if bottom - tall < 6:
            continue
        for left in range(step // 2, width - wide, step):
            if rng.random() < 0.08:
                continue
            pane = base[bottom - tall : bottom, left : left + wide]
            base[bottom - tall - 3 : bottom + 3, left - 3 : left + wide + 3] = (226, 222, 214)
            sky = np.linspace(1.25, 0.7, tall, dtype=np.float32)[:, None, None]
            pane[:] = np.array((64, 78, 90), np.float32) * sky * rng.uniform(0.7, 1.25)
            if rng.random() < 0.35:
                pane[: int(tall * rng.uniform(0.2, 0.8))] = np.array((206, 200, 186), np.float32) * rng.uniform(
                    0.7, 1
                )
            pane[:, wide // 2 - 1 : wide // 2 + 1] = (226, 222, 214)
            pane[tall // 3 : tall // 3 + 2] = (226, 222, 214)
            base[bottom + 3 : bottom + 6, left - 5 : left + wide + 5] *= 0.6
            if rng.random() < 0.3:
                glow[bottom - tall : bottom, left : left + wide] = np.array((255, 206, 130)) * rng.uniform(0.5, 1)


def _panes(rng: np.random.Generator, base: Float, glow: Picture, *, scale: int) -> None:
    height, width = base.shape[:2]
    tall, wide = int(1.5 * scale), int(1.2 * scale)
    tint = rng.uniform(0.75, 1.25, (height // tall + 1, width // wide + 1)).astype(np.float32)
    y, x = np.mgrid[:height, :width]
    base *= tint[y // tall, x // wide][..., None]
    base *= (1.15 - 0.4 * (y % tall) / tall).astype(np.float32)[..., None]
    lit = (rng.random(tint.shape) < 0.22)[y // tall, x // wide]
    glow[lit] = (210, 200, 160)
    frame = (y % tall < 3) | (x % wide < 3)
    base[frame] = (52, 56, 60)
    glow[frame] = 0


def _fence(base: Float, alpha: Picture, *, scale: int) -> None:
    height, width = base.shape[:2]
    alpha[:] = 0
    for left in range(0, width, scale // 5):
        alpha[:, left : left + 2] = 255
    for left in range(0, width, 2 * scale):
        alpha[:, left : left + 5] = 255
    for top in (0, int(0.5 * height), height - scale // 6):
        alpha[top : top + 4] = 255


def sky(rng: np.random.Generator, size: int, *, horizon: int) -> Float:
    """(S, S, 3) float32: blue above, haze at the horizon, clouds."""
    level = np.clip(np.arange(size, dtype=np.float32) / max(horizon, 1), 0, 1)[:, None]
    blue, haze = np.array((112, 160, 214), np.float32), np.array((206, 218, 228), np.float32)
    base = (blue * (1 - level) + haze * level)[:, None].repeat(size, axis=1)
    clouds = np.clip(noise(rng, (size, size), coarsest=3) * 0.5 + rng.uniform(-0.3, 0.5), 0, 1)[..., None]
    return np.asarray(base * (1 - clouds) + 236 * clouds, np.float32)
