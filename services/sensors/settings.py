"""What an operator can set about publishing; an option on the command line wins over the environment."""

from pydantic import Field

from services.core.settings import CoreSettings


class SensorsSettings(CoreSettings):
    """Streams' size, back-pressure, and the simulated annotator."""

    stream_max_entries: int = Field(
        default=2000,
        ge=10,
        description="entries that each stream of a site keeps (MAXLEN); older ones are trimmed",
    )
    max_backlog: int = Field(
        default=500, ge=0, description="a replay pauses while more entries of the site wait for ingest; 0: never"
    )
    simulated_site: str = Field(default="demo", description="site to simulate: a shipped one, or a .yaml file")
    label_share: float = Field(
        default=0.05, ge=0, le=1, description="share of simulated radar frames that the simulated annotator labels"
    )
    label_mistakes: float = Field(
        default=0.02, ge=0, le=1, description="share of the simulated annotator's labels that are wrong"
    )
    radar_fps: float = Field(default=10.0, gt=0, le=1000, description="simulated radar frames a second")
    camera_fps: float = Field(default=15.0, gt=0, le=1000, description="simulated camera frames a second")
