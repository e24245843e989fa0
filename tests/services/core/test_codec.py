"""The stream contract: what is written is read back, and what is broken is named."""

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from services.core import codec
from services.core.errors import BadFrameError
from services.core.frames import RadarFrame, check_heatmap
from tests.conftest import JPEG, camera_frame, label, radar_frame


def entry(frame) -> dict[bytes, bytes]:
    return {name.encode(): bytes(value) for name, value in codec.encode(frame).items()}


def with_header(fields: dict[bytes, bytes], **changes) -> dict[bytes, bytes]:
    header = orjson.loads(fields[b"header"]) | changes
    return fields | {b"header": orjson.dumps({k: v for k, v in header.items() if v is not ...})}


@given(
    heatmap=hnp.arrays(
        st.sampled_from(["float16", "float32", "uint8"]),
        hnp.array_shapes(min_dims=2, max_dims=3, max_side=9),
        elements={"min_value": 0, "max_value": 200},
    )
)
def test_radar_frame_survives_the_wire_bit_for_bit(heatmap) -> None:
    axes = ("channel", "range", "azimuth")[-heatmap.ndim :]
    frame = RadarFrame("north", 7, 123, heatmap=heatmap, axes=axes, unit="dB")
    back = codec.decode("north", "radar", entry(frame))
    assert isinstance(back, RadarFrame)
    assert (back.id, back.axes, back.unit) == (frame.id, axes, "dB")
    assert back.heatmap.dtype == heatmap.dtype
    assert back.heatmap.tobytes() == heatmap.tobytes()


def test_decoded_heatmap_is_a_view_of_the_received_bytes() -> None:
    back = codec.decode("north", "radar", entry(radar_frame(1)))
    assert isinstance(back, RadarFrame)
    assert not back.heatmap.flags.owndata
    assert not back.heatmap.flags.writeable


def test_camera_frame_and_label_survive_the_wire() -> None:
    for kind, frame in (("camera", camera_frame(5, seq=9)), ("labels", label(5, "cyclist", seq=9))):
        assert codec.decode("north", kind, entry(frame)) == frame


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"v": 2}, "header field v is 2"),
        ({"v": ...}, "field v"),
        ({"dtype": "float64"}, "'float64'"),
        ({"shape": [2, 4, 4]}, "48 bytes, shape (2, 4, 4) and dtype float16 need 64"),
        ({"shape": [16000, 16000], "axes": ["range", "azimuth"]}, "takes 512000000 bytes"),
        ({"shape": [0, 4]}, "shape"),
        ({"axes": ["range", "azimuth"]}, "do not fit shape"),
        ({"captured_at_ns": -5}, "captured_at_ns is -5"),
        ({"seq": "x"}, "seq is 'x'"),
    ],
)
def test_broken_radar_header_is_named_with_its_value(changes, told) -> None:
    fields = with_header(entry(radar_frame(1)), **changes)
    with pytest.raises(BadFrameError) as caught:
        codec.decode("north", "radar", fields)
    assert told in str(caught.value)
    assert caught.value.remedy


def test_truncated_heatmap_and_image_are_refused() -> None:
    fields = entry(radar_frame(1))
    with pytest.raises(BadFrameError, match="47 bytes"):
        codec.decode("north", "radar", fields | {b"data": fields[b"data"][:-1]})
    with pytest.raises(BadFrameError, match="no end marker"):
        codec.decode("north", "camera", entry(camera_frame(1)) | {b"data": JPEG[:-2]})


def test_not_a_number_is_counted_in_the_message() -> None:
    frame = radar_frame(1)
    fields = entry(frame) | {b"data": b"\x00\x7e" * frame.heatmap.size}
    with pytest.raises(BadFrameError, match="24 of 24 values that are not finite"):
        codec.decode("north", "radar", fields)


@given(
    header=st.binary(max_size=80), data=st.binary(max_size=80), kind=st.sampled_from(["radar", "camera", "labels"])
)
def test_random_bytes_never_raise_anything_else(header, data, kind) -> None:
    with pytest.raises(BadFrameError):
        codec.decode("north", kind, {b"header": header, b"data": data})


@pytest.mark.parametrize("value", [10_001.0, -1e30])
def test_absurd_value_is_refused_with_what_it_is(value) -> None:
    frame = radar_frame(1)
    heatmap = frame.heatmap.astype(np.float32)
    fields = with_header(entry(frame), dtype="float32")
    heatmap[0, 1, 2] = value
    with pytest.raises(BadFrameError, match="heatmap reaches"):
        codec.decode("north", "radar", fields | {b"data": heatmap.tobytes()})


def test_entry_without_header_is_refused() -> None:
    with pytest.raises(BadFrameError, match="send the fields header and data"):
        codec.decode("north", "radar", {b"x": b"y"})


def test_header_like_one_before_is_checked_all_the_same() -> None:
    fields = entry(radar_frame(1))
    assert codec.decode("north", "radar", fields).seq == 0
    assert codec.decode("north", "radar", with_header(fields, seq=2**63 - 1)).seq == 2**63 - 1
    for changes, told in (
        ({"v": 2}, "header field v is 2"),
        ({"v": 1.5}, "header field v is 1.5"),
        ({"seq": -1}, "seq is -1"),
        ({"seq": 0.5}, "seq is 0.5"),
        ({"seq": 2**63}, "seq is 9223372036854775808"),
        ({"captured_at_ns": 2**63}, "captured_at_ns is 9223372036854775808"),
        ({"captured_at_ns": None}, "captured_at_ns is None"),
        ({"captured_at_ns": ...}, "captured_at_ns"),
        ({"dtype": "float32"}, "48 bytes"),
    ):
        with pytest.raises(BadFrameError) as caught:
            codec.decode("north", "radar", with_header(fields, **changes))
        assert told in str(caught.value)
    with pytest.raises(BadFrameError, match="camera header"):
        codec.decode("north", "camera", fields)


def test_headers_that_are_known_are_bounded_in_number_and_size() -> None:
    fields = entry(radar_frame(1))
    for number in range(1000):
        assert codec.decode("north", "radar", with_header(fields, unit=f"u{number}")).unit == f"u{number}"
    assert codec.decode("north", "radar", with_header(fields, note="x" * 5000)).seq == 0
    assert len(codec._KNOWN["radar"]) <= 256
    assert max(len(rest) for rest in codec._KNOWN["radar"]) <= 1024


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("value", [10_000.0, -10_000.0, np.nan, -np.nan, np.inf, -np.inf, 10_016.0, -10_016.0])
def test_bound_holds_for_either_sign_and_byte_order(dtype, value) -> None:
    heatmap = np.zeros((4, 4), dtype)
    heatmap[2, 1] = value
    for order in "<>":
        ordered = heatmap.astype(heatmap.dtype.newbyteorder(order))
        if abs(value) == 10_000.0:
            assert check_heatmap(ordered) is ordered
        else:
            with pytest.raises(BadFrameError, match="heatmap"):
                check_heatmap(ordered)
