from __future__ import annotations

import json

import numpy as np
import pytest

from prima_ray.base import PrimaError
from prima_ray.data.attribute_vectors import (
    SoftTargetConfig,
    SoftTargetEncoder,
    choose_label_temperature,
    mean_self_target,
)
from prima_ray.data.description import DataSetConfig
from prima_ray.data.metadata import MetadataTextConfig, describe, draw_dropped

DATA_SET = DataSetConfig.model_validate(
    {
        "name": "toy",
        "subject": "a skin lesion",
        "classes": [{"name": "BCC", "phrase": "basal cell carcinoma"}, {"name": "NEV", "phrase": "nevus"}],
        "attributes": [
            {
                "kind": "categorical",
                "name": "region",
                "phrase": "on the {value}",
                "values": {"FACE": "face", "ARM": "arm"},
            },
            {"kind": "categorical", "name": "background", "phrase": "of {value} descent"},
            {"kind": "boolean", "name": "itch", "phrase": "it itches", "phrase_false": "it does not itch"},
            {
                "kind": "numeric",
                "name": "diameter",
                "phrase": "diameter {value}",
                "unit": "mm",
                "minimum": 0,
                "maximum": 100,
                "disease_related": True,
            },
            {"kind": "ordinal", "name": "skin_type", "phrase": "skin type {value}", "values": {"1": "I", "2": "II"}},
            {"kind": "text", "name": "note", "phrase": "note: {value}", "relevant": False},
        ],
        "blocks": [{"name": "history", "attributes": ["background", "skin_type"]}],
    }
)
FULL = {
    "region": "FACE",
    "background": "NORTH_ITALY",
    "itch": "true",
    "diameter": "6",
    "skin_type": "2",
    "note": "grew {fast}",
}


def text(exam: dict[str, str], /, dropped: tuple[str, ...] = (), **config: object) -> str:
    return describe(exam, DATA_SET, MetadataTextConfig.model_validate(config), dropped=dropped)


def test_the_text_says_every_relevant_attribute_in_the_order_of_the_description() -> None:
    assert text(FULL) == ("a skin lesion: on the face; of north italy descent; it itches; diameter 6 mm; skin type II.")


def test_a_false_boolean_has_words_of_its_own() -> None:
    assert text({"itch": "false"}) == "a skin lesion: it does not itch."


def test_an_exam_without_attributes_still_has_a_text() -> None:
    assert text({}) == "a skin lesion."


def test_missing_values_are_stated_when_asked() -> None:
    assert text({"region": "ARM"}, missing="state", attributes=("region", "skin_type")) == (
        "a skin lesion: on the arm; skin type not recorded."
    )


def test_free_text_with_braces_is_kept_as_it_is() -> None:
    assert text(FULL, attributes=("note",)) == "a skin lesion: note: grew {fast}."


@pytest.mark.parametrize("missing", ["omit", "state"])
def test_a_masked_block_makes_complete_and_incomplete_exams_read_the_same(missing: str) -> None:
    without = {key: value for key, value in FULL.items() if key not in {"background", "skin_type"}}
    assert text(FULL, masked=("history",), missing=missing) == text(without, masked=("history",), missing=missing)
    assert text(FULL, dropped=("background", "skin_type"), missing=missing) == text(without, missing=missing)


def test_an_unknown_attribute_names_the_nearest() -> None:
    with pytest.raises(PrimaError) as caught:
        text(FULL, attributes=("regoin",))
    assert str(caught.value) == "attributes: toy has no attribute 'regoin'\n  Did you mean 'region'?"
    with pytest.raises(PrimaError) as caught:
        text(FULL, masked=("xyz",))
    assert str(caught.value) == (
        "masked: toy has no attribute 'xyz'\n  Known: background, diameter, history, itch, note, region, skin_type."
    )


def test_dropout_depends_on_the_key_alone_and_drops_blocks_together() -> None:
    config = MetadataTextConfig(attribute_dropout=0.3, block_dropout=0.5)
    draws = [draw_dropped(DATA_SET, config, 1, 0, f"exam{index}") for index in range(400)]
    assert draws == [draw_dropped(DATA_SET, config, 1, 0, f"exam{index}") for index in range(400)]
    assert draws != [draw_dropped(DATA_SET, config, 1, 1, f"exam{index}") for index in range(400)]
    assert 0.22 < np.mean(["itch" in drawn for drawn in draws]) < 0.38
    both = np.mean([{"background", "skin_type"} <= drawn for drawn in draws])
    assert 0.45 < both < 0.65
    assert draw_dropped(DATA_SET, MetadataTextConfig(), 1, 0, "exam0") == frozenset()


ROWS = [{**FULL, "diameter": str(value), "background": background} for value, background in
        [(1, "POLAND"), (2, "ITALY"), (3, "ITALY"), (4, "POLAND"), (5, "ITALY")]]  # fmt: skip


