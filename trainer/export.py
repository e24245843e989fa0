"""`python -m trainer.export`: one published version to ONNX, checked against torch on real stored frames.

Exit status 0: model.onnx lies beside the checkpoint and the manifest vouches for it; model.int8.onnx, too, where
that is as accurate (`trainer.quantize`), which takes nothing from the first if it fails. 75 (EX_TEMPFAIL of
sysexits.h): the machine or the store stood in the way, another try may succeed. Anything else: the version is bad.
The last line on stderr says why, and the version is as it was.
"""

import io
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
import typer

from services.core.errors import EchosightError, ExportError, StoreError
from services.core.registry import Int8, Manifest, Parity, Registry
from services.core.store import StoreReader
from trainer import quantize
from trainer.classifier import RadarClassifier, load_classifier

BATCH_SIZES = (1, 8)
MAX_PROBABILITY_ERROR = 1e-3
Array = npt.NDArray[np.float32]


def main(
    registry_dir: Annotated[Path, typer.Option(help="Directory of the model registry.")],
    store_dir: Annotated[Path, typer.Option(help="Rolling store to take frames for the comparison from.")],
    name: Annotated[str, typer.Option(help="Name of the model.")],
    version: Annotated[int, typer.Option(help="Version to export.")],
    int8: Annotated[bool, typer.Option(help="Whether to try an int8 graph as well.")] = True,
) -> None:
    """Export one version of a model to ONNX and vouch for it in its manifest."""
    try:
        parity = export(Registry(registry_dir, name), version, store_dir=store_dir, with_int8=int8)
    except (StoreError, OSError, MemoryError) as error:
        print(f"export of {name} {version}: {error}", file=sys.stderr)
        raise typer.Exit(os.EX_TEMPFAIL) from None
    except EchosightError as error:
        print(f"export of {name} {version}: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    print(parity.model_dump_json())


def export(registry: Registry, version: int, *, store_dir: Path, with_int8: bool = True) -> Parity:
    """Export, compare, attach; then the same for int8, whose failure is only written down.

    Raises ExportError when ONNX and torch disagree, RegistryError when the version is damaged; and what says
    nothing about the version: StoreError when there is no frame to compare on, OSError and MemoryError.
    """
    torch.set_num_threads(1)
    manifest = registry.manifest(version)
    classifier = load_classifier(registry.path(version), manifest)
    heatmap, site = _stored_frames(store_dir, manifest, num=max(BATCH_SIZES))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        try:
            to_onnx(classifier, path, shape=manifest.input.shape)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # the exporter raises many kinds, with pages of text
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise ExportError(
                f"torch cannot write this network as ONNX: {reason}", remedy="use a supported encoder"
            ) from error
        parity = compare(classifier, path, heatmap, site, unknown_threshold=manifest.unknown_threshold)
        errors = (
            parity.max_abs_probability_error,
            parity.max_abs_embedding_error or 0.0,
            parity.max_rel_unknown_error or 0.0,
        )
        if not max(errors) <= parity.max_allowed or parity.num_label_changes:
            raise ExportError(
                f"ONNX and torch differ by {errors[0]:.2e} in probability, {errors[1]:.2e} in the embedding,"
                f" {errors[2]:.2e} in the unknown score and {parity.num_label_changes} labels"
                f" on {parity.num_frames} stored frames",
                remedy=f"allowed are {parity.max_allowed:.0e} and 0; this version is not served",
            )
        registry.attach_model(version, path, parity, probes=_probes(classifier, heatmap, site))
        del classifier  # of a large network: what follows takes enough memory
        if with_int8:
            _attach_int8(registry, version, path, store_dir=store_dir, manifest=manifest)
    return parity


def to_onnx(classifier: RadarClassifier, path: Path, *, shape: tuple[int, ...]) -> None:
    """Write the graph with a dynamic batch dimension, weights inside.

    By torch's tracing exporter: seconds where the newer one takes tens of them on a basestation's cores, and each
    graph is compared with torch before anybody is served by it.
    """
    example = (torch.zeros(2, *shape), torch.zeros(2, dtype=torch.int64))
    inputs, outputs = ["heatmap", "site"], list(classifier.output_names)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # that the newer exporter exists, and notes on shapes, which are fixed here
        torch.onnx.export(
            classifier,
            example,
            str(path),
            input_names=inputs,
            output_names=outputs,
            dynamic_axes={name: {0: "batch"} for name in (*inputs, *outputs)},
            dynamo=False,
        )


def compare(
    classifier: RadarClassifier,
    path: Path,
    heatmap: Array,
    site: npt.NDArray[np.int64],
    *,
    unknown_threshold: float | None,
) -> Parity:
    """Torch against onnxruntime on the same frames, one by one and eight at once, every output."""
    names = classifier.output_names
    with torch.no_grad():
        answer = classifier(torch.from_numpy(heatmap), torch.from_numpy(site))
    expected = {name: output.numpy() for name, output in zip(names, answer, strict=True)}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst, num_changes = dict.fromkeys(names, 0.0), 0
    for size in BATCH_SIZES:
        for start in range(0, len(heatmap), size):
            part = slice(start, start + size)
            found = session.run(list(names), {"heatmap": heatmap[part], "site": site[part]})
            for name, got in zip(names, found, strict=True):
                difference = np.abs(got - expected[name][part])
                is_number = bool(np.isfinite(difference).all())
                worst[name] = max(worst[name], float(difference.max()) if is_number else float("inf"))
            num_changes += int((found[0].argmax(1) != expected["probabilities"][part].argmax(1)).sum())
    return Parity(
        num_frames=len(heatmap),
        batch_sizes=BATCH_SIZES,
        max_abs_probability_error=worst["probabilities"],
        max_allowed=MAX_PROBABILITY_ERROR,
        num_label_changes=num_changes,
        max_abs_embedding_error=worst["embedding"],
        max_rel_unknown_error=None if unknown_threshold is None else worst["unknown_score"] / unknown_threshold,
    )


def _attach_int8(registry: Registry, version: int, model: Path, *, store_dir: Path, manifest: Manifest) -> None:
    """Try an int8 graph; whatever goes wrong, fp32 serves."""
    path = model.with_name("model.int8.onnx")
    try:
        reader = StoreReader(store_dir)
        reader.refresh()
        frames = quantize.choose_frames(reader, manifest)
        int8 = quantize.quantize(model, path, frames=frames, manifest=manifest)
        reader.close()
    except Exception as error:  # of the quantiser, of the store, of memory
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        int8 = Int8(is_kept=False, why=f"it could not be made: {reason}")
    try:
        registry.attach_int8(version, path, int8)
    except (EchosightError, OSError) as error:
        int8 = Int8(is_kept=False, why=str(error))
    print(f"int8 {'kept' if int8.is_kept else 'not kept'}: {int8.why}", file=sys.stderr)


@torch.no_grad()
def _probes(classifier: RadarClassifier, heatmap: Array, site: npt.NDArray[np.int64]) -> bytes:
    """An .npz that whoever loads the graph can compare it by, whatever runs it."""
    probabilities = classifier(torch.from_numpy(heatmap), torch.from_numpy(site))[0].numpy()
    half = heatmap.astype(np.float16)
    kept = half if np.array_equal(half, heatmap) else heatmap
    file = io.BytesIO()
    np.savez(file, heatmap=kept, site=site, probabilities=probabilities)
    return file.getvalue()


def _stored_frames(store_dir: Path, manifest: Manifest, *, num: int) -> tuple[Array, npt.NDArray[np.int64]]:
    """`num` frames drawn from the store: heatmap (num, C, R, A) float32, site (num,) int64."""
    reader = StoreReader(store_dir)
    reader.refresh()
    heatmaps: list[Array] = []
    sites: list[int] = []
    for pair in reader.random_batch(8 * num, rng=np.random.default_rng(0)):
        radar = pair.radar()
        if radar is None or radar.shape != manifest.input.shape or len(heatmaps) == num:
            continue
        heatmaps.append(radar.heatmap.astype(np.float32).reshape(manifest.input.shape))
        known = pair.site in manifest.sites
        sites.append(manifest.sites.index(pair.site) if known else 0)
    reader.close()
    if not heatmaps:
        raise StoreError(
            f"the store {store_dir} holds no frame of shape {manifest.input.shape} to compare on",
            remedy="let ingest store some first",
        )
    while len(heatmaps) < num:  # a store with fewer frames: repeat them, the batch of 8 must be seen
        heatmaps.append(heatmaps[0])
        sites.append(sites[0])
    return np.stack(heatmaps), np.array(sites, np.int64)


if __name__ == "__main__":
    typer.run(main)
