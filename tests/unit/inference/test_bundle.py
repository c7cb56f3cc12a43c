from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prima_ray.base import PrimaError
from prima_ray.inference.bundle import load_bundle, read_bundle_config

MEND = "\n  Copy the run again, or train it again."


@pytest.fixture
def model(tiny_fuse: Path, tmp_path: Path) -> Path:
    """A model folder of one's own, to damage, with nothing else of its run beside it."""
    return Path(shutil.copytree(tiny_fuse / "model", tmp_path / "elsewhere"))


def change(file: Path, **keys: Any) -> None:
    raw = json.loads(file.read_text())
    raw.update(keys)
    file.write_text(json.dumps(raw))


def test_nothing_in_a_model_folder_names_a_place_of_this_machine(tiny_fuse: Path, labelled_shards: str) -> None:
    for file in (tiny_fuse / "model").rglob("*.json"):
        text = file.read_text()
        for place in (str(tiny_fuse.parent), str(Path(labelled_shards).parent), str(Path.cwd()), str(Path.home())):
            assert place not in text or place == "/", f"{file} names {place}"


def test_it_loads_frozen_with_nothing_else_at_hand(model: Path) -> None:
    bundle = load_bundle(model)
    assert sorted(bundle.components) == ["fusion", "image_tower", "text_tower"]
    for module in bundle.components.values():
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert bundle.config.data_set.class_names == ("BCC", "NEV", "SEK")


def test_every_file_of_the_folder_is_needed_and_named_when_it_is_missing(model: Path) -> None:
    for file in sorted(item for item in model.rglob("*") if item.is_file()):
        if file.name == "tokenizer_config.json":
            continue  # holds only what the defaults say as well
        aside = file.rename(file.with_name("aside"))
        with pytest.raises(PrimaError) as caught:
            load_bundle(model)
        named = caught.value.where or ""
        assert str(file) in named or str(file.parent) in named, f"{file}: {caught.value}"
        aside.rename(file)
    load_bundle(model)


def test_a_description_that_says_something_else_is_refused(model: Path) -> None:
    file = model / "config.json"
    whole = file.read_text()

    def message() -> str:
        with pytest.raises(PrimaError) as caught:
            read_bundle_config(model)
        file.write_text(whole)
        return str(caught.value)

    change(file, version=2)
    assert message() == f"{file}: a model of version 2, this program reads version 1"
    change(file, kind="resnet")
    assert message() == f"{file}: damaged: kind: Input should be 'align', 'finetune' or 'fuse'{MEND}"
    file.write_text("[]")
    assert message() == f"{file}: damaged: holds a list, not an object"
    file.write_text(whole[:100])
    assert message().startswith(f"{file}: not valid JSON (")


def test_a_part_that_is_not_named_or_cannot_be_built_is_refused(model: Path) -> None:
    file = model / "config.json"
    whole = file.read_text()
    change(file, components={"image_tower": "image_tower", "text_tower": "text_tower"})
    with pytest.raises(PrimaError) as caught:
        load_bundle(model)
    assert str(caught.value) == f"{file}: damaged: a model of fuse needs the part 'fusion'"
    file.write_text(whole)
    part = model / "image_tower" / "config.json"
    change(part, spec={"config": {"name": 3}})
    with pytest.raises(PrimaError) as caught:
        load_bundle(model)
    assert str(model / "image_tower") in str(caught.value)
