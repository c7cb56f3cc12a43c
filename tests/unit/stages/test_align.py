"""What align, finetune and fuse refuse before any worker starts."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from prima_ray.stages.align import AlignConfig
from prima_ray.stages.finetune import FinetuneConfig
from prima_ray.stages.fuse import FuseConfig, tower_sources

TOWER = {"name": "resnet10t", "image_size": 32}
VIEWS = {"image_size": 32}
MLP = {"kind": "mlp"}


def messages(kind: type[AlignConfig | FinetuneConfig | FuseConfig], **keys: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"out": "run", **keys})
    return [error["msg"] for error in caught.value.errors()]


def test_views_must_have_the_size_that_the_tower_reads():
    wanted = ["Value error, views.image_size is 224, the image tower reads 32: set them alike"]
    assert messages(AlignConfig, inputs={"shards": "s"}, image_tower=TOWER) == wanted
    assert messages(FinetuneConfig, inputs={"shards": "s"}, image_tower=TOWER) == wanted


def test_align_wants_two_views():
    found = messages(AlignConfig, inputs={"shards": "s"}, image_tower=TOWER, views={**VIEWS, "num_views": 1})
    assert found == ["Value error, views.num_views: align contrasts two views of an exam"]


@pytest.mark.parametrize("keys", [{}, {"inputs": {"shards": "s", "align": "a"}, "image_tower": TOWER}])
def test_finetune_wants_one_tower(keys: dict[str, Any]):
    found = messages(FinetuneConfig, **{"inputs": {"shards": "s"}, "views": VIEWS, **keys})
    assert found == ["Value error, give inputs.align or image_tower, and not both"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"inputs": {"shards": "s"}},
            "the image tower: give inputs.finetune, inputs.align, or image_tower for an untrained one",
        ),
        (
            {"inputs": {"shards": "s", "finetune": "f"}},
            "the text tower: give inputs.align, or text_tower for an unaligned one",
        ),
        (
            {"inputs": {"shards": "s", "finetune": "f"}, "text_tower": {}, "features": "projected"},
            "features: projected needs the heads of inputs.align",
        ),
    ],
)
def test_fuse_wants_one_tower_of_each_kind(keys: dict[str, Any], message: str):
    assert messages(FuseConfig, fusion=MLP, views=VIEWS, **keys) == [f"Value error, {message}"]


def test_fuse_takes_finetunes_image_tower_before_aligns():
    def sources(**keys: Any) -> tuple[object, object, object]:
        found = tower_sources(FuseConfig.model_validate({"out": "run", "fusion": MLP, "views": VIEWS, **keys}))
        return found.image_tower, found.text_tower, found.heads

    assert sources(inputs={"shards": "s", "align": "a", "finetune": "f"}) == (
        "f/model/classifier/image_tower", "a/model/text_tower", None,
    )  # fmt: skip
    assert sources(inputs={"shards": "s", "align": "a"}, features="projected") == (
        "a/model/image_tower", "a/model/text_tower", "a/model/heads",
    )  # fmt: skip
