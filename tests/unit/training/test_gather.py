"""The gather, and with it all losses and the gradient cache, on two and on three gloo ranks: one start each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from prima_ray.losses import AlignLossConfig, align_losses, condense_outputs
from prima_ray.models.keyed_dropout import ExamKeys, KeyedDropout
from prima_ray.training.gather import Gather
from prima_ray.training.gradient_cache import backward_cached
from prima_ray.training.ranks import start_ranks

N, V, K, L, WIDTH, D, A = 6, 2, 3, 5, 4, 5, 7
SHAPES = {"image_cls": (V,), "image_seq": (V, K), "text_cls": (), "text_seq": (L,)}
TEXT_LENGTHS = (5, 2, 3, 4, 1, 3)
WEIGHTS = {
    "no padding": (1, 1, 1, 1, 1, 1),
    "one exam of padding": (1, 1, 0, 1, 1, 1),
    "a last rank of padding": (1, 1, 1, 0, 0, 0),
}


def alone(section: str, **keys: object) -> AlignLossConfig:
    others = {name: {"weight": 0} for name in AlignLossConfig.model_fields if name != section}
    return AlignLossConfig.model_validate({section: {"weight": 1, **keys}, **others})


CONFIGS = {
    "all": AlignLossConfig(),
    "image": alone("image_consistency"),
    "image, one-sided": alone("image_consistency", symmetric=False, temperature=None),
    "global": alone("global_semantic"),
    "local": alone("local_semantic", temperature=None),
    "local, as printed": alone("local_semantic", as_printed=True),
    "local, loc_dir": alone("local_semantic", variant="loc_dir"),
    "soft": alone("soft_semantic"),
    "soft, as printed": alone("soft_semantic", as_printed=True),
}


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image = nn.Parameter(torch.randn(WIDTH, D, dtype=torch.float64, generator=generator))
        self.text = nn.Parameter(torch.randn(WIDTH, D, dtype=torch.float64, generator=generator))
        self.temperature = nn.Parameter(torch.tensor([0.3], dtype=torch.float64))
        self.exams = ExamKeys()
        self.drops = nn.ModuleDict({name: KeyedDropout(name, 0.3, self.exams) for name in SHAPES})

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.exams.keys = batch["mask_keys"]
        batch = {**batch, **{name: drop(batch[name]) for name, drop in self.drops.items()}}
        outputs = {name: batch[name] @ self.image for name in ("image_cls", "image_seq")}
        outputs |= {name: (batch[name] @ self.text).tanh() for name in ("text_cls", "text_seq")}
        return {**outputs, "temperature": self.temperature}


def make_batch(rows: slice, weights: tuple[int, ...]) -> dict[str, Tensor]:
    """Exams ``rows``; texts only as long as these exams need."""
    generator = torch.Generator().manual_seed(1)
    batch = {
        name: torch.randn(N, *shape, WIDTH, dtype=torch.float64, generator=generator)[rows]
        for name, shape in SHAPES.items()
    }
    y = torch.randn(N, A, dtype=torch.float64, generator=generator)
    y[1] = 0
    length = max(TEXT_LENGTHS[rows])
    batch["text_seq"] = batch["text_seq"][:, :length]
    batch["token_mask"] = (torch.arange(L) < torch.tensor(TEXT_LENGTHS)[:, None])[rows, :length]
    batch["mask_keys"] = torch.arange(100, 100 + N)[rows]
    return {**batch, "attributes": y[rows], "weights": torch.tensor(weights, dtype=torch.float32)[rows]}


def train_step(
    config: AlignLossConfig,
    rows: slice,
    weights: tuple[int, ...],
    *,
    gather: Callable[[Tensor], Tensor] | None = None,
    micro_batch: int = N,
) -> tuple[Tensor, list[Tensor]]:
    """This rank's loss and gradients of the parameters, not yet averaged."""
    towers, batch = Towers(), make_batch(rows, weights)
    ends = range(rows.start, rows.stop, micro_batch)
    micro = [make_batch(slice(start, min(start + micro_batch, rows.stop)), weights) for start in ends]

    def loss(outputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return align_losses(
            config,
            outputs,
            attributes=batch["attributes"],
            label_temperature=3.0,
            weights=batch["weights"],
            gather=gather,
        )

    def forward(piece: dict[str, Tensor]) -> dict[str, Tensor]:
        return condense_outputs(config, towers(piece), token_mask=piece["token_mask"])

    total, _ = backward_cached(
        forward, micro, loss, lambda loss, last: torch.autograd.backward(loss), batch_level=("temperature",)
    )
    zero = torch.zeros((), dtype=torch.float64)
    return total, [zero if value.grad is None else value.grad for value in towers.parameters()]


# ------------------------------------------------------------------------------------------ what the ranks run


def check_plain(gather: Gather) -> dict[str, Any]:
    rank, world = gather.rank, gather.world_size
    whole = torch.arange(world * 4 * 3, dtype=torch.float64).reshape(world * 4, 3)
    own = whole.chunk(world)[rank].clone().requires_grad_()
    found = gather(own)
    # The loss of rank r weights row i by (r + 1) * i: the ranks' gradients of one row add up.
    (found * torch.arange(world * 4)[:, None] * (rank + 1)).sum().backward()
    expected = torch.arange(world * 4).chunk(world)[rank][:, None] * (world * (world + 1) / 2)
    counts, flags = torch.arange(4) + 4 * rank, torch.tensor([True, False]) ^ bool(rank)
    try:
        Gather()(torch.zeros(2 + rank, 3))
    except ValueError as error:
        unequal = str(error)
    transposed = gather(own.detach().T.contiguous().T)
    return {
        "value": torch.equal(found.detach(), whole) and found.dtype == torch.float64,
        "gradient": torch.equal(own.grad, expected.expand(4, 3).double()),
        "not contiguous": torch.equal(transposed, whole),
        "integers": torch.equal(gather(counts), torch.arange(4 * world)),
        "flags": gather(flags).tolist() == [value for other in range(world) for value in (not other, bool(other))],
        "no gradient": not gather(own.detach()).requires_grad,
        "unequal": unequal,
    }


def rank_main(rank: int, world: int, folder: str) -> None:
    gather = Gather()
    rows = slice(rank * (N // world), (rank + 1) * (N // world))
    # A callable without a rank of its own: the losses ask torch.distributed.
    ways: dict[str, dict[str, Any]] = {
        "whole": {"gather": gather},
        "cached by one": {"gather": gather, "micro_batch": 1},
        "cached by two": {"gather": gather, "micro_batch": 2},
        "plain callable": {"gather": gather.__call__},
    }
    result: dict[str, Any] = {"plain": check_plain(gather), "losses": {}}
    for name, config in CONFIGS.items():
        for padding, weights in WEIGHTS.items():
            for way, arguments in ways.items():
                total, gradients = train_step(config, rows, weights, **arguments)
                mean = [total.clone(), *gradients]
                for value in mean:
                    dist.all_reduce(value)
                result["losses"][name, padding, way] = [value / world for value in mean]
    torch.save(result, Path(folder, f"rank{rank}.pt"))


@pytest.fixture(scope="module", params=[2, 3])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gather")
    start_ranks(rank_main, request.param, request.param, str(folder))
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(request.param)]


# --------------------------------------------------------------------------------------------------- the claims


def test_rows_come_from_all_ranks_and_gradients_go_back(results: list[dict[str, Any]]):
    numbers = ", ".join(str(2 + rank) for rank in range(len(results)))
    widths = ", ".join("3" for _ in results)
    for found in results:
        plain = dict(found["plain"])
        assert plain.pop("unequal") == (
            f"gather: the ranks hold {numbers} rows of {widths} numbers; "
            "every rank must hold as many (pad with exams of weight 0)"
        )
        assert [name for name, right in plain.items() if not right] == []


@pytest.mark.parametrize("padding", WEIGHTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_mean_over_ranks_is_the_loss_of_one_process(results: list[dict[str, Any]], name: str, padding: str):
    total, gradients = train_step(CONFIGS[name], slice(0, N), WEIGHTS[padding])
    ways = {way for _, _, way in results[0]["losses"]}
    assert len(ways) == 4
    for found in results:
        for way in ways:
            mean, *others = found["losses"][name, padding, way]
            torch.testing.assert_close(mean, total, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(others, gradients, rtol=1e-10, atol=1e-11)


def test_one_process_gathers_nothing():
    x = torch.randn(3, 2, requires_grad=True)
    gather = Gather()
    assert (gather.rank, gather.world_size) == (0, 1)
    assert gather(x) is x
    with pytest.raises(ValueError, match="^gather: expected rows, got a tensor without dimensions$"):
        gather(torch.tensor(1.0))


def test_a_gather_of_one_process_gives_the_loss_of_none():
    without = train_step(CONFIGS["all"], slice(0, N), WEIGHTS["one exam of padding"])
    with_one = train_step(CONFIGS["all"], slice(0, N), WEIGHTS["one exam of padding"], gather=Gather())
    torch.testing.assert_close(with_one, without, rtol=0, atol=1e-14)
