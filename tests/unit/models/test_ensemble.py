from __future__ import annotations

import torch

from prima_ray.models.ensemble import Ensemble
from prima_ray.models.fusion import FusionInputs, MlpFusionConfig
from tests.unit.models.conftest import feature_batch

INPUTS = FusionInputs(
    image_width=6, text_width=6, grid=(4, 4), class_phrases=("one", "two", "three"), subject="a skin lesion"
)


def ensemble() -> Ensemble:
    torch.manual_seed(0)
    return Ensemble(MlpFusionConfig(hidden=4).build(INPUTS) for _ in range(3))


def test_it_says_the_mean_of_its_members_probabilities() -> None:
    model, batch = ensemble(), feature_batch(2)
    found = model(batch)
    each = torch.stack([member(batch)["logits"].double() for member in model.members], dim=1)
    assert torch.equal(found["own"].double(), each)
    wanted = each.softmax(dim=-1).mean(dim=1)
    torch.testing.assert_close(found["logits"].double().exp(), wanted, atol=1e-6, rtol=0)
    assert not torch.allclose(each[:, 0], each[:, 1], atol=1e-3)
    assert model.inputs is INPUTS


def test_every_member_learns_by_its_own_loss_alone() -> None:
    model, batch = ensemble(), feature_batch(2)
    model(batch)["own"][:, 1].sum().backward()
    learned = {
        name.split(".")[1] for name, item in model.named_parameters() if item.grad is not None and item.grad.any()
    }
    assert learned == {"1"}
