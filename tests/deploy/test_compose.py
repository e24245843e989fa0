"""docker-compose.yml: parsed, hardened, and complete against the settings; an engine is not needed."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from api.access.keys import Access
from api.settings import ApiSettings
from services.cli import app
from services.core.errors import SettingsError
from services.core.settings import CoreSettings, environment_name
from services.ingest.settings import IngestSettings
from services.sensors.settings import SensorsSettings
from tests.deploy.files import COMPOSE, ROOT, compose, lineage, stages
from trainer.settings import TrainerSettings

SETTINGS: dict[str, type[CoreSettings]] = {
    "ingest": IngestSettings,
    "trainer": TrainerSettings,
    "api": ApiSettings,
    "site": SensorsSettings,
}
FIXED_BY_COMMAND = {"site": {"ECHOSIGHT_SIMULATED_SITE"}}
SERVICES: dict[str, Any] = compose()["services"]


def keys_of(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield str(key)
            yield from keys_of(value)
    elif isinstance(node, list):
        for value in node:
            yield from keys_of(value)


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def test_has_the_whole_path_and_the_simulated_site_only_in_the_demo() -> None:
    assert set(SERVICES) == {"redis", "ingest", "trainer", "api", "site"}
    assert {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service} == {
        "site": ["demo"]
    }


def test_uses_nothing_that_compose_1_29_rejects() -> None:
    assert not {"start_interval", "required", "name", "include", "develop"} & set(keys_of(compose()))


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_watched_stopped_gently_and_started_again(name: str) -> None:
    service = SERVICES[name]
    check = service["healthcheck"]
    assert check["test"][0] in ("CMD", "CMD-SHELL")
    assert seconds(check["timeout"]) < seconds(check["interval"])
    assert check["retries"] >= 3
    assert seconds(check["start_period"]) > 0
    assert seconds(service["stop_grace_period"]) > 10
    assert service["restart"] == "unless-stopped"


@pytest.mark.parametrize("name", SERVICES)
def test_service_has_no_more_rights_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]  # noqa: S108 - the container's own
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True
    assert service["mem_limit"]
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert not {"privileged", "cap_add", "network_mode", "user"} & set(service)


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_built_from_a_target_that_is_there_and_does_not_run_as_root(name: str) -> None:
    build = SERVICES[name]["build"]
    assert (ROOT / build["context"] / build["dockerfile"]).is_file()
    assert build["target"] in stages()
    users = [user for stage in lineage(build["target"]) for user in stage.all("USER")]
    assert users
    assert users[-1].split(":")[0] not in ("root", "0")
    for argument in build.get("args", {}):
        declared = [line.split("=")[0] for stage in lineage(build["target"]) for line in stage.all("ARG")]
        assert argument in declared


@pytest.mark.parametrize("name", SERVICES)
def test_service_keeps_its_data_in_a_named_volume(name: str) -> None:
    mounts = [mount.split(":") for mount in SERVICES[name]["volumes"]]
    assert [path for _, path in mounts] == ["/data"]
    assert {volume for volume, _ in mounts} <= set(compose()["volumes"])
    assert "/data" in lineage(SERVICES[name]["build"]["target"])[-1].all("VOLUME")


def test_workers_share_one_volume_and_wait_for_redis_to_be_healthy() -> None:
    workers = [service for name, service in SERVICES.items() if name != "redis"]
    assert {mount for service in workers for mount in service["volumes"]} == {"data:/data"}
    assert all(service["depends_on"] == {"redis": {"condition": "service_healthy"}} for service in workers)


def test_only_the_api_is_published_and_only_to_this_machine_unless_asked() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    host = "${ECHOSIGHT_API_HOST:-127.0.0.1}"
    assert published == {
        "api": [
            f"{host}:${{ECHOSIGHT_API_PORT:-8000}}:8000",
            f"{host}:${{ECHOSIGHT_GRPC_PORT:-}}:${{ECHOSIGHT_GRPC_PORT:-8001}}",
        ]
    }
    assert SERVICES["api"]["environment"]["ECHOSIGHT_API_PORT"] == "8000"


def test_grpc_is_off_until_its_port_is_given() -> None:
    assert SERVICES["api"]["environment"]["ECHOSIGHT_GRPC_PORT"] is None
    assert ApiSettings.model_fields["grpc_port"].default == 0


def test_api_needs_no_keys_only_while_it_is_published_to_this_machine_alone() -> None:
    environment = SERVICES["api"]["environment"]
    assert environment["ECHOSIGHT_API_OPEN"] is None
    published, default = environment["ECHOSIGHT_API_PUBLISHED_HOST"].strip("${}").split(":-")
    assert published == "ECHOSIGHT_API_HOST"
    assert all(port.startswith(f"${{{published}:-{default}}}:") for port in SERVICES["api"]["ports"])
    host = environment["ECHOSIGHT_API_HOST"]
    assert not Access(ApiSettings.read(api_host=host, api_published_host=default)).is_on
    with pytest.raises(SettingsError, match=r"192\.0\.2\.7"):
        Access(ApiSettings.read(api_host=host, api_published_host="192.0.2.7"))


def test_api_may_finish_what_is_in_flight_before_it_is_killed() -> None:
    assert seconds(SERVICES["api"]["stop_grace_period"]) > ApiSettings.model_fields["stop_grace_s"].default


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_of_a_worker_can_be_set_and_no_other(name: str) -> None:
    known = {environment_name(SETTINGS[name], field) for field in SETTINGS[name].model_fields}
    assert set(SERVICES[name]["environment"]) == known - FIXED_BY_COMMAND.get(name, set())


def test_variables_in_values_are_settings_or_build_arguments_or_memory_limits() -> None:
    known = {environment_name(cls, field) for cls in SETTINGS.values() for field in cls.model_fields}
    limits = {f"{name.upper()}_MEMORY" for name in SERVICES}
    used = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text()))
    assert used <= known | limits | {"PIP_INDEX_URL", "TORCH_INDEX_URL", "OPENVINO"}


def test_commands_are_commands_of_echosight() -> None:
    known = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    for service in SERVICES.values():
        if "command" in service:
            program, command, *_ = service["command"]
            assert program == "echosight"
            assert command in known
