"""The record of `faithfulness` -> a part of the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from prima_ray.evaluation.plots import BLUE, GREY, INK, figure_of, png_of
from prima_ray.evaluation.report import Grid, Section
from prima_ray.evaluation.sections import interval_cell

Record = Mapping[str, Any]
_COLOURS = [BLUE, "#c05621", INK]
_WORD = {
    "better": "better than chance",
    "not distinguishable": "not shown to be better than chance",
    "worse": "worse than chance",
    "too few": "too few",
}


def explanation_section(record: Record) -> Section:
    """Whether the explanations name what the answer rests on."""
    parts = {"photos": "parts of the photo", "attributes": "attributes"}
    grids, pictures = [], {}
    for name, words in parts.items():
        found = record[name]
        if not found or not found["methods"]:
            continue
        first = next(iter(found["methods"]))
        rows = [
            (
                method,
                interval_cell(item["gain"], sign=True),
                (_WORD[item["verdict"]], f"{item['num_exams']} exams"),
                interval_cell(found["agreement"].get(method), scale=1, digits=2, sign=True),
            )
            for method, item in found["methods"].items()
        ]
        counts = f"{found['num_exams']} exams of {found['num_patients']} patients"
        heads = ["ranked by", "gain, points", "verdict", f"rank correlation with {first}"]
        grids.append(Grid(heads, rows, caption=f"{words[0].upper()}{words[1:]}: {counts}"))
        pictures[
            f"The predicted class's probability while {words} are taken away, the highest ranked first; dotted: in "
            "random order."
        ] = deletion_plot(found)
    sizes = [
        (row["attribute"].replace("_", " "), f"{row['mean_absolute']:.2f}", str(row["num_exams"]))
        for row in record["by_attribute"]
    ]
    if sizes:
        caption = "Mean absolute Shapley value, in log-odds of the predicted class, over the exams that give it"
        grids.append(Grid(["attribute", "size", "exams"], sizes, caption=caption))
    return Section(
        title="Do the explanations name what the answer rests on?",
        note="What an explanation ranks highest is taken away first. The gain is how much lower the predicted class's "
        f"probability lies than in random order, on average over the first {record['config']['share']:.0%} of the "
        "deletion; zero is a ranking that says nothing. "
        "Occlusion and Shapley values ask the model itself; attention and leaving out one by one are what the product "
        "shows.",
        grids=grids,
        pictures=pictures,
    )


def deletion_plot(found: Record) -> bytes:
    """The mean deletion curve of every method beside that of random orders."""
    figure, (axes,) = figure_of(6.4, 3.0)
    shares = np.linspace(0, 1, len(found["random"]["curve"]))
    axes.plot(shares, found["random"]["curve"], color=GREY, linestyle=":", linewidth=1.5, label="random order")
    for color, (name, item) in zip(_COLOURS, found["methods"].items(), strict=False):
        axes.plot(shares, item["curve"], color=color, linewidth=1.5, label=name)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("share that is taken away")
    axes.set_ylabel("probability")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return png_of(figure)
