"""One run of a study: load the store, study, write, show."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from services.core.errors import SettingsError
from trainer.evaluation.bench import Bench, Plan
from trainer.evaluation.dataset import load_dataset
from trainer.evaluation.options import Asked, settings_of
from trainer.evaluation.progress import Bars
from trainer.evaluation.report import Report, require_libraries
from trainer.memory import keep_freed_memory
from trainer.settings import TrainerSettings
from trainer.vision import load_vision_encoder
from trainer.worker import device_of, num_threads

_PIPE_WIDTH = 200
Add = Callable[[TrainerSettings], dict[str, Any]]


def run(asked: Asked, study: Callable[[Bench], Report], *, add: Add = lambda _: {}) -> None:
    """Do what was asked; results on stdout, progress on stderr."""
    require_libraries()
    with Bars().shown() as bars:
        report = study(make_bench(asked, bars, add=add))
        report.notes += report.protocol["warnings"]
        out_dir = asked.out or Path("evaluation") / report.name
        paths = report.write(out_dir)
    if asked.as_json:
        import orjson

        found = report.as_json() | {"files": [str(path) for path in paths]}
        print(orjson.dumps(found, option=orjson.OPT_SERIALIZE_NUMPY).decode())
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH)
    report.show(console)
    console.print("written: " + ", ".join(str(path) for path in paths), highlight=False, soft_wrap=True)


def make_bench(asked: Asked, bars: Bars, *, add: Add) -> Bench:
    """Everything loaded and encoded. add: settings that the study adds, once the vision encoder is here."""
    if asked.simulate or asked.recording:
        raise SettingsError(
            "the store of a recording or simulation is made by `echosight evaluate`",
            remedy="run that, or name a store: --store DIR",
        )
    settings = settings_of(asked)
    keep_freed_memory()
    torch.set_num_threads(num_threads(settings))
    vision = load_vision_encoder(settings.vision_encoder, weights=settings.vision_weights).to(device_of(settings))
    settings = settings_of(asked, **add(settings))
    kept_dir = settings.data_dir / "evaluation"
    dataset = load_dataset(
        asked.store or settings.store_dir,
        vision=vision,
        cache_dir=kept_dir / "encodings",
        mirror_share=settings.mirror_share,
        session_s=asked.session_s,
        on_progress=bars.advance,
    )
    plan = Plan(
        seeds=tuple(range(asked.seeds)),
        steps=asked.steps,
        order=asked.order,
        probe=asked.probe,
        split=asked.split,
        split_seed=asked.split_seed,
        unseen=tuple(asked.unseen) if asked.unseen else None,
        session_s=asked.session_s,
        guard_s=asked.guard_s,
        label_block_s=asked.label_block_s,
        source=asked.source or str(asked.store or settings.store_dir),
    )
    return Bench(dataset, settings, plan, bars, encoders_dir=kept_dir / "encoders", is_fresh=asked.fresh)
