"""MCAP sessions: exact round trips, Foxglove's own schemas, arrival order, and what is left of damaged files."""

from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import pytest
from foxglove_schemas_protobuf.CompressedImage_pb2 import CompressedImage
from foxglove_schemas_protobuf.Grid_pb2 import Grid
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st
from mcap.reader import make_reader
from mcap.writer import Writer
from mcap_protobuf.decoder import DecoderFactory

from services.core import codec
from services.core.errors import BadFrameError, RecordingError
from services.core.frames import CLASSES, CameraFrame, Frame, Label, RadarFrame
from services.core.streams import kind_of
from services.sensors.recordings import McapRecording, detect_format, open_recording
from services.sensors.recordings.base import OpenRecording
from services.sensors.recordings.doctor import examine
from services.sensors.recordings.foxglove_messages import to_entry, to_message
from services.sensors.recordings.mcap_writer import McapWriter
from tests.conftest import MS, camera_frame, label, radar_frame

Sent = tuple[int, Frame]
"""Arrival, ns, and what arrived."""


def header_of(frame: Frame) -> bytes:
    return bytes(codec.encode(frame)["header"])


def write(path: Path, sent: Iterable[Sent], *, per_chunk: int = 10**9) -> Path:
    with path.open("wb") as file:
        writer = McapWriter(file)
        for number, (arrived_ns, frame) in enumerate(sent, start=1):
            writer.add(frame, header=header_of(frame), arrived_ns=arrived_ns)
            if number % per_chunk == 0:
                writer.flush()
        writer.finish()
    return path


def session(num: int, *, site: str = "north") -> list[Sent]:
    """Radar, its label, and an image each 100 ms, arriving 20 ms after capture."""
    sent: list[Sent] = []
    for seq in range(num):
        at_ms = 100 * seq
        sent += [
            ((at_ms + 20) * MS, radar_frame(at_ms, seq=seq, site=site)),
            ((at_ms + 21) * MS, label(at_ms, CLASSES[seq % 4], seq=seq, site=site)),
            ((at_ms + 25) * MS, camera_frame(at_ms + 3, seq=seq, site=site)),
        ]
    return sent


def assert_same(found: Frame, expected: Frame) -> None:
    """Equal to the last bit, the sign of a zero included."""
    if isinstance(expected, RadarFrame):
        assert isinstance(found, RadarFrame)
        assert found.heatmap.dtype == expected.heatmap.dtype
        assert found.heatmap.shape == expected.heatmap.shape
        assert found.heatmap.tobytes() == expected.heatmap.tobytes()
        facts = ("site", "seq", "captured_at_ns", "axes", "unit", "channels")
        assert [getattr(found, fact) for fact in facts] == [getattr(expected, fact) for fact in facts]
    else:
        assert found == expected


