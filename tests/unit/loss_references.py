"""The losses once more, as sums over exams i, j, tokens l, m and patches k, for tests to compare with.

Written from the formulas, a number at a time, without a line in common with `prima_ray.losses`. ``real`` lists the
exams that are no padding: the others are simply not there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    return sum((x * y for x, y in zip(a, b, strict=True)), torch.zeros((), dtype=torch.float64))


def sim(a: Tensor, b: Tensor, temperature: Tensor | float) -> Tensor:
    return dot(a, b) / (dot(a, a).sqrt() * dot(b, b).sqrt()) / temperature


def mean(values: list[Tensor]) -> Tensor:
    return sum(values, torch.zeros((), dtype=torch.float64)) / len(values)


def surprise(right: Tensor, candidates: list[Tensor]) -> Tensor:
    """-log of the share of ``right`` among the exponentials of ``candidates``."""
    return -(right.exp() / sum(candidate.exp() for candidate in candidates)).log()


def image_consistency(a: Tensor, b: Tensor, temperature: Tensor | float, real: list[int], *, symmetric: bool) -> Tensor:
    def one_sided(anchor: Tensor, other: Tensor) -> Tensor:
        values = []
        for i in real:
            candidates = [sim(anchor[i], other[j], temperature) for j in real]
            candidates += [sim(anchor[i], anchor[j], temperature) for j in real if j != i]
            values.append(surprise(sim(anchor[i], other[i], temperature), candidates))
        return mean(values)

    return mean([one_sided(a, b), one_sided(b, a)]) if symmetric else one_sided(a, b)


def info_nce(image: Tensor, text: Tensor, temperature: Tensor | float, real: list[int]) -> Tensor:
    values = []
    for i in real:
        own = sim(image[i], text[i], temperature)
        values.append(surprise(own, [sim(image[i], text[j], temperature) for j in real]))
        values.append(surprise(own, [sim(image[j], text[i], temperature) for j in real]))
    return mean(values)


def global_semantic(image: Tensor, text: Tensor, temperature: Tensor | float, real: list[int]) -> Tensor:
    return mean([info_nce(view, text, temperature, real) for view in image])


def local_semantic(
    image: Tensor, text: Tensor, mask: Tensor, temperature: Tensor | float, real: list[int], *, as_printed: bool
) -> Tensor:
    values = []
    for view in image:
        for i in real:
            tokens = [text[i, index] for index in range(text.shape[1]) if mask[i, index]]
            if len(tokens) < 2:
                values.append(torch.zeros((), dtype=torch.float64))
                continue
            contexts = []
            for q in tokens:
                scores = [dot(q, p) / math.sqrt(text.shape[-1]) for p in view[i]]
                total = sum(score.exp() for score in scores)
                contexts.append(sum(score.exp() / total * p for score, p in zip(scores, view[i], strict=True)))
            terms = []
            for q, c in zip(tokens, contexts, strict=True):
                own = sim(q, c, temperature)
                over_contexts = surprise(own, [sim(q, other, temperature) for other in contexts])
                over_tokens = surprise(own, [sim(c, other, temperature) for other in tokens])
                terms += [over_contexts, over_contexts if as_printed else over_tokens]
            values.append(mean(terms))
    return mean(values)


def loc_dir(image: Tensor, text: Tensor, mask: Tensor, temperature: Tensor | float, real: list[int]) -> Tensor:
    """Exams without a real token take no part and count zero."""
    described = [i for i in real if mask[i].any()]
    texts = {i: mean([text[i, index] for index in range(text.shape[1]) if mask[i, index]]) for i in described}
    stacked = torch.stack([texts.get(i, torch.zeros_like(text[i, 0])) for i in range(len(text))])
    values = []
    for view in image:
        patches = torch.stack([mean(list(exam)) for exam in view])
        values.append(info_nce(patches, stacked, temperature, described) * len(described) / len(real))
    return mean(values)


def similarity(attributes: Tensor, temperature: float) -> Tensor:
    rows = [torch.stack([dot(a, b) / temperature for b in attributes]) for a in attributes]
    return torch.stack(rows)


def soft_semantic(
    image: Tensor, text: Tensor, g: Tensor, temperature: Tensor | float, real: list[int], *, as_printed: bool
) -> Tensor:
    def over_texts(i: int, j: int) -> Tensor | float:
        if g[i, i] == 0:
            return float(i == j)
        return g[i, j].exp() / sum(g[i, k].exp() for k in real)

    def over_images(i: int, j: int) -> Tensor | float:
        if as_printed:
            return over_texts(i, j)
        if g[j, j] == 0:
            return float(i == j)
        return g[i, j].exp() / sum(g[k, j].exp() for k in real)

    total = torch.zeros((), dtype=torch.float64)
    for view in image:
        for i in real:
            for j in real:
                own = sim(view[i], text[j], temperature)
                total = total + over_texts(i, j) * surprise(own, [sim(view[i], text[k], temperature) for k in real])
                total = total + over_images(i, j) * surprise(own, [sim(view[k], text[j], temperature) for k in real])
    # Printed: 1 / (4 N^2) for two views; ours: the mean over views of 1 / (2 N).
    return total / (2 * len(image) * len(real) ** (2 if as_printed else 1))
