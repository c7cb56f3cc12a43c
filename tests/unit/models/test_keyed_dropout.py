"""Masks are functions of (exam key, layer, place): checked against a generator written out in Python integers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from prima_ray.base import hash_key
from prima_ray.models.keyed_dropout import KeyedDropout, KeyedDropPath, keep_mask, key_random_masks

WRAP = 2**64


@dataclass
class Batch:
    """What a model is called with, as far as masks are concerned."""

    x: Tensor
    mask_keys: Tensor | None


def batch(x: Tensor, *keys: int) -> Batch:
    return Batch(x, torch.tensor(keys))


class Model(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, batch: Batch) -> Tensor:
        found: Tensor = self.layers(batch.x)
        return found


def keyed(*layers: nn.Module) -> Model:
    model = Model(*layers).train()
    key_random_masks(model)
    return model


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % WRAP
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % WRAP
    return x ^ (x >> 31)


def splitmix(key: int, count: int) -> list[int]:
    """The first words of SplitMix64 as 16-bit fates."""
    words = [mix((key + number * 0x9E3779B97F4A7C15) % WRAP) for number in range(1, -(-count // 4) + 1)]
    lanes = [(word >> shift) & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
    return [lane - 2**16 if lane >= 2**15 else lane for lane in lanes][:count]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.999])
def test_fates_are_splitmix64s(rate: float) -> None:
    keys = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    expected = [[fate < round((1 - rate) * 2**16) - 2**15 for fate in splitmix(key % WRAP, 23)] for key in keys]
    assert keep_mask(torch.tensor(keys), 23, rate).tolist() == expected


def test_the_published_first_words_of_seed_1234567() -> None:
    # Of the reference implementation, as many libraries test against.
    assert [mix((1234567 + n * 0x9E3779B97F4A7C15) % WRAP) for n in (1, 2)] == [
        6457827717110365317,
        3203168211198807973,
    ]


def test_a_rate_is_kept_and_streams_are_independent() -> None:
    mask = keep_mask(torch.arange(200), 10_001, 0.3).double()
    assert float(mask.mean()) == pytest.approx(0.7, abs=0.002)
    # Of 200 exams and of 10,001 places, shares spread as independent coins do.
    for dim, count in ((0, 200), (1, 10_001)):
        assert float(mask.mean(dim=dim).std()) == pytest.approx((0.21 / count) ** 0.5, rel=0.15)
    noise = mask - mask.mean()
    correlations = [float((noise[:, lag:] * noise[:, :-lag]).mean()) / 0.21 for lag in (1, 2, 3, 4, 8)]
    assert max(map(abs, correlations)) < 4 / (200 * 10_001) ** 0.5
    neighbours = float((noise[1:] * noise[:-1]).mean()) / 0.21
    assert abs(neighbours) < 4 / (200 * 10_001) ** 0.5


@pytest.mark.parametrize("rate", [1e-9, 1 - 1e-9])
def test_extreme_rates_are_no_numbers_out_of_range(rate: float) -> None:
    assert float(keep_mask(torch.arange(50), 1000, rate).double().mean()) == pytest.approx(1 - rate, abs=1e-3)


def test_the_mean_stays_and_evaluation_is_untouched() -> None:
    model = keyed(nn.Dropout(0.25))
    x = torch.ones(40, 50, 30)
    dropped = model(batch(x, *range(40)))
    assert set(dropped.unique().tolist()) == {0.0, float(torch.tensor(2**16 / 49152))}
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.01)
    assert model.eval()(Batch(x, None)) is x


def test_place_in_the_batch_micro_batch_and_padding_change_nothing() -> None:
    model = keyed(nn.Dropout(0.5))
    x = torch.randn(4, 7, 5)
    whole = model(batch(x, 11, 12, 13, 14))
    parts = [model(batch(x[2:3], 13)), model(batch(x[:2], 11, 12)), model(batch(x[[3, 0]], 14, 11))]
    assert torch.equal(parts[0], whole[2:3])
    assert torch.equal(parts[1], whole[:2])
    assert torch.equal(parts[2], whole[[3, 0]])
    # Texts of a batch whose longest has three tokens, and one of nine.
    assert torch.equal(model(batch(x[:, :3], 11, 12, 13, 14)), whole[:, :3])
    longer = torch.cat([x, torch.randn(4, 2, 5)], dim=1)
    assert torch.equal(model(batch(longer, 11, 12, 13, 14))[:, :7], whole)
    assert torch.equal(model(batch(x.double(), 11, 12, 13, 14)) == 0, whole == 0)


def test_views_layers_exams_and_epochs_have_masks_of_their_own() -> None:
    model = keyed(nn.Dropout(0.5))
    other = keyed(nn.Identity(), nn.Dropout(0.5))
    x = torch.ones(3, 100)
    first, second, third = model(batch(x, 7))
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert not torch.equal(model(batch(x, 8))[0], first)
    assert not torch.equal(other(batch(x, 7))[0], first)
    # An exam with one view fewer keeps the masks of the others.
    assert torch.equal(model(batch(x[:2], 7)), torch.stack([first, second]))


def test_a_path_is_dropped_as_one_image_by_image() -> None:
    from timm.layers import DropPath

    model = keyed(DropPath(0.5))
    assert isinstance(model.layers[0], KeyedDropPath)
    x = torch.randn(60, 4, 6)
    kept = model(batch(x, *range(20)))
    whole = [bool(torch.equal(row, 2 * value)) for row, value in zip(kept, x, strict=True)]
    gone = [not row.any() for row in kept]
    assert [one != other for one, other in zip(whole, gone, strict=True)] == [True] * 60
    assert 15 < sum(gone) < 45
    fates = torch.tensor(gone).view(20, 3)
    assert (fates[:, 0] != fates[:, 1]).any(), "images of one exam go their own ways"


def test_the_global_generator_is_left_alone() -> None:
    model = keyed(nn.Dropout(0.5))
    before = torch.get_rng_state()
    model(batch(torch.ones(2, 8), 1, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_flow_where_values_do_and_checkpointing_draws_the_same_masks() -> None:
    from torch.utils.checkpoint import checkpoint

    model = keyed(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6))
    x = torch.randn(4, 6, requires_grad=True)
    (plain,) = torch.autograd.grad(model(batch(x, 1, 2, 3, 4)).pow(2).sum(), x)
    with torch.no_grad():
        model(batch(x, 9, 9, 9, 9))

    class Checkpointed(Model):
        def forward(self, batch: Batch) -> Tensor:
            found: Tensor = checkpoint(self.layers, batch.x, use_reentrant=False)
            return found

    again = Checkpointed(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6)).train()
    again.load_state_dict(model.state_dict())
    key_random_masks(again)
    (recomputed,) = torch.autograd.grad(again(batch(x, 1, 2, 3, 4)).pow(2).sum(), x)
    assert torch.equal(plain, recomputed)


def test_a_layer_under_two_names_is_keyed_under_both() -> None:
    shared = nn.Dropout(0.5)
    model = keyed(shared, nn.Sequential(shared), nn.Dropout(0.0))
    kinds = [type(layer) for layer in model.modules()][2:]
    assert kinds == [KeyedDropout, nn.Sequential, KeyedDropout, nn.Dropout]


def test_what_cannot_be_keyed_is_said() -> None:
    model = keyed(nn.Dropout(0.5))
    with pytest.raises(ValueError, match=r"^layers\.0 drops at random, but the batch has no mask_keys to draw its"):
        model(Batch(torch.ones(2, 2), None))
    with pytest.raises(ValueError, match=r"^layers\.0: 3 rows of 2 exams; masks are keyed by exam, exams first$"):
        model(batch(torch.ones(3, 2), 1, 2))


def test_a_layers_salt_is_its_name() -> None:
    layer = keyed(nn.Dropout(0.5)).layers[0]
    assert isinstance(layer, KeyedDropout)
    assert layer._salt % WRAP == hash_key("mask", "layers.0")
    assert repr(layer) == "KeyedDropout(rate=0.5)"
