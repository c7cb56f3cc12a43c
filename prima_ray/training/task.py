"""What the loop asks of a task, and nothing of Ray or DeepSpeed.

A task is a picklable description; the model is built from it inside the worker. To add one: a class with these
members in its own module, and a stage that launches it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.stream import Collator
from prima_ray.training.gather import Gather


class Task(Protocol):
    """A batch in; outputs, losses and metrics out."""

    kind: str
    interacts: bool
    """True where exams meet in the loss: then it spans the global batch, whatever the micro-batch."""
    batch_level: tuple[str, ...]
    """Outputs that belong to the batch rather than to its exams, such as the temperature, (1,)."""

    def build(self) -> nn.Module:
        """The model, on the CPU, the same on every rank."""
        ...

    def collator(self, *, train: bool) -> Collator:
        """How planned rows become a batch, with augmentation or without."""
        ...

    def feature_folder(self, *, train: bool) -> str | None:
        """The cached features that the stream adds, if any."""
        ...

    def batch_weight(self, batch: ImageTextBatch) -> Tensor:
        """() float32: this batch's share of the loss's denominator. Not asked where exams interact."""
        ...

    def loss(
        self, outputs: Mapping[str, Tensor], batch: ImageTextBatch, *, gather: Gather | None, total_weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of this rank's rows, whose mean over ranks is the global loss, and its parts for the log.

        Where exams do not interact it is a sum over the rows divided by ``total_weight``, the mean over ranks of the
        ranks' `batch_weight`, so that the losses of micro-batches add up.
        """
        ...

    def observe(
        self, outputs: Mapping[str, Tensor], batch: ImageTextBatch, *, gather: Gather | None
    ) -> dict[str, Tensor]:
        """Per-exam tensors (n, ...) of one validation batch that `metrics` needs."""
        ...

    def metrics(self, observed: Mapping[str, Tensor]) -> dict[str, float]:
        """Validation figures from the observations of all exams."""
        ...
