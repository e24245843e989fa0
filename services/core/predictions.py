"""What the model server says of one frame of a stream, and the entry that says it: a JSON header, no data.

The contract is docs/asyncapi.yaml. It does not know Redis.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.core.codec import Entry
from services.core.errors import BadFrameError

Probability = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[int, Field(ge=0, lt=2**63)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Smoothed(_Part):
    """The vote of the frames of one track window, this one the last of them."""

    label: str
    probabilities: dict[str, Probability]
    num_frames: Annotated[int, Field(ge=0)]


class UnknownScore(_Part):
    """How little the frame is like anything that has a name; from `threshold` on it is unknown."""

    score: float
    threshold: float
    is_unknown: bool


class ModelName(_Part):
    """The model that said so."""

    name: str
    version: Annotated[int, Field(ge=1)]


class Latency(_Part):
    """Milliseconds until it was published.

    captured: since the frame was captured, by the sensor's clock. arrived: since the streams' server took it.
    read: since it was read.
    """

    captured: float
    arrived: float
    read: float


class Prediction(_Part):
    """One frame's. label, probabilities: of the frame alone, as POST /v1/classify says.

    answer: what to act on: the label of the vote; null where the model abstains, and then `abstained` says why:
    "unknown", the frame is like nothing that has a name; "unsure", the vote is below the confidence asked for.
    radar_id: the frame's entry in the site's radar stream.
    """

    v: Literal[1] = 1
    sensor: Literal["prediction"] = "prediction"
    seq: Number
    captured_at_ns: Number
    radar_id: Annotated[str, Field(pattern=r"^\d{1,20}-\d{1,20}$")]
    answer: str | None
    abstained: Literal["", "unknown", "unsure"]
    label: str
    probabilities: dict[str, Probability]
    smoothed: Smoothed
    unknown: UnknownScore | None = None
    model: ModelName
    latency_ms: Latency


def encode_prediction(prediction: Prediction) -> bytes:
    """The field `header` of its entry."""
    return prediction.model_dump_json().encode()


def decode_prediction(fields: Entry) -> Prediction:
    """What one entry says. Raises BadFrameError with the reason."""
    try:
        return Prediction.model_validate_json(fields.get(b"header", b""))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "header"
        raise BadFrameError(
            f"prediction field {where} is {str(first.get('input'))[:80]!r}: {first['msg']}",
            remedy="see docs/asyncapi.yaml",
        ) from None
