"""The OpenAPI operations of the hot routes, written out: FastAPI does not know them."""

from typing import Any

from api.routes.classify import PATH as CLASSIFY_PATH
from api.routes.embed import PATH as EMBED_PATH
from api.routes.openapi import problem_responses

_NUMBER = {"type": "number"}
_ONE = {
    "label": {"type": "string"},
    "probabilities": {"type": "object", "additionalProperties": _NUMBER, "description": "by class; they sum to 1"},
}
_UNKNOWN = {
    "type": "object",
    "description": "whether the frame is like anything that the model was taught; from models that can tell",
    "required": ["score", "threshold", "is_unknown"],
    "properties": {
        "score": _NUMBER | {"description": "larger: stranger"},
        "threshold": _NUMBER,
        "is_unknown": {"type": "boolean", "description": "score >= threshold: the label means little"},
    },
}
_MODEL = {
    "type": "object",
    "required": ["name", "version"],
    "properties": {"name": {"type": "string"}, "version": {"type": "integer"}},
}
_SITE = {
    "type": "object",
    "required": ["name", "known"],
    "properties": {
        "name": {"type": "string", "description": "as it was posted; empty: none"},
        "known": {"type": "boolean", "description": "whether the model has this site's clutter map"},
    },
}
_TIMING = {
    "type": "object",
    "required": ["decode", "queue", "inference", "total"],
    "properties": dict.fromkeys(("decode", "queue", "inference", "total"), _NUMBER),
}
_COMMON = {"model": _MODEL, "site": _SITE, "timing_ms": _TIMING}
_EMBEDDING = {"type": "array", "items": _NUMBER, "description": "of length 1"}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _result(**properties: Any) -> dict[str, Any]:
    """One frame's answer; only some models say whether it is unknown."""
    required = _object(**_ONE, **properties)
    return required | {"properties": required["properties"] | {"unknown": _UNKNOWN}}


_CLASSIFICATION_SCHEMA = {
    "title": "Classification",
    "oneOf": [_result(**_COMMON), _object(results={"type": "array", "items": _result()}, **_COMMON)],
}
_EMBEDDING_SCHEMA = {
    "title": "Embedding",
    "oneOf": [
        _object(embedding=_EMBEDDING, model=_MODEL, site=_SITE),
        _object(embeddings={"type": "array", "items": _EMBEDDING}, model=_MODEL, site=_SITE),
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
    "unknown": {"score": 0.11, "threshold": 0.34, "is_unknown": False},
    "model": {"name": "radar", "version": 7},
    "site": {"name": "north", "known": True},
    "timing_ms": {"decode": 0.02, "queue": 0.0, "inference": 1.4, "total": 1.5},
}
_OF_FRAME = ("label", "probabilities", "unknown")
_EXAMPLE_MANY = {"results": [{k: _EXAMPLE_ONE[k] for k in _OF_FRAME}]} | {
    k: v for k, v in _EXAMPLE_ONE.items() if k not in _OF_FRAME
}
_EXAMPLE_EMBEDDING = {
    "embedding": [0.6, -0.8],
    "model": {"name": "radar", "version": 7},
    "site": {"name": "north", "known": True},
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_VERSION_HEADER = {"x-model-version": {"schema": {"type": "integer"}, "description": "which version answered"}}
_TIMEOUT_PARAMETER = {
    "name": "x-timeout-ms",
    "in": "header",
    "required": False,
    "description": "how long an answer is of use, counted from the request's arrival: 504 rather than a late one",
    "schema": {"type": "integer", "minimum": 1, "maximum": 999_999_999},
}
_SITE_PARAMETER = {
    "name": "site",
    "in": "query",
    "required": False,
    "description": "where the frame comes from: its clutter map is subtracted, if the model has one",
    "schema": {"type": "string", "maxLength": 64},
}
_RAW_PARAMETERS = [
    {
        "name": "x-shape",
        "in": "header",
        "required": False,
        "description": "shape of an application/octet-stream body: 2,128,64",
        "schema": {"type": "string", "pattern": "^[0-9]{1,9}(,[0-9]{1,9}){0,7}$"},
    },
    {
        "name": "x-dtype",
        "in": "header",
        "required": False,
        "description": "what its elements are, little-endian",
        "schema": {"enum": ["float32", "float16", "uint8"]},
    },
]
_SMALL = "for a model of heatmaps of (1, 2, 2), to be short; GET /v1/models shows yours"
_FRAMES_BODY = {
    "required": True,
    "content": {
        "application/x-npy": _BINARY,
        "application/octet-stream": _BINARY,
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
                "one": {
                    "summary": _SMALL,
                    "value": {"heatmap": [[[-61.5, -60.2], [-58.0, -44.1]]], "site": "north"},
                },
                "many": {"summary": _SMALL, "value": {"heatmaps": [[[[-61.5, -60.2], [-58.0, -44.1]]]]}},
            },
        },
    },
}
_CLASSIFY_DESCRIPTION = """\
Post one radar heatmap, raw as the sensor delivers it, or a batch; get its class back.

A `.npy` body (`numpy.save`) is the fast way: `(C, R, A)` is one frame, `(B, C, R, A)` a batch, `(R, A)` one
frame of a model with one channel; float32, float16 or uint8. `GET /v1/models` shows the shape. As
application/octet-stream the bytes of the array alone will do, if the headers x-shape and x-dtype say what they
are. A body may be compressed with gzip or deflate.

    curl --data-binary @frame.npy -H 'content-type: application/x-npy' 'http://localhost:8000/v1/classify?site=north'
"""
_EMBED_DESCRIPTION = """\
Post what /v1/classify takes; get the radar encoder's embeddings, of length 1: their scalar product is how alike
two frames are to the model. With `accept: application/x-npy` they come as .npy, float32, (D,) or (B, D).
"""
_INFER_DESCRIPTION = """\
Inputs: `heatmap`, FP32, FP16, FP64 or UINT8, (B, C, R, A) or (C, R, A); and, if you like, `site`, the name of the
site as BYTES or its index as INT64, one or one a frame. A request parameter `site` does the same. Outputs:
`probabilities`, `embedding`, and what else the graph has; all if none is named. `parameters.classification` on
`probabilities` gives the best so many as "score:index:label".

Tensors may be JSON or, with Inference-Header-Content-Length, binary; 0 there: the body is one raw FP32 heatmap.
"""
_TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"enum": ["heatmap", "site"]},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 8},
        "datatype": {"enum": ["FP32", "FP16", "FP64", "UINT8", "BYTES", "INT64"]},
        "parameters": {"type": "object"},
        "data": {"type": "array", "items": {}},
    },
}
_INFER_REQUEST_SCHEMA = {
    "title": "InferenceRequest",
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "parameters": {"type": "object"},
        "inputs": {"type": "array", "items": _TENSOR, "minItems": 1, "maxItems": 2},
        "outputs": {
            "type": "array",
            "maxItems": 16,
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
            },
        },
    },
}
_INFER_ANSWER_SCHEMA = {
    "title": "InferenceAnswer",
    **_object(
        model_name={"type": "string"},
        model_version={"type": "string"},
        outputs={
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "shape", "datatype"],
                "properties": {
                    "name": {"type": "string"},
                    "shape": {"type": "array", "items": {"type": "integer"}},
                    "datatype": {"type": "string"},
                    "data": {"type": "array", "items": {}},
                    "parameters": {"type": "object"},
                },
            },
        },
    ),
}
_EXAMPLE_INFER = {
    "id": "42",
    "parameters": {"site": "north"},
    "inputs": [
        {"name": "heatmap", "shape": [1, 1, 2, 2], "datatype": "FP32", "data": [-61.5, -60.2, -58.0, -44.1]}
    ],
    "outputs": [{"name": "probabilities"}],
}
_EXAMPLE_INFERRED = {
    "model_name": "radar",
    "model_version": "7",
    "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [1, 4], "data": [0.02, 0.01, 0.03, 0.94]}],
    "id": "42",
}


