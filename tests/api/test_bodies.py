"""Bodies to arrays: what is accepted, and how each refusal names the value and the remedy."""

import json
import math
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.bodies.frames import Posted, decode
from api.problems import ProblemError
from services.core.registry import InputContract
from tests.api.tiny import SHAPE, heatmap, npy

CONTRACT = InputContract(shape=SHAPE, channels=("integrated", "moving"))
ONE_CHANNEL = InputContract(shape=(1, 4, 3))
NPY = "application/x-npy"
JSON = "application/json"


def decoded(
    body: bytes, content_type: str = NPY, *, query: bytes = b"", contract: InputContract = CONTRACT
) -> Posted:
    headers = {b"content-type": content_type.encode("latin-1")}
    return decode(body, headers=headers, query=query, contract=contract, max_batch=4)


def refusal(
    body: bytes, content_type: str = NPY, *, query: bytes = b"", contract: InputContract = CONTRACT
) -> ProblemError:
    with pytest.raises(ProblemError) as caught:
        decoded(body, content_type, query=query, contract=contract)
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "|u1", ">f4", ">f2"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_one_npy_frame_becomes_a_float32_batch_of_one(dtype: str, version: tuple[int, int]) -> None:
    posted = decoded(npy(heatmap(dtype=dtype), version=version))
    assert not posted.is_batch
    assert posted.heatmaps.dtype == np.dtype("<f4")
    np.testing.assert_array_equal(posted.heatmaps, heatmap()[None])


def test_fortran_order_is_turned_into_c_order() -> None:
    posted = decoded(npy(np.asfortranarray(heatmap())))
    np.testing.assert_array_equal(posted.heatmaps, heatmap()[None])
    assert posted.heatmaps.flags.c_contiguous


def test_four_dimensions_are_a_batch() -> None:
    posted = decoded(npy(heatmap(3, *SHAPE)))
    assert posted.is_batch
    assert posted.heatmaps.shape == (3, *SHAPE)


def test_range_azimuth_is_taken_where_the_model_has_one_channel() -> None:
    assert decoded(npy(heatmap(4, 3)), contract=ONE_CHANNEL).heatmaps.shape == (1, 1, 4, 3)
    body = orjson.dumps({"heatmaps": heatmap(2, 4, 3).tolist()})
    assert decoded(body, JSON, contract=ONE_CHANNEL).heatmaps.shape == (2, 1, 4, 3)


@pytest.mark.parametrize("content_type", ["", "application/octet-stream", "application/x-www-form-urlencoded"])
def test_npy_is_known_by_its_start_where_nothing_better_is_said(content_type: str) -> None:
    assert decoded(npy(heatmap()), content_type).heatmaps.shape == (1, *SHAPE)


def test_json_takes_one_frame_or_several_and_a_site() -> None:
    one = decoded(
        orjson.dumps({"heatmap": heatmap().tolist(), "site": "north"}), "application/json; charset=utf-8"
    )
    assert (one.is_batch, one.site) == (False, "north")
    many = decoded(orjson.dumps({"heatmaps": [heatmap().tolist()] * 2}), JSON, query=b"site=south")
    assert (many.is_batch, many.site, len(many.heatmaps)) == (True, "south", 2)


def test_numbers_too_large_for_float32_are_counted_as_infinite() -> None:
    rows = heatmap().tolist()
    rows[0][0][0] = 1e300
    assert "1 of 24 values" in refusal(orjson.dumps({"heatmap": rows}), JSON).what


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_counted(bad: float) -> None:
    frame = heatmap()
    frame[0, 0, :2] = bad
    error = refusal(npy(frame))
    assert (error.kind.status, "2 of 24 values" in error.what) == (422, True)


