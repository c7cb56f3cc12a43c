"""Pictures of a report, as PNG bytes: matplotlib without a window, the same look everywhere."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

INK, BLUE, GREY = "#1f2933", "#2b6cb0", "#9aa5b1"


def confusion_plot(counts: NDArray[np.int64], class_names: Sequence[str]) -> bytes:
    """True class by row, predicted class by column; the shade is the share of the row, the number the count."""
    figure, (axes,) = figure_of(0.75 * len(class_names) + 1.6, 0.7 * len(class_names) + 1.3)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row in range(len(class_names)):
        for column in range(len(class_names)):
            color = "white" if shares[row, column] > 0.55 else INK
            axes.text(column, row, int(counts[row, column]), ha="center", va="center", color=color)
    axes.set_xticks(range(len(class_names)), class_names)
    axes.set_yticks(range(len(class_names)), class_names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return png_of(figure)


def per_class_plot(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """F1 of every class, a group of bars a class, a bar a model.

    Args:
        rows: model -> `metrics.per_class`; the first model is ours.
    """
    models = list(rows)
    names = [row["class"] for row in rows[models[0]]]
    figure, (axes,) = figure_of(max(7.0, 1.0 * len(names) + 1.0), 3.6)
    width = 0.8 / len(models)
    colors = [BLUE, "#616e7c", GREY, "#cbd2d9"]
    for number, model in enumerate(models):
        heights = [0.0 if np.isnan(row["f1"]) else row["f1"] for row in rows[model]]
        places = np.arange(len(names)) + (number - (len(models) - 1) / 2) * width
        axes.bar(places, heights, width * 0.92, label=model, color=colors[number % len(colors)])
    counts = [row["num_exams"] for row in rows[models[0]]]
    axes.set_xticks(range(len(names)), [f"{name}\n{count} exams" for name, count in zip(names, counts, strict=True)])
    axes.set_ylim(0, 1)
    axes.set_ylabel("F1")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside upper left", ncols=2)
    return png_of(figure)


def training_plot(steps: Sequence[Mapping[str, Any]]) -> bytes:
    """The loss of every optimizer step."""
    figure, (axes,) = figure_of(7, 2.8)
    axes.plot([step["step"] for step in steps], [step["loss"] for step in steps], color=BLUE, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.spines[["top", "right"]].set_visible(False)
    return png_of(figure)


def figure_of(width: float, height: float, *, rows: int = 1) -> tuple[Any, list[Any]]:
    """An empty figure of ``width`` x ``height`` inches, and its axes from top to bottom."""
    # The object interface: pyplot keeps figures alive and asks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, 1, squeeze=False)[:, 0])


def png_of(figure: Any) -> bytes:
    """The finished picture."""
    buffer = io.BytesIO()
    # No date or version in the file: the same figures give the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def strip_of(pictures: Sequence[bytes], *, height: int = 256) -> bytes:
    """PNGs side by side, of one height."""
    from PIL import Image

    tiles = []
    for data in pictures:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        tiles.append(picture.resize((round(picture.width * height / picture.height), height)))
    gap = 8
    whole = Image.new("RGB", (sum(item.width for item in tiles) + gap * (len(tiles) - 1), height), "white")
    left = 0
    for tile in tiles:
        whole.paste(tile, (left, 0))
        left += tile.width + gap
    stream = io.BytesIO()
    whole.save(stream, "PNG", optimize=True)
    return stream.getvalue()
