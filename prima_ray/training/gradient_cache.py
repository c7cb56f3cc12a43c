"""Gradient caching (Gao et al. 2021, arXiv 2101.06983): a loss over many exams in the memory of a few.

Pass 1 runs every micro-batch without a graph and keeps the outputs; the loss of all of them gives the gradient of
each output; pass 2 runs each micro-batch again with a graph and sends that gradient through it. The forward must give
the same outputs twice: random masks are keyed, and the torch generator is put back for what is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from prima_ray.data.batch import ImageTextBatch

Outputs = dict[str, Tensor]
LossFunction = Callable[[Outputs], tuple[Tensor, dict[str, Tensor]]]


class Backward(Protocol):
    """Accumulates gradients; ``last`` says that nothing more comes in this step."""

    def __call__(self, loss: Tensor, *, last: bool) -> None: ...


def concatenate(pieces: Sequence[Mapping[str, Tensor]], *, batch_level: Sequence[str] = ()) -> Outputs:
    """The outputs of micro-batches as those of one batch: exams along the first dimension.

    Args:
        batch_level: names that belong to the batch, taken from the first piece.
    """
    return {
        name: first if name in batch_level else torch.cat([piece[name] for piece in pieces])
        for name, first in pieces[0].items()
    }


def backward_cached(
    forward: Callable[[ImageTextBatch], Outputs],
    micro_batches: Sequence[ImageTextBatch],
    loss: LossFunction,
    backward: Backward,
    *,
    batch_level: Sequence[str] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward and backward of a loss over all micro-batches together.

    Args:
        forward: a micro-batch -> its outputs, (n, ...) each, or any shape for ``batch_level`` names.
        loss: outputs of the whole batch -> (total, parts).
        backward: accumulates the gradients of a scalar.
        batch_level: outputs that are the same for every micro-batch (the temperature): their gradient counts once.

    Returns:
        (total, parts), detached.
    """
    if len(micro_batches) == 1:
        total, parts = loss(forward(micro_batches[0]))
        backward(total, last=True)
        return total.detach(), {name: part.detach() for name, part in parts.items()}

    states = []
    pieces = []
    with torch.no_grad():
        for micro in micro_batches:
            states.append(_random_state())
            pieces.append(forward(micro))
    after = _random_state()
    outputs = {
        name: value.detach().requires_grad_(value.is_floating_point())
        for name, value in concatenate(pieces, batch_level=batch_level).items()
    }
    del pieces
    total, parts = loss(outputs)
    # Not through the engine: these gradients end at the outputs, no parameter is touched.
    total.backward()  # type: ignore[no-untyped-call]
    gradients = {name: value.grad for name, value in outputs.items() if value.grad is not None}

    start = 0
    for index, micro in enumerate(micro_batches):
        _restore_random_state(states[index])
        surrogate = _surrogate(
            forward(micro), gradients, start, len(micro), batch_level=batch_level, counts_batch_level=index == 0
        )
        start += len(micro)
        backward(surrogate, last=index == len(micro_batches) - 1)
    _restore_random_state(after)
    return total.detach(), {name: part.detach() for name, part in parts.items()}


def _surrogate(
    outputs: Outputs,
    gradients: Mapping[str, Tensor],
    start: int,
    count: int,
    *,
    batch_level: Sequence[str],
    counts_batch_level: bool,
) -> Tensor:
    """A scalar whose gradient is the cached one: the sum of outputs times their gradients."""
    terms = []
    for name, gradient in gradients.items():
        if name in batch_level:
            # Kept in the graph with the factor 0: every rank's backward touches the same parameters.
            terms.append((outputs[name] * gradient).sum() * float(counts_batch_level))
        else:
            terms.append((outputs[name] * gradient[start : start + count]).sum())
    return torch.stack([term.to(terms[0].dtype) for term in terms]).sum()


def _random_state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _restore_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
