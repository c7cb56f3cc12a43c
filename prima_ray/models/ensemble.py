"""Fusion models of the same kind from different random weights, whose probabilities are averaged.

Deep ensembles (Lakshminarayanan et al. 2017, "Simple and Scalable Predictive Uncertainty Estimation using Deep
Ensembles"): every member learns by a loss of its own, over the same exams in the same order. They share an optimizer,
which clips the norm of all their gradients together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from prima_ray.data.batch import ImageTextBatch
from prima_ray.models.fusion import FusionInputs


class Ensemble(nn.Module):
    """M fusion models of N exams and C classes; see the module.

    Raises:
        ValueError: no member.
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        if not len(self.members):
            raise ValueError("an ensemble needs a member")

    @property
    def inputs(self) -> FusionInputs:
        """What its members read."""
        first: Any = self.members[0]
        found: FusionInputs = first.inputs
        return found

    def forward(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """`logits` (N, C), log-probabilities of the mean; `own` (N, M, C), what each member learns by."""
        said = [member(batch)["logits"] for member in self.members]
        with torch.autocast(said[0].device.type, enabled=False):
            own = torch.stack([logits.float() for logits in said], dim=1)
            return {"logits": own.log_softmax(dim=-1).logsumexp(dim=1) - math.log(own.shape[1]), "own": own}
