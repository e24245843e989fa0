"""POST /v1/labels: what a person or a program says about frames, published to the sites' labels streams.

The trainer learns from them as from any annotator's: they take effect with the next version. It does not look into
the store; a label may come long before or after its frame.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import AfterValidator, BaseModel, Field, RootModel, model_validator

from api.bodies.reading import BodyReader
from api.bodies.requests import described_body, read_body
from api.problems import BAD_SITE, NO_STREAMS, ProblemError
from api.routes.openapi import example, problem_responses
from services.core.errors import StreamsError
from services.core.frames import CLASSES, SITE_PATTERN, Label
from services.core.streams import Publisher, StreamsLost, connect

MAX_LABELS = 256
_MAX_STREAM_ENTRIES = 200_000
"""Of a site whose labels nobody reads. Before that the janitor trims, by what was read and by memory."""
_Count = Annotated[int, Field(ge=0, lt=2**63, description="as the radar frame has it; a text of digits works too")]


def _known(label: str) -> str:
    if label not in CLASSES:
        raise ValueError(f"use one of {', '.join(CLASSES)}")
    return label


class LabelBody(BaseModel):
    """One label. The frame is named by its site, captured_at_ns and seq."""

    site: str = Field(pattern=f"^{SITE_PATTERN.pattern}$", max_length=64)
    captured_at_ns: _Count
    seq: _Count
    label: Annotated[str, AfterValidator(_known), Field(json_schema_extra={"enum": list(CLASSES)})]
    source: str = Field(default="api", min_length=1, max_length=64, description="who says so")


class LabelsBody(RootModel[Annotated[list[LabelBody], Field(min_length=1, max_length=MAX_LABELS)]]):
    """One label, or a list of them."""

    @model_validator(mode="before")
    @classmethod
    def _as_list(cls, given: Any) -> Any:
        return [given] if isinstance(given, dict) else given


class Accepted(BaseModel):
    """accepted: how many of the posted labels lie in the streams now, to be read by ingest."""

    accepted: int


class LabelPublisher:
    """Where labels go. Nothing is sent before the first."""

    def __init__(self, redis_url: str) -> None:
        self._publisher = Publisher(connect(redis_url), max_entries=_MAX_STREAM_ENTRIES) if redis_url else None

    async def publish(self, labels: list[Label]) -> None:
        """All of them, or none if one names a site that does not exist. Raises ProblemError."""
        if self._publisher is None:
            raise no_streams("REDIS_URL is not set", "set it to the server that the sensors publish to")
        try:
            for site in {label.site for label in labels}:
                if not await self._publisher.knows(site):
                    raise ProblemError(
                        BAD_SITE, f"no sensor has published at site {site!r}", remedy="GET /v1/models lists sites"
                    )
            await self._publisher.publish(labels)
        except (*StreamsLost, StreamsError) as error:
            raise no_streams(str(error)[:200] or type(error).__name__, "try again soon") from None

    async def close(self) -> None:
        if self._publisher is not None:
            await self._publisher.close()


def no_streams(what: str, remedy: str) -> ProblemError:
    """The problem of a server that has no streams, or has lost them."""
    return ProblemError(NO_STREAMS, what, remedy=remedy, headers={"retry-after": "5"})


def make_router(publisher: LabelPublisher, reader: BodyReader) -> APIRouter:
    router = APIRouter(tags=["labels"])
    one = {"site": "north", "captured_at_ns": 1712000000000000000, "seq": 7, "label": "car", "source": "ada"}
    label_schema = LabelBody.model_json_schema()
    many_schema = {"type": "array", "items": label_schema, "minItems": 1, "maxItems": MAX_LABELS}

    @router.post(
        "/v1/labels",
        status_code=202,
        summary="Say what frames show",
        description=f"One label, or a list of up to {MAX_LABELS}. The last label of a frame wins. Numbers beyond "
        "2^53 may be sent as text, for languages whose numbers are too short for nanoseconds.",
        openapi_extra=described_body(
            LabelsBody, is_required=True, schema={"oneOf": [label_schema, many_schema]}, one=one, many=[one]
        ),
        responses=problem_responses(400, 403, 408, 413, 415, 422, 500, 503) | example({"accepted": 1}, status=202),
    )
    async def labels(request: Request) -> Accepted:
        posted = (await read_body(request, reader, LabelsBody)).root
        await publisher.publish(
            [Label(row.site, row.seq, row.captured_at_ns, label=row.label, source=row.source) for row in posted]
        )
        return Accepted(accepted=len(posted))

    return router
