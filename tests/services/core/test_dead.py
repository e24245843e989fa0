"""Dead letters as a person handles them, on one server and on a cluster."""

import pytest

from services.core import codec
from services.core.errors import BadFrameError, StreamsError
from services.core.streams import DeadLetters, stream_key
from tests.conftest import radar_frame

BINARY = {b"header": b"{\xff\x00", b"data": bytes(range(256)), b"\xfe name": b""}


@pytest.fixture
def letters(any_url):
    letters = DeadLetters(any_url)
    yield letters
    letters.close()


async def bury_all(reader) -> int:
    """Bury whatever cannot be decoded; how many."""
    bad = [d for d in await reader.read(count=10, block_ms=10) if isinstance(d.frame, BadFrameError)]
    for delivery in bad:
        await reader.bury([(delivery, str(delivery.frame))])
    return len(bad)


async def test_letter_says_what_it_was_and_why(reader, letters, server) -> None:
    entry_id = server.xadd(stream_key("north", "radar"), BINARY)
    server.xadd(stream_key("south", "camera"), {"a": "b"})
    await reader.join("north")
    assert await bury_all(reader) == 1
    assert letters.sites() == ("north",)
    [letter] = letters.list("north", count=10)
    assert (letter.site, letter.kind, letter.entry_id) == ("north", "radar", entry_id.decode())
    assert letter.fields == BINARY
    assert letter.num_bytes == sum(len(name) + len(value) for name, value in BINARY.items())
    assert "radar header" in letter.reason
    assert f"{letter.buried_at_ms}-" in letter.id
    assert letters.show("north", letter.id) == letter
    assert letters.list("south", count=10) == []


async def test_requeued_letter_is_read_again_byte_for_byte_and_comes_back_if_still_bad(
    reader, letters, server
) -> None:
    server.xadd(stream_key("north", "radar"), BINARY)
    await reader.join("north")
    await bury_all(reader)
    [old] = letters.list("north", count=10)
    assert letters.requeue("north", [old.id]) == 1
    assert letters.sites() == ()
    assert await bury_all(reader) == 1
    [new] = letters.list("north", count=10)
    assert new.fields == old.fields == BINARY
    assert (new.id, new.entry_id) != (old.id, old.entry_id)


async def test_requeue_gives_a_good_frame_another_chance(reader, letters, server) -> None:
    good = {name.encode(): bytes(value) for name, value in codec.encode(radar_frame(5, seq=7)).items()}
    server.xadd(stream_key("north", "radar"), good)
    await reader.join("north")
    [delivery] = await reader.read(count=10, block_ms=10)
    await reader.bury([(delivery, "refused by an older version")])
    assert letters.requeue("north", [letters.list("north", count=1)[0].id]) == 1
    [again] = await reader.read(count=10, block_ms=10)
    assert again.frame.seq == 7
    assert again.fields == good


async def test_list_goes_on_after_a_letter_and_drop_deletes(reader, letters, server) -> None:
    for number in range(3):
        server.xadd(stream_key("north", "radar"), {"number": number})
    await reader.join("north")
    await bury_all(reader)
    first, second = letters.list("north", count=2)
    [third] = letters.list("north", count=10, after=second.id)
    assert [one.fields[b"number"] for one in (first, second, third)] == [b"0", b"1", b"2"]
    assert letters.drop("north", [first.id, third.id]) == 2
    assert letters.list("north", count=10) == [second]


async def test_unknown_site_and_id_are_said_and_nothing_is_done(reader, letters, server) -> None:
    server.xadd(stream_key("north", "radar"), {"a": "b"})
    await reader.join("north")
    await bury_all(reader)
    [letter] = letters.list("north", count=10)
    with pytest.raises(StreamsError, match="site 'nowhere' has no streams"):
        letters.list("nowhere", count=10)
    with pytest.raises(StreamsError, match="site is 'no}rth'"):
        letters.list("no}rth", count=10)
    with pytest.raises(StreamsError, match="id of a dead letter is '-'"):
        letters.show("north", "-")
    for act in (letters.requeue, letters.drop):
        with pytest.raises(StreamsError, match=r"site north has no dead letter 1-0;"):
            act("north", [letter.id, "1-0"])
    assert letters.list("north", count=10) == [letter]


async def test_letter_that_ingest_did_not_write_is_shown_but_not_requeued(letters, server) -> None:
    server.xadd(stream_key("north", "dead"), {"stream": "elsewhere", "field:a": "b"})
    [letter] = letters.list("north", count=10)
    with pytest.raises(StreamsError, match="names stream 'elsewhere'"):
        letters.requeue("north", [letter.id])
    assert letters.drop("north", [letter.id]) == 1


async def test_burial_repeated_after_a_lost_answer_leaves_one_letter(reader, letters, server) -> None:
    server.xadd(stream_key("north", "radar"), {"a": "b"})
    await reader.join("north")
    [delivery] = await reader.read(count=10, block_ms=10)
    await reader.bury([(delivery, "why")])
    await reader.bury([(delivery, "why")])
    assert len(letters.list("north", count=10)) == 1
    assert server.xpending(stream_key("north", "radar"), "ingest")["pending"] == 0


async def test_entry_of_very_many_fields_is_buried_too(reader, letters, server) -> None:
    fields = {f"name-{i}": "value" for i in range(5000)}
    server.xadd(stream_key("north", "radar"), fields)
    await reader.join("north")
    assert await bury_all(reader) == 1
    [letter] = letters.list("north", count=10)
    assert len(letter.fields) == 5000
    assert server.xpending(stream_key("north", "radar"), "ingest")["pending"] == 0
    with pytest.raises(StreamsError, match="5000 fields"):
        letters.requeue("north", [letter.id])
