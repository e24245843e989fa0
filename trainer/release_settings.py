"""What can be set about releases: heads, what may name a frame, strangers, and when a version may be served."""

from typing import Literal

from pydantic import Field

from services.core.settings import CoreSettings


class ReleaseSettings(CoreSettings):
    """From features to a version that may be promoted."""

    release_from: Literal["ema", "cooldown"] = Field(
        default="ema", description="weights of a version: the moving average, or a copy whose rate went to zero"
    )
    cooldown_steps: int = Field(
        default=100, ge=1, description="cooldown: steps of the copy until its rate is zero"
    )
    cooldown_max_s: float = Field(
        default=60.0, gt=0, description="cooldown: longest that it may take; then the average is released instead"
    )
    names_from: Literal["both", "people", "detector"] = Field(
        default="both", description="whose word for a frame's class heads learn from; people win over the detector"
    )
    pseudo_label_confidence: float = Field(
        default=0.8, ge=0, le=1, description="confidence from which the detector's word counts; below it abstains"
    )
    pseudo_label_weight: float = Field(
        default=0.3, gt=0, le=1, description="weight of a frame that the detector named; a person's word has 1"
    )
    head: Literal["auto", "linear", "mlp"] = Field(
        default="linear",
        description="linear; mlp: 128 hidden units; auto: what cross-validation over blocks of time prefers",
    )
    max_head_frames: int = Field(default=2048, ge=16, description="most named frames that a head is trained on")
    known_share: float = Field(
        default=0.99, gt=0.5, le=1, description="share of known frames, held out, that must not count as unknown"
    )
    answer_accuracy: float = Field(
        default=0.95,
        gt=0.5,
        le=1,
        description="share of the answers, held out, that must be right; the others are unsure",
    )
    max_gate_frames: int = Field(
        default=512, ge=16, description="most held-out frames that candidate and champion are compared on"
    )
    min_gate_frames: int = Field(
        default=40, ge=1, description="named held-out frames from which they alone decide; below: cross-validation"
    )
    max_fall_points: float = Field(
        default=5.0, ge=0, description="by how many points an old site or a class may fall in a promoted version"
    )
