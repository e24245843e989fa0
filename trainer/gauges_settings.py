"""What can be set about judging the learning while it goes on."""

from pydantic import Field

from services.core.settings import CoreSettings
from trainer.heldout import MAX_SHARE


class GaugesSettings(CoreSettings):
    """The held-out share, how often and at what cost gauges are read, when they alarm, and where they are told."""

    held_out_share: float = Field(
        default=0.1, ge=0, le=MAX_SHARE, description="share of each site's time that is never learnt from; 0: none"
    )
    gauges_every_s: float = Field(
        default=30.0, gt=0, description="how often the learning is judged, if its share allows"
    )
    gauges_max_share: float = Field(
        default=0.02, gt=0, le=1, description="share of the trainer's time that judging may take"
    )
    sync_lag_alarm_ms: float = Field(
        default=100.0, gt=0, description="warn when what a camera sees is farther from its radar than that, ms"
    )
    trainer_metrics_port: int = Field(
        default=0, ge=0, le=65535, description="port on which the trainer answers Prometheus at /metrics; 0: none"
    )
    trainer_metrics_host: str = Field(default="127.0.0.1", description="address of trainer_metrics_port")
