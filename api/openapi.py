"""What FastAPI cannot derive for /openapi.json: the hot route, written out, and the problems."""

from typing import Any

from fastapi import FastAPI

from api.problems import KINDS, MEDIA_TYPE

_PROBLEM_SCHEMA = {
    "type": "object",
    "title": "Problem",
    "description": "RFC 9457: what is wrong, with the offending value and the remedy.",
    "required": ["type", "title", "status", "detail", "remedy", "instance"],
    "properties": {
        "type": {"type": "string", "examples": ["urn:echosight:problem:wrong-shape"]},
        "title": {"type": "string", "examples": ["The heatmap has the wrong shape"]},
        "status": {"type": "integer", "examples": [422]},
        "detail": {"type": "string", "examples": ["heatmap shape is (2, 64, 64)"]},
        "remedy": {"type": "string", "examples": ["send (2, 128, 64) for one frame"]},
        "instance": {"type": "string", "examples": ["/v1/classify"]},
    },
}
_NUMBER = {"type": "number"}
_ONE = {
    "label": {"type": "string"},
    "probabilities": {"type": "object", "additionalProperties": _NUMBER, "description": "by class; they sum to 1"},
}
_COMMON = {
    "model": {
        "type": "object",
        "required": ["name", "version"],
        "properties": {"name": {"type": "string"}, "version": {"type": "integer"}},
    },
    "site": {
        "type": "object",
        "required": ["name", "known"],
        "properties": {
            "name": {"type": "string", "description": "as it was posted; empty: none"},
            "known": {"type": "boolean", "description": "whether the model has this site's clutter map"},
        },
    },
    "timing_ms": {
        "type": "object",
        "required": ["decode", "queue", "inference", "total"],
        "properties": dict.fromkeys(("decode", "queue", "inference", "total"), _NUMBER),
    },
}
_CLASSIFICATION_SCHEMA = {
    "title": "Classification",
    "oneOf": [
        {"type": "object", "required": [*_ONE, *_COMMON], "properties": _ONE | _COMMON},
        {
            "type": "object",
            "required": ["results", *_COMMON],
            "properties": {
                "results": {
                    "type": "array",
                    "items": {"type": "object", "required": list(_ONE), "properties": _ONE},
                },
                **_COMMON,
            },
        },
    ],
}
_MAP_SCHEMA = {
    "description": "(C, R, A) nested lists of numbers; (R, A) where the model takes one channel",
    "type": "array",
    "items": {},
}
_EXAMPLE_ONE = {
    "label": "car",
    "probabilities": {"empty": 0.02, "pedestrian": 0.01, "cyclist": 0.03, "car": 0.94},
    "model": {"name": "radar", "version": 7},
    "site": {"name": "north", "known": True},
    "timing_ms": {"decode": 0.02, "queue": 0.0, "inference": 1.4, "total": 1.5},
}
_EXAMPLE_MANY = {"results": [{k: _EXAMPLE_ONE[k] for k in ("label", "probabilities")}]} | {
    k: v for k, v in _EXAMPLE_ONE.items() if k not in ("label", "probabilities")
}
_NPY = {"schema": {"type": "string", "format": "binary"}}
_DESCRIPTION = """\
Post one radar heatmap, raw as the sensor delivers it, or a batch; get its class back.

A `.npy` body (`numpy.save`) is the fast way: `(C, R, A)` is one frame, `(B, C, R, A)` a batch, `(R, A)` one
frame of a model with one channel; float32, float16 or uint8. `GET /v1/models` shows the shape.

    curl --data-binary @frame.npy -H 'content-type: application/x-npy' 'http://localhost:8000/v1/classify?site=north'
"""
_CLASSIFY = {
    "summary": "Classify radar heatmaps",
    "description": _DESCRIPTION,
    "operationId": "classify",
    "tags": ["answers"],
    "parameters": [
        {
            "name": "site",
            "in": "query",
            "required": False,
            "description": "where the frame comes from: its clutter map is subtracted, if the model has one",
            "schema": {"type": "string", "maxLength": 64},
        }
    ],
    "requestBody": {
        "required": True,
        "content": {
            "application/x-npy": _NPY,
            "application/octet-stream": _NPY,
            "application/json": {
                "schema": {
                    "oneOf": [
                        {
                            "type": "object",
                            "required": ["heatmap"],
                            "properties": {"heatmap": _MAP_SCHEMA, "site": {"type": "string"}},
                        },
                        {
                            "type": "object",
                            "required": ["heatmaps"],
                            "properties": {
                                "heatmaps": {"type": "array", "items": _MAP_SCHEMA},
                                "site": {"type": "string"},
                            },
                        },
                    ]
                },
                "examples": {
                    "one": {"value": {"heatmap": [[[-61.5, -60.2], [-58.0, -44.1]]], "site": "north"}},
                    "many": {"value": {"heatmaps": [[[[-61.5, -60.2], [-58.0, -44.1]]]]}},
                },
            },
        },
    },
}


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for the problems with these statuses."""
    return {
        status: {
            "description": "; ".join(kind.title for kind in KINDS if kind.status == status),
            "content": {MEDIA_TYPE: {"schema": _PROBLEM_SCHEMA}},
        }
        for status in statuses
    }


def describe_classify(app: FastAPI, path: str) -> None:
    """Add the hot route, which FastAPI does not know, to the schema of `app`."""
    derive = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = derive()
            ok = {
                "description": "The class of each frame",
                "headers": {"x-model-version": {"schema": {"type": "integer"}}},
                "content": {
                    "application/json": {
                        "schema": _CLASSIFICATION_SCHEMA,
                        "examples": {"one": {"value": _EXAMPLE_ONE}, "many": {"value": _EXAMPLE_MANY}},
                    }
                },
            }
            problems = problem_responses(400, 408, 413, 415, 422, 500, 503)
            responses = {"200": ok} | {str(status): row for status, row in problems.items()}
            schema["paths"] = {path: {"post": _CLASSIFY | {"responses": responses}}} | schema["paths"]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
