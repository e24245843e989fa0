"""The documents tell the truth: every setting is in docs/settings.md, with its default; every command has help."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic_core import PydanticUndefined

from api.settings import ApiSettings
from services.core.settings import CoreSettings, environment_name
from services.ingest.settings import IngestSettings
from services.sensors.settings import SensorsSettings
from trainer.settings import TrainerSettings

SETTINGS = Path(__file__).parent.parent / "docs" / "settings.md"
OWNERS: dict[str, type[CoreSettings]] = {
    "all": CoreSettings,
    "sensors": SensorsSettings,
    "ingest": IngestSettings,
    "trainer": TrainerSettings,
    "API": ApiSettings,
}


def settings_rows() -> list[str]:
    """The table's lines as the code has them: variable, default, meaning."""
    rows = []
    for owner, settings in OWNERS.items():
        for name, field in settings.model_fields.items():
            if owner != "all" and name in CoreSettings.model_fields:
                continue
            default = "host name" if field.default is PydanticUndefined else str(field.default)
            shown = f"`{default}`" if default else "(empty)"
            rows.append(f"| {owner} | `{environment_name(settings, name)}` | {shown} | {field.description} |")
    return rows


def test_every_setting_is_documented_with_its_default_and_meaning() -> None:
    table = [
        line
        for line in SETTINGS.read_text().splitlines()
        if re.match(r"\| (all|sensors|ingest|trainer|API) ", line)
    ]
    assert table == settings_rows()


@pytest.mark.parametrize(
    "command",
    [
        "",
        "up",
        "status",
        "classify",
        "watch",
        "keys add",
        "simulate",
        "replay",
        "import",
        "record",
        "doctor",
        "ingest",
        "train",
        "serve",
        "bench serve",
        "evaluate",
        "evaluate linear",
        "reproduce fig5",
        "bench",
        "bench providers",
    ],
)
def test_every_command_explains_itself(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.cli", *command.split(), "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert len(done.stdout) > 200
