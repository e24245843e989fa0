"""`echosight bench serve`: how many answers a running server gives, and how long each takes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from services.client import UnreachableError
from services.client.http import Connection, read_json
from services.client.load.requests import BODIES, Frames, Target, request_for
from services.client.load.run import PERCENTILES, Plan, Result, ceiling_per_s, put_load
from services.commands.output import console, fail, print_json
from services.core.errors import EchosightError, NoPairsError, SettingsError
from services.core.store import StoreReader

_MAX_REQUESTS = 32
_MAX_REQUEST_BYTES = 64 * 2**20
"""Different requests are sent in turn, so many and of so many bytes at most."""
_DB_MEAN, _DB_SPREAD = -60.0, 8.0
_NEAR_CEILING = 0.5
_errors = Console(stderr=True)


def serve(
    url: Annotated[str, typer.Argument(help="Address of the API.")] = "http://127.0.0.1:8000",
    clients: Annotated[str, typer.Option(help="Clients at a time, one measurement each.")] = "1,8,64",
    body: Annotated[str, typer.Option(help=f"How frames are sent: {', '.join(BODIES)}.")] = "npy",
    batch: Annotated[int, typer.Option(min=1, help="Frames in a request.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="Measured seconds for each number of clients.")] = 5.0,
    rate: Annotated[
        float,
        typer.Option(
            min=0,
            help="Requests/s over all clients, each at its time whatever became of the others. 0: each "
            "client posts when it is answered.",
        ),
    ] = 0.0,
    processes: Annotated[int, typer.Option(min=1, max=64, help="Processes that the clients are spread over.")] = 1,
    key: Annotated[
        str,
        typer.Option(envvar="ECHOSIGHT_API_KEY", show_envvar=True, help="API key, where the server wants one."),
    ] = "",
    store: Annotated[
        Path | None, typer.Option(help="Store to send real frames of (ECHOSIGHT_DATA_DIR/store). Default: noise.")
    ] = None,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="An answer that takes longer is given up.")] = 10.0,
    ceiling: Annotated[
        bool, typer.Option(help="Whether to measure first what the load generator itself can do at most.")
    ] = True,
    plot: Annotated[
        Path | None, typer.Option(help="Draw latency over percentiles into this .png or .svg.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Put load on a running server and print requests a second and latencies.

    Latency is what a client sees, to the last byte of the answer. With --rate it counts from the time at which a
    request was meant to be sent, so that waiting for a stalled server is not left out. The exit status is 1 if
    any request failed; 429 (come later) is no failure.

    [bold]Examples[/bold]

      echosight bench serve                                     1, 8 and 64 clients, .npy

      echosight bench serve --clients 8 --rate 200 --seconds 30 --plot latency.png

      echosight bench serve http://10.0.0.7:8000 --body v2-binary --batch 16 --store var/store

    [bold]Next[/bold]: docs/benchmarking.md says how to read it.
    """
    try:
        counts = _counts(clients)
        if body not in BODIES:
            raise SettingsError(f"--body is {body!r}", remedy=f"use one of {', '.join(BODIES)}")
        draw = _drawing(plot)
        target = find_target(url, key)
        frames = _stored_frames(store, target) if store else _noise(target, batch)
        requests = _requests(body, frames, target, batch)
        plans = [Plan(count, seconds, rate, processes, timeout_s=timeout_s) for count in counts]
        limit = ceiling_per_s(requests, plans[-1]) if ceiling else math.nan
        results = [_measure(target, requests, plan, body) for plan in plans]
    except EchosightError as error:
        fail(error)
    if as_json:
        about = {"url": url, "model": target.model, "version": target.version, "shape": target.shape}
        sent = {"body": body, "batch": batch, "request_bytes": len(requests[0]), "rate": rate}
        rows = [_row(result, batch) for result in results]
        print_json(
            about | sent | {"ceiling_requests_per_s": None if math.isnan(limit) else limit, "results": rows}
        )
    else:
        console.print(_table(results, batch))
        for line in _remarks(target, results, requests, limit, body):
            console.print(line, highlight=False, soft_wrap=True)
    if draw is not None:
        draw(results)
        _errors.print(f"[dim]{plot}[/dim]", highlight=False)
    if any(result.num_failed for result in results):
        raise typer.Exit(1)


