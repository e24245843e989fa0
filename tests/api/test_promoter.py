"""From the registry to a live model: export, refuse, swap, promote, follow a pointer, and survive damage."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from api.releases.exporter import NICENESS
from api.settings import ApiSettings
from services.core.errors import RegistryError
from services.core.registry import MODEL_FILE, Registry
from services.core.streams import EVENTS, EventLog
from tests.api.tiny import (
    SHAPE,
    attach,
    heatmap,
    npy,
    probability_of,
    publish,
    publish_champion,
    registry_of,
    serving,
    tiny_model,
    until,
)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return registry_of(tmp_path)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Where the stand-in for the export child finds what to do."""
    path = tmp_path / "prepared"
    path.mkdir()
    return path


async def test_a_new_candidate_is_exported_served_and_promoted(
    tmp_path: Path, registry: Registry, prepared: Path
) -> None:
    (prepared / "1.onnx").write_bytes(tiny_model(1))
    publish(registry)
    async with serving(tmp_path, export_threads=3) as (app, client):
        assert (await client.get("/readyz")).status_code == 503
        await until(lambda: registry.history()[-1]["moved"].get("champion") == 1)
        answer = await client.post("/v1/classify", content=npy(heatmap()))
        assert app.state.live.version == 1
    assert answer.headers["x-model-version"] == "1"
    parity = registry.manifest(1).parity
    assert parity is not None
    assert parity.max_abs_probability_error == pytest.approx(3e-7)  # the child's threads
    assert parity.num_label_changes >= 10  # the child's niceness
    assert registry.history()[-1]["by"] == "api"


async def test_an_export_that_is_killed_once_the_graph_is_there_is_served(
    tmp_path: Path, registry: Registry, prepared: Path
) -> None:
    (prepared / "1.onnx").write_bytes(tiny_model(1))
    (prepared / "1.late").touch()  # for lack of memory for the int8 graph, say
    publish(registry)
    async with serving(tmp_path) as (app, _):
        await until(lambda: app.state.live.version == 1)
    assert registry.refused() == {}


@pytest.mark.parametrize("how", ["fails", "is NaN", "leaves nothing"])
async def test_a_bad_candidate_is_refused_and_the_live_model_stays(
    tmp_path: Path, registry: Registry, prepared: Path, how: str
) -> None:
    publish_champion(registry)
    if how == "fails":
        (prepared / "2.fail").write_text("parity 0.3 is above 0.0001")
    elif how == "is NaN":
        (prepared / "2.onnx").write_bytes(tiny_model(2, is_nan=True))
    async with serving(tmp_path) as (app, client):
        await until(lambda: app.state.live.version == 1)
        publish(registry)
        await until(registry.refused)
        why = {"fails": "parity 0.3 is above 0.0001", "is NaN": "NaN", "leaves nothing": "left no model.onnx"}[how]
        assert why in registry.refused()[2]
        assert app.state.live.version == 1
        assert (await client.get("/readyz")).status_code == 200
        assert "echosight_api_export_refusals_total 1.0" in (await client.get("/metrics")).text
        shown = (await client.get("/v1/models")).json()
    assert registry.aliases()["champion"] == 1
    assert why in shown["versions"][0]["refused"]


async def test_a_version_that_is_held_waits_until_a_person_promotes_it(
    tmp_path: Path, registry: Registry, prepared: Path
) -> None:
    (prepared / "1.onnx").write_bytes(tiny_model(1))
    publish(registry, verdict="hold")
    async with serving(tmp_path) as (app, client):
        await until(lambda: "promote version 1, which is held: +1.0 points" in app.state.live.waiting_for)
        assert (await client.get("/readyz")).status_code == 503
        registry.promote(1, by="operator", why="good enough to begin with")
        await until(lambda: app.state.live.version == 1)


async def test_a_candidate_that_the_gate_did_not_let_through_is_not_promoted(
    tmp_path: Path, registry: Registry, prepared: Path
) -> None:
    publish_champion(registry)
    version = publish(registry, verdict="hold")
    (prepared / f"{version}.onnx").write_bytes(tiny_model(version))
    registry._move({"candidate": version}, by="somebody", why="by hand")
    async with serving(tmp_path) as (app, _):
        await until(lambda: app.state.live.version == 1)
        await asyncio.sleep(0.1)  # five more looks into the registry
    assert registry.aliases()["champion"] == 1
    assert not (registry.path(version) / MODEL_FILE).exists()


