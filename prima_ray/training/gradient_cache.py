"""Gradient caching (Gao et al. 2021, arXiv 2101.06983): a loss over many exams in the memory of a few.

Pass 1 runs every micro-batch without a graph and keeps the outputs; the loss of all of them gives the gradient of
each output; pass 2 runs each micro-batch again with a graph and sends that gradient through it. Nothing here knows of
engines: `backward` is whatever accumulates gradients, and with an embedding gather in the loss its collectives run
once a step, whatever the number of micro-batches.

Both passes must compute the same outputs. Random masks should be keyed by exam (then they do not depend on the size
of the micro-batch either); for plain dropout the global generator is put back to where it stood.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from torch import Tensor

Outputs = dict[str, Tensor]
LossFunction = Callable[[Outputs], tuple[Tensor, dict[str, Tensor]]]
MicroBatch = TypeVar("MicroBatch")


class Backward(Protocol):
    """Accumulates gradients; ``last`` says that nothing more comes in this step."""

    def __call__(self, loss: Tensor, *, last: bool) -> None: ...


def concatenate(pieces: Sequence[Mapping[str, Tensor]], *, batch_level: Sequence[str] = ()) -> Outputs:
    """The outputs of micro-batches as those of one batch.

    Args:
        pieces: exam-first tensors (n, ...). Where other dimensions differ, as texts do, the shorter ones get zeros
            (False) at the end; a mask that goes along as an output says which.
        batch_level: names that belong to the batch, taken from the first piece.

    Raises:
        ValueError: no pieces, or ``batch_level`` names that are not there.
    """
    if not pieces:
        raise ValueError("gradient cache: no micro-batches")
    missing = [name for name in batch_level if name not in pieces[0]]
    if missing:
        raise ValueError(f"gradient cache: no output is called {', '.join(missing)}; there are {', '.join(pieces[0])}")
    return {
        name: first if name in batch_level else _stack_rows([piece[name] for piece in pieces])
        for name, first in pieces[0].items()
    }


def _stack_rows(tensors: Sequence[Tensor]) -> Tensor:
    widest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        # F.pad counts from the last dimension: nothing before, what is missing behind.
        lacking = [wide - size for wide, size in zip(widest, tensor.shape[1:], strict=True)]
        margins = [margin for behind in reversed(lacking) for margin in (0, behind)]
        padded.append(F.pad(tensor, margins) if any(lacking) else tensor)
    return torch.cat(padded)


def backward_cached(
    forward: Callable[[MicroBatch], Outputs],
    micro_batches: Sequence[MicroBatch],
    loss: LossFunction,
    backward: Backward,
    *,
    batch_level: Sequence[str] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward and backward of a loss over all micro-batches together. One micro-batch takes the plain way.

    Args:
        forward: a micro-batch -> its outputs, (n, ...) each, or any shape for ``batch_level`` names.
        loss: outputs of the whole batch, as `concatenate` makes them -> (total, parts).
        backward: accumulates the gradients of a scalar; called once a micro-batch.
        batch_level: outputs that are the same for every micro-batch (the temperature): their gradient counts once.

    Returns:
        (total, parts), detached.

    Raises:
        ValueError: as `concatenate`.
    """
    if len(micro_batches) == 1:
        total, parts = loss(forward(micro_batches[0]))
        backward(total, last=True)
        return _detached(total, parts)

    states: list[_RandomState] = []
    pieces: list[Outputs] = []
    with torch.no_grad():
        for micro in micro_batches:
            states.append(_RandomState())
            pieces.append(forward(micro))
    after = _RandomState()
    counts = [_num_rows(piece, batch_level) for piece in pieces]
    outputs = concatenate(pieces, batch_level=batch_level)
    del pieces
    total, parts, gradients = _output_gradients(outputs, loss)
    # From here on only the gradients are needed: the outputs make room for pass 2.
    del outputs

    start = 0
    for index, (micro, state, count) in enumerate(zip(micro_batches, states, counts, strict=True)):
        state.restore()
        rows = slice(start, start + count)
        surrogate = _surrogate(forward(micro), gradients, rows, batch_level=batch_level)
        backward(surrogate, last=index == len(micro_batches) - 1)
        # Gone before the next forward, or two graphs would be alive.
        del surrogate
        start += count
    after.restore()
    return total, parts


def _detached(total: Tensor, parts: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    return total.detach(), {name: part.detach() for name, part in parts.items()}


def _num_rows(outputs: Outputs, batch_level: Sequence[str]) -> int:
    return next(len(value) for name, value in outputs.items() if name not in batch_level)


def _output_gradients(outputs: Outputs, loss: LossFunction) -> tuple[Tensor, dict[str, Tensor], Outputs]:
    """Total and parts, detached, and the gradient of every output that the loss reads."""
    leaves = {name: value.detach().requires_grad_(value.is_floating_point()) for name, value in outputs.items()}
    total, parts = loss(leaves)
    # Not through the engine: these gradients end at the outputs, no parameter is touched.
    torch.autograd.backward(total)
    return *_detached(total, parts), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def _surrogate(outputs: Outputs, gradients: Outputs, rows: slice, *, batch_level: Sequence[str]) -> Tensor:
    """A scalar whose gradient is the cached one: the sum of outputs times their gradients."""
    terms = []
    for name, gradient in gradients.items():
        value = outputs[name]
        if name in batch_level:
            # With the factor 0 after the first: every backward touches the same parameters, as ZeRO expects.
            terms.append((value * gradient).sum() * float(rows.start == 0))
        else:
            # A shorter text was padded for the loss: its own part of the gradient is the front.
            own = gradient[rows][tuple(slice(size) for size in value.shape)]
            terms.append((value * own).sum())
    # In the widest type: the sum itself means nothing, but in half precision it could overflow.
    widest = torch.promote_types(torch.float32, max((term.dtype for term in terms), key=lambda kind: kind.itemsize))
    return torch.stack([term.to(widest) for term in terms]).sum()


class _RandomState:
    """The global generators as they stand."""

    def __init__(self) -> None:
        self._host = torch.get_rng_state()
        self._device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore(self) -> None:
        torch.set_rng_state(self._host)
        if self._device is not None:
            torch.cuda.set_rng_state(self._device)
