"""The site profile: what belongs to a site rather than to a frame, kept beside its pairs.

    store/SITE/profile.npz   version, number of frames, clutter map (running mean of its heatmaps)

Written by the trainer, read by whoever wants it; each save is a new version and replaces the file whole.
"""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from services.core.errors import StoreError
from services.core.files import write_atomically

FILE_NAME = "profile.npz"
_FORMAT_VERSION = 1
_MEMORY_FRAMES = 4096
"""A frame's weight never falls below 1 / this: a moved wall is forgotten after some minutes."""


@dataclass(slots=True)
class SiteProfile:
    """clutter: (C, R, A) float32, in the heatmaps' unit. version: counts the saves."""

    site: str
    clutter: npt.NDArray[np.float32]
    num_frames: int = 0
    version: int = 0

    def take_in(self, heatmap: npt.NDArray[np.float32]) -> None:
        """Let one heatmap (C, R, A) into the running mean."""
        self.num_frames += 1
        self.clutter += (heatmap - self.clutter) / min(self.num_frames, _MEMORY_FRAMES)

    def save(self, store_dir: Path) -> None:
        self.version += 1
        buffer = io.BytesIO()
        np.savez(
            buffer,
            format_version=_FORMAT_VERSION,
            version=self.version,
            num_frames=self.num_frames,
            clutter=self.clutter,
        )
        write_atomically(store_dir / self.site / FILE_NAME, buffer.getvalue())


def load_profile(store_dir: Path, site: str) -> SiteProfile | None:
    """The site's profile, None if it has none yet. Raises StoreError if it is damaged or of another format."""
    path = store_dir / site / FILE_NAME
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as values:
            if int(values["format_version"]) != _FORMAT_VERSION:
                raise StoreError(f"{path} has format {values['format_version']}", remedy="upgrade Echosight")
            return SiteProfile(
                site,
                values["clutter"].astype(np.float32),
                num_frames=int(values["num_frames"]),
                version=int(values["version"]),
            )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise StoreError(f"cannot read {path}: {error}", remedy="delete it: it is made anew") from None
