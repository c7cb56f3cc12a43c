from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from prima_ray.base import PrimaError
from prima_ray.data.description import DataSetConfig
from prima_ray.inference.known_exam import KnownExam
from prima_ray.inference.predictor import Predictor
from prima_ray.inference.readiness import check_known_exam
from tests.conftest import TOY


def test_the_exam_is_made_of_the_description_alone() -> None:
    raw = {**TOY, "attributes": [*TOY["attributes"], {"kind": "text", "name": "note", "phrase": "{value}"},
                                 {"kind": "categorical", "name": "open", "phrase": "{value}"},
                                 {"kind": "numeric", "name": "free", "phrase": "{value}", "minimum": 0,
                                  "maximum": float("inf")}]}  # fmt: skip
    known = KnownExam.of(DataSetConfig.model_validate(raw), side=32)
    assert known == KnownExam.of(DataSetConfig.model_validate(raw), side=32)
    assert known.attributes.keys() == {"region", "itch", "age"}
    assert known.attributes["age"] == "60"
    with Image.open(io.BytesIO(known.photo)) as picture:
        assert (picture.format, picture.size) == ("PNG", (32, 32))


@pytest.mark.parametrize("run", ["tiny_fuse", "tiny_finetune"])
def test_a_model_as_it_was_trained_answers_as_then(run: str, request: pytest.FixtureRequest) -> None:
    deviation = check_known_exam(Predictor.load(request.getfixturevalue(run)))
    assert deviation is not None
    assert deviation < 1e-4


@pytest.mark.parametrize("part", ["image_tower", "text_tower", "fusion"])
def test_other_weights_are_noticed_in_every_part(part: str, tiny_fuse: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_fuse / "model", tmp_path / "model")
    weights = tmp_path / "model" / part / "model.safetensors"
    state = load_file(weights)
    generator = torch.Generator().manual_seed(0)
    for name in [key for key, value in state.items() if value.ndim == 2]:
        state[name] = state[name].std() * torch.randn(state[name].shape, generator=generator)
    save_file(state, weights)
    with pytest.raises(PrimaError) as caught:
        check_known_exam(Predictor.load(tmp_path))
    noticed = {"image_tower": "the features of its image", "text_tower": "the features of its text", "fusion": "log p("}
    assert caught.value.what.startswith(f"the known exam is not answered as at training time: {noticed[part]}")
    assert caught.value.where == str(tmp_path)


def test_a_folder_of_before_there_was_one_has_nothing_to_compare(tiny_fuse: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_fuse / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["answers"].remove("known_exam")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert check_known_exam(Predictor.load(tmp_path)) is None
