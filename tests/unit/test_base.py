from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from prima_ray.base import PrimaError, canonical_json, hash_json, hash_key, read_json, write_atomic, write_json


def test_an_error_survives_pickling_with_its_mend():
    error = PrimaError("no such class", where="a.csv", mend="Add it.")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert str(again) == str(error) == "a.csv: no such class\n  Add it."


def test_hashes_do_not_depend_on_key_order_or_process():
    assert hash_json({"a": 1, "b": 2}) == hash_json({"b": 2, "a": 1})
    assert canonical_json({"b": [1, "é"], "a": None}) == '{"a":null,"b":[1,"é"]}'
    assert hash_key(1, "exam") == 16408010174119506915


def test_numbers_that_json_has_not_become_null(tmp_path: Path):
    write_json(tmp_path / "a.json", {"x": float("nan"), "y": [1.5, float("inf")]})
    assert read_json(tmp_path / "a.json") == {"x": None, "y": [1.5, None]}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["a.txt"]


def test_reading_what_is_no_json_names_the_file(tmp_path: Path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(PrimaError, match="a.json: not valid JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(PrimaError, match="b.json: no such file"):
        read_json(tmp_path / "b.json")