def _header(text: str, *, major: int = 1) -> bytes:
    size = len(text).to_bytes(2 if major == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([major, 0]) + size + text.encode()


F4 = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 4, 3)}"


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        (b"", 400, "empty"),
        (b"GIF89a..........", 400, "47 49 46 38 39 61"),
        (b"\x93NUMPY", 400, "6 bytes"),
        (npy(heatmap())[:60], 400, "truncated: 60 bytes"),
        (npy(heatmap())[:-8], 400, "truncated: 88 data bytes"),
        (npy(heatmap()) + b"!!", 400, "left over: 98 data bytes"),
        (_header(F4, major=9) + bytes(96), 400, "version is 9"),
        (_header("x" * 5000), 400, "5010 bytes"),
        (_header("__import__('os').getcwd()"), 400, "__import__"),
        (_header("(" * 2000), 400, "((("),
        (_header("{'descr': '<f4'}"), 400, "{'descr'"),
        (_header(F4.replace("(2, 4, 3)", "(10**9, 10**9)")), 400, "10**9"),
        (_header(F4.replace("(2, 4, 3)", "(1000000000, 1000000000)")), 400, "truncated"),
        (_header(F4.replace("(2, 4, 3)", "(-1, 4)")), 422, "(-1, 4)"),
        (_header(F4.replace("(2, 4, 3)", "(True, 4)")), 422, "(True, 4)"),
        (_header(F4.replace("(2, 4, 3)", "[2, 4, 3]")), 422, "[2, 4, 3]"),
        (_header(F4.replace("<f4", "|O")), 422, "'|O'"),
        (_header(F4.replace("'<f4'", "[('x', '<f4')]")), 422, "('x', '<f4')"),
        (_header(F4.replace("<f4", "<U9")), 422, "<U9"),
        (npy(np.array([{"a": 1}], dtype=object)), 422, "'|O'"),
        (npy(heatmap(dtype=np.float64)), 422, "float64"),
        (npy(heatmap(dtype=np.complex64)), 422, "<c8"),
        (npy(heatmap(4, 3)), 422, "(4, 3)"),
        (npy(heatmap(3, 4, 3)), 422, "3 channels, the model takes 2 (integrated, moving)"),
        (npy(heatmap(0, *SHAPE)), 422, "0 frames"),
        (npy(heatmap(5, *SHAPE)), 422, "5 frames"),
        (npy(np.float32(1.0)), 422, "()"),
    ],
)
def test_bad_npy_is_refused_by_name(body: bytes, status: int, named: str) -> None:
    error = refusal(body)
    assert error.kind.status == status
    assert named in error.what


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        (b'{"heatmap": [[1, 2', 400, "broken at line 1"),
        (b'{"heatmap": [[[NaN]]]}', 400, "broken"),
        (b"[" * 5000, 400, "broken"),
        (b"[1, 2]", 400, "a list"),
        (b'{"frame": 1}', 400, "'frame'"),
        (b'{"heatmap": [], "heatmaps": []}', 400, "'heatmaps'"),
        (b'{"heatmap": "abc"}', 422, "'abc'"),
        (b'{"heatmap": [["1.5"]]}', 422, "'1.5'"),
        (b'{"heatmap": [[[1, 2, 3], [1, 2]]]}', 422, "(1, 2, 3)"),
        (orjson.dumps({"heatmap": [[[1, 2, 3]] * 4, [[1, 2]] * 4]}), 422, "inhomogeneous"),
        (orjson.dumps({"heatmap": [[[1, 2, 3]] * 4, [[1, 2, {}]] * 4]}), 422, "no regular array"),
        (b'{"heatmap": ' + b"[" * 900 + b"1" + b"]" * 900 + b"}", 422, "(1, 1, 1"),
        (b'{"heatmap": []}', 422, "(0,)"),
        (b'{"heatmaps": []}', 422, "(0,)"),
        (b'{"heatmap": [[[1]]], "site": "a b"}', 422, "'a b'"),
        (b'{"heatmap": [[[1]]], "site": 7}', 422, "7"),
    ],
)
def test_bad_json_is_refused_by_name(body: bytes, status: int, named: str) -> None:
    error = refusal(body, JSON)
    assert error.kind.status == status
    assert named in error.what


def test_a_json_text_that_would_take_much_memory_is_refused() -> None:
    error = refusal(b'{"heatmap": [' + b"1," * 2**21 + b"1]}", JSON)
    assert (error.kind.status, "4194320 bytes" in error.what, ".npy" in error.remedy) == (413, True, True)


def test_two_different_sites_are_refused() -> None:
    body = orjson.dumps({"heatmap": heatmap().tolist(), "site": "north"})
    assert "'north'" in refusal(body, JSON, query=b"site=south").what
    assert "2 sites" in refusal(npy(heatmap()), query=b"site=a&site=b").what
    assert "1025 bytes" in refusal(npy(heatmap()), query=b"site=" + b"a" * 1020).what
    assert "'../x'" in refusal(npy(heatmap()), query=b"site=../x").what


@pytest.mark.parametrize("content_type", ["text/plain", "multipart/form-data; boundary=x", "image/png"])
def test_an_unknown_content_type_is_named(content_type: str) -> None:
    error = refusal(npy(heatmap()), content_type)
    assert (error.kind.status, content_type.split(";")[0] in error.what) == (415, True)


_mutations = st.lists(st.tuples(st.integers(0, 250), st.integers(0, 255)), max_size=6)
_nested: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(changes=_mutations, cut=st.integers(0, 250))
def test_a_damaged_npy_is_read_or_refused_but_never_breaks(changes: list[tuple[int, int]], cut: int) -> None:
    body = bytearray(npy(heatmap()))
    for position, value in changes:
        body[position % len(body)] = value
    _read_or_refuse(bytes(body[: len(body) - (cut if cut < 40 else 0)]), NPY, b"")


@settings(max_examples=100, deadline=None)
@given(nested=_nested, member=st.sampled_from(["heatmap", "heatmaps"]), site=_nested, query=st.binary(max_size=20))
def test_any_json_is_read_or_refused_but_never_breaks(nested: Any, member: str, site: Any, query: bytes) -> None:
    body = json.dumps({member: nested, "site": site}).encode()
    _read_or_refuse(body, JSON, query)


def _read_or_refuse(body: bytes, content_type: str, query: bytes) -> None:
    posted = error = None
    try:
        posted = decoded(body, content_type, query=query)
    except ProblemError as refused:
        error = refused
    if posted is None:
        assert error is not None
        assert 400 <= error.kind.status < 500
    else:
        assert np.isfinite(posted.heatmaps).all()
        assert posted.heatmaps.shape[1:] == SHAPE
