"""Sessions into MCAP files, chunk by chunk. It knows neither the streams nor how the file gets its name.

/SITE/radar, /SITE/camera, /SITE/labels    messages as foxglove_messages.py makes them
log time                                   arrival
publish time                               capture
channel metadata                           echosight (format version), site, kind
"""

from typing import IO, NamedTuple

from mcap.writer import CompressionType, Writer

from services.core.frames import Frame
from services.core.streams import Kind, kind_of
from services.sensors.recordings.foxglove_messages import MESSAGE_TYPES, to_message

VERSION = "1"
"""Of the format: topics, messages and metadata together. Another one is refused when it is read."""
CHUNK_BYTES = 4 * 1024 * 1024
MAX_LOG_TIME_NS = 2**63 - 1

_LIBRARY = "echosight"


class Topic(NamedTuple):
    """One stream of one site."""

    site: str
    kind: Kind

    def __str__(self) -> str:
        return f"/{self.site}/{self.kind}"


class McapWriter:
    """Writes frames to an MCAP file. What `flush` has written is readable even if `finish` never comes."""

    def __init__(self, file: IO[bytes]) -> None:
        """file: open for binary writing, and empty; the caller closes it."""
        self._writer = Writer(file, chunk_size=CHUNK_BYTES, compression=CompressionType.ZSTD)
        self._writer.start(library=_LIBRARY)
        self._schemas: dict[Kind, int] = {}
        self._channels: dict[Topic, int] = {}

    def add(self, frame: Frame, *, header: bytes, arrived_ns: int) -> int:
        """Add a valid frame; return its message's size in bytes, before compression. Raises OSError.

        header: that of the frame's stream entry. arrived_ns: at most MAX_LOG_TIME_NS.
        """
        message = to_message(frame, header)
        self._writer.add_message(
            self._channel(Topic(frame.site, kind_of(frame))),
            log_time=arrived_ns,
            data=message,
            publish_time=frame.captured_at_ns,
            sequence=frame.seq % 2**32,  # all there is room for; the header has all of it
        )
        return len(message)

    def flush(self) -> None:
        """Hand everything to the operating system, as a whole chunk. Raises OSError."""
        self._writer.flush()  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Write the index and the end. Raises OSError."""
        self._writer.finish()  # type: ignore[no-untyped-call]

    def _channel(self, topic: Topic) -> int:
        if topic not in self._channels:
            described = MESSAGE_TYPES[topic.kind]
            if topic.kind not in self._schemas:
                self._schemas[topic.kind] = self._writer.register_schema(
                    described.schema_name, described.schema_encoding, described.schema
                )
            self._channels[topic] = self._writer.register_channel(
                str(topic),
                described.encoding,
                self._schemas[topic.kind],
                metadata={"echosight": VERSION, "site": topic.site, "kind": topic.kind},
            )
        return self._channels[topic]
