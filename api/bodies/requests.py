"""JSON bodies of the routes that are not hot: read within the limits of all bodies, then checked by a model.

FastAPI would read a body of any length before it looks at it. What these routes change, pages of other sites may
not: a browser lets any page post a text, to the loopback interface too, but says whose page it is (RFC 6454).
"""

from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from api.access.origins import check_origin
from api.bodies.frames import check_json_length
from api.bodies.reading import BodyReader, ClientGoneError
from api.problems import BAD_REQUEST_VALUE, UNREADABLE_BODY, ProblemError

_Body = TypeVar("_Body", bound=BaseModel)


async def read_body(request: Request, reader: BodyReader, kind: type[_Body]) -> _Body:
    """The body as `kind`, an empty one as {}. Raises ProblemError."""
    headers = dict(request.scope["headers"])
    try:
        body = await reader.read(request.scope, headers, request.receive)
    except ClientGoneError:  # whatever is answered, nobody reads it
        raise ProblemError(UNREADABLE_BODY, "the client went away", remedy="send the whole body") from None
    check_json_length(body)
    check_origin(
        headers, reader.allowed_origins
    )  # after the body: an answer to half a request breaks a connection
    try:
        return kind.model_validate_json(body or b"{}")
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        what = UNREADABLE_BODY if first["type"] == "json_invalid" else BAD_REQUEST_VALUE
        where = ".".join(str(part) for part in first["loc"]) or "body"
        shown = "" if what is UNREADABLE_BODY else f" is {str(first.get('input'))[:80]!r}"
        raise ProblemError(what, f"{where}{shown}: {first['msg']}"[:300], remedy="see /docs") from None


def described_body(
    kind: type[BaseModel], *, is_required: bool, schema: dict[str, Any] | None = None, **examples: Any
) -> dict[str, Any]:
    """FastAPI's `openapi_extra` for what `read_body` reads. schema: where the model's own says too little."""
    own = kind.model_json_schema()
    content = {
        "schema": schema or _without_references(own, own.pop("$defs", {})),
        "examples": {name: {"value": value} for name, value in examples.items()},
    }
    return {"requestBody": {"required": is_required, "content": {"application/json": content}}}


def _without_references(part: Any, definitions: dict[str, Any]) -> Any:
    """A JSON schema with its definitions in the places that refer to them."""
    if isinstance(part, list):
        return [_without_references(item, definitions) for item in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return _without_references(definitions[part["$ref"].rpartition("/")[2]], definitions)
    return {name: _without_references(value, definitions) for name, value in part.items()}
