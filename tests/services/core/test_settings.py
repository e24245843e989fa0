"""Settings: from the environment, once, with errors that name the variable."""

from pathlib import Path

import pytest

from services.core.errors import SettingsError
from services.core.settings import CoreSettings, environment_name
from services.ingest.settings import IngestSettings


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch) -> None:
    for name in ("REDIS_URL", "ECHOSIGHT_REDIS_URL", "ECHOSIGHT_DATA_DIR", "ECHOSIGHT_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)


def test_defaults_need_no_environment() -> None:
    settings = CoreSettings.read()
    assert settings.redis_url == ""
    assert settings.store_dir == Path("var/store")
    assert settings.registry_dir == Path("var/models")


@pytest.mark.parametrize("name", ["REDIS_URL", "ECHOSIGHT_REDIS_URL"])
def test_redis_url_is_read_under_both_names(monkeypatch, name) -> None:
    monkeypatch.setenv(name, "redis://host:1/0")
    assert CoreSettings.read().redis_url == "redis://host:1/0"


def test_environment_is_read_with_the_prefix(monkeypatch) -> None:
    monkeypatch.setenv("ECHOSIGHT_DATA_DIR", "/somewhere")
    monkeypatch.setenv("ECHOSIGHT_WINDOW_MS", "31")
    settings = IngestSettings.read()
    assert settings.store_dir == Path("/somewhere/store")
    assert settings.window_ms == 31


def test_argument_wins_over_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("ECHOSIGHT_DATA_DIR", "/somewhere")
    monkeypatch.setenv("REDIS_URL", "redis://host:1/0")
    settings = CoreSettings.read(data_dir=Path("/here"), redis_url="redis://other:2/0")
    assert (settings.data_dir, settings.redis_url) == (Path("/here"), "redis://other:2/0")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ECHOSIGHT_WINDOW_MS", "-5"),
        ("ECHOSIGHT_LOG_LEVEL", "loud"),
        ("ECHOSIGHT_MAX_STORE_BYTES", "8 GB"),
        ("ECHOSIGHT_MODEL_NAME", "../radar"),
    ],
)
def test_bad_value_names_the_variable_and_the_value(monkeypatch, variable, value) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=rf"setting {variable} is '{value}': .*; see the table in docs"):
        IngestSettings.read()


def test_every_field_has_an_environment_name_and_a_description() -> None:
    assert environment_name(IngestSettings, "redis_url") == "REDIS_URL"
    assert environment_name(IngestSettings, "window_ms") == "ECHOSIGHT_WINDOW_MS"
    assert all(field.description for field in IngestSettings.model_fields.values())


def test_sites_and_known_clock_offsets_are_split() -> None:
    settings = IngestSettings.read(sites=" north, south ,", clock_offsets_ms="north=120, south = -4.5")
    assert settings.site_names == ("north", "south")
    assert settings.clock_offset_ns("north") == 120_000_000
    assert settings.clock_offset_ns("south") == -4_500_000
    assert settings.clock_offset_ns("west") == 0


@pytest.mark.parametrize("offsets", ["north", "north=", "north=soon", "north=nan", "a/b=3", "north=1e12"])
def test_clock_offset_that_cannot_be_meant_is_refused(offsets: str) -> None:
    with pytest.raises(SettingsError, match="ECHOSIGHT_CLOCK_OFFSETS_MS"):
        IngestSettings.read(clock_offsets_ms=offsets)