def test_soft_targets_are_one_hot_blocks_with_disease_related_ones_weighted() -> None:
    encoder = SoftTargetEncoder.fit(ROWS, DATA_SET, SoftTargetConfig(bins=2))
    assert encoder.dimensions == (
        "region=FACE", "region=ARM", "background=ITALY", "background=POLAND", "itch=false", "itch=true",
        "diameter:bin 0", "diameter:bin 1", "skin_type=1", "skin_type=2",
    )  # fmt: skip
    encoded = encoder.encode([{"region": "ARM", "itch": "true", "diameter": "3", "background": "MARS"}, {}])
    assert encoded.dtype == np.float32
    assert encoded.tolist() == [[0, 1, 0, 0, 0, 1, 0, 3, 0, 0], [0] * 10]


def test_numeric_bins_are_quantiles_of_the_training_rows() -> None:
    rows = [{"diameter": str(value)} for value in [0, 0, 0, 0, 1, 2, 3, 90]]
    encoder = SoftTargetEncoder.fit(rows, DATA_SET, SoftTargetConfig(attributes=("diameter",), bins=4))
    edges = np.unique(np.quantile([0, 0, 0, 0, 1, 2, 3, 90], [0.25, 0.5, 0.75]))
    assert encoder.blocks[0].edges == tuple(edges)
    assert encoder.encode([{"diameter": "-1"}, {"diameter": "90"}]).argmax(axis=1).tolist() == [0, len(edges)]


def test_labels_enter_only_by_a_key_and_only_where_they_are_passed() -> None:
    with_label = SoftTargetEncoder.fit(ROWS, DATA_SET, SoftTargetConfig(include_label=True))
    without = SoftTargetEncoder.fit(ROWS, DATA_SET, SoftTargetConfig())
    assert with_label.width == without.width + 2
    assert with_label.encode(ROWS, labels=["NEV", None, "BCC", "NEV", "NEV"])[:, -2:].tolist() == [
        [0, 3], [0, 0], [3, 0], [0, 3], [0, 3]]  # fmt: skip
    assert not with_label.encode(ROWS)[:, -2:].any()
    assert np.array_equal(without.encode(ROWS, labels=["NEV"] * 5), without.encode(ROWS))
    only = SoftTargetEncoder.fit(ROWS, DATA_SET, SoftTargetConfig(targets="labels"))
    assert only.encode(ROWS[:1], labels=["BCC"]).tolist() == [[3, 0]]


def test_an_attribute_called_label_is_not_the_label() -> None:
    raw = DATA_SET.model_dump()
    raw["attributes"] = [{"kind": "boolean", "name": "label", "phrase": "labelled", "phrase_false": "bare"}]
    raw["blocks"] = []
    encoder = SoftTargetEncoder.fit([{}], DataSetConfig.model_validate(raw), SoftTargetConfig())
    assert encoder.encode([{"label": "true"}], labels=["BCC"]).tolist() == [[0, 1]]


def test_the_encoder_survives_json() -> None:
    encoder = SoftTargetEncoder.fit(ROWS, DATA_SET, SoftTargetConfig(include_label=True))
    again = SoftTargetEncoder.from_dict(json.loads(json.dumps(encoder.to_dict())))
    assert again == encoder
    assert np.array_equal(again.encode(ROWS), encoder.encode(ROWS))


def test_soft_targets_of_nothing_are_a_mistake() -> None:
    with pytest.raises(PrimaError) as caught:
        SoftTargetEncoder.fit(ROWS, DATA_SET, SoftTargetConfig(attributes=("note",)))
    assert str(caught.value) == (
        "soft targets: toy has no attribute to build them from\n"
        "  Describe attributes, set `targets: labels`, or give the soft loss the weight 0."
    )


def test_the_label_temperature_gives_a_mean_self_target_of_one_half() -> None:
    rng = np.random.default_rng(0)
    vectors = np.zeros((300, 24), dtype=np.float32)
    for block in range(6):
        vectors[np.arange(300), 4 * block + rng.integers(0, 4, 300)] = 3.0 if block < 2 else 1.0
    vectors[::10] = 0.0
    chosen = choose_label_temperature(vectors, batch_size=64, seed=3)
    assert chosen == choose_label_temperature(vectors, batch_size=64, seed=3)
    fresh = np.stack([np.random.default_rng(index).permutation(300)[:64] for index in range(50)])
    assert mean_self_target(vectors, fresh, chosen) == pytest.approx(0.5, abs=0.05)


def test_the_label_temperature_of_classes_alone_stays_inside_what_can_be_reached() -> None:
    vectors = 3.0 * np.eye(3, dtype=np.float32)[np.arange(90) % 3]
    chosen = choose_label_temperature(vectors, batch_size=30, seed=0)
    batches = np.stack([np.random.default_rng(index).permutation(90)[:30] for index in range(50)])
    assert 1 / 30 < mean_self_target(vectors, batches, chosen) < 0.12
    assert choose_label_temperature(vectors[:1], batch_size=64, seed=0) == 1.0
