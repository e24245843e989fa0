"""docs/asyncapi.yaml says what the code does: the codec's schemas, our keys, and examples that decode."""

import base64
import re
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import yaml
from pydantic import BaseModel

from services.core import codec
from services.core.errors import BadFrameError
from services.core.frames import CLASSES, MAX_HEATMAP_BYTES, MAX_IMAGE_BYTES
from services.core.predictions import Prediction, decode_prediction, encode_prediction
from services.core.streams import (
    DEAD_MAX_ENTRIES,
    EVENTS,
    EVENTS_MAX_ENTRIES,
    INGEST_GROUP,
    KINDS,
    LIVE_REPLICAS,
    PREDICTIONS_MAX_ENTRIES,
    REPLICAS,
    Consumer,
    EventLog,
    SiteLeases,
    connect,
    stream_key,
)
from tests.conftest import JPEG

DOCUMENT: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parents[3] / "docs" / "asyncapi.yaml").read_text(encoding="utf-8")
)
MESSAGES = DOCUMENT["components"]["messages"]
SCHEMAS = DOCUMENT["components"]["schemas"]
MODELS: dict[str, type[BaseModel]] = {
    "radar": codec.RadarHeader,
    "camera": codec.CameraHeader,
    "labels": codec.LabelHeader,
    "predictions": Prediction,
}


