"""Whatever fits the OpenAPI document, or nearly, is answered without a 5xx and as the document says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from starlette.testclient import TestClient

from prima_ray.serving.app import create_app
from prima_ray.serving.engine import LocalEngine
from prima_ray.serving.examples import DIAGNOSIS_OPERATION
from prima_ray.serving.model import Model

schemathesis = pytest.importorskip("schemathesis")
PATHS = ["/v1/diagnoses", "/v1/schema", "/healthz", "/readyz", "/metrics"]


@pytest.fixture(scope="module")
def api(model: Model) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(LocalEngine(model), local_only=False))


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_no_request_is_a_5xx_or_answered_otherwise_than_described(api: Any, mode: str) -> None:
    checks = schemathesis.checks
    wanted = [
        checks.not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    for path in PATHS:
        operation = api[path]["POST" if path == "/v1/diagnoses" else "GET"]
        requests = operation.as_strategy(generation_mode=getattr(schemathesis.GenerationMode, mode))
        count = 12 if path == "/v1/diagnoses" else 2

        @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=requests)
        def ask(case: Any) -> None:
            case.validate_response(case.call(), checks=wanted)

        try:
            ask()
        except Unsatisfiable:
            # Of a route without parameters nothing can be wrong.
            assert mode == "NEGATIVE"
            assert path != "/v1/diagnoses"


def test_the_document_describes_all_routes_with_examples(client: TestClient) -> None:
    found = client.get("/openapi.json").json()
    assert list(found["paths"]) == PATHS
    content = found["paths"]["/v1/diagnoses"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data"}
    for name, example in content["application/json"]["examples"].items():
        value = {**example["value"], "attributes": {}}
        assert client.post("/v1/diagnoses", json=value).status_code == 200, name
    responses = found["paths"]["/v1/diagnoses"]["post"]["responses"]
    assert {"200", "400", "401", "413", "415", "422", "429", "503"} <= set(responses)
    assert all("application/problem+json" in responses[code]["content"] for code in responses if code != "200")


def test_the_documents_answer_is_an_answer(serve: Callable[..., TestClient]) -> None:
    from prima_ray.serving.schemas import Diagnosis

    Diagnosis.model_validate(DIAGNOSIS_OPERATION["responses"]["200"]["content"]["application/json"]["example"])
