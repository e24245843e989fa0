"""A store of three sites, one of them unseen, whose two kinds of scene look and echo differently."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from services.core.frames import Label
from services.core.records import Pair
from services.core.store import StoreLimits, StoreWriter
from tests.trainer.conftest import scene
from trainer.evaluation.bench import Bench, Plan
from trainer.evaluation.dataset import Dataset, load_dataset
from trainer.evaluation.progress import Bars

SITES = ("north", "south", "eval_east")
NUM_FRAMES = 48
SESSION_S = 16.0  # 8 frames, one every 2 s


def at_site(seq: int, site: str) -> Pair:
    pair = scene(seq, site=site, kind=(seq // 4) % 2)
    return replace(pair, radar=replace(pair.radar, site=site), camera=replace(pair.camera, site=site))


def label_of(pair: Pair) -> Label:
    name = ("pedestrian", "car")[(pair.radar.seq // 4) % 2]
    return Label(pair.radar.site, pair.radar.seq, pair.radar.captured_at_ns, label=name)


def fill_site(store_dir: Path, site: str, *, num_frames: int = NUM_FRAMES, num_labels: int = NUM_FRAMES) -> None:
    pairs = [at_site(seq, site) for seq in range(num_frames)]
    writer = StoreWriter(store_dir, site, limits=StoreLimits(min_free_bytes=0))
    writer.append(pairs)
    writer.append_labels([label_of(pair) for pair in pairs[:num_labels]])
    writer.close()


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    for site in SITES:
        fill_site(tmp_path / "store", site)
    return tmp_path / "store"


@pytest.fixture
def dataset(filled: Path, vision, tmp_path: Path) -> Dataset:
    return load_dataset(filled, vision=vision, cache_dir=tmp_path / "encodings", session_s=SESSION_S)


@pytest.fixture
def bench(dataset: Dataset, settings, tmp_path: Path) -> Iterator[Bench]:
    plan = Plan(
        seeds=(0, 1),
        steps=6,
        probe="paper",
        probe_epochs=2,
        session_s=SESSION_S,
        guard_s=0.0,
        label_block_s=8.0,
    )
    with Bars(Console(quiet=True)).shown() as bars:
        fixed = settings.model_copy(update={"precision": "fp32"})
        yield Bench(dataset, fixed, plan, bars, encoders_dir=tmp_path / "encoders")