def find_target(url: str, key: str = "") -> Target:
    """The server at `url` and what its live model takes. Raises ClientError."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with Connection(url, timeout_s=10.0, retries=1) as connection:
        models = read_json(connection.ask("GET", "/v1/models", headers=headers)[1])
        try:
            live = models["live_version"]
            [model] = [version for version in models["versions"] if version["version"] == live]
            found = Target(
                host=connection.host,
                port=connection.port or (443 if connection.scheme == "https" else 80),
                is_tls=connection.scheme == "https",
                prefix=connection.prefix,
                model=models["name"],
                version=live,
                shape=tuple(model["input"]["shape"]),
                unit=model["input"]["unit"],
                key=key,
            )
        except (KeyError, TypeError, ValueError):
            raise UnreachableError(
                f"{url} has no live model",
                remedy="wait for its first (`echosight status`), or name another server",
            ) from None
    return found


def _counts(clients: str) -> list[int]:
    try:
        counts = [int(count) for count in clients.split(",")]
    except ValueError:
        counts = []
    if not counts or not all(1 <= count <= 100_000 for count in counts):
        raise SettingsError(f"--clients is {clients!r}", remedy="give numbers of clients: 1,8,64")
    return sorted(set(counts))


def _drawing(plot: Path | None) -> Any:
    """What draws into `plot`, None if nothing is to be drawn. Asked for before the load, not after it."""
    if plot is None:
        return None
    if plot.suffix not in (".png", ".svg", ".pdf") or not plot.absolute().parent.is_dir():
        raise SettingsError(
            f"--plot is {str(plot)!r}", remedy="name a .png, .svg or .pdf in a folder that is there"
        )
    try:
        from services.commands.bench_plot import draw_latency
    except ImportError:
        raise SettingsError(
            "--plot needs matplotlib, which is not installed", remedy="pip install matplotlib, or leave --plot out"
        ) from None
    return lambda results: draw_latency(results, plot)


def _noise(target: Target, batch: int) -> Frames:
    """(N, C, R, A) float32: what a radar without anything before it might show."""
    num_frames = batch * max(1, min(_MAX_REQUESTS, _MAX_REQUEST_BYTES // (4 * batch * math.prod(target.shape))))
    mean, spread = (_DB_MEAN, _DB_SPREAD) if target.unit == "dB" else (0.0, 1.0)
    noise = np.random.default_rng(0).normal(mean, spread, size=(num_frames, *target.shape))
    return noise.astype(np.float32)


def _stored_frames(store_dir: Path, target: Target) -> Frames:
    """(N, C, R, A) float32: heatmaps from all over the store that fit the model. Raises StoreError."""
    reader = StoreReader(store_dir)
    num_pairs = reader.refresh()
    found = []
    for index in np.linspace(0, num_pairs - 1, min(num_pairs, 4 * _MAX_REQUESTS)).astype(int):
        radar = reader.pairs[index].radar()
        if radar is not None and radar.heatmap.shape == target.shape:
            found.append(radar.heatmap.astype(np.float32))
    if not found:
        raise NoPairsError(
            f"none of {num_pairs} pairs in {store_dir} has a heatmap of {target.shape}",
            remedy="name the store that the model learnt from, or leave --store out",
        )
    return np.stack(found)


def _requests(body: str, frames: Frames, target: Target, batch: int) -> list[bytes]:
    """Different ones, each of `batch` frames."""
    requests: list[bytes] = []
    for start in range(0, max(1, len(frames) - batch + 1), batch):
        chosen = np.take(frames, range(start, start + batch), axis=0, mode="wrap")
        requests.append(request_for(body, chosen, target))
        if len(requests) == _MAX_REQUESTS or len(requests) * len(requests[0]) > _MAX_REQUEST_BYTES:
            break
    return requests


def _measure(target: Target, requests: Sequence[bytes], plan: Plan, body: str) -> Result:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_errors, transient=True, disable=not _errors.is_terminal) as progress:
        text = f"{plan.num_clients} client{'s' if plan.num_clients > 1 else ''}, {body}"
        task = progress.add_task(text, total=plan.warm_s + plan.seconds)
        return put_load(target, requests, plan, on_tick=lambda at_s: progress.update(task, completed=at_s))


def _row(result: Result, batch: int) -> dict[str, Any]:
    answered = len(result.latency_s) > 0
    return {
        "clients": result.plan.num_clients,
        "requests_per_s": result.requests_per_s,
        "frames_per_s": result.requests_per_s * batch,
        **{f"p{p:g}_ms": result.percentile_ms(p) if answered else None for p in PERCENTILES},
        "max_ms": result.percentile_ms(100.0) if answered else None,
        "by_status": result.num_by_status,
        "server_ms": result.timing_ms,
        "generator_cpu_share": result.cpu_share,
    }


def _table(results: Sequence[Result], batch: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = ["clients", "requests/s", *(["frames/s"] if batch > 1 else [])]
    names += [f"p{p:g}" for p in PERCENTILES] + ["max ms"]
    has_parts = any(result.timing_ms for result in results)
    for name in (*names, *(["in server"] if has_parts else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("not 200")
    for result in results:
        rates = [f"{result.requests_per_s:,.1f}"]
        if batch > 1:
            rates.append(f"{result.requests_per_s * batch:,.1f}")
        latencies = [_shown_ms(result.percentile_ms(p)) for p in (*PERCENTILES, 100.0)]
        server = [" ".join(_shown_ms(value) for value in result.timing_ms.values())] if has_parts else []
        others = {status: count for status, count in result.num_by_status.items() if status != "200"}
        shown = ", ".join(f"{status}: {count:,}" for status, count in others.items())
        colour = "red" if result.num_failed else "yellow"
        wrong = f"[{colour}]{shown}[/{colour}]" if shown else ""
        table.add_row(str(result.plan.num_clients), *rates, *latencies, *server, wrong)
    return table


def _shown_ms(value: float) -> str:
    return "" if math.isnan(value) else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _remarks(
    target: Target, results: Sequence[Result], requests: Sequence[bytes], limit: float, body: str
) -> list[str]:
    rate = results[0].plan.rate
    loop = f"at {rate:g} requests/s" if rate else "each client posts when it is answered"
    parts = "; in server: median ms of " + ", ".join(results[0].timing_ms) if results[0].timing_ms else ""
    lines = [f"[dim]{target.model} v{target.version}, {body} of {len(requests[0]):,} bytes, {loop}{parts}[/dim]"]
    best = max(result.requests_per_s for result in results)
    if not math.isnan(limit):
        lines.append(
            f"[dim]the load generator alone reaches {limit:,.0f} requests/s of these on this machine[/dim]"
        )
        if best > _NEAR_CEILING * limit:
            lines.append("[yellow]that is near: the figures are the generator's too; try --processes 2[/yellow]")
    return lines
