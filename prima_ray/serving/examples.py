"""What the OpenAPI document says besides the schemas: bodies in both forms, examples, and the errors."""

from __future__ import annotations

from typing import Any

from prima_ray.serving.schemas import MAX_IMAGES, DiagnosisRequest, Problem

_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
"""A PNG of one red pixel: short, and a picture all the same."""

_ANSWER = {
    "request_id": "5b3c6e1c-6e0f-4f0e-8a55-0a4a0d3f4f39",
    "model": {
        "name": "pad_ufes_20-fuse",
        "version": "3f1c0d9a27b86e54",
        "data_version": "a0c4e19be6d2f837",
        "unvetted": False,
    },
    "prediction": "BCC",
    "probabilities": {"ACK": 0.08, "BCC": 0.71, "MEL": 0.02, "NEV": 0.04, "SCC": 0.12, "SEK": 0.03},
    "prediction_set": ["BCC", "SCC"],
    "coverage": 0.9,
    "confidence": 0.71,
    "novelty": 0.62,
    "abstained": False,
    "reasons": [],
    "attributes_used": {"age": "61", "itch": "true"},
    "attributes_ignored": [],
    "attributes_missing": ["region"],
    "text": "age 61 years; it itches",
    "warnings": [],
    "explanation": None,
}


def _problem(status: int, title: str, detail: str) -> dict[str, Any]:
    example = {"type": "about:blank", "title": title, "status": status, "detail": detail, "request_id": "5b3c6e1c-..."}
    content = {"schema": {"$ref": "#/components/schemas/Problem"}, "example": example}
    return {"description": title, "content": {"application/problem+json": content}}


_RETRY = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
_ERRORS = {
    400: _problem(400, "Bad Request", "not valid JSON (Expecting value: line 1 column 1 (char 0))"),
    401: _problem(401, "Unauthorized", "an API key is needed: `Authorization: Bearer KEY`"),
    403: _problem(403, "Forbidden", "requests of other sites are not answered"),
    408: _problem(408, "Request Timeout", "the body was not there after 30 s"),
    413: _problem(413, "Request Entity Too Large", "the body has more than 33554432 bytes"),
    415: _problem(415, "Unsupported Media Type", "the body must be application/json or multipart/form-data"),
    421: _problem(421, "Misdirected Request", "this server answers to names of this machine only"),
    422: _problem(422, "Unprocessable Entity", "age: 300 is outside 0 to 120."),
    429: {**_problem(429, "Too Many Requests", "too many requests with this key"), "headers": _RETRY},
    500: _problem(500, "Internal Server Error", "this is our mistake; its request id is in the log"),
    503: {**_problem(503, "Service Unavailable", "too many requests are waiting"), "headers": _RETRY},
}

PROBLEMS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, **_ERRORS[401]},
    403: _ERRORS[403],
    421: _ERRORS[421],
    500: _ERRORS[500],
    503: _ERRORS[503],
}
"""What every route may answer."""

DIAGNOSIS_OPERATION: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    **DiagnosisRequest.model_json_schema(),
                    "title": "DiagnosisRequest",
                },
                "examples": {
                    "photo_and_attributes": {
                        "summary": "A photo and what is known",
                        "value": {"images": [_PIXEL], "attributes": {"age": 61, "itch": True}, "explain": False},
                    },
                    "photo_alone": {"summary": "A photo alone", "value": {"images": [_PIXEL]}},
                },
            },
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["images"],
                    "properties": {
                        "images": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "minItems": 1,
                            "maxItems": MAX_IMAGES,
                        },
                        "attributes": {"type": "string", "description": "The attributes as a JSON object."},
                        "explain": {"type": "string", "enum": ["true", "false"]},
                    },
                },
                "encoding": {"images": {"contentType": "image/jpeg, image/png"}},
            },
        },
    },
    "responses": {
        "200": {"description": "The diagnosis", "content": {"application/json": {"example": _ANSWER}}},
        **{str(status): found for status, found in _ERRORS.items()},
    },
}
"""Of `POST /v1/diagnoses`, whose body is read by hand: it has to be bounded before it is parsed."""
