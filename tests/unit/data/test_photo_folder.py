from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from prima_ray.base import PrimaError
from prima_ray.data.photo_folder import list_photos
from prima_ray.data.rejection import RecordRejected


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    def make(*names: str) -> Path:
        root = tmp_path / "images"
        root.mkdir()
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"x")
        return root

    return make


def found(root: Path | str, image_id: str, *, follow_links: bool = False) -> str:
    try:
        return list_photos(str(root), follow_links=follow_links).find(image_id).path
    except RecordRejected as error:
        return str(error)


def test_an_image_id_names_a_file_by_its_stem(folder: Callable[..., Path]):
    root = folder(
        "a.jpg", "B.JPG", "sub/c.jpeg", "d.1.png", "e.jpg", "e.png", "f.tif", "g.jpg", "g.txt", "1.5.jpg", "1.jpg"
    )
    expected = {
        "a": "a.jpg",
        "a.png": "a.jpg",
        "a.dcm": "a.jpg",
        "./a": "a.jpg",
        "B": "B.JPG",
        "sub/c": "sub/c.jpeg",
        "sub\\c.PNG": "sub/c.jpeg",
        "sub//c": "sub/c.jpeg",
        "d.1": "d.1.png",
        "e.png": "e.png",
        "e": "ambiguous_photo: several files of this name: e.jpg, e.png",
        "f": "f.tif",
        "g": "g.jpg",
        "1.5": "1.5.jpg",
        "1.6": "no_photo: no file of this name in the image folder",
        "c": "no_photo: no file of this name in the image folder",
        "sub": "no_photo: no file of this name in the image folder",
    }
    assert {name: found(root, name) for name in expected} == expected
    assert [file.path for file in list_photos(str(root)).photos if file.path.endswith((".tif", ".txt"))] == []


@pytest.mark.parametrize(
    "name", ["../a", "sub/../../a.jpg", "/etc/passwd", "\\\\server\\a", "..\\a", "C:\\a.jpg", "c:a", "sub\\..\\..\\a"]
)
def test_an_id_that_leaves_the_folder_is_not_looked_up(folder: Callable[..., Path], name: str):
    assert found(folder("a.jpg", "sub/b.jpg"), name) == "path_outside: the image id leaves the image folder"


def test_links_cannot_lead_out_of_the_folder_unless_that_is_asked_for(folder: Callable[..., Path], tmp_path: Path):
    root = folder("a.jpg")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.jpg").write_bytes(b"x")
    (root / "inside.jpg").symlink_to("a.jpg")
    (root / "leaves.jpg").symlink_to(outside / "secret.jpg")
    (root / "linked").symlink_to(outside)
    (root / "broken.jpg").symlink_to("nowhere.jpg")
    (root / "itself.jpg").symlink_to("itself.jpg")
    (root / "round").symlink_to(root)
    os.mkfifo(root / "pipe.jpg")
    assert found(root, "inside") == "inside.jpg"
    assert found(root, "leaves") == (
        "path_outside: the file is a link that leaves the image folder, which source.follow_links forbids"
    )
    assert found(root, "linked/secret") == (
        "path_outside: a folder on the way is a link, which source.follow_links forbids"
    )
    for name in ("broken", "pipe"):
        assert found(root, name) == "no_photo: no file of this name in the image folder"
    assert found(root, "leaves", follow_links=True) == "leaves.jpg"
    assert found(root, "linked/secret", follow_links=True) == "linked/secret.jpg"
    link = tmp_path / "link_to_images"
    link.symlink_to(root)
    assert found(link, "a") == "a.jpg"


def test_a_folder_may_be_a_uri(folder: Callable[..., Path]):
    root = folder("sub/a.jpg")
    assert found(root.as_uri(), "sub/a") == "sub/a.jpg"


def test_a_folder_that_is_none(folder: Callable[..., Path]):
    root = folder("a.jpg")
    for path, what in ((root / "x", "no such folder"), (root / "a.jpg", "is a file, not a folder of photos")):
        with pytest.raises(PrimaError) as caught:
            list_photos(str(path))
        assert str(caught.value) == f"{path}: {what}\n  Check source.images."