async def test_a_first_candidate_that_is_refused_leaves_the_server_waiting(
    tmp_path: Path, registry: Registry, prepared: Path
) -> None:
    (prepared / "1.fail").write_text("no good")
    publish(registry)
    async with serving(tmp_path) as (_, client):
        await until(registry.refused)
        problem = (await client.get("/readyz")).json()
    assert problem["status"] == 503
    assert "waiting for" in problem["detail"]


async def test_an_export_that_was_killed_from_outside_is_tried_again(
    tmp_path: Path, registry: Registry, prepared: Path
) -> None:
    (prepared / "1.killed").touch()
    (prepared / "1.onnx").write_bytes(tiny_model(1))
    publish(registry)
    async with serving(tmp_path) as (app, _):
        await until(lambda: app.state.live.version == 1)
    assert not registry.refused()


async def test_an_export_that_is_killed_each_time_is_put_off_and_refuses_nothing(
    tmp_path: Path, registry: Registry, prepared: Path
) -> None:
    (prepared / "1.killed always").touch()
    publish(registry)
    async with serving(tmp_path) as (app, _):
        await until(lambda: "put off" in app.state.live.waiting_for)
    assert not registry.refused()


@pytest.mark.parametrize("alias", ["candidate", "champion"])
async def test_an_export_that_cannot_be_judged_now_is_put_off_and_tried_again(
    tmp_path: Path, registry: Registry, prepared: Path, alias: str
) -> None:
    (prepared / "1.later").write_text("the store holds no frame")
    (prepared / "1.onnx").write_bytes(tiny_model(1))
    publish(registry)
    if alias == "champion":
        registry.promote(1, by="operator", why="test")
    async with serving(tmp_path, poll_interval_s=0.05) as (app, client):
        await until(lambda: "put off" in app.state.live.waiting_for)
        detail = (await client.get("/readyz")).json()["detail"]
        assert "version 1, put off for 0 s: the store holds no frame" in detail
        await until(lambda: app.state.live.version == 1)
    assert not registry.refused()


async def test_an_export_that_takes_too_long_is_put_off_longer_each_time(
    tmp_path: Path, registry: Registry, prepared: Path
) -> None:
    (prepared / "1.hang").touch()
    publish(registry)
    seen: set[str] = set()
    async with serving(tmp_path, export_timeout_s=0.05, poll_interval_s=0.06) as (app, _):
        await until(lambda: seen.add(app.state.live.waiting_for) or any("for 1 s" in line for line in seen))
        assert any("longer than 0.05 s" in line for line in seen)
    assert not registry.refused()


def group_niceness(pid: int) -> int | None:
    """Of the session's scheduling group; None where the kernel has none."""
    path = Path(f"/proc/{pid}/autogroup")
    return int(path.read_text().rpartition(" ")[2]) if path.exists() else None


async def test_stopping_kills_the_export_and_refuses_nothing(
    tmp_path: Path, registry: Registry, prepared: Path
) -> None:
    (prepared / "1.hang").touch()
    publish(registry)
    pid_path = prepared / "1.pid"
    async with serving(tmp_path):
        await until(lambda: pid_path.exists() and pid_path.read_text())
        assert group_niceness(int(pid_path.read_text())) in (NICENESS, None)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_path.read_text()), 0)
    assert not registry.refused()


async def test_a_rollback_by_somebody_else_is_followed_and_not_undone(tmp_path: Path, registry: Registry) -> None:
    publish_champion(registry)
    publish_champion(registry)
    async with serving(tmp_path) as (app, client):
        await until(lambda: app.state.live.version == 2)
        registry.promote(1, by="operator", why="2 mistakes cars for trees")
        await until(lambda: app.state.live.version == 1)
        await asyncio.sleep(0.1)  # five more looks into the registry
        answer = await client.post("/v1/classify", content=npy(heatmap()))
    assert answer.json()["model"]["version"] == 1
    assert registry.aliases()["champion"] == 1


