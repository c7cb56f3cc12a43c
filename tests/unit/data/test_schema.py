from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from prima_ray.base import PrimaError
from prima_ray.data.schema import join, open_filesystem, read_manifest


def mistake(shards: str) -> str:
    with pytest.raises(PrimaError) as caught:
        read_manifest(shards)
    return str(caught.value).replace(shards, "SHARDS")


def test_a_manifest_is_read_from_a_path_and_from_a_uri(toy_shards: str):
    manifest = read_manifest(toy_shards)
    assert manifest == read_manifest(Path(toy_shards).as_uri())
    assert manifest.num_exams == 23
    assert manifest.content_hash == read_manifest(toy_shards).content_hash


def test_the_content_hash_is_of_files_and_description(make_shards: Callable[..., str]):
    manifest = read_manifest(make_shards())
    other = manifest.model_copy(update={"created_by": {"prima_ray": "9"}, "num_quarantined": 5})
    assert other.content_hash == manifest.content_hash
    data_set = manifest.data_set.model_copy(update={"subject": "an eye"})
    assert manifest.model_copy(update={"data_set": data_set}).content_hash != manifest.content_hash
    file = manifest.files[0].model_copy(update={"sha256": "0" * 64})
    changed = manifest.model_copy(update={"files": (file, *manifest.files[1:])})
    assert changed.content_hash != manifest.content_hash


def test_a_folder_without_a_manifest_is_not_finished(tmp_path: Path):
    text = "SHARDS: no finished shard folder here (manifest.json is missing)\n  Run `prima ingest` first."
    assert mistake(str(tmp_path)) == text
    assert mistake(str(tmp_path / "absent")) == text


def test_damaged_manifests_and_those_of_another_version(make_shards: Callable[..., str]):
    shards = make_shards()
    path = Path(shards) / "manifest.json"
    whole = json.loads(path.read_text())

    def wrong(text: str) -> str:
        path.write_text(text)
        return mistake(shards)

    assert wrong(json.dumps({**whole, "schema_version": 7})) == (
        "SHARDS/manifest.json: shards of schema version 7, this program reads version 1\n"
        "  Ingest the data set again with this version of prima_ray."
    )
    assert wrong("[]").startswith("SHARDS/manifest.json: shards of schema version None, ")
    assert wrong('{"schema').startswith("SHARDS/manifest.json: not valid JSON (")
    assert wrong(json.dumps({**whole, "num_exams": "many"})).startswith(
        "SHARDS/manifest.json: damaged manifest: num_exams: "
    )
    path.write_bytes(b"\xff\xfe")
    assert mistake(shards) == "SHARDS/manifest.json: not valid JSON (it is not UTF-8 text)"


def test_addresses_of_unknown_kinds():
    with pytest.raises(PrimaError) as caught:
        open_filesystem("htp://bucket/shards")
    assert str(caught.value).startswith("htp://bucket/shards: cannot open this address (")
    assert join("s3://bucket/a", "b", "c") == "s3://bucket/a/b/c"
    assert join("s3://bucket/a?region=x/y", "b") == "s3://bucket/a/b?region=x/y"
    assert join("/what?", "b") == "/what?/b"
