"""A request's body, bounded in size, time, depth and number of values before anything is made of it."""

from __future__ import annotations

import asyncio
import binascii
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, cast

from pydantic import ValidationError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from prima_ray.data.images import ImageRejected, image_size
from prima_ray.serving.config import LimitsConfig
from prima_ray.serving.engine import Unavailable
from prima_ray.serving.problems import HttpProblem
from prima_ray.serving.schemas import MAX_IMAGES, DiagnosisRequest, Scalar

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)
_QUICKLY_PARSED = 64 * 1024
"""Bytes that are parsed within a millisecond, about what asking another thread takes."""
_MANY = 1000
"""Photos of a form that are counted; of more it is no request."""
_EXPECTED = {
    "tuple_type": "expected a list",
    "dict_type": "expected an object",
    "string_type": "expected a text",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
}
"""In words of JSON what pydantic says in those of Python."""
_BASE64 = re.compile(r"[A-Za-z0-9+/]*+={0,2}\s*")


class Held:
    """Bytes of bodies that are in memory: many requests within their limit are no less than one beyond it."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits, self._bytes = limits, 0

    @contextmanager
    def room(self, headers: Headers) -> Iterator[Room]:
        """For one body while it is read and answered; as much as it announces, else as much as it may have.

        Raises:
            Unavailable: there is none.
        """
        announced = headers.get("content-length", "")
        largest = self._limits.max_body_bytes
        found = Room(self, min(int(announced), largest) if announced.isdecimal() else largest)
        if self._bytes and self._bytes + found.bytes > self._limits.max_held_bytes:
            raise Unavailable("too much is being read and answered", reason="memory", retry_after_s=2.0)
        self._bytes += found.bytes
        try:
            yield found
        finally:
            self._bytes -= found.bytes

    def change(self, by: int) -> None:
        """A body has turned out larger or smaller."""
        self._bytes += by


class Room:
    """What one body takes."""

    def __init__(self, held: Held, size: int) -> None:
        self._held, self.bytes = held, size

    def takes(self, size: int) -> None:
        """The body is read."""
        self._held.change(size - self.bytes)
        self.bytes = size


async def read_body(receive: Receive, headers: Headers, limits: LimitsConfig) -> bytes:
    """The whole body of an ASGI request.

    Raises:
        HttpProblem: 413 as soon as it is known to be too large, 408 when it takes too long.
    """
    announced = headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limits.max_body_bytes:
        raise _too_large(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise HttpProblem(400, "the client left before its request was whole", reason="disconnected")
                body += message.get("body", b"")
                if len(body) > limits.max_body_bytes:
                    raise _too_large(limits)
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise HttpProblem(
            408, f"the body was not there after {limits.body_timeout_s:g} s", reason="slow_body", close=True
        ) from None


def _too_large(limits: LimitsConfig) -> HttpProblem:
    return HttpProblem(
        413, f"the body has more than {limits.max_body_bytes} bytes", reason="body_too_large", close=True
    )


async def parse_request(
    body: bytes, headers: Headers, limits: LimitsConfig
) -> tuple[tuple[bytes, ...], dict[str, Scalar], bool]:
    """Photos, attributes and `explain` of a request in JSON or multipart.

    Raises:
        HttpProblem: 400, 413, 415 or 422; the text names what is wrong.
    """
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise HttpProblem(415, "a body with a Content-Encoding is not read: send it as it is", reason="encoding")
    kind = headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "application/json":
        if len(body) <= _QUICKLY_PARSED:
            return _from_json(body, limits)
        # Parsing megabytes takes a while, and the loop answers others meanwhile.
        return await asyncio.to_thread(_from_json, body, limits)
    if kind == "multipart/form-data":
        return await _from_multipart(body, headers, limits)
    raise HttpProblem(415, "the body must be application/json or multipart/form-data", reason="media_type")


def parse_json(body: bytes, limits: LimitsConfig) -> Any:
    """JSON that is no burden: of bounded depth and number of values, without NaN and repeated keys.

    Raises:
        HttpProblem: 400.
    """
    depth = 0
    for count, token in enumerate(_TOKEN.finditer(body)):
        if count >= limits.max_json_values:
            raise HttpProblem(400, f"the JSON holds more than {limits.max_json_values} values", reason="json")
        first = body[token.start()]
        depth += (first in b"[{") - (first in b"]}")
        if depth > limits.max_json_depth:
            raise HttpProblem(400, f"the JSON is nested deeper than {limits.max_json_depth}", reason="json")
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_once)
    except UnicodeDecodeError:
        raise HttpProblem(400, "the body is not UTF-8", reason="json") from None
    except (ValueError, RecursionError) as error:
        # The message of a decoder tells a place; it quotes nothing but what `_once` and `_no_constant` name.
        raise HttpProblem(400, f"not valid JSON ({error})", reason="json") from None


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON; leave out what is missing, or write null")


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is given twice in one object")
    return dict(pairs)


def _from_json(body: bytes, limits: LimitsConfig) -> tuple[tuple[bytes, ...], dict[str, Scalar], bool]:
    raw = parse_json(body, limits)
    if not isinstance(raw, dict):
        raise HttpProblem(422, "the body must be an object with `images` and `attributes`", reason="schema")
    found = _validated(raw)
    check_attributes(found.attributes, limits)
    photos = tuple(_decoded(text, f"images[{at}]") for at, text in enumerate(found.images))
    check_photos(photos, limits)
    return photos, found.attributes, found.explain


def _validated(raw: dict[str, Any]) -> DiagnosisRequest:
    images = raw.get("images")
    if not images or isinstance(images, list):
        _check_count(len(images or ()))
    try:
        return DiagnosisRequest.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"] if part not in ("str", "int", "float", "bool"))
        if first["type"] == "extra_forbidden":
            known = ", ".join(DiagnosisRequest.model_fields)
            raise HttpProblem(422, f"unknown key {key[:60]!r}; known: {known}", reason="schema") from None
        message = _EXPECTED.get(first["type"], first["msg"])
        if key.startswith("attributes."):
            message = "expected a text, a number, true, false or null"
        raise HttpProblem(422, f"{key[:80]}: {message}", reason="schema") from None


def _check_count(count: int) -> None:
    if not count:
        raise HttpProblem(422, f"a diagnosis needs 1 to {MAX_IMAGES} images", reason="num_images")
    if count > MAX_IMAGES:
        raise HttpProblem(422, f"{count} images; at most {MAX_IMAGES} are read", reason="num_images")


def _decoded(text: str, where: str) -> bytes:
    # Padding may be left out, nothing else: `a2b_base64` passes over what is no base64.
    try:
        if not _BASE64.fullmatch(text):
            raise ValueError
        return binascii.a2b_base64(text + "=" * (-len(text) % 4), strict_mode=False)
    except ValueError:
        raise HttpProblem(422, f"{where}: not base64", reason="base64") from None


class _InMemory(MultiPartParser):
    """Photos of patients are not written to temporary files: the body is bounded, and in memory already."""

    spool_max_size = 1 << 62


async def _from_multipart(
    body: bytes, headers: Headers, limits: LimitsConfig
) -> tuple[tuple[bytes, ...], dict[str, Scalar], bool]:
    async def once() -> AsyncIterator[bytes]:
        yield body

    try:
        parser = _InMemory(
            headers,
            cast(Any, once()),
            # Of the body, which is bounded: how many photos, and how much of a part, is told as it is of JSON.
            max_files=_MANY,
            max_fields=4,
            max_part_size=limits.max_body_bytes,
        )
        form = await parser.parse()
    except (MultiPartException, KeyError, UnicodeDecodeError, ValueError) as error:
        text = error.message if isinstance(error, MultiPartException) else "the multipart body cannot be read"
        raise HttpProblem(400, text.rstrip("."), reason="multipart") from None
    photos: list[bytes] = []
    fields: dict[str, str] = {}
    for name, value in form.multi_items():
        if name == "images" and isinstance(value, UploadFile):
            photos.append(await value.read())
        elif name in ("attributes", "explain") and name not in fields:
            fields[name] = await _text(value, limits)
        else:
            raise HttpProblem(
                422, "unknown or repeated part; known: images (files), attributes (JSON), explain", reason="schema"
            )
    await form.close()
    _check_count(len(photos))
    explain = fields.get("explain", "false").strip().lower()
    if explain not in ("true", "false"):
        raise HttpProblem(422, "explain: expected true or false", reason="schema")
    text = fields.get("attributes", "").strip() or "{}"
    attributes = parse_json(text.encode("utf-8", "surrogatepass"), limits)
    if not isinstance(attributes, dict):
        raise HttpProblem(422, "attributes: expected a JSON object", reason="schema")
    found = _validated({"images": ["-"], "attributes": attributes}).attributes
    check_attributes(found, limits)
    check_photos(tuple(photos), limits)
    return tuple(photos), found, explain == "true"


async def _text(value: UploadFile | str, limits: LimitsConfig) -> str:
    data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else await value.read()
    if len(data) > limits.max_attributes_bytes:
        raise _much_said(limits)
    try:
        return data.decode("utf-8", "surrogatepass" if isinstance(value, str) else "strict")
    except UnicodeDecodeError:
        raise HttpProblem(400, "the attributes are not UTF-8", reason="multipart") from None


def check_attributes(attributes: dict[str, Scalar], limits: LimitsConfig) -> None:
    """Raises:
    HttpProblem: 413 where they are larger than any form.
    """
    size = sum(len(name) + (len(value) if isinstance(value, str) else 8) for name, value in attributes.items())
    if size > limits.max_attributes_bytes:
        raise _much_said(limits)


def _much_said(limits: LimitsConfig) -> HttpProblem:
    return HttpProblem(
        413, f"the attributes have more than {limits.max_attributes_bytes} bytes", reason="attributes_too_large"
    )


def check_photos(photos: tuple[bytes, ...], limits: LimitsConfig) -> None:
    """By their headers alone: nothing is decoded.

    Raises:
        HttpProblem: 413 or 422, with the photo's number.
    """
    for number, data in enumerate(photos, start=1):
        if len(data) > limits.max_image_bytes:
            raise HttpProblem(
                413, f"photo {number} has more than {limits.max_image_bytes} bytes", reason="image_too_large"
            )
        try:
            image_size(data, max_pixels=limits.max_pixels)
        except ImageRejected as error:
            raise HttpProblem(
                422, f"photo {number} cannot be used: {error.detail} ({error.reason})", reason=error.reason
            ) from None
