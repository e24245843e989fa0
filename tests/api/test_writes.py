"""Two writes of a moment are sent as one, in order, and none is lost or late."""

import asyncio

from api.writes import MAX_JOINED_BYTES, JoinedWrites


class _Sent:
    """A transport that keeps what is sent."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.is_over = False

    def write(self, data: bytes) -> None:
        self.parts.append(data)

    def is_closing(self) -> bool:
        return self.is_over

    def close(self) -> None:
        self.is_over = True

    abort = close

    def get_write_buffer_size(self) -> int:
        return 0

    get_extra_info = pause_reading = resume_reading = get_write_buffer_size


async def test_two_writes_of_a_moment_are_one_and_a_lone_one_waits_for_none() -> None:
    sent = _Sent()
    joined = JoinedWrites(sent, asyncio.get_running_loop())  # type: ignore[arg-type]
    joined.write(b"head ")
    assert (sent.parts, joined.get_write_buffer_size()) == ([], 5)
    joined.write(b"body")
    joined.write(b"next")
    await asyncio.sleep(0)
    assert sent.parts == [b"head body", b"next"]
    long = bytes(MAX_JOINED_BYTES + 1)
    joined.write(b"head")
    joined.write(long)
    joined.write(b"last")
    joined.close()
    assert sent.parts[2:] == [b"head", long, b"last"]
    await asyncio.sleep(0)
    assert len(sent.parts) == 5


async def test_nothing_is_sent_after_the_end() -> None:
    sent = _Sent()
    joined = JoinedWrites(sent, asyncio.get_running_loop())  # type: ignore[arg-type]
    joined.write(b"head")
    joined.abort()
    joined.write(b"body")
    await asyncio.sleep(0)
    assert sent.parts == []
