"""A site out of the rolling store into a recording that anybody can play: an MCAP file, or a folder.

It only reads; ingest and the trainer do not notice.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from services.core import codec
from services.core.errors import RecordingError, StoreError
from services.core.frames import Frame
from services.core.store import StoredPair, StoreReader
from services.sensors.record import SessionFile
from services.sensors.recordings import write_folder


class Export:
    """One site's pairs, oldest first, each as its frames and its label.

    num_damaged: pairs left out because their bytes are damaged. num_dropped_images: pairs without a camera frame.
    """

    def __init__(self, store_dir: Path, site: str, *, limit: int | None = None) -> None:
        """limit: only the newest so many pairs. Raises StoreError if the site has none."""
        self._reader = StoreReader(store_dir)
        self._reader.refresh()
        pairs = [pair for pair in self._reader if pair.site == site]
        if not pairs:
            known = ", ".join(self._reader.sites) or "none"
            raise StoreError(
                f"{store_dir} has no pairs of site {site!r} (it has: {known})", remedy="name one of those"
            )
        self.pairs = pairs[-limit:] if limit else pairs
        self.num_damaged = self.num_dropped_images = 0

    def write(self, path: Path, *, overwrite: bool, on_progress: Callable[[int], None] = lambda _: None) -> int:
        """Write to `path`, an MCAP file if it is called .mcap, else a new folder; return the number of frames.

        Raises RecordingError where something would be overwritten, or cannot be written.
        """
        frames = self._frames(on_progress)
        if path.suffix != ".mcap":
            return sum(write_folder(frames, path).counts.values())
        file = SessionFile(path, overwrite=overwrite)
        num_frames = 0
        try:
            for frame in frames:
                header = bytes(codec.encode(frame)["header"])
                file.writer.add(frame, header=header, arrived_ns=frame.captured_at_ns)
                num_frames += 1
            file.close()
        except OSError as error:
            raise RecordingError(
                f"{file.part} cannot be written: {error.strerror or error}",
                remedy="free some disk, and begin again",
            ) from None
        finally:
            file.abandon()
        return num_frames

    def _frames(self, on_progress: Callable[[int], None]) -> Iterator[Frame]:
        for number, pair in enumerate(self.pairs, 1):
            yield from self._frames_of(pair)
            on_progress(number)

    def _frames_of(self, pair: StoredPair) -> Iterator[Frame]:
        radar, camera = pair.radar(), pair.camera()
        if radar is None:
            self.num_damaged += 1
            return
        yield radar
        if camera is not None:
            yield camera
        elif pair.has_image:
            self.num_damaged += 1
        else:
            self.num_dropped_images += 1
        label = self._reader.label(pair)
        if label is not None:
            yield label

    def close(self) -> None:
        self._reader.close()
