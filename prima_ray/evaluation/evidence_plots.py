"""Pictures of what can be believed: reliability diagrams and risk-coverage curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prima_ray.evaluation.plots import BLUE, GREY, figure_of, png_of


def reliability_plot(bins: Mapping[str, list[dict[str, Any]]]) -> bytes:
    """Accuracy by confidence, before and after calibration.

    Args:
        bins: "before" and "after" -> `reliability_bins`.
    """
    figure, (axes,) = figure_of(4.6, 4.2)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":")
    for name, color, words in (("before", GREY, "before the temperature"), ("after", BLUE, "after")):
        whole = max(sum(item["num_exams"] for item in bins[name]), 1)
        places = [item["confidence"] for item in bins[name]], [item["accuracy"] for item in bins[name]]
        axes.plot(*places, color=color, linewidth=1, alpha=0.5)
        sizes = [12 + 300 * item["num_exams"] / whole for item in bins[name]]
        axes.scatter(*places, s=sizes, color=color, alpha=0.75, linewidths=0, label=words)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(frameon=False, fontsize=8, loc="upper left")
    for handle in legend.legend_handles:
        handle.set_sizes([30])
    return png_of(figure)


def risk_coverage_plot(record: Mapping[str, Any]) -> bytes:
    """Error by the share that is answered, of `calibration_evidence`."""
    figure, (axes,) = figure_of(6.4, 3.0)
    curve = record["curve"]
    axes.plot(curve["coverage"], curve["risk"], color=BLUE, linewidth=1.5)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("share of the exams that is answered, the surest first")
    axes.set_ylabel("share of wrong answers")
    axes.spines[["top", "right"]].set_visible(False)
    return png_of(figure)
