"""`echosight bench providers`: what runs a model fastest on this machine. A child process of the API measures."""

import subprocess
import sys
from typing import Annotated, Any

import orjson
import typer
from rich.markup import escape
from rich.table import Table

from services.commands.output import console, fail, print_json, read_settings
from services.core.errors import EchosightError
from services.core.registry import INT8_FILE, MODEL_FILE
from services.core.settings import CoreSettings

MODULE = "api.models.measure"
_BATCH = 8


def providers(
    version: Annotated[int, typer.Option(min=0, help="Version of the registry; 0: the champion.")] = 0,
    save: Annotated[
        bool, typer.Option("--save", help="Let the API on this machine start with the choice.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time a version by everything that can run it here: onnxruntime, OpenVINO, a GPU, in fp32, bf16 and int8.

    The API does this by itself for the first version of a kind, and keeps the choice under ECHOSIGHT_DATA_DIR.
    With --save, on a quiet machine, a choice made on a busy one is made anew. It holds for a server's share of the
    cores: for one of several processes, set ECHOSIGHT_API_PROCESSES here as well. docs/execution.md says more.

    [bold]Examples[/bold]

      echosight bench providers                    the champion

      echosight bench providers --save --json      for scripts
    """
    settings = read_settings(CoreSettings)
    command = [sys.executable, "-m", MODULE, "--version", str(version), *(["--save"] if save else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        fail(
            EchosightError(said[-1].removeprefix("error: ") if said else f"{MODULE} ended with {done.returncode}")
        )
    report: dict[str, Any] = orjson.loads(done.stdout.splitlines()[-1])
    if as_json:
        print_json(report)
        return
    choice = report["choice"]
    table = Table("variant", "file", "threads", "1 frame", "8 frames", "frames/s", "max difference", "", box=None)
    for row in choice["measurements"]:
        table.add_row(*_cells(row, is_chosen=all(row[name] == choice[name] for name in ("variant", "threads"))))
    console.print(table)
    console.print(f"v{report['version']}: {escape(choice['variant'])}: {escape(choice['why'])}", highlight=False)
    if save:
        console.print(
            f"saved for the API under {escape(str(settings.data_dir))}; it takes it up with its next model"
        )


def _cells(row: dict[str, Any], *, is_chosen: bool) -> list[str]:
    file = INT8_FILE if row["variant"].endswith("int8") else MODEL_FILE
    if row["problem"]:
        return [row["variant"], file, str(row["threads"]), "", "", "", "", escape(row["problem"])]
    return [
        row["variant"],
        file,
        str(row["threads"]),
        f"{row['frame_ms']:.2f} ms",
        f"{row['batch_ms']:.2f} ms",
        f"{_BATCH * 1e3 / row['batch_ms']:,.0f}",
        f"{row['max_error']:.5f}",
        "chosen" if is_chosen else "",
    ]