JPEG_ENDS = (b"\xff\xd8\xff", b"\xff\xd9")
PNG_ENDS = (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82")
BIG = st.integers(0, 2**63 - 1)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@st.composite
def radar_frames(draw: st.DrawFn) -> RadarFrame:
    dtype = draw(st.sampled_from(["uint8", "float16", "float32"]))
    shape = draw(numpy_st.array_shapes(min_dims=2, max_dims=3, max_side=5))
    width = {"float16": 16, "float32": 32}.get(dtype)
    values = (
        st.floats(-9984, 9984, width=width) if width else st.integers(0, 255)  # type: ignore[arg-type]
    )
    return RadarFrame(
        "north",
        draw(BIG),
        draw(BIG),
        heatmap=draw(numpy_st.arrays(dtype, shape, elements=values)),
        axes=tuple(draw(st.lists(NAMES, min_size=len(shape), max_size=len(shape)))),
        unit=draw(NAMES),
        channels=tuple(draw(st.lists(NAMES, max_size=4))),
    )


CAMERA_FRAMES = st.builds(
    lambda seq, at_ns, body, height, encoding: CameraFrame(
        "north",
        seq,
        at_ns,
        image=JPEG_ENDS[0] + body + JPEG_ENDS[1] if encoding == "jpeg" else PNG_ENDS[0] + body + PNG_ENDS[1],
        shape=(height, 7, 3),
        encoding=encoding,
    ),
    BIG, BIG, st.binary(max_size=100), st.integers(1, 16384), st.sampled_from(["jpeg", "png"]),
)  # fmt: skip
LABELS = st.builds(Label, st.just("north"), BIG, BIG, label=st.sampled_from(CLASSES), source=NAMES)


@settings(max_examples=150, deadline=None)
@given(frame=radar_frames() | CAMERA_FRAMES | LABELS)
def test_a_message_holds_every_bit_of_its_frame(frame: Frame) -> None:
    kind, header = kind_of(frame), header_of(frame)
    entry = to_entry(kind, to_message(frame, header))
    assert entry[b"header"] == header
    assert_same(codec.decode(frame.site, kind, entry), frame)


@settings(max_examples=25, deadline=None)
@given(frames=st.lists(radar_frames() | CAMERA_FRAMES | LABELS, min_size=1, max_size=8))
def test_a_file_gives_back_what_was_written(frames: list[Frame], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "roundtrip.mcap"
    sent = [(2**62 + number, frame) for number, frame in enumerate(frames)]
    found = list(McapRecording(write(path, sent)).arrivals())
    assert [arrived_ns for arrived_ns, _ in found] == [arrived_ns for arrived_ns, _ in sent]
    for (_, frame), original in zip(found, frames, strict=True):
        assert_same(frame, original)


def test_unknown_fields_of_a_header_are_kept() -> None:
    header = header_of(label(0, "car")).replace(b'"v":1', b'"v":1,"annotator_id":7')
    frame = codec.decode("north", "labels", {b"header": header})
    assert to_entry("labels", to_message(frame, header))[b"header"] == header


def test_a_stranger_reads_the_file_with_the_published_schemas(tmp_path: Path) -> None:
    heatmap = np.arange(24, dtype=np.float16).reshape(2, 4, 3) / 2
    axes, channels = ("channel", "range", "azimuth"), ("integrated", "moving")
    frame = RadarFrame("north", 2**63 - 1, 1500 * MS + 7, heatmap=heatmap, axes=axes, channels=channels)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    jpeg = cv2.imencode(".jpg", pixels)[1].tobytes()
    image = CameraFrame("north", 1, 1503 * MS, image=jpeg, shape=(8, 12, 3))
    path = write(
        tmp_path / "look.mcap", [(9, frame), (10, image), (11, label(1500, "car")), (12, label(1600, "car"))]
    )
    with path.open("rb") as file:
        reader = make_reader(file, validate_crcs=True, decoder_factories=[DecoderFactory()])
        summary = reader.get_summary()
        assert summary is not None
        assert summary.statistics is not None
        topics = {channel.topic: channel for channel in summary.channels.values()}
        schemas = {name: summary.schemas[channel.schema_id] for name, channel in topics.items()}
        assert {name: schema.name for name, schema in schemas.items()} == {
            "/north/radar": "foxglove.Grid",
            "/north/camera": "foxglove.CompressedImage",
            "/north/labels": "echosight.Label",
        }
        assert {schema.encoding for schema in schemas.values()} == {"protobuf", "jsonschema"}
        assert summary.statistics.message_count == 4
        assert [chunk.compression for chunk in summary.chunk_indexes] == ["zstd"]
        [(_, _, sent, by_schema)] = list(reader.iter_decoded_messages(topics="/north/radar"))
        [(_, _, sent_image)] = list(reader.iter_messages(topics="/north/camera"))
    assert by_schema.header == header_of(frame).decode()  # the file's own schema knows the extra field
    assert (sent.log_time, sent.publish_time) == (9, 1500 * MS + 7)
    grid = Grid.FromString(sent.data)
    assert (grid.timestamp.seconds, grid.timestamp.nanos) == (1, 500 * MS + 7)
    assert [(cell.name, cell.offset) for cell in grid.fields] == [("integrated", 0), ("moving", 4)]
    for channel, row, column in [(0, 0, 0), (1, 0, 0), (0, 3, 2), (1, 2, 1)]:
        offset = row * grid.row_stride + column * grid.cell_stride + grid.fields[channel].offset
        assert np.frombuffer(grid.data, "<f4", 1, offset)[0] == heatmap[channel, row, column]
    assert grid.column_count == 3
    assert len(grid.data) == 4 * grid.row_stride
    shown = CompressedImage.FromString(sent_image.data)
    assert (shown.format, shown.data) == ("jpeg", jpeg)
    assert cv2.imdecode(np.frombuffer(shown.data, np.uint8), cv2.IMREAD_COLOR).shape == (8, 12, 3)


@pytest.mark.parametrize("per_chunk", [1, 5, 100])
def test_frames_come_in_the_order_of_arrival_whatever_the_order_in_the_file(
    per_chunk: int, tmp_path: Path
) -> None:
    late = (500 * MS, radar_frame(0, seq=99))  # captured first, arrived last
    shuffled = [late, *session(4)[::2], *session(4)[1::2]]
    recording = McapRecording(write(tmp_path / "s.mcap", shuffled, per_chunk=per_chunk))
    assert isinstance(recording, OpenRecording)
    found = list(recording.arrivals())
    assert [arrived_ns for arrived_ns, _ in found] == sorted(arrived_ns for arrived_ns, _ in shuffled)
    assert_same(found[-1][1], late[1])
    assert len(list(recording.frames())) == 13
    assert (recording.num_files, recording.report().counts) == (9, {"radar": 5, "camera": 4, "labels": 4})


def num_readable(path: Path) -> int:
    try:
        recording = McapRecording(path)
    except RecordingError:
        return 0
    assert "has no end" in recording.report().notes[0]
    return len(list(recording.frames()))


def test_a_file_cut_anywhere_gives_what_is_before_the_cut(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.mcap", session(3), per_chunk=1).read_bytes()
    cut, readable = tmp_path / "cut.mcap", []
    for length in range(8, len(whole), 97):
        cut.write_bytes(whole[:length])
        readable.append(num_readable(cut))
    assert readable == sorted(readable)
    assert set(readable) == set(range(10))  # each frame is there as soon as its chunk is


def test_a_damaged_chunk_is_named_and_the_rest_is_played(tmp_path: Path) -> None:
    path = write(tmp_path / "s.mcap", session(3), per_chunk=1)
    whole = path.read_bytes()
    with path.open("rb") as file:
        summary = make_reader(file).get_summary()
    assert summary is not None
    chunk = summary.chunk_indexes[4]
    payload_at = chunk.chunk_start_offset + chunk.chunk_length - chunk.compressed_size
    for position in range(payload_at, payload_at + chunk.compressed_size, 11):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        recording = McapRecording(path)
        assert len(list(recording.frames())) == 8
        [damaged] = recording.report().corrupt
        assert damaged.name == f"chunk at byte {chunk.chunk_start_offset}"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_damage_is_a_traceback(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.mcap"
    content = bytearray(write(path, session(2), per_chunk=1).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(8, len(content) - 1))
        content[start : start + 1] = data.draw(st.binary(min_size=0, max_size=9))
    path.write_bytes(content)
    try:
        recording = McapRecording(path)
    except (RecordingError, BadFrameError):
        return
    assert len(list(recording.frames())) <= 6


def test_a_session_of_several_sites_plays_them_all_or_the_one_named(tmp_path: Path) -> None:
    sent = [*session(2), *session(3, site="south")]
    path = write(tmp_path / "s.mcap", sent)
    both = McapRecording(path)
    assert (both.sites, both.num_files) == (("north", "south"), 10)
    assert {frame.site for frame in both.frames()} == {"north", "south"}
    south = McapRecording(path, site="south")
    assert (south.sites, south.num_files, len(list(south.frames()))) == (("south",), 6, 9)
    with pytest.raises(RecordingError, match="holds sites north, south, not east"):
        McapRecording(path, site="east")


def test_a_session_of_one_site_goes_by_the_name_given(tmp_path: Path) -> None:
    recording = McapRecording(write(tmp_path / "s.mcap", session(1)), site="yard")
    assert [frame.site for frame in recording.frames()] == ["yard"] * 3
    with pytest.raises(BadFrameError, match="site is"):
        McapRecording(tmp_path / "s.mcap", site="no/site")


def test_a_file_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "session", session(1))
    assert detect_format(path) == "mcap"
    assert open_recording(path).format_name == "mcap"
    (tmp_path / "text.mcap").write_text("no")
    with pytest.raises(RecordingError, match="is not an MCAP file"):
        open_recording(tmp_path / "text.mcap")
    with pytest.raises(RecordingError, match="is no MCAP file"):
        open_recording(tmp_path / "text.mcap", format_name="mcap")
    with pytest.raises(RecordingError, match="is not a directory"):
        open_recording(path, format_name="radiate")


def foreign(metadata: dict[str, str]) -> Callable[[Path], None]:
    def write_foreign(path: Path) -> None:
        writer = Writer(str(path))
        writer.start()
        channel = writer.register_channel("/odd", "json", 0, metadata)
        writer.add_message(channel, log_time=0, data=b"{}", publish_time=0)
        writer.finish()  # type: ignore[no-untyped-call]

    return write_foreign


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (foreign({}), r"holds no frame of ours .* \(its topics: /odd\); play what"),
        (foreign({"echosight": "2", "site": "north", "kind": "radar"}), "/odd has format version 2; upgrade"),
        (lambda path: write(path, []), r"its topics: none\)"),
    ],
)
def test_refuses_what_it_did_not_write(make: Callable[[Path], None], error: str, tmp_path: Path) -> None:
    make(tmp_path / "odd.mcap")
    with pytest.raises(RecordingError, match=error):
        McapRecording(tmp_path / "odd.mcap")


def test_the_doctor_examines_a_session(tmp_path: Path) -> None:
    found, _ = examine(open_recording(write(tmp_path / "s.mcap", session(20))), window_ms=20)
    assert (found.radar.num_frames, found.pairing.num_pairs) == (20, 20)
    assert found.radar.rate_hz == pytest.approx(10)
    assert found.classes["car"] == 5
