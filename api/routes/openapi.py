"""What FastAPI cannot derive for /openapi.json: problems, examples, and the routes that go past it."""

from copy import deepcopy
from typing import Any

from fastapi import FastAPI

from api.access.keys import needed_scope
from api.problems import KINDS, MEDIA_TYPE, ProblemError

Responses = dict[int | str, dict[str, Any]]

SECURITY_SCHEMES = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "an API key of `echosight keys`, with the scope that an operation names, or admin",
    },
    "api_key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "the same, for who cannot"},
}
_TEXT_HEADER = {"schema": {"type": "string"}}
_SECONDS_HEADER = {"schema": {"type": "integer", "minimum": 0}}

PROBLEM_SCHEMA = {
    "type": "object",
    "title": "Problem",
    "description": "RFC 9457: what is wrong, with the offending value and the remedy.",
    "required": ["type", "title", "status", "detail", "remedy", "instance"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "what is wrong, and the offending value"},
        "remedy": {"type": "string", "description": "what to do about it"},
        "instance": {"type": "string", "description": "the path that was asked"},
        "request_id": {
            "type": "string",
            "description": "as the answer's x-request-id and the server's log have it",
        },
        "error": {"type": "string", "description": "below /v2: detail and remedy in one sentence"},
    },
}
PROBLEM_EXAMPLES = {
    "unreadable-body": ("JSON is broken at line 1, column 9: unexpected end of data", "send the whole object"),
    "not-http": ("what was sent is no request of HTTP/1.1", "use a client for HTTP, without TLS"),
    "no-key": ("no API key was sent", "send it as `Authorization: Bearer KEY`; `echosight keys add` makes one"),
    "missing-scope": (
        "key 'north-radar' has predict, POST /v1/models/7/promote needs admin",
        "use a key with it: echosight keys add NAME --scope admin",
    ),
    "foreign-origin": ("origin is 'https://example.org'", "ask from a page of this server, or without a browser"),
    "not-found": ("path is '/v1/clasify'", "GET / lists what is here"),
    "no-such-model": ("model radar has no version 99", "GET /v1/models lists them"),
    "not-loaded": (
        "version 5 of radar is not loaded",
        'POST /v2/repository/models/radar/load with {"parameters": {"version": "5"}}',
    ),
    "wrong-method": ("method is GET", "use POST"),
    "overloaded": ("512 frames wait for the model, 512 may", "try again in 2 s or so, or send fewer frames"),
    "too-late": (
        "the deadline passed after 50 ms in line",
        "give it more time (x-timeout-ms), or send fewer frames",
    ),
    "slow-body": ("4096 bytes of the body came within 30 s", "send it faster or in smaller requests"),
    "conflict": ("version 5 was refused: NaN in the answers", "promote another"),
    "too-large": ("body has 20000000 bytes or more", "send at most 16777216: fewer frames a request, or float16"),
    "wrong-media-type": ("content type is 'text/csv'", "post a .npy array as application/x-npy"),
    "unknown-host": (
        "host is 'radar.example', and this server asks for no keys",
        "ask by address or as localhost, list it in ECHOSIGHT_ALLOWED_HOSTS, or use API keys",
    ),
    "wrong-shape": ("heatmap shape is (2, 64, 64)", "send (2, 128, 64) for one frame"),
    "wrong-dtype": ("heatmap dtype is int64", "send one of float32, float16, uint8"),
    "not-finite": ("3 of 16384 values are NaN or infinite", "replace them before posting"),
    "out-of-range": ("heatmap reaches 2e+06", "keep within 10000, as the sensors must; send dB rather than power"),
    "bad-site": ("site is '../etc'", "use 1 to 64 letters, digits, '.', '_' or '-'"),
    "bad-value": ("label is 'lorry'", "use one of empty, pedestrian, cyclist, car"),
    "no-websocket": ("this was plain HTTP", "open a WebSocket"),
    "rate-limited": (
        "north-radar may ask 20 times a second",
        "wait 1 s, or have the limit of the key or ECHOSIGHT_RATE_LIMIT raised",
    ),
    "internal": ("RuntimeError while answering", "see the log of the API"),
    "not-ready": ("waiting for the trainer to publish a first version of radar", "try again soon"),
    "starting": ("waiting for the first look into the registry", "try again soon"),
    "no-streams": ("REDIS_URL is not set", "set it to the server that the sensors publish to"),
    "too-many-clients": ("32 clients listen already", "raise ECHOSIGHT_MAX_EVENT_CLIENTS"),
    "too-many-connections": (
        "the server has as many connections as it may",
        "try again soon, keep fewer connections open, or have ECHOSIGHT_MAX_CONNECTIONS raised",
    ),
}
PARAMETERS = {
    "name": ("the model's, ECHOSIGHT_MODEL_NAME", "radar"),
    "version": ("its number; below /v2 also an alias: champion, candidate, previous", 7),
    "last-event-id": ("the last event that was heard: those since then come first", "1795868067308-0"),
}
"""By name, of parameters that their operations do not explain: what it is, and an example."""


