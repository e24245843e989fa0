"""What an operator can set about curation. It knows neither images nor networks."""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from services.core.settings import CoreSettings

CurationMode = Literal["off", "keep", "thin", "balance"]


class CurationSettings(CoreSettings):
    """Fields that ingest's settings take over. docs/curation.md says what they do together."""

    curation: CurationMode = Field(
        default="off",
        description="keep: note what the camera sees; thin: fewer empty scenes; balance: classes too",
    )
    detector_path: str = Field(
        default="",
        validate_default=True,  # thin and balance cannot do with it
        description="YOLOX ONNX file of the detector; empty: none, curation only checks images",
    )
    detector_min_score: float = Field(
        default=0.3, ge=0.05, le=0.95, description="score from which a detected object counts"
    )
    look_interval_s: float = Field(
        default=0.5,
        ge=0.02,
        le=3600,
        description="capture time between two images given to the detector, seconds",
    )
    agreeing_looks: int = Field(
        default=2, ge=1, le=100, description="looks in a row that must agree before a site's scene changes"
    )
    max_empty_share: float = Field(
        default=0.5, ge=0, le=1, description="thin, balance: largest share of empty scenes among kept pairs"
    )
    balance_ratio: float = Field(
        default=4.0, ge=1, le=1000, description="balance: most pairs of a class for each of the rarest class"
    )
    duplicate_interval_s: float = Field(
        default=0.0,
        ge=0,
        le=86_400,
        description="thin, balance: while nothing changes, one pair in so many seconds is kept; 0: all",
    )
    curation_share: float = Field(
        default=0.5, gt=0, le=1, description="share of one core that curation may take; pairs beyond pass unseen"
    )

    @field_validator("detector_path")
    @classmethod
    def _check_detector_path(cls, path: str, info: ValidationInfo) -> str:
        mode = info.data.get("curation", "off")
        if mode in ("thin", "balance") and not path:
            raise ValueError(f"curation {mode} needs a detector; name a YOLOX ONNX file, or use curation keep")
        return path
