"""What the live classification can be told."""

from typing import Annotated, Literal

from pydantic import Field

from services.core.settings import CoreSettings


class LiveSettings(CoreSettings):
    """Settings of the API's task that classifies what the radars stream."""

    live: bool = Field(
        default=True, description="whether the API classifies what the radars stream, with redis_url"
    )
    live_max_age_ms: int = Field(
        default=1000, ge=1, description="a radar frame that waited longer in its stream is skipped, ms"
    )
    live_max_batch: int = Field(default=16, ge=1, le=4096, description="most streamed frames in one model call")
    live_window_frames: int = Field(
        default=3, ge=1, le=1000, description="frames of a site that vote on what is seen; 1: each alone"
    )
    live_window_ms: int = Field(
        default=500, ge=1, description="a frame older than the newest by more than this has no vote, ms"
    )
    live_abstain_below: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = Field(
        default="auto",
        description="confidence of the vote below which no answer is given; auto: the release's, 0: never",
    )
    live_lease_ms: int = Field(
        default=3000, ge=100, description="an API replica silent for so long loses its sites to others, ms"
    )
