"""`echosight dead` on a real server: what was refused is shown, sent again, dropped."""

import json
from collections.abc import Iterator

import pytest
import redis
from typer.testing import CliRunner

from services.commands.dead import app
from services.core import codec
from services.core.streams import Consumer, Publisher, connect, stream_key
from tests.conftest import camera_frame, radar_frame

RADAR, DEAD = stream_key("north", "radar"), stream_key("north", "dead")


@pytest.fixture
def run(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[CliRunner]:
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("COLUMNS", "200")
    return CliRunner()


@pytest.fixture
async def letters(redis_client: "redis.Redis", publisher: Publisher, redis_url: str) -> list[str]:
    """Two buried radar frames, one with a broken header and one that a fixed reader could take; their ids."""
    good = dict(codec.encode(radar_frame(100, seq=1)))
    for fields in ({"header": b'{"v":9}', "data": b"\x00\xff"}, good):
        redis_client.xadd(RADAR, fields)
    await publisher.publish([camera_frame(104)])
    consumer = Consumer(connect(redis_url), name="test", sites=["north"])
    await consumer.discover()
    for delivery in await consumer.read(count=10, block_ms=100):
        if delivery.kind == "radar":
            await consumer.bury([(delivery, f"seq is {getattr(delivery.frame, 'seq', 'unknown')}")])
    await consumer.close()
    return [entry_id.decode() for entry_id, _ in redis_client.xrange(DEAD)]


def test_list_shows_every_letter_with_its_reason(run, letters) -> None:
    result = run.invoke(app, ["list"])
    assert result.exit_code == 0, result.output
    for letter_id, reason in zip(letters, ("seq is unknown", "seq is 1"), strict=True):
        assert any(letter_id in line and reason in line for line in result.output.splitlines())
    listed = json.loads(run.invoke(app, ["list", "--json"]).output)
    assert [row["id"] for row in listed["north"]] == letters


def test_list_fits_a_narrow_terminal_and_keeps_ids_whole(run, letters, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = run.invoke(app, ["list"]).output.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert all(any(letter_id in line for line in lines) for letter_id in letters)


def test_list_without_letters_says_so(run, redis_client) -> None:
    assert "no dead letters" in run.invoke(app, ["list"]).output


def test_show_tells_header_and_data(run, letters) -> None:
    result = run.invoke(app, ["show", "north", letters[0]])
    assert '{"v":9}' in result.output
    assert "2 bytes, starting 00 ff" in result.output
    shown = json.loads(run.invoke(app, ["show", "north", letters[0], "--json"]).output)
    assert shown["fields_base64"]["data"] == "AP8="


def test_requeue_puts_the_entry_back_byte_for_byte(run, letters, redis_client) -> None:
    before = redis_client.xrange(RADAR)
    result = run.invoke(app, ["requeue", "north", letters[1]])
    assert result.output == "1 letter requeued\n"
    assert redis_client.xrange(RADAR)[-1][1] == before[1][1]
    assert redis_client.xlen(DEAD) == 1


def test_drop_all_leaves_none(run, letters, redis_client) -> None:
    assert json.loads(run.invoke(app, ["drop", "north", "--all", "--json"]).output) == {"dropped": 2}
    assert redis_client.xlen(DEAD) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["drop", "north"], "--all"),
        (["drop", "north", "1-0", "--all"], "--all"),
        (["show", "north", "not-an-id"], "not-an-id"),
        (["requeue", "north", "1-1"], "1-1"),
        (["list", "no/site"], "no/site"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_changes_nothing(run, letters, redis_client, arguments, said) -> None:
    result = run.invoke(app, arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert redis_client.xlen(DEAD) == 2