def problem_responses(*statuses: int) -> Responses:
    """OpenAPI responses for the problems with these statuses, an example for each kind."""
    return {status: _problem_response(status) for status in statuses}


def _problem_response(status: int) -> dict[str, Any]:
    kinds = [kind for kind in KINDS if kind.status == status]
    examples = {}
    for kind in kinds:
        what, remedy = PROBLEM_EXAMPLES[kind.name]
        examples[kind.name] = {
            "value": ProblemError(kind, what, remedy=remedy).members("/v1/classify", "9c1e07aa12-5f")
        }
    return {
        "description": "; ".join(kind.title for kind in kinds),
        "content": {MEDIA_TYPE: {"schema": PROBLEM_SCHEMA, "examples": examples}},
    }


def example(value: Any, *, status: int = 200) -> Responses:
    """An example of the good answer."""
    return {status: {"content": {"application/json": {"examples": {"usual": {"value": value}}}}}}


def add_operations(app: FastAPI, operations: dict[str, dict[str, Any]], *, has_keys: bool) -> None:
    """Put written-out operations, by path, before those that FastAPI derives; say which needs what sort of key."""
    derive = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = derive()
            _drop_validation_errors(schema)
            schema["paths"] = operations | schema["paths"]
            _add_access(schema, has_keys=has_keys)
            app.openapi_schema = _with_examples(schema)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _add_access(schema: dict[str, Any], *, has_keys: bool) -> None:
    """Security, 401, 403, 421 and 429 of whatever needs a key; the id that every answer has."""
    schema["components"]["securitySchemes"] = SECURITY_SCHEMES
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            answers: dict[str, Any] = operation["responses"]
            scope = needed_scope(method.upper(), path)
            if scope is not None:
                anybody: list[dict[str, list[str]]] = [] if has_keys else [{}]
                operation["security"] = [*anybody, *({name: [scope]} for name in SECURITY_SCHEMES)]
                described = {str(status): row for status, row in problem_responses(401, 403, 421, 429).items()}
                answers |= {status: row for status, row in described.items() if status not in answers}
                answers["401"]["headers"] = {"www-authenticate": _TEXT_HEADER}
                answers["429"]["headers"] = {"retry-after": _SECONDS_HEADER}
            for answer in answers.values():
                answer["headers"] = {"x-request-id": _TEXT_HEADER} | answer.get("headers", {})


def _with_examples(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, in which every parameter is explained, and every problem is one that its path may answer."""
    schema = deepcopy(schema)  # operations share parts
    for path, methods in schema["paths"].items():
        filled = path.format(name="radar", version=7)
        for operation in methods.values():
            for parameter in operation.get("parameters", []):
                if parameter["name"] in PARAMETERS:
                    description, value = PARAMETERS[parameter["name"]]
                    parameter.setdefault("description", description)
                    parameter["example"] = str(value) if parameter["schema"]["type"] == "string" else value
            for answer in operation["responses"].values():
                for one in answer.get("content", {}).get(MEDIA_TYPE, {}).get("examples", {}).values():
                    one["value"]["instance"] = filled
                    if path.startswith("/v2"):
                        one["value"]["error"] = f"{one['value']['detail']}; {one['value']['remedy']}"
    return schema


def _drop_validation_errors(schema: dict[str, Any]) -> None:
    """Take out the answers that FastAPI believes in: ours are problems, and stand where they can happen."""
    for methods in schema["paths"].values():
        for operation in methods.values():
            if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
