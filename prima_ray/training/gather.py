"""The embedding gather: every rank's rows on every rank, with gradients that find their way home."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.num_rows = group, len(x)
        gathered = x.new_empty((dist.get_world_size(group) * len(x), *x.shape[1:]))
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Every rank's loss saw these rows as columns: the gradients of all of them belong to the row's owner.
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        first = dist.get_rank(ctx.group) * ctx.num_rows
        return total[first : first + ctx.num_rows], None


class Gather:
    """Callable: this rank's (n, ...) -> (n * world_size, ...), rank by rank. Collective, also in backward.

    Backward sums over the ranks. With gradients averaged over the ranks, as data-parallel engines do, that makes the
    gradient of the mean of the ranks' losses. One process, or no process group, gives back what it got.

    Args:
        group: a process group; None: the default one.
    """

    def __init__(self, group: Any = None) -> None:
        alone = not (dist.is_available() and dist.is_initialized())
        self.group = group
        self.rank = 0 if alone else dist.get_rank(group)
        self.world_size = 1 if alone else dist.get_world_size(group)
        self._compared = False

    def __call__(self, x: Tensor) -> Tensor:
        """Gather rows along the first dimension; tensors of any type, gradients where they have some.

        Raises:
            ValueError: a tensor without dimensions; at the first call, ranks with unequal shapes.
        """
        if x.ndim == 0:
            raise ValueError("gather: expected rows, got a tensor without dimensions")
        if self.world_size == 1:
            return x
        if not self._compared:
            self._compare(x)
        if x.dtype == torch.bool:
            return self(x.to(torch.uint8)).bool()
        gathered: Tensor = _AllGather.apply(x, self.group)
        return gathered

    def _compare(self, x: Tensor) -> None:
        # Unequal shapes would hang or crash the backend. Once is enough, and every rank agrees which call that is:
        # the plan gives all ranks the same number of rows at every step, and a comparison costs a synchronisation.
        shape = torch.tensor([len(x), x[:1].numel()], device=x.device)
        shapes = shape.new_empty(self.world_size * 2)
        dist.all_gather_into_tensor(shapes, shape, group=self.group)
        rows, widths = shapes.view(-1, 2).T.tolist()
        if len(set(rows)) > 1 or len(set(widths)) > 1:
            raise ValueError(
                f"gather: the ranks hold {', '.join(map(str, rows))} rows of {', '.join(map(str, widths))} numbers; "
                "every rank must hold as many (pad with exams of weight 0)"
            )
        self._compared = True