async def test_a_rollback_during_an_export_is_not_undone_by_the_candidate_of_that_moment(
    tmp_path: Path, registry: Registry, prepared: Path
) -> None:
    publish_champion(registry)
    publish_champion(registry)
    (prepared / "3.hang").touch()
    async with serving(tmp_path) as (app, _):
        await until(lambda: app.state.live.version == 2)
        publish(registry)
        await until((prepared / "3.pid").exists)
        registry.rollback(by="operator", why="2 mistakes cars for trees")
        attach(registry, 3, tiny_model(3))
        os.kill(int((prepared / "3.pid").read_text()), signal.SIGKILL)
        (prepared / "3.hang").unlink()
        await until(lambda: app.state.live.version == 1)
        await asyncio.sleep(0.1)  # five more looks into the registry
        assert (app.state.live.version, registry.aliases()["champion"]) == (1, 1)
        (prepared / "4.onnx").write_bytes(tiny_model(4))
        publish(registry)  # one that was judged since
        await until(lambda: app.state.live.version == 4)


async def test_a_rollback_stands_though_a_crash_cost_the_line_of_the_promotion(
    tmp_path: Path, registry: Registry
) -> None:
    publish_champion(registry)
    publish(registry)
    attach(registry, 2, tiny_model(2))
    (registry.dir / "aliases.json").write_text('{"champion": 2, "previous": 1, "candidate": 2}')
    registry.rollback(by="operator", why="2 mistakes cars for trees")
    async with serving(tmp_path) as (app, _):
        await until(lambda: app.state.live.version == 1)
        await asyncio.sleep(0.1)  # five more looks into the registry
        assert (app.state.live.version, registry.aliases()["champion"]) == (1, 1)


