"""What runs a model fastest, each against onnxruntime in fp32 on the same cores: python benchmarks/providers.py

    small   the default edge encoder         vgg16   the paper-mode radar encoder, torchvision's layout at 224 px

Weights are random and frames are noise: neither changes the time of a call. Variants take turns, each for a few
calls with one frame and with eight; medians over rounds, all in one process. Targets are for VGG-16 where AMX or
VNNI is there, in int8 by OpenVINO: set that up as docs/execution.md says; what is missing is left out. --keep DIR
keeps the graphs, which take minutes to make, and finds them there again.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import simplejpeg
import torch

from api.cores import available_cores
from api.models.classifier import Classifier, read_probes
from api.models.providers import BATCH, CPU_FP32, VARIANTS, cpu_name, has
from services.core.errors import EchosightError
from services.core.frames import CLASSES, CameraFrame, RadarFrame
from services.core.registry import INT8_FILE, MODEL_FILE, InputContract, Manifest, Registry
from services.core.segments import Pair
from services.core.store import StoreLimits, StoreReader, StoreWriter
from trainer import export, quantize
from trainer.classifier import RadarClassifier, save_classifier
from trainer.head_nets import LinearHead
from trainer.radar import Preprocess, build_encoder, default_architecture, feature_dim_of

SHAPE = (2, 128, 64)
NUM_FRAMES = 80
TARGETS = {("vgg16", "openvino-int8", 1): 8.0, ("vgg16", "openvino-int8", BATCH): 12.0}


def fill_store(store_dir: Path) -> None:
    rng = np.random.default_rng(0)
    image = simplejpeg.encode_jpeg(np.zeros((32, 32, 3), np.uint8))
    pairs = []
    for seq in range(NUM_FRAMES):
        heatmap = rng.normal(-60.0, 6.0, SHAPE).astype(np.float16)
        at_ns = seq * 2_000_000_000
        radar = RadarFrame("bench", seq, at_ns, heatmap=heatmap, axes=("channel", "range", "azimuth"))
        pairs.append(Pair(radar, CameraFrame("bench", seq, at_ns, image=image, shape=(32, 32, 3))))
    writer = StoreWriter(store_dir, "bench", limits=StoreLimits(min_free_bytes=0))
    writer.append(pairs)
    writer.close()


def publish(registry: Registry, net: str) -> None:
    torch.manual_seed(0)
    encoder = build_encoder({"feature_dim": 0} | default_architecture(net), SHAPE)
    dim = feature_dim_of(encoder)
    preprocess = Preprocess(1, SHAPE)
    preprocess.clutter.fill_(-60.0)
    preprocess.scale.fill_(6.0)
    model = RadarClassifier(preprocess, encoder, LinearHead(dim, len(CLASSES))).eval()

    def describe(version: int) -> Manifest:
        return Manifest(
            name=net,
            version=version,
            created_at_s=time.time(),
            classes=CLASSES,
            input=InputContract(shape=SHAPE),
            sites=("", "bench"),
            architecture=default_architecture(net) | {"feature_dim": dim} | model.describe(),
            preprocessing={},
            metrics={},
            lineage={},
        )

    registry.publish(describe, lambda directory: save_classifier(model, directory))


def make(directory: Path, net: str) -> Registry:
    """A version with both graphs; int8 is kept whatever it says of weights that have learnt nothing."""
    registry = Registry(directory / "models", net)
    if registry.versions():
        return registry
    store_dir = directory / "store"
    if not store_dir.exists():
        fill_store(store_dir)
    publish(registry, net)
    began_s = time.perf_counter()
    export.export(registry, 1, store_dir=store_dir, with_int8=False)
    exported_s = time.perf_counter()
    reader = StoreReader(store_dir)
    reader.refresh()
    frames = quantize.choose_frames(reader, registry.manifest(1))
    path = directory / f"{net}.int8.onnx"
    int8 = quantize.quantize(
        registry.path(1) / MODEL_FILE, path, frames=frames, manifest=registry.manifest(1), budget_s=1.0
    )
    registry.attach_int8(1, path, int8.model_copy(update={"is_kept": True}))
    path.unlink()
    print(f"{net}: export {exported_s - began_s:.1f} s, int8 {time.perf_counter() - exported_s:.1f} s; {int8.why}")
    return registry


def load(registry: Registry, threads: int) -> dict[str, Classifier]:
    manifest, directory = registry.manifest(1), registry.path(1)
    found = {}
    for variant in VARIANTS.values():
        if not has(variant) or (variant.file == INT8_FILE and not (directory / INT8_FILE).exists()):
            continue
        try:
            found[variant.name] = Classifier.load(
                directory / MODEL_FILE, manifest, variant=variant, threads=threads
            )
        except EchosightError as error:
            print(f"{variant.name}: {error}")
    return found


def measure(
    models: dict[str, Classifier], frames: np.ndarray, rounds: int, calls: int
) -> dict[tuple[str, int], float]:
    """Median ms of a call, by variant and batch."""
    times: dict[tuple[str, int], list[float]] = {(name, size): [] for name in models for size in (1, BATCH)}
    for _ in range(rounds):
        for (name, size), found in times.items():
            part = frames[:size]
            models[name].predict(part, 0)
            for _ in range(calls):
                started_s = time.perf_counter()
                models[name].predict(part, 0)
                found.append((time.perf_counter() - started_s) * 1e3)
    return {key: statistics.median(found) for key, found in times.items()}


def bench(registry: Registry, *, threads: int, rounds: int, calls: int) -> None:
    net = registry.name
    models = load(registry, threads)
    probes = read_probes(registry.path(1))
    assert probes is not None
    ms = measure(models, probes.heatmaps[:BATCH], rounds, calls)
    print(f"\n{net}, {threads} thread{'s' if threads > 1 else ''} a call")
    print(f"{'variant':15} {'1 frame':>10} {'':>7} {'8 frames':>10} {'':>7} {'frames/s':>9} {'max error':>9}")
    for name, model in models.items():
        row = f"{name:15}"
        for size in (1, BATCH):
            ratio = ms[CPU_FP32.name, size] / ms[name, size]
            row += f" {ms[name, size]:7.2f} ms {ratio:6.2f}x"
        print(f"{row} {BATCH * 1e3 / ms[name, BATCH]:9.0f} {model.max_probe_error:9.5f}")
    for (of_net, name, size), target in TARGETS.items():
        if of_net == net and name in models:
            ratio = ms[CPU_FP32.name, size] / ms[name, size]
            word = "reached" if ratio >= target else "MISSED"
            print(
                f"{word}: {name}, {size} frame{'s' if size > 1 else ''} a call: {ratio:.1f}x, target {target:g}x"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["small", "vgg16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="of one call")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="directory to keep the graphs in")
    parser.add_argument("--only-make", action="store_true", help="make the graphs, measure nothing")
    given = parser.parse_args()
    print(f"{cpu_name()}; {available_cores()} cores; onnxruntime {onnxruntime.__version__}")
    with tempfile.TemporaryDirectory() as aside:
        for net in given.nets:
            registry = make(given.keep or Path(aside), net)
            for threads in () if given.only_make else given.threads:
                bench(registry, threads=threads, rounds=given.rounds, calls=20 if net == "small" else 2)


if __name__ == "__main__":
    main()
