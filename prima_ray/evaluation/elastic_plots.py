"""Pictures of an elastic run: how it went over time, what its pauses were spent on, how far it is from a fixed run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prima_ray.evaluation.elastic import PHASES, Pause
from prima_ray.evaluation.plots import BLUE, GREY, INK, figure_of, png_of

Record = Mapping[str, Any]
RED = "#c05621"
_COLORS = ("#9aa5b1", "#2b6cb0", "#4299e1", "#90cdf4", "#c05621", "#f6ad55")


def timeline_plot(
    steps: Sequence[Record],
    replayed: Sequence[Record],
    pauses: Sequence[Pause],
    events: Sequence[Record],
    *,
    global_batch: int,
) -> bytes:
    """Workers, exams a second and loss over the seconds since the first step; pauses grey, events named."""
    taken = sorted([*steps, *replayed], key=lambda record: record["time"])
    zero = taken[0]["time"]
    lost = {record["time"] for record in replayed}
    figure, axes = figure_of(9, 6.4, rows=3)
    seconds = [record["time"] - zero for record in taken]
    axes[0].step(seconds, [record["world_size"] for record in taken], where="post", color=INK)
    axes[0].set_ylabel("workers")
    axes[0].set_ylim(0, max(record["world_size"] for record in taken) + 1.2)
    axes[0].yaxis.get_major_locator().set_params(integer=True)
    for record, moment in zip(taken, seconds, strict=True):
        rate = global_batch / max(record["seconds"], 1e-3)
        begun = moment - min(record["seconds"], moment)
        axes[1].plot([begun, moment], [rate, rate], color=RED if record["time"] in lost else BLUE, linewidth=1.5)
    axes[1].set_ylabel("exams / s")
    axes[1].set_ylim(bottom=0)
    for kept, color, name in ((True, BLUE, "surviving"), (False, RED, "replayed later")):
        mine = [(record["time"] - zero, record["loss"]) for record in taken if (record["time"] not in lost) == kept]
        if mine:
            axes[2].plot(*zip(*mine, strict=True), ".", color=color, markersize=4, label=name)
    axes[2].set_ylabel("training loss")
    axes[2].set_xlabel("seconds since the first step")
    axes[2].legend(frameon=False, fontsize=8)
    for row, axis in enumerate(axes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.sharex(axes[0])
        for pause in pauses:
            axis.axvspan(pause.began - zero, pause.began - zero + pause.seconds, color="#e4e7eb", linewidth=0)
        for event in events:
            moment = event["time"] - zero
            axis.axvline(moment, color=GREY, linewidth=0.8, linestyle=":")
            if row == 0:
                name = event["event"].replace("_", " ")
                place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
                axis.annotate(name, (moment, 1), (2, -2), **place, fontsize=7, rotation=90, va="top", color=INK)
    return png_of(figure)


def pause_plot(pauses: Sequence[Pause], names: Sequence[str]) -> bytes:
    """A bar a pause, its colours what the seconds were spent on."""
    figure, (axis,) = figure_of(9, 0.42 * len(pauses) + 1.5)
    places = range(len(pauses))
    begun = [0.0] * len(pauses)
    for color, (phase, words) in zip(_COLORS, PHASES.items(), strict=True):
        widths = [pause.phases[phase] for pause in pauses]
        axis.barh(list(places), widths, left=begun, color=color, label=words, height=0.6)
        begun = [left + width for left, width in zip(begun, widths, strict=True)]
    axis.set_yticks(list(places), list(names))
    axis.invert_yaxis()
    axis.set_xlabel("seconds without a step")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside upper left", ncols=3)
    return png_of(figure)


def loss_plot(
    steps: Sequence[Record], expected: Sequence[Record], differences: Sequence[tuple[int, float]], *, tolerance: float
) -> bytes:
    """Both losses by step, and below how far they are apart."""
    figure, axes = figure_of(9, 4.6, rows=2)
    axes[0].plot([r["step"] for r in expected], [r["loss"] for r in expected], color=GREY, linewidth=3, label="fixed")
    axes[0].plot([r["step"] for r in steps], [r["loss"] for r in steps], color=BLUE, linewidth=1, label="elastic")
    axes[0].set_ylabel("training loss")
    axes[0].legend(frameon=False, fontsize=8)
    # A logarithm knows no zero: equal to the last bit is drawn at the bottom.
    axes[1].semilogy([step for step, _ in differences], [max(value, 1e-9) for _, value in differences], ".", color=INK)
    axes[1].axhline(tolerance, color=RED, linewidth=0.8)
    axes[1].set_ylabel("relative difference")
    axes[1].set_xlabel("step")
    axes[1].set_ylim(5e-10, 1e-2)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return png_of(figure)
