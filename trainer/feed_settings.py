"""What can be set about the way from the store to batches."""

from typing import Literal

from pydantic import Field

from services.core.settings import CoreSettings


class FeedSettings(CoreSettings):
    """How pairs are sampled, how images are encoded beside learning."""

    sampling: Literal["replay", "shuffled", "stream"] = Field(
        default="replay",
        description="replay: fresh and stored pairs, fairly; shuffled: any pair; stream: in order of time",
    )
    fresh_share: float = Field(
        default=0.25, ge=0, le=1, description="share of a batch from the newest pairs; the rest from all"
    )
    fresh_pairs: int = Field(default=256, ge=1, description="how many newest pairs count as fresh")
    session_s: float = Field(
        default=60.0, gt=0, description="replay: length of a session, a stretch of time at one site, seconds"
    )
    session_pairs: int = Field(
        default=512, ge=1, description="replay: a session with more pairs than this is drawn no more often"
    )
    session_share: float = Field(
        default=0.25, gt=0, le=1, description="replay: most of a batch's stored share that one session gives"
    )
    duplicate_cosine: float = Field(
        default=0.97, ge=0, le=1, description="replay: images this much like the one before count less; 1: none"
    )
    duplicate_weight: float = Field(
        default=0.25, gt=0, le=1, description="replay: how often such a pair is drawn, against 1"
    )
    max_replays: float = Field(
        default=12.0,
        gt=0,
        description="how often a pair is learnt on average; then the trainer waits for new ones",
    )
    mirror_share: float = Field(
        default=0.5, ge=0, le=1, description="share of pairs learnt mirrored: heatmap and image together"
    )
    encode_batch: int = Field(default=16, ge=1, le=512, description="images encoded at once")
    encode_share: float = Field(
        default=0.3, gt=0, lt=1, description="share of time for encoding while there is learning to do as well"
    )
    prefetch: int = Field(default=2, ge=0, le=16, description="batches read ahead on a thread; 0: none")