async def test_a_version_that_went_live_unpromoted_gives_way_to_a_persons_choice(
    tmp_path: Path, registry: Registry, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_champion(registry)
    (prepared / "2.onnx").write_bytes(tiny_model(2))

    def fail(*_: object, **__: object) -> None:
        raise RegistryError("the disk is full")

    async with serving(tmp_path) as (app, _):
        await until(lambda: app.state.live.version == 1)
        promote = Registry.promote
        monkeypatch.setattr(Registry, "promote", fail)
        publish(registry)
        await until(lambda: app.state.live.version == 2)
        monkeypatch.setattr(Registry, "promote", promote)
        registry._move({"champion": 1}, by="operator", why="1 is good")
        await until(lambda: app.state.live.version == 1)


async def test_a_damaged_champion_is_replaced_by_previous_until_it_is_repaired(
    tmp_path: Path, registry: Registry
) -> None:
    publish_champion(registry)
    publish_champion(registry)
    model = registry.path(2) / MODEL_FILE
    model.write_bytes(b"damaged")
    async with serving(tmp_path) as (app, _):
        await until(lambda: app.state.live.version == 1)
        model.write_bytes(tiny_model(2))
        await until(lambda: app.state.live.version == 2)
    assert registry.aliases() == {"candidate": 2, "champion": 2, "previous": 1}


async def test_damaged_aliases_are_survived(tmp_path: Path, registry: Registry) -> None:
    publish_champion(registry)
    aliases = registry.dir / "aliases.json"
    good = aliases.read_bytes()
    aliases.write_bytes(b"{")
    async with serving(tmp_path) as (app, client):
        await until(lambda: "damaged" in app.state.live.waiting_for)
        assert (await client.get("/v1/models")).json()["type"] == "urn:echosight:problem:internal"
        aliases.write_bytes(good)
        await until(lambda: app.state.live.is_ready)


async def test_twenty_swaps_under_load_fail_no_request_and_label_each_answer_rightly(
    tmp_path: Path, registry: Registry
) -> None:
    publish_champion(registry)
    body, seen, is_over = npy(heatmap()), set(), asyncio.Event()
    async with serving(tmp_path, in_loop_below_ms=0.0) as (app, client):
        await until(lambda: app.state.live.is_ready)

        async def post() -> int:
            num_answers = 0
            while not is_over.is_set():
                answer = await client.post("/v1/classify", content=body)
                assert answer.status_code == 200
                content = answer.json()
                version = content["model"]["version"]
                assert content["probabilities"]["empty"] == pytest.approx(probability_of(version), abs=1e-6)
                assert answer.headers["x-model-version"] == str(version)
                seen.add(version)
                num_answers += 1
            return num_answers

        clients = [asyncio.create_task(post()) for _ in range(4)]
        for _ in range(20):
            version = publish(registry)
            attach(registry, version, tiny_model(version))
            await until(lambda v=version: app.state.live.version == v)  # type: ignore[misc]
        is_over.set()
        counts = await asyncio.gather(*clients)
    assert min(counts) > 0
    assert app.state.live.num_swaps == 21
    assert len(seen) >= 5


async def test_events_tell_what_went_live_and_what_was_refused(
    tmp_path: Path, registry: Registry, prepared: Path, redis_url: str
) -> None:
    publish_champion(registry)
    (prepared / "2.fail").write_text("no good")
    log = EventLog(redis_url, source="test")
    async with serving(tmp_path, redis_url=redis_url, events_interval_s=0.02) as (app, _):
        await until(lambda: app.state.live.is_ready)
        publish(registry)
        await until(lambda: {"model_live", "model_refused", "api"} <= {e["kind"] for e in log.since("0-0")[1]})
    events = {event["kind"]: event for event in log.since("0-0")[1]}
    log.close()
    assert EVENTS == "echosight:events"
    assert (events["model_live"]["version"], events["model_live"]["source"]) == (1, "api")
    assert (events["model_refused"]["version"], events["model_refused"]["why"]) == (2, "no good")
    assert events["api"].keys() >= {"requests", "live_version", "replica"}


def test_every_setting_says_what_it_is() -> None:
    assert all(field.description for field in ApiSettings.model_fields.values())


async def test_a_candidate_is_compared_on_live_frames_before_anybody_sees_its_answers(
    tmp_path: Path, registry: Registry
) -> None:
    publish_champion(registry)
    async with serving(tmp_path, shadow_frames=6, in_loop_below_ms=0.0) as (app, client):
        await until(lambda: app.state.live.is_ready)
        attach(registry, publish(registry), tiny_model(2))
        num_asked = 0
        while app.state.live.version == 1:
            answer = await client.post("/v1/classify?site=north", content=npy(heatmap(2, *SHAPE)))
            num_asked += 1
            assert answer.headers["x-model-version"] == "1" or app.state.live.version == 2
        assert num_asked >= 3
        await until(lambda: registry.history()[-1]["moved"].get("champion") == 2)
    assert "agrees with the live model on 100.0% of 6 live frames" in registry.history()[-1]["why"]


async def test_a_candidate_that_disagrees_on_live_frames_is_refused(tmp_path: Path, registry: Registry) -> None:
    publish_champion(registry)
    async with serving(tmp_path, shadow_frames=4, shadow_min_agreement=0.9, in_loop_below_ms=0.0) as (app, client):
        await until(lambda: app.state.live.is_ready)
        attach(registry, publish(registry), tiny_model(900))  # sure of the first class, where 1 says another
        while not registry.refused():
            await client.post("/v1/classify", content=npy(heatmap()))
        assert app.state.live.version == 1
    assert "agrees with the live model on 0.0% of 4 live frames" in registry.refused()[2]


async def test_without_traffic_a_candidate_does_not_wait_for_ever(tmp_path: Path, registry: Registry) -> None:
    publish_champion(registry)
    async with serving(tmp_path, shadow_frames=4, shadow_timeout_s=0.05) as (app, _):
        await until(lambda: app.state.live.is_ready)
        attach(registry, publish(registry), tiny_model(2))
        await until(lambda: registry.history()[-1]["moved"].get("champion") == 2)
    assert "no live frame came" in registry.history()[-1]["why"]


async def test_a_candidate_that_is_too_slow_is_refused(tmp_path: Path, registry: Registry) -> None:
    attach(registry, publish(registry), tiny_model(1))
    async with serving(tmp_path, max_frame_ms=1e-6) as (app, _):
        await until(registry.refused)
        assert not app.state.live.is_ready
    assert "ms for a frame" in registry.refused()[1]
