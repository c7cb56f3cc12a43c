from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from prima_ray.base import PrimaError
from prima_ray.data.rejection import RecordRejected
from prima_ray.knowledge.files import SourceFile, decode, find_files, other_kind

NAMES = ("a.md", "b.TXT.gz", "c.pdf", "sub/d.md", "sub/deep/e.md", ".hidden.md", ".git/f.md", "[1].md")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    for name in NAMES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def names(path: Path | str) -> list[str]:
    return [file.name for file in find_files(str(path), (".md", ".txt"))]


def message(path: Path | str) -> str:
    with pytest.raises(PrimaError) as caught:
        find_files(str(path), (".md", ".txt"), key="sources.0.path")
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", ["[1].md", "a.md", "b.TXT.gz", "sub/d.md", "sub/deep/e.md"]),
        ("c.pdf", ["c.pdf"]),
        ("[1].md", ["[1].md"]),
        ("*.md", ["[1].md", "a.md"]),
        ("?.md", ["a.md"]),
        ("[ac].*", ["a.md", "c.pdf"]),
        ("[!a-b].*", ["c.pdf"]),
        ("*/*.md", ["sub/d.md"]),
        ("**/*.md", ["[1].md", "a.md", "sub/d.md", "sub/deep/e.md"]),
        ("sub/**/e.md", ["deep/e.md"]),
        ("sub/**", ["d.md", "deep/e.md"]),
    ],
)
def test_a_file_a_folder_or_a_pattern(folder: Path, path: str, expected: list[str]):
    assert names(folder / path) == expected
    assert [file.path for file in find_files(str(folder / path), (".md", ".txt"))] == [
        str(folder / ("sub" if path.startswith("sub/") else "") / name) for name in expected
    ]


def test_paths_may_be_uris(folder: Path):
    assert names(folder.as_uri()) == names(folder)
    assert names(f"{folder.as_uri()}/*.md") == ["[1].md", "a.md"]
    assert find_files(f"{folder.as_uri()}/*.md", (".md",))[1].path == f"{folder.as_uri()}/a.md"


def test_what_is_not_there_is_said(folder: Path):
    assert message(folder / "no.md") == f"{folder}/no.md: no such file or folder\n  Check sources.0.path."
    assert message(folder / "*.rst") == f"{folder}/*.rst: no file matches the pattern\n  Check sources.0.path."
    assert message(folder / "no/*.md") == f"{folder}/no/*.md: no file matches the pattern\n  Check sources.0.path."
    (folder / "empty").mkdir()
    assert message(folder / "empty") == (
        f"{folder}/empty: the folder holds no .md or .txt file\n  Check sources.0.path."
    )


def test_a_name_that_is_no_utf8_cannot_be_opened_and_says_so(folder: Path):
    (folder / "sub" / os.fsdecode(b"caf\xe9.md")).write_text("x")
    file = find_files(str(folder / "sub"), (".md",))[0]
    assert file.name == "caf\\udce9.md"
    with pytest.raises(RecordRejected, match="unreadable_file"):
        file.read(10, key="limits.key")
    with pytest.raises(PrimaError, match="cannot be listed"):
        find_files(str(folder / "sub" / os.fsdecode(b"caf\xe9.md")), (".md",))


def test_links_that_leave_the_folder_are_marked_and_linked_folders_not_entered(folder: Path, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.md").write_text("x")
    (folder / "inside.md").symlink_to("a.md")
    (folder / "leaves.md").symlink_to(outside / "secret.md")
    (folder / "linked").symlink_to(outside)
    (folder / "round").symlink_to(folder)
    (folder / "broken.md").symlink_to("nowhere.md")
    os.mkfifo(folder / "pipe.md")
    marked = {file.name: file.leaves for file in find_files(str(folder), (".md",))}
    assert marked == dict.fromkeys(("[1].md", "a.md", "inside.md", "sub/d.md", "sub/deep/e.md"), False) | {
        "leaves.md": True
    }


def found(path: Path, data: bytes) -> SourceFile:
    path.write_bytes(data)
    return find_files(str(path), ())[0]


def test_packed_files_are_unpacked_and_bounded(tmp_path: Path):
    file = found(tmp_path / "a.TXT.gz", gzip.compress(b"x" * 1_000_000))
    assert (file.suffix, file.stem) == (".txt", "a")
    assert len(file.read(1_000_000, key="limits.key")) == 1_000_000
    with pytest.raises(RecordRejected) as caught:
        file.read(999_999, key="limits.key")
    assert str(caught.value) == "too_large: more than 999999 bytes, the bound in limits.key"
    # Tools that append to a packed file write it in several pieces.
    assert (
        found(tmp_path / "d.gz", gzip.compress(b"one") + gzip.compress(b"two")).read(9, key="limits.key") == b"onetwo"
    )
    cut = found(tmp_path / "b.gz", gzip.compress(os.urandom(10_000))[:5000])
    with pytest.raises(RecordRejected, match="unreadable_file"):
        cut.read(1_000_000, key="limits.key")
    with pytest.raises(RecordRejected) as caught:
        found(tmp_path / "c.txt", b"").read(1, key="limits.key")
    assert str(caught.value) == "empty_file: the file is empty"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\xff\xfea\0", "encoding: UTF-16 text; save it as UTF-8: iconv -f utf-16 -t utf-8"),
        (b"a\0b", "not_text: the file holds NUL bytes: it is not text, or UTF-16; text must be UTF-8"),
        (
            b"caf\xe9",
            "encoding: not UTF-8 text (byte 0xe9 at 3); save it as UTF-8: iconv -f latin1 -t utf-8, say",
        ),
    ],
)
def test_other_encodings_are_refused_with_the_mend(data: bytes, expected: str):
    with pytest.raises(RecordRejected) as caught:
        decode(data)
    assert str(caught.value) == expected


def test_utf8_with_and_without_a_mark():
    assert decode(b"\xef\xbb\xbfcaf\xc3\xa9") == decode("café".encode()) == "café"


def test_files_of_another_kind_are_known_by_how_they_begin():
    assert other_kind(b"%PDF-1.7") == "a PDF"
    assert other_kind(b"%PDF-1.7", but=("a PDF",)) is None
    assert other_kind(b"\xef\xbb\xbf \n<!DOCTYPE HTML>") == "a web page"
    assert other_kind(b"PK\x03\x04...") == "a ZIP archive, as Word and EPUB files are"
    assert other_kind(b"<p align=center>") is None
