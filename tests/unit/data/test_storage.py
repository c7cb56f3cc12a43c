"""Folders on a disk and on a real S3-compatible server, copies of them, and what is fetched from them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from prima_ray.base import PrimaError, hash_file, write_json
from prima_ray.data.fetched import cache_root, local_copy
from prima_ray.data.schema import join, split
from prima_ray.data.storage import Folder, WorkingCopy, reaching


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("s3://bucket/runs/align", ("s3://bucket/runs", "align")),
        ("s3://bucket/runs/align/", ("s3://bucket/runs", "align")),
        (
            "s3://bucket/a?endpoint_override=host:1&scheme=http",
            ("s3://bucket?endpoint_override=host:1&scheme=http", "a"),
        ),
        ("runs/align", ("runs", "align")),
        ("/runs/align/", ("/runs", "align")),
    ],
)
def test_an_address_is_cut_where_it_was_joined(address: str, parts: tuple[str, str]):
    assert split(address) == parts
    assert join(*parts).rstrip("/") == (address if "?" in address else address.rstrip("/"))


@pytest.fixture(params=["disk", "uri", "store", "query"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "disk":
        return Folder.at(tmp_path / "here")
    if request.param == "uri":
        return Folder.at(f"file://{tmp_path}/here")
    store: str = request.getfixturevalue("store")
    if request.param == "store":
        return Folder.at(store)
    host = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    return Folder.at(f"{store}?endpoint_override={host}&scheme=http&region=us-east-1")


def test_files_come_and_go(folder: Folder, tmp_path: Path):
    assert (folder.files(), folder.folders(), folder.size("a"), folder.exists("a")) == ({}, [], None, False)
    assert folder.is_empty()
    folder.write("a", b"one")
    folder.write("a", b"three")
    source = tmp_path / "source"
    source.write_bytes(b"x" * 100)
    folder.upload(source, "deep/er/b")
    folder.folder("deep").write("c", b"")
    assert folder.files() == {"a": 5, "deep/c": 0, "deep/er/b": 100}
    assert folder.files(without=("er",)) == {"a": 5, "deep/c": 0}
    assert (folder.folders(), folder.is_empty()) == (["deep"], False)
    assert folder.read("a") == b"three"
    target = tmp_path / "deep" / "target"
    assert folder.download("deep/er/b", target) == hash_file(source) == hash_file(target)
    folder.remove("a")
    folder.remove("a")
    folder.remove_folder("deep")
    folder.remove_folder("deep")
    assert folder.files() == {}
    with pytest.raises(FileNotFoundError):
        folder.read("a")


class _Flat(pafs.FSSpecHandler):
    """What pyarrow shows of Google's store, as seen of 26.0 with an emulator of it: a folder that nobody made is in no
    list, and is none that could be deleted."""

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        found = super().get_file_info_selector(selector)
        return [info for info in found if info.type == pafs.FileType.File]

    def delete_dir(self, path: str) -> None:
        if not self.fs.exists(path):
            raise OSError(f"No such directory: {path}")
        super().delete_dir(path)


def test_a_store_that_lists_no_folders(tmp_path: Path):
    from fsspec.implementations.local import LocalFileSystem

    folder = Folder("gs://bucket/here", pafs.PyFileSystem(_Flat(LocalFileSystem())), str(tmp_path / "here"))
    assert (folder.is_empty(), folder.files(), folder.folders()) == (True, {}, [])
    folder.remove_folder("checkpoints")
    for name in ("a", "checkpoints/step-00000003/state", "checkpoints/step-00000006/state"):
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        folder.write(name, b"one")
    assert (folder.is_empty(), folder.folders()) == (False, ["checkpoints"])
    assert folder.folder("checkpoints").folders() == ["step-00000003", "step-00000006"]
    assert folder.files(without=("checkpoints",)) == {"a": 3}
    folder.remove_folder("checkpoints/step-00000003")
    assert list(folder.files()) == ["a", "checkpoints/step-00000006/state"]


def test_a_copy_brings_what_changed_and_leaves_the_rest(store: str, tmp_path: Path):
    there = Folder.at(store)
    there.write("steps.jsonl", b"1\n")
    there.write("checkpoints/state", b"large")
    copy = WorkingCopy(tmp_path, there, without=("checkpoints", "run.json"))
    copy.pull()
    assert {item.name for item in tmp_path.rglob("*")} == {"steps.jsonl"}
    before = there.stamps()
    copy.push()
    assert there.stamps() == before, "nothing had changed"
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write("2\n")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "head" / "checkpoints").mkdir(parents=True)
    (tmp_path / "head" / "checkpoints" / "state").write_text("large too")
    copy.push()
    assert there.files() == {"checkpoints/state": 5, "steps.jsonl": 4}
    # What another process appended comes; what is only here stays.
    there.write("steps.jsonl", b"1\n2\n3\n")
    copy.pull()
    assert (tmp_path / "steps.jsonl").read_bytes() == b"1\n2\n3\n"
    fresh = WorkingCopy(tmp_path, there)
    (tmp_path / "steps.jsonl").write_bytes(b"mine")
    fresh.pull()
    assert (tmp_path / "steps.jsonl").read_bytes() == b"mine"


def test_a_run_is_fetched_once_by_its_parts_and_anew_when_it_is_another(store: str):
    there = Folder.at(store)
    for name in ("model/tower/weights", "model/text/weights", "checkpoints/state", "evaluation/report.html"):
        there.write(name, name.encode())
    there.write("run.json", b'{"outputs": {}}')
    part = local_copy(f"{store}/model/tower")
    assert part.is_relative_to(cache_root())
    assert (part / "weights").read_bytes() == b"model/tower/weights"
    run = part.parents[1]
    assert {item.name for item in run.rglob("*") if item.is_file()} == {"run.json", "weights"}
    assert not (run / "model" / "text").exists(), "nobody asked for it"
    stamp = (part / "weights").stat().st_mtime_ns
    assert local_copy(store) == run
    assert (run / "model" / "text" / "weights").exists()
    assert (part / "weights").stat().st_mtime_ns == stamp
    assert not (run / "checkpoints").exists()
    there.write("model/tower/weights", b"others")
    assert (local_copy(f"{store}/model/tower") / "weights").read_bytes() == b"others"


def test_a_folder_that_is_no_run_is_fetched_whole(store: str):
    Folder.at(store).write("config.json", b"{}")
    Folder.at(store).write("1_Pooling/config.json", b"{}")
    assert {item.name for item in local_copy(store).iterdir()} == {"config.json", "1_Pooling"}


def test_local_paths_are_their_own(tmp_path: Path):
    write_json(tmp_path / "run.json", {})
    assert local_copy(tmp_path) == tmp_path
    assert local_copy("runs/x") == Path("runs/x")
    assert local_copy(f"file://{tmp_path}") == tmp_path


def test_a_store_that_fails_is_told_with_its_mend(tmp_path: Path):
    with pytest.raises(PrimaError) as caught, reaching("s3://bucket/run", "cannot be read"):
        raise OSError("no\n route")
    assert str(caught.value) == (
        "s3://bucket/run: cannot be read (no route)\n"
        "  Check the address and the credentials; `AWS_ENDPOINT_URL` names a store other than Amazon's."
    )
    with pytest.raises(PrimaError) as caught, reaching(str(tmp_path), "cannot be read"):
        (tmp_path / "none").read_bytes()
    assert str(caught.value) == f"{tmp_path}: cannot be read (No such file or directory)"