def operations() -> dict[str, dict[str, Any]]:
    """By path."""
    return {
        CLASSIFY_PATH: {
            "post": {
                "summary": "Classify radar heatmaps",
                "description": _CLASSIFY_DESCRIPTION,
                "operationId": "classify",
                "tags": ["answers"],
                "parameters": [_SITE_PARAMETER, _TIMEOUT_PARAMETER, *_RAW_PARAMETERS],
                "requestBody": _FRAMES_BODY,
                "responses": _responses(
                    "The class of each frame",
                    {
                        "application/json": {
                            "schema": _CLASSIFICATION_SCHEMA,
                            "examples": {"one": {"value": _EXAMPLE_ONE}, "many": {"value": _EXAMPLE_MANY}},
                        }
                    },
                ),
            }
        },
        EMBED_PATH: {
            "post": {
                "summary": "Embed radar heatmaps",
                "description": _EMBED_DESCRIPTION,
                "operationId": "embed",
                "tags": ["answers"],
                "parameters": [_SITE_PARAMETER, _TIMEOUT_PARAMETER, *_RAW_PARAMETERS],
                "requestBody": _FRAMES_BODY,
                "responses": _responses(
                    "The embedding of each frame",
                    {
                        "application/json": {
                            "schema": _EMBEDDING_SCHEMA,
                            "examples": {"one": {"value": _EXAMPLE_EMBEDDING}},
                        },
                        "application/x-npy": _BINARY,
                    },
                ),
            }
        },
        "/v2/models/{name}/infer": {"post": _infer("infer", "Infer with the live version", "name")},
        "/v2/models/{name}/versions/{version}/infer": {
            "post": _infer("infer_version", "Infer with a version that is loaded", "name", "version")
        },
    }


def _infer(operation_id: str, summary: str, *path_parameters: str) -> dict[str, Any]:
    responses = _responses(
        "The outputs",
        {
            "application/json": {
                "schema": _INFER_ANSWER_SCHEMA,
                "examples": {"probabilities": {"value": _EXAMPLE_INFERRED}},
            },
            "application/octet-stream": _BINARY,
        },
    )
    responses["200"]["headers"] = {
        "Inference-Header-Content-Length": {
            "schema": {"type": "integer"},
            "description": "how many bytes of the body are JSON, where binary data follows",
        }
    }
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in path_parameters
    ]
    length = {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "required": False,
        "description": "how many bytes of the body are JSON; 0: none, the body is one raw heatmap",
        "schema": {"type": "integer", "minimum": 0},
    }
    return {
        "summary": summary,
        "description": _INFER_DESCRIPTION,
        "operationId": operation_id,
        "tags": ["protocol V2"],
        "parameters": [*in_path, length, _TIMEOUT_PARAMETER],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": _INFER_REQUEST_SCHEMA,
                    "examples": {"heatmap": {"summary": _SMALL, "value": _EXAMPLE_INFER}},
                },
                "application/octet-stream": _BINARY,
            },
        },
        "responses": responses | {"404": problem_responses(404)[404]},
    }


def _responses(description: str, content: dict[str, Any]) -> dict[str, Any]:
    problems = problem_responses(400, 408, 413, 415, 422, 429, 500, 503, 504)
    ok = {"description": description, "headers": _VERSION_HEADER, "content": content}
    return {"200": ok} | {str(status): row for status, row in problems.items()}
