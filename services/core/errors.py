"""The tree of errors that Echosight raises at its boundaries.

    EchosightError
    ├── BadFrameError       a frame, label or header that breaks the contract; the sender can fix it
    ├── RecordingError      a recording on disk that cannot be read as its format says
    ├── SettingsError       a setting that cannot work
    ├── StoreError          the rolling store cannot do what was asked (full disk, damage, version)
    │   ├── StoreFencedError  another writer has taken the site over; this one must stop writing it
    │   └── NoPairsError      there are no pairs, or none that can be read, of those that were asked for
    ├── StreamsError        the Redis-compatible server is missing, too old or refuses
    ├── RegistryError       a model version or alias that does not exist or is damaged
    └── ExportError         a checkpoint that did not become a trustworthy ONNX model

A message has what happened, the offending value, and what to do about it.
"""


class EchosightError(Exception):
    """Root of all errors that callers are meant to catch."""

    def __init__(self, what: str, *, remedy: str = "") -> None:
        super().__init__(f"{what}; {remedy}" if remedy else what)
        self.what = what
        self.remedy = remedy


class BadFrameError(EchosightError):
    """A frame, label or header that breaks the stream contract."""


class RecordingError(EchosightError):
    """A recording on disk that cannot be read as its format says."""


class SettingsError(EchosightError):
    """A setting that cannot work."""


class StoreError(EchosightError):
    """The rolling store cannot do what was asked."""


class StoreFencedError(StoreError):
    """Another writer has taken the site over: nothing more may be written, or acknowledged, under this token."""


class NoPairsError(StoreError):
    """There are no pairs, or none that can be read, of those that were asked for."""


class StreamsError(EchosightError):
    """The Redis-compatible server is missing, too old or refuses."""


class RegistryError(EchosightError):
    """A model version or alias that does not exist or is damaged."""


class ExportError(EchosightError):
    """A checkpoint that did not become a trustworthy ONNX model."""
