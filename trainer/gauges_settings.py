"""What can be set about judging the learning while it goes on."""

from pydantic import Field

from services.core.settings import CoreSettings
from trainer.heldout import MAX_SHARE


class GaugesSettings(CoreSettings):
    """The held-out share."""

    held_out_share: float = Field(
        default=0.1, ge=0, le=MAX_SHARE, description="share of each site's time that is never learnt from; 0: none"
    )
