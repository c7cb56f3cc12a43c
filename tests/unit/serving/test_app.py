"""What the endpoint answers, over a real model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from starlette.testclient import TestClient

from prima_ray.base import PrimaError
from prima_ray.inference.diagnosis import Diagnoser
from prima_ray.inference.predictor import Exam
from prima_ray.serving.engine import LocalEngine, Question, Unavailable
from prima_ray.serving.keys import KeyRing, add_key
from prima_ray.serving.model import Model
from prima_ray.serving.schemas import Diagnosis
from tests.unit.serving.conftest import text64

ATTRIBUTES = {"age": 61, "itch": True, "region": "FACE"}


def ask(client: TestClient, photo: bytes, **body: Any) -> Any:
    return client.post("/v1/diagnoses", json={"images": [text64(photo)], **body})


def test_the_answer_is_the_diagnosers(client: TestClient, tiny_fuse: Path, photo: bytes) -> None:
    response = ask(client, photo, attributes=ATTRIBUTES)
    assert response.status_code == 200, response.text
    found = response.json()
    wanted = Diagnoser.load(tiny_fuse).diagnose_one(Exam((photo,), ATTRIBUTES)).as_dict()
    assert found["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)
    for key in ("prediction", "prediction_set", "coverage", "abstained", "attributes_used", "text"):
        assert found[key] == wanted[key], key
    assert set(found) == set(Diagnosis.model_fields)
    assert sum(found["probabilities"].values()) == pytest.approx(1)
    assert found["model"]["name"] == "toy-fuse"
    assert re.fullmatch("[0-9a-f]{16}", found["model"]["version"])
    assert found["request_id"] == response.headers["x-request-id"]


def test_an_explanation_is_given_where_it_is_asked_for(client: TestClient, photo: bytes) -> None:
    found = ask(client, photo, attributes=ATTRIBUTES, explain=True).json()["explanation"]
    moved = {item["attribute"] for item in found["contributions"]["attributes"]}
    assert moved == {"age", "itch", "region"}
    assert "no evidence: the model was made without a corpus" in found["notes"]
    assert ask(client, photo, attributes=ATTRIBUTES).json()["explanation"] is None


def test_multipart_gives_the_same(client: TestClient, photo: bytes) -> None:
    files = [("images", ("my name.jpg", photo, "image/jpeg"))] * 2
    parts = client.post("/v1/diagnoses", files=files, data={"attributes": json.dumps(ATTRIBUTES), "explain": "false"})
    assert parts.status_code == 200, parts.text
    body = client.post("/v1/diagnoses", json={"images": [text64(photo)] * 2, "attributes": ATTRIBUTES}).json()
    assert parts.json()["probabilities"] == pytest.approx(body["probabilities"], abs=1e-6)
    assert parts.json()["attributes_used"] == {"age": "61", "itch": "true", "region": "FACE"}


def test_a_photo_alone_is_answered_and_what_is_missing_is_said(client: TestClient, photo: bytes) -> None:
    found = ask(client, photo).json()
    assert (found["attributes_used"], found["attributes_missing"]) == ({}, ["region", "itch", "age"])
    assert any(text.startswith("only 0 of the 3 attributes") for text in found["warnings"])


def test_the_schema_takes_what_the_endpoint_takes(client: TestClient) -> None:
    response = client.get("/v1/schema")
    found = response.json()
    Draft202012Validator.check_schema(found)
    validator = Draft202012Validator(found)
    assert validator.is_valid(ATTRIBUTES)
    assert validator.is_valid({"age": None})
    assert not any(map(validator.is_valid, ({"age": 300}, {"itch": "perhaps"}, {"aeg": 3}, {"region": "LEG"})))
    assert list(found["properties"]) == ["region", "itch", "age"]
    assert found["properties"]["age"]["x-unit"] == "years"
    assert found["x-classes"] == {"BCC": "basal cell carcinoma", "NEV": "nevus", "SEK": "seborrheic keratosis"}


@pytest.mark.parametrize(
    ("method", "path", "status", "detail"),
    [
        ("GET", "/nothing", 404, "there is no such path"),
        ("PUT", "/v1/diagnoses", 405, "this path has other methods"),
        ("GET", "/docs", 404, "there is no such path"),
    ],
)
def test_what_is_not_there_is_a_problem(client: TestClient, method: str, path: str, status: int, detail: str) -> None:
    response = client.request(method, path)
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    assert response.json() == {
        "type": "about:blank",
        "title": response.json()["title"],
        "status": status,
        "detail": detail,
        "request_id": response.headers["x-request-id"],
    }


def test_every_answer_carries_the_headers(client: TestClient, photo: bytes) -> None:
    for response in (client.get("/healthz"), client.get("/nothing"), ask(client, photo), client.get("/")):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert "server" not in response.headers


class _Engine(LocalEngine):
    """Raises what it is told to."""

    def __init__(self, model: Model, error: Exception) -> None:
        super().__init__(model)
        self._error = error

    async def answer(self, question: Question) -> Any:
        raise self._error

    async def check(self) -> None:
        raise self._error


def test_a_full_queue_is_503_with_a_time_to_come_back(
    serve: Callable[..., TestClient], model: Model, photo: bytes
) -> None:
    full = Unavailable("too many requests are waiting", reason="queue_full", retry_after_s=3)
    response = ask(serve(_Engine(model, full)), photo)
    assert (response.status_code, response.headers["retry-after"]) == (503, "3")
    assert response.json()["detail"] == "too many requests are waiting"


def test_our_own_mistake_says_nothing_of_the_exam(
    serve: Callable[..., TestClient], model: Model, photo: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    client = serve(_Engine(model, RuntimeError("secret of the patient")))
    response = ask(client, photo)
    assert (response.status_code, response.headers["content-type"]) == (500, "application/problem+json")
    assert response.json()["detail"] == "this is our mistake; its request id is in the log"
    assert "secret" not in caplog.text
    assert f"request {response.json()['request_id']} failed: RuntimeError at " in caplog.text


def test_not_ready_while_the_known_exam_is_predicted_otherwise(
    serve: Callable[..., TestClient], client: TestClient, model: Model
) -> None:
    assert client.get("/readyz").json()["status"] == "ready"
    broken = serve(_Engine(model, PrimaError("the known exam is predicted otherwise", where="/a/path")))
    response = broken.get("/readyz")
    assert (response.status_code, response.json()["detail"]) == (503, "the known exam is predicted otherwise")
    assert "prima_ready 0.0" in broken.get("/metrics").text
    assert broken.get("/healthz").status_code == 200


def test_broken_weights_are_not_ready(serve: Callable[..., TestClient], tiny_fuse: Path) -> None:
    broken = Model(str(tiny_fuse))
    client = serve(LocalEngine(broken))
    assert client.get("/readyz").status_code == 200
    with torch.no_grad():
        for parameter in broken._diagnoser.predictor._model.parameters():
            parameter.add_(torch.randn_like(parameter))
    response = client.get("/readyz")
    assert response.status_code == 503
    assert response.json()["detail"].startswith("the known exam is not answered as at training time")


def test_no_answer_in_time_is_503(serve: Callable[..., TestClient], model: Model, photo: bytes) -> None:
    response = ask(serve(LocalEngine(model, timeout_s=1e-4)), photo)
    assert (response.status_code, response.json()["detail"]) == (503, "no answer within 0.0001 s")


# ------------------------------------------------------------------------------------------------- who may ask


@pytest.fixture
def keyed(serve: Callable[..., TestClient], tmp_path: Path) -> tuple[TestClient, str]:
    key = add_key(tmp_path / "keys", "clinic")
    return serve(keys=KeyRing(tmp_path / "keys"), local_only=False), key


def test_a_key_is_needed_where_there_are_keys(keyed: tuple[TestClient, str], photo: bytes) -> None:
    client, key = keyed
    for headers in ({}, {"authorization": f"Basic {key}"}, {"authorization": f"Bearer {key}x"}):
        response = client.post("/v1/diagnoses", content=b"{", headers=headers)
        assert (response.status_code, response.headers["www-authenticate"]) == (401, 'Bearer realm="prima"')
    assert client.get("/v1/schema").status_code == client.get("/metrics").status_code == 401
    assert [client.get(path).status_code for path in ("/", "/healthz", "/readyz", "/openapi.json")] == [200] * 4
    for path in ("/healthz", "/readyz"):
        found = client.head(path)
        assert (found.status_code, found.content) == (200, b"")
    client.headers["authorization"] = f"Bearer {key}"
    assert ask(client, photo).status_code == client.get("/metrics").status_code == 200
    assert client.get("/openapi.json").json()["paths"]["/v1/schema"]["get"]["security"] == [{"key": []}]


def test_a_key_has_its_rate(serve: Callable[..., TestClient], tmp_path: Path, photo: bytes) -> None:
    one, two = (f"Bearer {add_key(tmp_path / 'keys', name)}" for name in ("one", "two"))
    settings = {"rate": {"per_minute": 1, "burst": 2}}
    client = serve(settings=settings, keys=KeyRing(tmp_path / "keys"))
    codes = [client.post("/v1/diagnoses", content=b"", headers={"authorization": one}) for _ in range(3)]
    assert [item.status_code for item in codes] == [415, 415, 429]
    assert 1 <= int(codes[2].headers["retry-after"]) <= 61
    assert client.post("/v1/diagnoses", content=b"", headers={"authorization": two}).status_code == 415


def test_on_loopback_only_names_of_this_machine_are_answered(client: TestClient) -> None:
    for host in ("localhost", "127.0.0.1:8000", "[::1]:80"):
        assert client.get("/healthz", headers={"host": host}).status_code == 200
    for host in ("evil.example", "", "127.0.0.1.evil.example", "["):
        assert client.get("/healthz", headers={"host": host}).status_code == 421


def test_other_sites_are_refused(client: TestClient, photo: bytes) -> None:
    files = [("images", ("a.jpg", photo, "image/jpeg"))]
    for origin, status in (("https://evil.example", 403), ("null", 403), ("http://127.0.0.1", 200)):
        response = client.post("/v1/diagnoses", files=files, headers={"origin": origin})
        assert response.status_code == status, origin


# ------------------------------------------------------------------------------------------- what is written down


def test_logs_metrics_and_audit_hold_nothing_of_the_patient(
    serve: Callable[..., TestClient], tmp_path: Path, photo: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    audit = tmp_path / "logs" / "audit.jsonl"
    client = serve(settings={"audit": str(audit)})
    files = [("images", ("Jane Doe.jpg", photo, "image/jpeg"))]
    given = {"age": 83.25, "region": "FACE"}
    answer = client.post("/v1/diagnoses?who=Doe", files=files, data={"attributes": json.dumps(given)}).json()
    client.post("/v1/diagnoses", json={"images": [text64(photo)], "attributes": {"age": 8325}})
    client.post("/v1/diagnoses/Doe", json={"images": ["Doe"]})
    said = "".join(record.getMessage() for record in caplog.records if not record.name.startswith("httpx"))
    written = said + audit.read_text() + client.get("/metrics").text
    for secret in ("Doe", "83", "FACE", text64(photo)[:40]):
        assert secret not in re.sub(r"[0-9a-f-]{16,}|\d\d:\d\d:\d\d[.\d+:]*|\d+\.\d+|le=\S+", "", written), secret
    (line,) = map(json.loads, audit.read_text().splitlines())
    assert (line["request_id"], line["model_version"]) == (answer["request_id"], answer["model"]["version"])
    assert line["data_version"] == answer["model"]["data_version"]
    assert audit.stat().st_mode & 0o077 == 0


def test_metrics_tell_what_was_answered(client: TestClient, photo: bytes) -> None:
    answer = ask(client, photo, attributes={"itch": True}).json()
    client.post("/v1/diagnoses", content=b"{", headers={"content-type": "application/json"})
    text = client.get("/metrics").text
    version = answer["model"]["version"]
    for line in (
        'prima_requests_total{method="POST",route="/v1/diagnoses",status="200"} 1.0',
        'prima_requests_total{method="POST",route="/v1/diagnoses",status="400"} 1.0',
        'prima_refused_total{reason="json"} 1.0',
        "prima_batch_size_count 1.0",
        f'prima_predictions_total{{diagnosis="{answer["prediction"]}",model="{version}"}} 1.0',
        'prima_attributes_missing_total{attribute="age"} 1.0',
        'prima_stage_seconds_count{stage="encode"} 1.0',
    ):
        assert line in text, line


def test_a_replica_holds_the_files_to_the_hashes_of_their_run(tiny_fuse: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_fuse, run)
    config = run / "model" / "config.json"
    config.write_text(config.read_text().replace('"version"', ' "version"', 1))
    with pytest.raises(PrimaError, match="is not the file that the run wrote"):
        Model(str(run))
