"""A store of two kinds of scene, one red image and one green, each with its own echo; and a tiny frozen net."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from torch import nn

from services.core.frames import CameraFrame, Label, RadarFrame
from services.core.segments import Pair
from services.core.store import StoreLimits, StoreWriter
from trainer.feed import Batch, Feed
from trainer.settings import TrainerSettings
from trainer.vision import VisionEncoder

torch.set_num_threads(1)  # small tensors; and the tests share their cores with servers
SHAPE = (2, 16, 8)
MS = 1_000_000


def scene(seq: int, *, site: str = "north", shape: tuple[int, ...] = SHAPE, kind: int | None = None) -> Pair:
    kind = seq % 2 if kind is None else kind
    rng = np.random.default_rng(seq)
    heatmap = rng.normal(20, 1, shape)
    heatmap[..., 2 + 8 * kind : 6 + 8 * kind, 2:6] += 12
    image = np.full((32, 32, 3), 40, np.uint8)
    image[..., kind] = 200 + rng.integers(0, 40)
    at_ns = seq * 2_000 * MS
    axes = ("channel", "range", "azimuth")[-len(shape) :]
    radar = RadarFrame(site, seq, at_ns, heatmap=heatmap.astype(np.float16), axes=axes)
    data = simplejpeg.encode_jpeg(image)
    comment = f"{site} {seq}".encode()  # no two files are the same, whatever they show
    data = data[:2] + b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big") + comment + data[2:]
    return Pair(radar, CameraFrame(site, seq, at_ns + MS, image=data, shape=(32, 32, 3)))


def label_of(pair: Pair) -> Label:
    name = ("pedestrian", "car")[pair.radar.seq % 2]
    return Label(pair.radar.site, pair.radar.seq, pair.radar.captured_at_ns, label=name)


def fill(store_dir: Path, pairs: list[Pair], *, num_labels: int = 0, site: str = "north") -> None:
    writer = StoreWriter(store_dir, site, limits=StoreLimits(min_free_bytes=0))
    writer.append(pairs)
    writer.append_labels([label_of(pair) for pair in pairs[:num_labels]])
    writer.close()


def batch_of(feed: Feed, size: int, *, rng: np.random.Generator) -> Batch:
    """Any of the feed's pairs."""
    return feed.collate([sample for _, sample in feed.pool.pick(rng.random((size, 2)))])


class _Colours(nn.Module):
    """Mean and spread of each colour: what little a frozen net must see here."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 12)
        self.num_images = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_images += len(x)
        mixed: torch.Tensor = self.mix(torch.cat([x.mean((2, 3)), x.std((2, 3))], 1))
        return mixed


def make_vision() -> VisionEncoder:
    torch.manual_seed(0)
    return VisionEncoder(_Colours(), name="colours", dim=12, mean=[127.0] * 3, std=[64.0] * 3)


def make_settings(data_dir: Path, **changes: Any) -> TrainerSettings:
    return TrainerSettings(
        **{
            "data_dir": data_dir,
            "device": "cpu",
            "precision": "fp32",
            "min_pairs": 16,
            "batch_size": 16,
            "queue_size": 40,
            "warmup_steps": 5,
            "min_publish_steps": 5,
            "min_labels": 4,
            "exclude_within_s": 0.0,
            "encode_batch": 64,
            "shift_bins": 1,
            "held_out_share": 0.0,
        }
        | changes
    )


@pytest.fixture
def vision() -> VisionEncoder:
    return make_vision()


@pytest.fixture
def settings(tmp_path: Path) -> TrainerSettings:
    return make_settings(tmp_path)
