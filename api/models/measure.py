"""`python -m api.models.measure`: time every variant that can run a version here; JSON, for `echosight bench`."""

import sys
from typing import Annotated

import typer
from pydantic import BaseModel

from api.cores import share_of_cores
from api.models.execution import AUTO, Choice, Execution
from api.models.providers import VARIANTS, has
from api.settings import ApiSettings
from services.core.errors import EchosightError
from services.core.logs import configure_logs
from services.core.registry import INT8_FILE, MODEL_FILE, Registry


class Report(BaseModel):
    """key: the machine and network that the choice holds for."""

    version: int
    key: str
    is_saved: bool
    choice: Choice


def main(
    version: Annotated[int, typer.Option(help="Version of the registry; 0: the champion.")] = 0,
    save: Annotated[bool, typer.Option(help="Let the server on this machine start with the choice.")] = False,
) -> None:
    """Measure, print one JSON object: the version, what the choice holds for, the choice with all measurements."""
    try:
        print(_measure(version, save=save))
    except (EchosightError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def _measure(version: int, *, save: bool) -> str:
    settings = ApiSettings.read()
    log = configure_logs("measure", level="error", log_format=settings.log_format)
    registry = Registry(settings.registry_dir, settings.model_name)
    number = version or registry.aliases().get("champion", 0)
    if not number:
        raise EchosightError(f"model {registry.name} has no champion yet", remedy="name a --version")
    manifest, directory = registry.manifest(number), registry.path(number)
    cores = share_of_cores(settings.api_processes)
    execution = Execution(AUTO, data_dir=settings.data_dir, cores=cores, log=log)
    has_int8 = manifest.int8 is not None and manifest.int8.is_kept
    variants = [
        variant for variant in VARIANTS.values() if has(variant) and (has_int8 or variant.file != INT8_FILE)
    ]
    choice = execution.measure(directory / MODEL_FILE, manifest, variants=variants)
    if save:
        execution.save(manifest, choice)
    return Report(version=number, key=execution.key(manifest), is_saved=save, choice=choice).model_dump_json()


if __name__ == "__main__":
    typer.run(main)
