"""A site: where the sensors stand and what stands still in front of them, as a small YAML that a person can write.

Metres; x to the right of the sensors, y ahead of them, z up from the ground below them. It does not know what
moves through the site (traffic) nor how either sensor sees it (clutter, backdrop).
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from services.core.errors import BadFrameError, SettingsError
from services.core.frames import check_site

SITES_DIR = Path(__file__).parent / "sites"
MAX_SITE_BYTES = 256 * 1024

XY = tuple[Annotated[float, Field(ge=-80, le=80)], Annotated[float, Field(ge=0, le=80)]]
Share = Annotated[float, Field(ge=0, le=1)]
Color = tuple[
    Annotated[int, Field(ge=0, le=255)],
    Annotated[int, Field(ge=0, le=255)],
    Annotated[int, Field(ge=0, le=255)],
]
"""Red, green, blue under white light."""

GroundKind = Literal["asphalt", "paving", "grass", "gravel"]


def load_site(name_or_path: str) -> "Site":
    """The shipped site of this name, or the one in this YAML file. Raises SettingsError with the first fault.

    A file of one's own must not go by the name of a shipped site: two places would be stored and learnt as one.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = SITES_DIR / f"{name_or_path}.yaml"
        if not path.is_file() or path.parent != SITES_DIR:
            names = ", ".join(sorted(file.stem for file in SITES_DIR.glob("*.yaml")))
            raise SettingsError(
                f"there is no site {name_or_path!r}", remedy=f"use one of {names}, or the path of a .yaml file"
            )
    site = _read(path)
    if path.resolve().parent != SITES_DIR.resolve() and (SITES_DIR / f"{site.name}.yaml").is_file():
        raise SettingsError(
            f"site file {path} is named {site.name!r}, as a shipped site is",
            remedy=f"write another name into it: `name: my_{site.name}`",
        )
    return site


def list_sites() -> dict[str, "Site"]:
    """All shipped sites by name, those kept for evaluation among them (`eval_only`)."""
    return {path.stem: _read(path) for path in sorted(SITES_DIR.glob("*.yaml"))}


def _read(path: Path) -> "Site":
    try:
        if path.stat().st_size > MAX_SITE_BYTES:
            raise SettingsError(f"site file {path} is larger than {MAX_SITE_BYTES} bytes", remedy="trim it")
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read site file {path}: {error.strerror}", remedy="check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"site file {path} is not YAML: {error}", remedy="see the shipped sites") from None
    if not isinstance(content, dict):
        raise SettingsError(
            f"site file {path} holds a {type(content).__name__}", remedy="write `name: ...` and the rest below it"
        )
    content.setdefault("name", path.stem)
    try:
        return Site.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        value = repr(first.get("input"))[:80]
        raise SettingsError(
            f"site file {path}: {where} is {value}: {first['msg']}", remedy="see the shipped sites for an example"
        ) from None


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Mount(_Part):
    """How the two sensors hang: together, on one bracket."""

    height_m: float = Field(default=1.7, ge=0.5, le=8)
    pitch_deg: float = Field(default=3.0, ge=-5, le=30, description="camera looks down by this much")
    fov_deg: float = Field(default=50.0, ge=20, le=100, description="of the camera, across")


class ArrayError(_Part):
    """What the factory calibration of the radar array left over, standard deviations."""

    gain_db: float = Field(default=0.5, ge=0, le=6)
    phase_deg: float = Field(default=6.0, ge=0, le=90)


class Ground(_Part):
    """What one stands on. Beyond `verge_from_m` ahead it is of the kind `verge`."""

    kind: GroundKind = "asphalt"
    verge: GroundKind = "asphalt"
    verge_from_m: float = Field(default=80.0, ge=0)
    markings: Literal["none", "lane", "parking", "crossing"] = "none"
    tone: Color = (128, 128, 128)
    sigma0_db: float = Field(default=-26.0, ge=-60, le=0, description="radar cross-section per m² of ground")
    bounce: float = Field(default=0.25, ge=0, le=0.9, description="share of a wave's amplitude that comes back up")


class Wall(_Part):
    """A vertical wall from `start` to `end`, which also mirrors radar waves."""

    start: XY
    end: XY
    height_m: float = Field(default=6.0, gt=0.3, le=60)
    kind: Literal["brick", "plaster", "concrete", "glass", "fence", "hedge"] = "plaster"
    color: Color = (170, 150, 130)
    mirror_db: float = Field(default=-9.0, ge=-40, le=0, description="what a reflection off it loses")


class Pole(_Part):
    """A lamp post or sign post."""

    at: XY
    height_m: float = Field(default=5.0, gt=0.5, le=20)
    lamp: bool = True


class Tree(_Part):
    """A trunk and a crown that the wind moves."""

    at: XY
    height_m: float = Field(default=5.0, gt=1, le=25)
    crown_m: float = Field(default=1.6, gt=0.3, le=6)
    color: Color = (70, 105, 50)


class Box(_Part):
    """Anything boxy that stands about: a bin, a kiosk, a crate, a planter."""

    at: XY
    size_m: tuple[float, float, float] = (1.0, 0.8, 1.1)
    turned_deg: float = 0.0
    color: Color = (60, 90, 70)
    rcs_dbsm: float = Field(default=2.0, ge=-20, le=20)

    @field_validator("size_m")
    @classmethod
    def _positive(cls, size_m: tuple[float, float, float]) -> tuple[float, float, float]:
        if not all(0.1 <= size <= 10 for size in size_m):
            raise ValueError("width, depth and height lie between 0.1 and 10 m")
        return size_m


class Light(_Part):
    """Sun and weather over the day. Shares are shares of time."""

    sun_azimuth_deg: float = Field(default=-40.0, ge=-180, le=180)
    sun_elevation_deg: float = Field(default=40.0, ge=8, le=85)
    night_share: Share = 0.2
    fog_share: Share = 0.15
    wind_mps: float = Field(default=2.5, ge=0, le=15)


class Ways(_Part):
    """Where road users go: the slant ranges between which they cross, turn and stop."""

    min_range_m: float = Field(default=3.5, ge=2, le=60)
    max_range_m: float = Field(default=12.0, ge=4, le=80)


class Site(_Part):
    """One place. `seed` decides what YAML leaves open: textures, clutter speckle, calibration error."""

    name: str
    description: str = ""
    eval_only: bool = False
    seed: int = Field(default=0, ge=0, lt=2**32)
    mount: Mount = Mount()
    array_error: ArrayError = ArrayError()
    ground: Ground = Ground()
    walls: tuple[Wall, ...] = ()
    poles: tuple[Pole, ...] = ()
    trees: tuple[Tree, ...] = ()
    boxes: tuple[Box, ...] = ()
    light: Light = Light()
    ways: Ways = Ways()

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        try:
            return check_site(name)
        except BadFrameError as error:
            raise ValueError(str(error)) from None

    @field_validator("ways")
    @classmethod
    def _ways(cls, ways: Ways) -> Ways:
        if ways.max_range_m < ways.min_range_m + 3:
            raise ValueError("max_range_m must be 3 m or more above min_range_m")
        return ways
