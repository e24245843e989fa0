"""`echosight classify`: what a running server says of heatmaps in files."""

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.lib.format import open_memmap
from rich.markup import escape
from rich.table import Column, Table

from services.client import Client, ClientError, Prediction, RefusedError
from services.commands.output import console, fail, print_json
from services.core.errors import RecordingError

_BATCH = 32


def classify(
    files: Annotated[
        list[str],
        typer.Argument(help=".npy files, folders of them (`simulate --out` writes one), or patterns."),
    ],
    site: Annotated[str, typer.Option(help="Site that the frames are of. Default: none.")] = "",
    url: Annotated[str, typer.Option(help="Address of the API.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str,
        typer.Option(
            envvar="ECHOSIGHT_API_KEY", help="Key of the API; better in the environment than on the line."
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Classify the heatmaps in FILES by a running server.

    A file holds one heatmap, (channel, range, azimuth), or a batch of them. What is like nothing that the model
    has a name for is unknown. A file that cannot be read, or that the server refuses, is reported and the others
    go on; the exit status is then 1.
    """
    paths = _paths(files)
    if not paths:
        fail(RecordingError(f"no .npy file at {', '.join(files)}", remedy="name files, folders or patterns"))
    rows: list[dict[str, Any]] = []
    try:
        with Client(url, api_key=api_key) as client:
            for batch in _batches(_frames(paths)):
                rows += _ask(client, batch, site)
    except ClientError as error:
        fail(error)
    is_bad = any("problem" in row for row in rows)
    if as_json:
        print_json({"url": url, "site": site, "frames": rows})
    else:
        console.print(_table(rows))
    if is_bad:
        raise typer.Exit(1)


Frame = tuple[dict[str, Any], np.ndarray[Any, Any] | None]
"""Where a heatmap comes from, and the heatmap; None if its file cannot be read, which the first then says."""


def _paths(files: Iterable[str]) -> list[Path]:
    """The .npy files that are meant, in their order, each once."""
    found: dict[Path, None] = {}
    for name in files:
        path = Path(name)
        if path.is_dir():
            found.update(dict.fromkeys(sorted(path.rglob("*.npy"))))
        elif path.exists():
            found[path] = None
        else:
            found.update(dict.fromkeys(Path(match) for match in sorted(glob.glob(name, recursive=True))))  # noqa: PTH207 - absolute ones too
    return list(found)


def _frames(paths: Iterable[Path]) -> Iterator[Frame]:
    for path in paths:
        try:
            array = open_memmap(path, mode="r")
        except (OSError, ValueError) as error:
            yield {"file": str(path), "problem": f"cannot be read: {error}"}, None
            continue
        if array.ndim not in (2, 3, 4) or not array.size:
            yield {"file": str(path), "problem": "holds no heatmap"}, None
        elif array.dtype.kind not in "biuf":
            yield {"file": str(path), "problem": f"holds {array.dtype}, no real numbers"}, None
        elif array.ndim == 4:
            yield from (({"file": str(path), "index": index}, frame) for index, frame in enumerate(array))
        else:
            yield {"file": str(path)}, array


def _batches(frames: Iterable[Frame]) -> Iterator[list[Frame]]:
    """Frames that can go in one request: of one shape and dtype."""
    batch: list[Frame] = []
    for frame in frames:
        if batch and (len(batch) == _BATCH or not _is_alike(batch[-1][1], frame[1])):
            yield batch
            batch = []
        batch.append(frame)
    if batch:
        yield batch


def _is_alike(one: Any, other: Any) -> bool:
    return one is not None and other is not None and (one.shape, one.dtype) == (other.shape, other.dtype)


def _ask(client: Client, batch: list[Frame], site: str) -> list[dict[str, Any]]:
    """A row for each frame. One refused request is asked again frame by frame: the others are not at fault."""
    if batch[0][1] is None:
        return [batch[0][0]]
    heatmaps = [frame for _, frame in batch if frame is not None]
    try:
        one = len(heatmaps) == 1
        predictions = (
            [client.classify(heatmaps[0], site=site)] if one else client.classify_many(heatmaps, site=site)
        )
    except RefusedError as error:
        if error.status in (401, 403):
            raise  # the key is at fault, not a frame
        if len(batch) == 1:
            return [batch[0][0] | {"problem": str(error)}]
        return [row for frame in batch for row in _ask(client, [frame], site)]
    return [_row(where, prediction) for (where, _), prediction in zip(batch, predictions, strict=True)]


def _row(where: dict[str, Any], prediction: Prediction) -> dict[str, Any]:
    return where | {
        "label": prediction.label,
        "is_unknown": prediction.is_unknown,
        "probabilities": prediction.probabilities,
        "version": prediction.version,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    classes = next((list(row["probabilities"]) for row in rows if "label" in row), [])
    table = Table(Column("file", overflow="fold"), "label", *classes, "model", box=None)
    for row in rows:
        name = escape(row["file"]) + (f" [{row['index']}]" if "index" in row else "")
        if "problem" in row:
            table.add_row(name, f"[red]{escape(row['problem'])}[/red]")
        else:
            shares = (f"{probability:.2f}" for probability in row["probabilities"].values())
            label = "unknown" if row["is_unknown"] else row["label"]
            table.add_row(name, label, *shares, f"v{row['version']}")
    return table
