"""What strangers send. Every refusal is told before anything is decoded, and says what is wrong."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from tests.unit.serving.conftest import text64

NO_CONSTANT = "not valid JSON ({} is no JSON; leave out what is missing, or write null)"
JSON = {"content-type": "application/json"}


def png_bomb(side: int = 60_000) -> bytes:
    """A few kilobytes that say they are 3.6 thousand million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1_000_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def other_format(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind)
    return buffer.getvalue()


def refusal(response: Any) -> tuple[int, str]:
    assert response.headers["content-type"] == "application/problem+json", response.text
    found = response.json()
    assert found["status"] == response.status_code
    return found["status"], found["detail"]


def test_photos_that_cannot_be_used(client: TestClient, photo: bytes) -> None:
    def answer(*images: bytes) -> tuple[int, str]:
        return refusal(client.post("/v1/diagnoses", json={"images": [text64(item) for item in images]}))

    assert answer() == (422, "a diagnosis needs 1 to 8 images")
    assert answer(*[photo] * 9) == (422, "9 images; at most 8 are read")
    assert answer(photo, b"") == (422, "photo 2 cannot be used: 0 bytes (empty_file)")
    assert answer(b"<svg/>") == (422, "photo 1 cannot be used: neither JPEG nor PNG (6 bytes) (not_an_image)")
    for kind in ("GIF", "WEBP", "TIFF", "BMP"):
        assert answer(other_format(kind))[1].endswith("(not_an_image)"), kind
    status, detail = answer(photo[: len(photo) // 2])
    assert status == 422
    assert "truncated_image" in detail


def test_a_bomb_is_refused_by_its_header(client: TestClient) -> None:
    tracemalloc.start()
    status, detail = refusal(client.post("/v1/diagnoses", json={"images": [text64(png_bomb())]}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (status, "too_many_pixels" in detail) == (422, True)
    assert peak < 20e6
    large = other_format("PNG")  # 64 pixels
    assert len(large) < 1000


def test_a_limit_on_pixels_is_the_servers(serve: Callable[..., TestClient], photo: bytes) -> None:
    client = serve(settings={"limits": {"max_pixels": 1000}})
    found = refusal(client.post("/v1/diagnoses", json={"images": [text64(photo)]}))
    assert found == (422, "photo 1 cannot be used: 60 x 50 pixels, at most 1000 are read (too_many_pixels)")


@pytest.mark.parametrize(
    ("attributes", "status", "detail"),
    [
        ({"aeg": 3}, 422, "unknown attribute 'aeg'. Did you mean 'age'?"),
        ({"age": 300}, 422, "age: 300 is outside 0 to 120"),
        ({"age": "old"}, 422, "age: 'old' is not a number"),
        ({"itch": "perhaps"}, 422, "itch: 'perhaps' is neither true nor false"),
        ({"region": "LEG"}, 422, "region: 'LEG' is none of FACE, ARM"),
        ({"age": [1]}, 422, "attributes.age: expected a text, a number, true, false or null"),
        ({"age": {"years": 3}}, 422, "attributes.age: expected a text, a number, true, false or null"),
        ({"region": "F" * 10_000_000}, 413, "the attributes have more than 65536 bytes"),
        ({"a" * 10_000_000: 1}, 413, "the attributes have more than 65536 bytes"),
        ([1], 422, "attributes: expected an object"),
    ],
)
def test_attributes_that_cannot_be(client: TestClient, photo: bytes, attributes: Any, status: int, detail: str) -> None:
    body = {"images": [text64(photo)], "attributes": attributes}
    assert refusal(client.post("/v1/diagnoses", json=body)) == (status, detail)


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        (b"", 400, "not valid JSON (Expecting value: line 1 column 1 (char 0))"),
        (b"{", 400, "not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        (b"[1]", 422, "the body must be an object with `images` and `attributes`"),
        (b'{"images": [], "attributes": {}}', 422, "a diagnosis needs 1 to 8 images"),
        (b'{"images": "abc"}', 422, "images: expected a list"),
        (b'{"images": ["***"]}', 422, "images[0]: not base64"),
        (b'{"images": ["a"]}', 422, "images[0]: not base64"),
        (b'{"images": [1]}', 422, "images.0: expected a text"),
        (b'{"images": ["aaaa"], "atributes": {}}', 422, "unknown key 'atributes'; known: images, attributes, explain"),
        (b'{"images": ["aaaa"], "explain": "maybe"}', 422, "explain: expected true or false"),
        (b'{"attributes": {"age": NaN}}', 400, NO_CONSTANT.format("NaN")),
        (b'{"attributes": {"age": Infinity}}', 400, NO_CONSTANT.format("Infinity")),
        (b'{"images": ["aaaa"], "images": []}', 400, "not valid JSON (a key is given twice in one object)"),
        (b'{"images": ["\xff\xfe"]}', 400, "the body is not UTF-8"),
        (b"[" * 1_000_000, 400, "the JSON is nested deeper than 8"),
        (b'{"a":' * 1_000_000, 400, "the JSON is nested deeper than 8"),
        (b"[" + b'"",' * 1_000_000, 400, "the JSON holds more than 2000 values"),
        (b'{"attributes": {"age": ' + b"9" * 5000 + b"}}", 400, None),
    ],
)  # fmt: skip
def test_bodies_that_are_no_request(client: TestClient, body: bytes, status: int, detail: str | None) -> None:
    found = refusal(client.post("/v1/diagnoses", content=body, headers=JSON))
    assert found[0] == status
    assert detail is None or found[1] == detail


def test_a_text_of_lone_surrogates_is_no_5xx(client: TestClient, photo: bytes) -> None:
    body = json.dumps({"images": [text64(photo)], "attributes": {"region": "\ud800", "\ud801": 1}})
    assert client.post("/v1/diagnoses", content=body, headers=JSON).status_code == 422


@pytest.mark.parametrize(
    ("kind", "body", "status", "detail"),
    [
        ("text/plain", b"a", 415, "the body must be application/json or multipart/form-data"),
        ("multipart/form-data", b"a", 400, None),
        ("multipart/form-data; boundary=x", b"--x\r\n", 422, "a diagnosis needs 1 to 8 images"),
        ("multipart/form-data; boundary=x", b"--x--\r\n", 422, "a diagnosis needs 1 to 8 images"),
        ("multipart/form-data; boundary=x", b"nothing of it", 400, None),
        ("multipart/form-data; boundary=x; charset=none", b"--x--\r\n", None, None),
    ],
)
def test_other_bodies(client: TestClient, kind: str, body: bytes, status: int | None, detail: str | None) -> None:
    response = client.post("/v1/diagnoses", content=body, headers={"content-type": kind})
    assert status is None or response.status_code == status, response.text
    assert 400 <= response.status_code < 500
    assert detail is None or response.json()["detail"] == detail


def test_parts_of_a_form(client: TestClient, photo: bytes) -> None:
    def answer(count: int = 1, **fields: Any) -> tuple[int, str]:
        files = [("images", ("a.jpg", photo, "image/jpeg"))] * count
        return refusal(client.post("/v1/diagnoses", files=files, data=fields))

    assert answer(9) == (422, "9 images; at most 8 are read")
    assert answer(30) == (422, "30 images; at most 8 are read")
    assert answer(1001)[0] == 400
    assert answer(attributes="[1]") == (422, "attributes: expected a JSON object")
    assert answer(attributes='{"age": NaN}')[0] == 400
    assert answer(attributes="[" * 1000) == (400, "the JSON is nested deeper than 8")
    assert answer(explain="maybe") == (422, "explain: expected true or false")
    assert answer(other="x")[1].startswith("unknown or repeated part")
    assert answer(attributes=["{}", "{}"])[1].startswith("unknown or repeated part")
    long = '{"region": "' + "F" * 1_000_000 + '"}'
    too_long = (413, "the attributes have more than 65536 bytes")
    assert answer(attributes=long) == too_long
    parts = [("images", ("a.jpg", photo, "image/jpeg")), ("attributes", ("a.json", long.encode(), "application/json"))]
    assert refusal(client.post("/v1/diagnoses", files=parts)) == too_long
    spaces = ("a.json", b"{}" + b" " * 1_000_000, "application/json")
    assert refusal(client.post("/v1/diagnoses", files=[parts[0], ("attributes", spaces)])) == too_long


def test_a_compressed_body_is_told_apart_from_a_broken_one(client: TestClient, photo: bytes) -> None:
    body = gzip.compress(json.dumps({"images": [text64(photo)]}).encode())
    found = client.post("/v1/diagnoses", content=body, headers={**JSON, "content-encoding": "gzip"})
    assert refusal(found) == (415, "a body with a Content-Encoding is not read: send it as it is")


def test_one_large_photo_is_told(serve: Callable[..., TestClient], photo: bytes) -> None:
    client = serve(settings={"limits": {"max_image_bytes": 1024}})
    large = photo + b"\0" * 2000
    found = refusal(client.post("/v1/diagnoses", json={"images": [text64(large)]}))
    assert found == (413, "photo 1 has more than 1024 bytes")
