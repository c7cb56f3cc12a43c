from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prima_ray.base import PrimaError
from prima_ray.config import validate_config
from prima_ray.losses import (
    AlignLossConfig,
    align_losses,
    condense_outputs,
    global_semantic_loss,
    image_consistency_loss,
    local_semantic_loss,
    metadata_similarity,
    soft_semantic_loss,
)
from tests.unit import loss_references as reference

V, N, K, L, D, A = 2, 5, 3, 4, 6, 7
E = math.e


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, dtype=torch.float64, generator=generator) * scale).requires_grad_()


def compare(value: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Equal values and gradients with respect to all inputs, to 1e-10."""
    assert value.shape == ()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad(value, inputs)
    wanted = torch.autograd.grad(expected, inputs, allow_unused=True)
    for x, y, of in zip(found, wanted, inputs, strict=True):
        torch.testing.assert_close(x, torch.zeros_like(of) if y is None else y, rtol=1e-10, atol=1e-10)


WEIGHTS = [None, [1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]


def weigh(weights: list[int] | None) -> tuple[Tensor | None, list[int]]:
    if weights is None:
        return None, list(range(N))
    return torch.tensor(weights, dtype=torch.float32), [i for i, weight in enumerate(weights) if weight]


MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 1, 0, 0], [1, 1, 1, 0]]).bool()
"""Real tokens behind specials and between gaps; exam 3 has a single one."""


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_image_consistency_is_the_written_out_sum(weights: list[int] | None, symmetric: bool):
    a, b, temperature = random(N, D, seed=1), random(N, D, seed=2, scale=3.0), random(1).detach().abs() + 0.1
    temperature.requires_grad_()
    w, real = weigh(weights)
    value = image_consistency_loss(a, b, temperature=temperature, symmetric=symmetric, weights=w)
    compare(value, reference.image_consistency(a, b, temperature, real, symmetric=symmetric)[0], [a, b, temperature])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("views", [1, 2, 3])
def test_global_semantic_is_the_written_out_sum(weights: list[int] | None, views: int):
    image, text = random(views, N, D, seed=1), random(N, D, seed=2)
    temperature = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    w, real = weigh(weights)
    value = global_semantic_loss(image, text, temperature=temperature, weights=w)
    compare(value, reference.global_semantic(image, text, temperature, real)[0], [image, text, temperature])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("as_printed", [False, True])
def test_local_semantic_is_the_written_out_sum(weights: list[int] | None, as_printed: bool):
    image, text = random(V, N, K, D, seed=1, scale=2.0), random(N, L, D, seed=2, scale=2.0)
    temperature = torch.tensor([0.2], dtype=torch.float64, requires_grad=True)
    w, real = weigh(weights)
    value = local_semantic_loss(image, text, MASK, temperature=temperature, as_printed=as_printed, weights=w)
    expected = reference.local_semantic(image, text, MASK, temperature, real, as_printed=as_printed)[0]
    compare(value, expected, [image, text, temperature])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("undescribed", [False, True])
def test_local_semantic_without_attention_contrasts_exams(weights: list[int] | None, undescribed: bool):
    image, text = random(V, N, K, D, seed=1), random(N, L, D, seed=2)
    mask = MASK.clone()
    if undescribed:
        mask[1] = False
    temperature = torch.tensor([0.2], dtype=torch.float64, requires_grad=True)
    w, real = weigh(weights)
    value = local_semantic_loss(image, text, mask, temperature=temperature, attention=False, weights=w)
    compare(value, reference.loc_dir(image, text, mask, temperature, real)[0], [image, text, temperature])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("as_printed", [False, True])
@pytest.mark.parametrize("kind", ["attributes", "zero row", "asymmetric"])
def test_soft_semantic_is_the_written_out_sum(weights: list[int] | None, as_printed: bool, kind: str):
    image, text = random(V, N, D, seed=1), random(N, D, seed=2)
    temperature = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    y = random(N, A, seed=3).detach()
    if kind == "zero row":
        y[1] = 0
    g = random(N, N, seed=4).detach() if kind == "asymmetric" else reference.similarity(y, 2.0)
    if kind != "asymmetric":
        torch.testing.assert_close(metadata_similarity(y, temperature=2.0), g, rtol=1e-12, atol=1e-12)
    w, real = weigh(weights)
    value = soft_semantic_loss(image, text, g, temperature=temperature, as_printed=as_printed, weights=w)
    expected = reference.soft_semantic(image, text, g, temperature, real, as_printed=as_printed)[0]
    compare(value, expected, [image, text, temperature])


# -------------------------------------------------------------------------------------------- computed by hand


AXES = torch.tensor([[2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
"""Two directions; the lengths must not matter."""


def test_two_perpendicular_exams_by_hand():
    # Anchor 1 over {its view 2, the other's view 2, the other's view 1}: sims 1, 0, 0.
    value = image_consistency_loss(AXES, AXES * 5, temperature=1.0)
    assert float(value) == pytest.approx(math.log(E + 2) - 1)
    # Over {its text, the other's}: sims 1, 0, divided by the temperature.
    value = global_semantic_loss(AXES[None], AXES, temperature=0.5)
    assert float(value) == pytest.approx(math.log(E**2 + 1) - 2)


def test_one_patch_and_two_perpendicular_tokens_by_hand():
    patch, tokens = AXES[0].reshape(1, 1, 1, 2), AXES[None]
    mask = torch.ones(1, 2, dtype=torch.bool)
    # Both contexts are the patch: log 2 over contexts. Over tokens: sims 1 and 0, of which 1 and 0 are right.
    over_tokens = math.log(E + 1) - 0.5
    value = local_semantic_loss(patch, tokens, mask, temperature=1.0)
    assert float(value) == pytest.approx((math.log(2) + over_tokens) / 2)
    value = local_semantic_loss(patch, tokens, mask, temperature=1.0, as_printed=True)
    assert float(value) == pytest.approx(math.log(2))


def test_attention_sees_lengths_by_hand():
    # Tokens (2, 0), (0, 3) over patches of the same kind: scores 4 / sqrt 2 and 9 / sqrt 2 against 0.
    mask = torch.ones(1, 2, dtype=torch.bool)
    value = local_semantic_loss(AXES[None, None], AXES[None], mask, temperature=1.0)
    first = 1 / (1 + math.exp(-4 / math.sqrt(2)))
    second = 1 / (1 + math.exp(-9 / math.sqrt(2)))
    one, two = (2 * first, 3 * (1 - first)), (2 * (1 - second), 3 * second)
    (a, b), (c, d) = ([x / math.hypot(*context) for x in context] for context in (one, two))
    over_contexts = math.log(math.exp(a) + math.exp(c)) - a + math.log(math.exp(b) + math.exp(d)) - d
    over_tokens = math.log(math.exp(a) + math.exp(b)) - a + math.log(math.exp(c) + math.exp(d)) - d
    assert float(value) == pytest.approx((over_contexts + over_tokens) / 4)


def test_soft_targets_by_hand():
    alike = metadata_similarity(torch.tensor([[3.0, 1.0], [3.0, 1.0]], dtype=torch.float64), temperature=10.0)
    assert alike.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    # Equal exams share the target: one half each of -log softmax, log(e + 1) - 1 and log(e + 1).
    value = soft_semantic_loss(AXES[None], AXES, alike, temperature=1.0)
    assert float(value) == pytest.approx(math.log(E + 1) - 0.5)
    printed = soft_semantic_loss(AXES[None], AXES, alike, temperature=1.0, as_printed=True)
    assert float(printed) == pytest.approx(float(value) / 2)
    # An exam without attributes is its own target; the other's target is still shared, e to 1.
    half_empty = metadata_similarity(torch.tensor([[1.0], [0.0]], dtype=torch.float64), temperature=1.0)
    value = soft_semantic_loss(AXES[None], AXES, half_empty, temperature=1.0)
    own = math.log(E + 1) - 1
    assert float(value) == pytest.approx((own + own + 1 / (E + 1)) / 2)


def test_with_nothing_shared_soft_is_global():
    image, text = random(V, N, D, seed=1), random(N, D, seed=2)
    soft = soft_semantic_loss(image, text, torch.zeros(N, N, dtype=torch.float64), temperature=0.1)
    torch.testing.assert_close(soft, global_semantic_loss(image, text, temperature=0.1))


# --------------------------------------------------------------------------------------------------- the edges


def all_losses(dtype: torch.dtype, n: int, *, weights: Tensor | None = None, mask: Tensor | None = None) -> list[Any]:
    """Every loss on one set of inputs, each with the gradients of what it reads."""
    image, text = random(V, n, D, seed=1).to(dtype), random(n, D, seed=2).to(dtype)
    patches, tokens = random(V, n, K, D, seed=3).to(dtype), random(n, L, D, seed=4).to(dtype)
    mask = torch.ones(n, L, dtype=torch.bool) if mask is None else mask
    y = random(n, A, seed=5).detach()
    g = metadata_similarity(y if dtype == torch.float64 else y.float(), temperature=2.0)
    common: dict[str, Any] = {"temperature": 0.07, "weights": weights}
    inputs = [x.detach().requires_grad_() for x in (image, text, patches, tokens)]
    image, text, patches, tokens = inputs
    values = [
        image_consistency_loss(image[0], image[1], **common),
        global_semantic_loss(image, text, **common),
        local_semantic_loss(patches, tokens, mask, **common),
        local_semantic_loss(patches, tokens, mask, attention=False, **common),
        soft_semantic_loss(image, text, g, **common),
        soft_semantic_loss(image, text, g, as_printed=True, **common),
    ]
    return [(value, torch.autograd.grad(value, inputs, allow_unused=True)) for value in values]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_of_padding_is_zero_with_zero_gradients(dtype: torch.dtype):
    for value, gradients in all_losses(dtype, 3, weights=torch.zeros(3)):
        assert float(value.detach()) == 0
        assert all(not gradient.any() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_texts_of_fewer_than_two_tokens_count_zero(dtype: torch.dtype, num_tokens: int):
    mask = (torch.arange(L) < num_tokens).expand(3, L)
    local, loc_dir = all_losses(dtype, 3, mask=mask)[2:4]
    assert local[0].item() == 0
    assert all(not gradient.any() for gradient in local[1] if gradient is not None)
    assert (loc_dir[0].item() == 0) == (num_tokens == 0)
    assert all(gradient.isfinite().all() for gradient in loc_dir[1] if gradient is not None)


def test_a_lone_exam_has_no_negatives():
    for index, (value, _) in enumerate(all_losses(torch.float32, 1)):
        assert math.isfinite(float(value))
        assert (float(value) == pytest.approx(0, abs=1e-6)) == (index != 2)


def test_padding_gets_no_gradient_and_may_hold_zeros():
    image = random(V, N, D, seed=1).detach()
    image[:, 2] = 0
    image.requires_grad_()
    text, weights = random(N, D, seed=2), torch.tensor([1, 1, 0, 1, 1])
    loss = global_semantic_loss(image, text, temperature=0.1, weights=weights)
    for gradient, rows in zip(torch.autograd.grad(loss, [image, text]), (1, 0), strict=True):
        assert gradient.isfinite().all()
        assert not gradient.select(rows, 2).any()
        assert gradient.select(rows, 1).any()


def test_half_precision_is_computed_in_float32_and_float64_stays():
    exact = all_losses(torch.float64, N)
    for dtype, result, tolerance in ((torch.bfloat16, torch.float32, 0.05), (torch.float32, torch.float32, 1e-5)):
        for (value, gradients), (wanted, _) in zip(all_losses(dtype, N), exact, strict=True):
            assert value.dtype == result
            assert wanted.dtype == torch.float64
            assert all(gradient.dtype == dtype for gradient in gradients if gradient is not None)
            assert float(value) == pytest.approx(float(wanted), rel=tolerance)
    cast = random(V, N, D, seed=1).bfloat16()
    one = global_semantic_loss(cast, cast[0], temperature=0.1)
    assert torch.equal(one, global_semantic_loss(cast.float(), cast[0].float(), temperature=0.1))


def test_similarity_is_exact_and_unnormalised():
    y = torch.tensor([[3.0, 0.0, 1.0], [3.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert metadata_similarity(y, temperature=2.0).tolist() == [[5.0, 4.5, 0.0], [4.5, 5.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: image_consistency_loss(torch.ones(3, 2), torch.ones(4, 2), temperature=0.1),
         "view_b: N is 4 in (4, 2), but 3 in view_a"),
        (lambda: global_semantic_loss(torch.ones(3, 2), torch.ones(3, 2), temperature=0.1),
         "image_cls: expected the shape (V, N, D), got (3, 2)"),
        (lambda: global_semantic_loss(torch.ones(2, 0, 2), torch.ones(0, 2), temperature=0.1),
         "image_cls: expected the shape (V, N, D), got (2, 0, 2)"),
        (lambda: global_semantic_loss(torch.ones(1, 3, 2), torch.ones(3, 2), temperature=0.1, weights=torch.ones(2)),
         "weights: N is 2 in (2,), but 3 in image_cls"),
        (lambda: local_semantic_loss(torch.ones(1, 3, 4, 2), torch.ones(3, 5, 2), torch.ones(3, 4), temperature=0.1),
         "text_mask: L is 4 in (3, 4), but 5 in text_seq"),
        (lambda: soft_semantic_loss(torch.ones(1, 3, 2), torch.ones(3, 2), torch.ones(3, 4), temperature=0.1),
         "similarity: expected a column for each of the 3 exams of the global batch, got the shape (3, 4)"),
        (lambda: metadata_similarity(torch.ones(3), temperature=1.0),
         "attributes: expected the shape (N, A), got (3,)"),
        (lambda: metadata_similarity(torch.ones(3, 2), temperature=0.0),
         "temperature: expected a number above 0, got 0.0"),
        (lambda: global_semantic_loss(torch.ones(1, 3, 2), torch.ones(3, 2), temperature=torch.ones(3)),
         "temperature: expected one number, got the shape (3,)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(call: Any, text: str):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole text is compared
        call()
    assert str(raised.value) == text


# ------------------------------------------------------------------------------------------ configs and the sum


def outputs() -> dict[str, Tensor]:
    return {
        "image_cls": random(N, V, D, seed=1),
        "image_seq": random(N, V, K, D, seed=2),
        "text_cls": random(N, D, seed=3),
        "text_seq": random(N, L, D, seed=4),
        "temperature": torch.tensor([0.2], dtype=torch.float64, requires_grad=True),
    }


def total(config: AlignLossConfig, out: dict[str, Tensor], **changes: Any) -> tuple[Tensor, dict[str, Tensor]]:
    y = random(N, A, seed=5).detach()
    arguments = {"attributes": y, "label_temperature": 3.0, **changes}
    condensed = condense_outputs(config, out, token_mask=arguments.pop("token_mask", MASK))
    return align_losses(config, condensed, **arguments)


def test_the_default_total_is_the_papers():
    out, everyone = outputs(), list(range(N))
    value, parts = total(AlignLossConfig(), out)
    image, patches, learned = out["image_cls"].transpose(0, 1), out["image_seq"].transpose(0, 1), out["temperature"]
    g = reference.similarity(random(N, A, seed=5).detach(), 3.0)
    expected = {
        "image_consistency_loss": reference.image_consistency(image[0], image[1], 0.1, everyone, symmetric=True),
        "global_semantic_loss": reference.global_semantic(image, out["text_cls"], learned, everyone)[0],
        "local_semantic_loss": reference.local_semantic(
            patches, out["text_seq"], MASK, 0.1, everyone, as_printed=False
        ),
        "soft_semantic_loss": reference.soft_semantic(image, out["text_cls"], g, learned, everyone, as_printed=False)[
            0
        ],
    }
    assert list(parts) == list(expected)
    for name, part in parts.items():
        torch.testing.assert_close(part, expected[name], rtol=1e-10, atol=1e-10)
    weights = dict(zip(expected, (0.2, 0.3, 0.2, 0.3), strict=True))
    compare(value, sum(weights[name] * part for name, part in expected.items()), list(out.values()))


def test_every_key_of_a_loss_changes_it():
    def value(section: str, **keys: object) -> float:
        others = {name: {"weight": 0} for name in AlignLossConfig.model_fields if name != section}
        found, parts = total(AlignLossConfig.model_validate({section: {"weight": 1, **keys}, **others}), outputs())
        assert list(parts) == [f"{section}_loss"]
        return float(found)

    for section, keys in {
        "image_consistency": ({"symmetric": False}, {"temperature": 0.3}, {"temperature": None}),
        "global_semantic": ({"temperature": 0.3},),
        "local_semantic": ({"variant": "loc_dir"}, {"as_printed": True}, {"temperature": 0.3}),
        "soft_semantic": ({"as_printed": True}, {"temperature": 0.3}),
    }.items():
        values = [value(section), *(value(section, **changed) for changed in keys)]
        assert len(set(values)) == len(values), section
        assert value(section, weight=2) == pytest.approx(2 * values[0])


class FirstOfEight:
    """A gather seen from one of eight ranks, all of which hold the same exams."""

    rank = 3

    def __call__(self, x: Tensor) -> Tensor:
        return x.repeat(8, *[1] * (x.ndim - 1))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes, forward or backward."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [item.numel() for item in tree_leaves(result) if isinstance(item, Tensor)]
        self.elements = max([self.elements, *found])
        return result


@pytest.mark.parametrize("local", [{}, {"variant": "loc_dir"}])
@pytest.mark.parametrize("printed", [False, True])
def test_no_rank_makes_a_block_of_global_by_global(printed: bool, local: dict[str, Any]):
    """Eight exams of 64 on a rank: blocks are (2 views x 8 x 64), never (64 x 64)."""
    config = AlignLossConfig.model_validate({"soft_semantic": {"as_printed": printed}, "local_semantic": local})

    def largest(count: int, gather: Any) -> int:
        shapes = {"image_cls": (2, 3), "image_seq": (2, 2, 3), "text_cls": (3,), "text_seq": (4, 3)}
        out = {name: random(count, *shape, seed=1) for name, shape in shapes.items()}
        out["temperature"] = torch.tensor([0.2], dtype=torch.float64, requires_grad=True)
        mask, y = torch.ones(count, 4, dtype=torch.bool), random(count, 5, seed=2).detach()
        with Largest() as mode:
            total(config, out, token_mask=mask, attributes=y, gather=gather)[0].backward()
        return mode.elements

    assert largest(64, None) >= 64 * 64, "one process sees them, so the measure sees them"
    assert largest(8, FirstOfEight()) == 2 * 8 * 64


def test_a_loss_of_weight_zero_is_not_computed():
    out = outputs()
    config = AlignLossConfig.model_validate({"soft_semantic": {"weight": 0}, "local_semantic": {"weight": 0}})
    value, parts = total(config, out, attributes=None, token_mask=torch.zeros(1))
    assert list(parts) == ["image_consistency_loss", "global_semantic_loss"]
    value.backward()
    assert out["image_seq"].grad is None


def test_fixed_temperatures_leave_the_learnable_one_alone():
    out = outputs()
    config = AlignLossConfig.model_validate(
        {"global_semantic": {"temperature": 0.1}, "soft_semantic": {"temperature": 0.1}}
    )
    total(config, out)[0].backward()
    assert out["temperature"].grad is None


def test_what_a_loss_misses_is_said():
    with pytest.raises(ValueError, match="^the soft semantic loss needs the attribute vectors of the batch$"):
        total(AlignLossConfig(), outputs(), attributes=None)
    with pytest.raises(ValueError, match="^the local semantic loss needs the mask of real tokens$"):
        total(AlignLossConfig(), outputs(), token_mask=None)
    out = outputs()
    out["image_cls"] = out["image_cls"][:, :1]
    with pytest.raises(ValueError, match="^image consistency compares two views of an exam, got 1$"):
        total(AlignLossConfig(), out)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ({name: {"weight": 0} for name in AlignLossConfig.model_fields},
         "every loss has the weight 0: there is nothing to train"),
        ({"local_semantic": {"variant": "loc_dir", "as_printed": True}},
         "local_semantic: as_printed belongs to `variant: attention`; loc_dir has no printed form"),
        ({"image_consistancy": {}}, "unknown key 'image_consistancy', did you mean 'image_consistency'?"),
        ({"soft_semantic": {"wieght": 1}}, "unknown key 'soft_semantic.wieght', did you mean 'soft_semantic.weight'?"),
        ({"global_semantic": {"temperature": 0}},
         "global_semantic.temperature: input should be greater than 0 (got 0)"),
    ],
)  # fmt: skip
def test_mistakes_in_the_section_are_named(raw: dict[str, Any], text: str):
    with pytest.raises(PrimaError) as raised:
        validate_config(AlignLossConfig, raw, where="align.yaml")
    assert str(raised.value) == f"align.yaml: {text}"
