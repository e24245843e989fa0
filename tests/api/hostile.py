"""Requests that nobody sends in good faith, many at a time, at a server in a process of its own.

Each sort of attack is a function from a random generator to the bytes that go over a new connection. What comes
back is only counted: a status, "closed" where the server ended the connection without an answer, "left" where the
attacker went first, "silent" where nothing came in time.
"""

import asyncio
import gzip
import json
import os
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tests.api.tiny import SHAPE, heatmap, npy

ANSWER_TIMEOUT_S = 20.0
TOO_MANY = b"too-many-clients"
"""A place that is not free yet is the one 5xx that may be."""

Rng = random.Random
_GOOD = npy(heatmap())
_FRAME = heatmap().tobytes()


@dataclass(frozen=True, slots=True)
class Attack:
    """data: what is sent. hold_s: so long it is kept open, and left. is_cut: our half of it is closed."""

    data: bytes
    hold_s: float = 0.0
    is_cut: bool = False


@dataclass(slots=True)
class Siege:
    """What has come of the attacks."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    num_sent: int = 0

    def statuses(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for (_, outcome), count in self.outcomes.items():
            found[outcome] += count
        return found


async def besiege(port: int, *, num_attacks: int, seed: int, num_at_once: int = 16) -> Siege:
    """Send so many attacks; every hundredth request is a good one, which must be answered well."""
    siege = Siege()
    rng = random.Random(seed)

    async def attacker() -> None:
        while siege.num_sent < num_attacks:
            siege.num_sent += 1
            if siege.num_sent % 100 == 0:
                await _check_service(port, siege)
                continue
            name = rng.choice(_NAMES)
            outcome = await _exchange(port, ATTACKS[name](rng))
            siege.outcomes[name, outcome] += 1
            if outcome.startswith("5") or outcome == "silent":
                siege.faults.append(f"{name}: {outcome}")

    async with asyncio.TaskGroup() as tasks:
        for _ in range(num_at_once):
            tasks.create_task(attacker())
    await _check_service(port, siege)
    return siege


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def _check_service(port: int, siege: Siege) -> None:
    outcome = await _exchange(port, Attack(_request("/v1/classify", _GOOD, "content-type: application/x-npy")))
    siege.outcomes["good", outcome] += 1
    if outcome != "200":
        siege.faults.append(f"a good request got {outcome}")


async def _exchange(port: int, attack: Attack) -> str:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError as error:
        return f"599 cannot connect: {error}"
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            writer.write(attack.data)
            if attack.is_cut:
                await writer.drain()
                writer.write_eof()
            if attack.hold_s:
                await asyncio.sleep(attack.hold_s)
                return "left"
            return await _status(reader)
    except TimeoutError:
        return "silent"
    except OSError:
        return "closed"
    finally:
        writer.transport.abort()


async def _status(reader: asyncio.StreamReader) -> str:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return "closed"
    status = head.split(b" ", 2)[1].decode()
    if status == "503" and TOO_MANY in await reader.read(4096):
        return "full"
    return status


def _request(path: str, body: bytes, *headers: str, length: int | None = None, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: api", *headers]
    lines.append(f"content-length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def _to_frames(body: bytes, *headers: str, rng: Rng) -> Attack:
    return Attack(_request(rng.choice(("/v1/classify", "/v1/classify?site=north", "/v1/embed")), body, *headers))


def _to_infer(body: bytes, rng: Rng, *headers: str) -> Attack:
    path = rng.choice(("/v2/models/radar/infer", "/v2/models/radar/versions/1/infer"))
    return Attack(_request(path, body, *headers))


def truncated(rng: Rng) -> Attack:
    return _to_frames(_GOOD[: rng.randrange(len(_GOOD))], "content-type: application/x-npy", rng=rng)


def bits_flipped(rng: Rng) -> Attack:
    body = bytearray(_GOOD)
    for _ in range(rng.randint(1, 20)):
        body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    return _to_frames(bytes(body), "content-type: application/x-npy", rng=rng)


def lying_npy_header(rng: Rng) -> Attack:
    descr = rng.choice(
        ("'<f4'", "'|O'", "'<U9999999'", "[('a', '<f4')]", "'<f4' * 10**9", "'<M8[ns]'", "'V2147483647'")
    )
    size = rng.choice((2**31 - 1, 2**63, -1, 0, 10**30))
    shape = rng.choice(
        (f"({size},)", f"({size},) * {size}", "(" * 90, f"({size},) + ({size},)", f"({','.join(['9'] * 40)})")
    )
    text = (
        f"{{'descr': {descr}, 'fortran_order': {rng.choice(('True', 'False', '1'))}, 'shape': {shape}}}".encode()
    )
    length = rng.choice((len(text), 65535, 0, 3))
    version = bytes([rng.choice((0, 1, 2, 3, 255)), 0])
    body = b"\x93NUMPY" + version + struct.pack("<H", length) + text + _FRAME
    return _to_frames(body, "content-type: application/x-npy", rng=rng)


def absurd_values(rng: Rng) -> Attack:
    array = heatmap().astype(rng.choice((np.float16, np.float32)))
    array.reshape(-1)[rng.randrange(array.size)] = rng.choice((np.nan, np.inf, -np.inf, 65504.0, -60000.0))
    return _to_frames(npy(array), "content-type: application/x-npy", rng=rng)


def bomb(rng: Rng) -> Attack:
    raw = rng.choice((_ZEROS, _GOOD + _ZEROS, _GOOD))
    packed = rng.choice((gzip.compress, zlib.compress))(raw, 1)
    packed = rng.choice(
        (packed, packed[: len(packed) // 2], gzip.compress(packed), packed * 3, b"\x1f\x8b" + packed)
    )
    encoding = rng.choice(("gzip", "deflate", "br", "gzip, gzip", "GZIP"))
    return _to_frames(packed, f"content-encoding: {encoding}", "content-type: application/x-npy", rng=rng)


def odd_json(rng: Rng) -> Attack:
    depth = rng.randint(1, 5000)
    number = rng.choice(
        ("1e400", "-1e39", "NaN", "Infinity", "9" * 400, "0x10", '"1"', "null", "true", "{}", "1e308")
    )
    body = rng.choice(
        (
            b"[" * depth,
            b'{"heatmap":' * depth,
            b'{"heatmap":' + b"[" * depth + b"1" + b"]" * depth + b"}",
            f'{{"heatmap":[[[{number},1,1],[1,1,1]]]}}'.encode(),
            f'{{"heatmaps":[[[{number}]],[[1]]]}}'.encode(),
            b'{"heatmap":[[1,2],[3]],"site":"\xff\xfe"}',
            b'{"heatmap":[[1]],"heatmap":[[2]],"site":' + b"9" * depth + b"}",
            b'{"heatmaps":' + b"[[]," * min(depth, 900) + b"[]" + b"]" * min(depth, 900) + b"}",
            orjson.dumps({"heatmap": heatmap().tolist(), "site": "../" * rng.randint(1, 40)}),
        )
    )
    return _to_frames(body, "content-type: application/json", rng=rng)


def lying_headers(rng: Rng) -> Attack:
    """Raw bytes that are not what their headers say; a length that is not that of the body."""
    shape = rng.choice(("2,4,3", "1," * 300, "999999999,999999999", "-1", "2;4;3", "0", "\xb2", "", "2,4,3" * 50))
    dtype = rng.choice(("float32", "float64", "object", "O", "<f4", "", "V99999"))
    headers = (f"x-shape: {shape}", f"x-dtype: {dtype}", "content-type: application/octet-stream")
    if rng.random() < 0.5:
        return _to_frames(_FRAME[: rng.choice((0, 5, 96))], *headers, rng=rng)
    length = rng.choice((10**9, 2**63, 10**40, len(_FRAME) + 5))
    return Attack(_request("/v1/classify", _FRAME, *headers, length=length), is_cut=True)


def odd_tensors(rng: Rng) -> Attack:
    size = rng.choice((-1, 0, 1, 96, 2**31, 2**63, 10**30, "96", None, 1.5))
    tensor: dict[str, Any] = {
        "name": rng.choice(("heatmap", "site", "image", 7, None)),
        "shape": rng.choice(
            ([1, *SHAPE], [2**31 - 1] * 8, [10**30], [-1], "1", [[1]], [0, *SHAPE], [1] * 5000, None)
        ),
        "datatype": rng.choice(("FP32", "FP16", "BYTES", "BF16", "INT64", "BOOL", 7, None, "FP32" * 999)),
        "parameters": rng.choice(({"binary_data_size": size}, {"binary_data_size": {}}, [], "x", {})),
        "data": rng.choice(
            ([1.0] * 24, [[[1]], [2]], ["a"], [None], {}, [10**400], [[]], "x" * 1000, [1e39] * 24)
        ),
    }
    if rng.random() < 0.4:
        del tensor["data"]
    outputs = [{"name": "probabilities", "parameters": {"classification": rng.choice((0, -1, 10**18, "1", 2))}}]
    inputs = rng.choice(([tensor], [tensor] * 3, [tensor, tensor], [], tensor, [_HEATMAP, tensor], [7]))
    request = {
        "inputs": inputs,
        "outputs": rng.choice((outputs, outputs * 2, [{}], None, "x")),
        "id": rng.choice(("a", 1)),
    }
    parameters = {
        "site": rng.choice(("north", "../x", 7, "\0")),
        "binary_data_output": rng.choice((True, "x", None)),
    }
    head = _lenient(request | rng.choice(({}, {"parameters": parameters}, {"parameters": []})))
    tail = rng.choice((b"", _FRAME, _FRAME * 2, struct.pack("<I", 2**32 - 1) + b"north", b"\x05\x00\x00\x00north"))
    length = rng.choice((len(head), len(head) - 1, 0, 10**20, -5, "x", len(head) + len(tail)))
    return _to_infer(head + tail, rng, f"Inference-Header-Content-Length: {length}")


def broken_http(rng: Rng) -> Attack:
    data = rng.choice(
        (
            rng.randbytes(rng.randint(1, 300)) + b"\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            _POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            _POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
            _POST + b"transfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n",
            _POST + b"content-length: -1\r\n\r\n",
            _POST + b"" + b"x: y\r\n" * 5000 + b"\r\n",
            b"GET /" + b"a" * rng.randint(1, 100_000) + b" HTTP/1.1\r\nhost: a\r\n\r\n",
            b"GET /v1/models/%00%ff%2e%2e HTTP/1.1\r\nhost: a\r\n\r\n",
            b"GET /v2/models/radar/versions/" + b"9" * 5000 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
            b"OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n",
            b"GET /v1/classify?site=" + b"%ff&site=" * 50 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
        )
    )
    return Attack(data, is_cut=True)


def endless(rng: Rng) -> Attack:
    chunk = b"10000\r\n" + bytes(65536) + b"\r\n"
    path = rng.choice(("/v1/classify", "/v1/labels", "/v2/repository/index", "/v1/models/rollback"))
    head = f"POST {path} HTTP/1.1\r\nhost: api\r\ntransfer-encoding: chunked\r\n\r\n"
    return Attack(head.encode() + chunk * rng.randint(20, 40), is_cut=True)


def slow(rng: Rng) -> Attack:
    data = _request("/v1/classify", _GOOD[: rng.randint(0, 60)], length=len(_GOOD))
    return (
        Attack(data)
        if rng.random() < 0.3
        else Attack(data[: rng.randrange(1, len(data))], hold_s=rng.random() / 2)
    )


def gone_at_once(rng: Rng) -> Attack:
    return Attack(_request("/v1/classify", _GOOD), hold_s=rng.choice((1e-6, 1e-3)))


def broken_websocket(rng: Rng) -> Attack:
    version, key = rng.choice((13, 13, 13, 8, "x")), rng.choice(("A" * 22 + "==", "A" * 22 + "==", "x", ""))
    head = (
        "GET /v1/stream HTTP/1.1\r\nhost: api\r\nconnection: Upgrade\r\nupgrade: websocket\r\n"
        f"sec-websocket-version: {version}\r\nsec-websocket-key: {key}\r\n\r\n"
    ).encode()
    frame = rng.choice(
        (
            b"\x82\x7f" + struct.pack("!Q", 2**62),
            b"\x82\xff" + struct.pack("!Q", 10**9) + b"mask",
            b"\x82\x05hello",  # not masked
            b"\x81\x84\0\0\0\0\xff\xfe\xfd\xfc",  # no UTF-8
            b"\x8f\x80\0\0\0\0",  # no such opcode
            b"\x02\x81\0\0\0\0x" * 2,  # a second beginning without an end
            b"\x00\x80\0\0\0\0" * 200,  # continuations of nothing
            b"\x89\xfe\x00\xff\0\0\0\0" + bytes(255),  # a ping that is too long
            b"\x88\x82\0\0\0\0\xff\xff",  # a close code that is none
            b"\x82\x83\0\0\0\0abc" * 50,  # rubbish, properly framed
            rng.randbytes(50),
        )
    )
    return Attack(head + frame, hold_s=rng.choice((0.0, 0.02)), is_cut=rng.random() < 0.5)


def listens_and_leaves(rng: Rng) -> Attack:
    head = (
        f"GET /v1/events HTTP/1.1\r\nhost: api\r\nlast-event-id: {rng.choice(('0-0', 'x', '9' * 60, ''))}\r\n\r\n"
    )
    return Attack(head.encode(), hold_s=rng.choice((0.0, 0.05)))


def odd_orders(rng: Rng) -> Attack:
    path = rng.choice(
        (
            "/v1/labels",
            "/v1/models/rollback",
            "/v1/models/1/promote",
            f"/v1/models/{'9' * rng.randint(1, 500)}/promote",
            "/v2/repository/index",
            "/v2/repository/models/radar/load",
            "/v2/repository/models/radar/unload",
        )
    )
    body = rng.choice(
        (
            b"",
            b"{" * rng.randint(1, 3000),
            b"[" * rng.randint(1, 3000),
            b'{"parameters":{"version":"' + b"9" * rng.randint(1, 300) + b'"}}',
            _lenient({"parameters": {"config": '{"version_policy":{"specific":{"versions":[99,"x"]}}}'}}),
            b'{"site":"north","captured_at_ns":1e300,"seq":-1,"label":"lorry"}',
            b'{"site":"nowhere","captured_at_ns":1,"seq":1,"label":"car"}',
            b'{"by":"' + b"x" * rng.randint(1, 3000) + b'"}',
            b'{"ready":"' + rng.randbytes(20) + b'"}',
        )
    )
    return Attack(_request(path, body, "content-type: application/json"))


def _lenient(value: Any) -> bytes:
    """JSON of numbers that orjson does not write."""
    return json.dumps(value).encode()


_POST = b"POST /v1/classify HTTP/1.1\r\nhost: a\r\n"
_ZEROS = bytes(8_000_000)
_HEATMAP = {"name": "heatmap", "shape": list(SHAPE), "datatype": "FP32", "data": [1.0] * 24}

ATTACKS: dict[str, Callable[[Rng], Attack]] = {
    attack.__name__: attack
    for attack in (
        truncated,
        bits_flipped,
        lying_npy_header,
        absurd_values,
        bomb,
        odd_json,
        lying_headers,
        odd_tensors,
        broken_http,
        endless,
        slow,
        gone_at_once,
        broken_websocket,
        listens_and_leaves,
        odd_orders,
    )
}
_NAMES = tuple(ATTACKS)