def resolve(node: dict[str, Any]) -> dict[str, Any]:
    """What a `$ref` within the document points at."""
    if "$ref" not in node:
        return node
    found: Any = DOCUMENT
    for part in node["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    return resolve(found)


def all_refs(node: Any) -> list[dict[str, Any]]:
    if isinstance(node, dict):
        return ([node] if "$ref" in node else []) + [ref for value in node.values() for ref in all_refs(value)]
    return [ref for value in node for ref in all_refs(value)] if isinstance(node, list) else []


def message_of(kind: str) -> dict[str, Any]:
    [message] = DOCUMENT["channels"][kind]["messages"].values()
    return resolve(message)


def test_document_is_asyncapi_3_and_every_reference_leads_somewhere() -> None:
    assert DOCUMENT["asyncapi"] == "3.0.0"
    assert {"title", "version"} <= DOCUMENT["info"].keys()
    assert all(resolve(ref) for ref in all_refs(DOCUMENT))
    for operation in DOCUMENT["operations"].values():
        assert operation["action"] in ("send", "receive")
        assert resolve(operation["channel"]) in DOCUMENT["channels"].values()


def test_channels_have_the_keys_of_the_code() -> None:
    channels = DOCUMENT["channels"]
    assert set(channels) == {*KINDS, "dead", "predictions", "events"}
    [tagged_site, *_] = DOCUMENT["components"]["parameters"]["taggedSite"]["examples"]
    for kind, channel in channels.items():
        key = channel["address"].replace("{taggedSite}", tagged_site)
        assert key == (EVENTS if kind == "events" else stream_key(tagged_site.strip("{}"), kind))


def plain(node: Any, definitions: dict[str, Any]) -> Any:
    """A schema of pydantic's as a person writes it: without titles, references and remarks of the code."""
    if isinstance(node, list):
        return [plain(value, definitions) for value in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        node = definitions[node["$ref"].rpartition("/")[2]] | {k: v for k, v in node.items() if k != "$ref"}
    left_out = {"title", "description"} if "type" in node or "anyOf" in node else set()
    return {key: plain(value, definitions) for key, value in node.items() if key not in left_out}


@pytest.mark.parametrize("kind", MODELS)
def test_header_schema_is_the_one_that_is_checked(kind) -> None:
    documented = resolve(message_of(kind)["payload"]["properties"]["header"])
    ours = MODELS[kind].model_json_schema()
    ours["properties"] = plain(ours["properties"], ours.get("$defs", {}))
    assert set(documented["required"]) == set(ours["required"])
    assert set(documented["properties"]) == set(ours["properties"])
    for name, rules in ours["properties"].items():
        expected = {key: value for key, value in rules.items() if key != "title"}
        if "prefixItems" in expected:  # AsyncAPI follows draft 07, where this is called items
            expected["items"] = expected.pop("prefixItems")
        if (kind, name) == ("labels", "label"):  # checked apart from the model
            expected["enum"] = list(CLASSES)
        found = {key: value for key, value in documented["properties"][name].items() if key != "description"}
        assert found == expected, name


@pytest.mark.parametrize(
    ("kind", "number"), [(kind, i) for kind in KINDS for i in range(len(message_of(kind)["examples"]))]
)
def test_message_example_decodes(kind, number) -> None:
    payload = message_of(kind)["examples"][number]["payload"]
    header = payload["header"]
    entry = {b"header": orjson.dumps(header), b"data": base64.b64decode(payload["data"], validate=True)}
    frame = codec.decode("north", kind, entry)
    assert (frame.seq, frame.captured_at_ns) == (header["seq"], header["captured_at_ns"])
    back = {name.encode(): bytes(value) for name, value in codec.encode(frame).items()}
    assert back[b"data"] == entry[b"data"]
    assert header.items() <= orjson.loads(back[b"header"]).items()


@pytest.mark.parametrize(
    ("name", "number"), [(name, i) for name, schema in SCHEMAS.items() for i in range(len(schema["examples"]))]
)
def test_header_example_decodes(name, number) -> None:
    header = SCHEMAS[name]["examples"][number]
    kind = next(kind for kind, model in MODELS.items() if model.__name__ == name)
    if kind == "predictions":
        assert decode_prediction({b"header": orjson.dumps(header)})
        return
    data = {
        "radar": lambda: np.zeros(header["shape"], header["dtype"]).tobytes(),
        "camera": lambda: JPEG,
        "labels": lambda: b"",
    }[kind]()
    assert codec.decode("north", kind, {b"header": orjson.dumps(header), b"data": data})


def test_prediction_example_is_what_the_code_writes() -> None:
    [example] = MESSAGES["prediction"]["examples"]
    header = example["payload"]["header"]
    prediction = decode_prediction({b"header": orjson.dumps(header)})
    assert orjson.loads(encode_prediction(prediction)) == header


def test_headers_of_the_redis_cli_lines_decode() -> None:
    text = DOCUMENT["info"]["description"]
    commands = re.findall(r"XADD 'echosight:\{north\}:(\w+)'.*?header '(.*?)' data", text, re.DOTALL)
    assert [kind for kind, _ in commands] == list(KINDS)
    data = {"radar": bytes(128 * 128 * 4), "camera": JPEG, "labels": b""}
    for kind, header in commands:
        assert codec.decode("north", kind, {b"header": header.encode(), b"data": data[kind]})


def test_limits_in_words_are_those_of_the_code() -> None:
    assert str(MAX_HEATMAP_BYTES) in MESSAGES["radarFrame"]["payload"]["properties"]["data"]["description"]
    assert str(MAX_IMAGE_BYTES) in MESSAGES["cameraFrame"]["payload"]["properties"]["data"]["description"]
    assert f"about {DEAD_MAX_ENTRIES}" in DOCUMENT["channels"]["dead"]["description"]
    assert f"about {PREDICTIONS_MAX_ENTRIES}" in DOCUMENT["channels"]["predictions"]["description"]
    assert f"about {EVENTS_MAX_ENTRIES}" in DOCUMENT["channels"]["events"]["description"]
    assert f"consumer group `{INGEST_GROUP}`" in DOCUMENT["info"]["description"]


async def test_keys_beside_the_streams_are_documented(redis_url, redis_client) -> None:
    client = connect(redis_url)
    leases = SiteLeases(client, owner="first", ttl_ms=60_000)
    token = await leases.acquire("SITE", floor=0)
    await leases.register()
    live = SiteLeases(client, owner="first", ttl_ms=60_000, task="live")
    assert await live.acquire("SITE", floor=0)  # apart from those of ingest
    await live.register()
    keys = {key.decode() for key in redis_client.scan_iter()}
    kinds = ("lease", "token", "live-lease", "live-token")
    assert keys == {*(stream_key("SITE", kind) for kind in kinds), REPLICAS, LIVE_REPLICAS}
    assert all(f"`{key}`" in DOCUMENT["info"]["description"] for key in keys)
    assert redis_client.get(stream_key("SITE", "lease")).startswith(f"{token}:first".encode())
    await client.aclose()


async def test_dead_letters_and_events_have_the_documented_fields(redis_url, redis_client) -> None:
    example = MESSAGES["deadLetter"]["examples"][0]["payload"]
    entry = {name.removeprefix("field:"): value for name, value in example.items() if name.startswith("field:")}
    redis_client.xadd(stream_key("north", "radar"), entry)
    consumer = Consumer(connect(redis_url), name="first", sites=["north"])
    await consumer.discover()
    [delivery] = await consumer.read(count=1, block_ms=100)
    assert isinstance(delivery.frame, BadFrameError)
    await consumer.bury([(delivery, str(delivery.frame))])
    await consumer.close()
    [(_, letter)] = redis_client.xrange(stream_key("north", "dead"))
    assert {name.decode() for name in letter} == set(example)
    assert letter[b"reason"].decode() == example["reason"]

    event = MESSAGES["event"]["examples"][0]["payload"]["event"]
    events = EventLog(redis_url, source=event["source"])
    events.emit(event["kind"], **{name: value for name, value in event.items() if name not in ("source", "kind")})
    assert events.since("0-0")[1] == [event]
    events.close()
