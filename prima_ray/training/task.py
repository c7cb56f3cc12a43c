"""What the loop asks of a task, and nothing of Ray or DeepSpeed.

A task is a picklable description; the model is built from it inside the worker. To add one: a class with these
members in `tasks/`, and a stage that launches it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from prima_ray.base import PrimaError, hash_key
from prima_ray.data.batch import ImageTextBatch
from prima_ray.training.contexts import StreamSpec, WorkerContext
from prima_ray.training.gather import Gather


class AgreedError(PrimaError):
    """A mistake that every rank finds at the same point: none of them is left waiting for another."""


class Task(Protocol):
    """A batch in; outputs, losses and metrics out."""

    @property
    def kind(self) -> str:
        """The stage's name."""
        ...

    @property
    def interacts(self) -> bool:
        """True where exams meet in the loss: then it spans the global batch, whatever the micro-batch."""
        ...

    @property
    def batch_level(self) -> tuple[str, ...]:
        """Outputs that belong to the batch rather than to its exams, such as the temperature, (1,)."""
        ...

    @property
    def metric_names(self) -> Collection[str]:
        """What `metrics` reports."""
        ...

    def prepare(self, context: WorkerContext) -> Self:
        """Compute what is computed once (features of frozen towers), or find it done. Collective."""
        ...

    def build(self) -> nn.Module:
        """The model, on the CPU, the same on every rank."""
        ...

    def stream(self, *, train: bool) -> StreamSpec:
        """With augmentation, or without; after `prepare`."""
        ...

    def batch_weight(self, batch: ImageTextBatch) -> Tensor:
        """() float32: this batch's share of the loss's denominator. Not asked where exams interact."""
        ...

    def condense(self, outputs: Mapping[str, Tensor], batch: ImageTextBatch) -> dict[str, Tensor]:
        """What `loss` and `observe` need of these exams, made of each exam alone; the same where nothing is too much.

        It is kept for the whole batch, while the outputs themselves live as long as their micro-batch.
        """
        ...

    def loss(
        self, outputs: Mapping[str, Tensor], batch: ImageTextBatch, *, gather: Gather | None, total_weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of this rank's rows, whose mean over ranks is the global loss, and its parts for the log.

        ``outputs`` are condensed, and ``batch`` is without what only the model reads (`ImageTextBatch.light`).

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


@contextmanager
def seeded_init(seed: int, *key: object) -> Iterator[None]:
    """Random weights that depend on (seed, key) alone, leaving the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash_key(seed, *key) % 2**63)
        yield


_RATES = ("drop_prob", "drop_rate", "dropout", "attention_dropout")
"""Where layers of torch, timm and transformers keep the rate of their random masks."""


def refuse_unkeyed(module: nn.Module) -> None:
    """Refuse layers whose result depends on which exams share a worker's batch, or on a worker's random numbers.

    What `models.keyed_dropout.key_random_masks` could key is no longer among them.

    Raises:
        AgreedError: naming the layer.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise AgreedError(
                f"the layer {name} is a batch norm, which mixes the exams of a worker's batch",
                mend="Choose a model with layer or group norm.",
            )
        for key in ("p",) if isinstance(layer, nn.modules.dropout._DropoutNd) else _RATES:
            rate = getattr(layer, key, None)
            if isinstance(rate, float) and rate > 0:
                raise AgreedError(
                    f"the layer {name} drops at random ({key} {rate:g}), which would depend on the worker that draws",
                    mend="Set its rate to 0; `lora.dropout`, dropout layers and drop paths are keyed by exam.",
                )
