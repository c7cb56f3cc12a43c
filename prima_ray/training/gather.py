"""The embedding gather: every rank's rows on every rank, with gradients that find their way home."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        pieces = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(pieces, x, group=group)
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Every rank's loss saw these rows as columns: the gradients of all of them belong to the row's owner.
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        world_size, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        return total.chunk(world_size)[rank], None


class Gather:
    """Callable: (n, ...) of this rank -> (n * world_size, ...), rank by rank; n must be equal on all ranks.

    Backward sums over the ranks, so that with gradients averaged over the ranks (as data-parallel engines do) the
    gradient of the mean of the ranks' losses comes out.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)

    def __call__(self, x: Tensor) -> Tensor:
        """Gather rows along the first dimension. Collective."""
        if self.world_size == 1:
            return x
        if x.dtype == torch.bool:
            return self(x.to(torch.uint8)).bool()
        gathered: Tensor = _AllGather.apply(x, self.group)
        return gathered
