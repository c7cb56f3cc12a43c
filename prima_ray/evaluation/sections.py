"""Records of `evidence`, `subgroups` and `robustness` -> parts of a page. To add a part: a function that ends in
`Section`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prima_ray.evaluation.evidence import BEFORE
from prima_ray.evaluation.evidence_plots import reliability_plot, risk_coverage_plot
from prima_ray.evaluation.report import Cell, Grid, Section, percent

Record = Mapping[str, Any]
_NONE = "-"
_WORD = {"better": "better", "worse": "worse", "not distinguishable": "no difference seen", "too few": "too few"}


def interval_cell(item: Record | None, *, scale: float = 100.0, digits: int = 1, sign: bool = False) -> Cell:
    """A value over its interval; a dash for None."""
    if item is None:
        return _NONE
    low, high = item["low"], item["high"]
    to = " to " if sign else "\u2013"
    small = "" if _blank(low) else f"{_number(low, scale, digits, sign)}{to}{_number(high, scale, digits, sign)}"
    return _number(item["value"], scale, digits, sign), small


def _number(value: float | None, scale: float, digits: int, sign: bool) -> str:
    if _blank(value) or value is None:
        return "n/a"
    return f"{scale * value:{'+' if sign else ''}.{digits}f}"


def _blank(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def difference_grid(
    record: Record, titles: Mapping[str, str], *, caption: str = "", verdicts_only: bool = False
) -> Grid:
    """A row for each other model: ours minus it in points, over the verdict on ours.

    Args:
        record: see `evidence.plain_scores`.
        titles: figure -> its name.
    """
    rows: list[Sequence[Cell]] = []
    for name, gaps in record["differences"].items():
        words = [_WORD[record["verdicts"][name][figure]] for figure in titles]
        cells = [interval_cell(gaps[figure], sign=True) for figure in titles]
        told = [(cell[0], f"{cell[1]}: {word}") for cell, word in zip(cells, words, strict=True)]
        rows.append((f"beside {name}", *(words if verdicts_only else told)))
    return Grid(["ours", *titles.values()], rows, caption=caption)


def operating_section(positive: Sequence[str], sets: Mapping[str, Record]) -> Section:
    """A group of classes against the rest.

    Args:
        sets: title of a set of exams -> `operating_evidence`.
    """
    grids = []
    for title, record in sets.items():
        figures = list(next(iter(record["models"].values())))
        rows = [
            (name, *(interval_cell(found[figure]) for figure in figures), _verdict(record, name, figures))
            for name, found in record["models"].items()
        ]
        heads = ["model", *map(_figure_title, figures), "ours, by AUROC"]
        counts = f"{record['num_positive']} against {record['num_negative']}"
        grids.append(Grid(heads, rows, caption=f"{title}: {counts}", ours=True))
    thresholds = [
        (
            f"{item['asked']:.0%}",
            interval_cell(item["specificity"]),
            interval_cell(item["sensitivity"]),
            str(item["num_negatives"]),
        )
        for item in next(iter(sets.values()))["thresholds"]
    ]
    if thresholds:
        heads = ["specificity asked for", "specificity here", "sensitivity here", "set on negatives"]
        grids.append(
            Grid(heads, thresholds, caption="Thresholds that were set on the validation fold, ours, all exams")
        )
    return Section(
        title=f"{', '.join(positive)} against the rest",
        note="The score is the sum of these classes' probabilities; in %. Sensitivities at a specificity are read off "
        "the scored exams' own curve.",
        grids=grids,
    )


def _verdict(record: Record, name: str, figures: Sequence[str]) -> str:
    if name not in record["verdicts"]:
        return ""
    return str(record["verdicts"][name][figures[0]])


def _figure_title(name: str) -> str:
    if name == "auroc":
        return "AUROC"
    figure, _, level = name.rpartition("_at_")
    return f"{figure} at {float(level):.0%}" if figure else name


def calibration_section(record: Record, *, num_exams: int) -> Section:
    """Whether probabilities and prediction sets can be believed."""
    models = record["figures"]["models"]
    columns = {"nll": ("NLL", 1.0, 3), "ece": ("ECE, %", 100.0, 1), "brier": ("Brier", 1.0, 3)}
    rows = [
        (name, *(interval_cell(found[key], scale=scale, digits=digits) for key, (_, scale, digits) in columns.items()))
        for name, found in models.items()
    ]
    sets = record["sets"]
    by_class = [
        (
            "all",
            interval_cell(sets["coverage"]),
            interval_cell(sets["mean_set_size"], scale=1, digits=2),
            str(num_exams),
        ),
        *(
            (
                item["class"],
                _plain(item["coverage"], 100, 1),
                _plain(item["mean_set_size"], 1, 2),
                str(item["num_exams"]),
            )
            for item in sets["by_class"]
        ),
    ]
    word = record["figures"]["verdicts"].get(BEFORE, {})
    note = (
        f"Lower is better. Beside the probabilities {BEFORE}: NLL {_said(word.get('nll'))}, ECE "
        f"{_said(word.get('ece'))}. ECE is biased upwards where exams are few: compare it between models."
    )
    return Section(
        title="Can the probabilities be believed?",
        note=note,
        grids=[
            Grid(["model", *(title for title, _, _ in columns.values())], rows, ours=True),
            Grid(
                ["class", "sets that hold it, %", "classes in a set", "exams"],
                by_class,
                caption=f"Prediction sets that were to hold the diagnosis in {sets['asked']:.0%}",
            ),
        ],
        pictures={
            "Reliability: a dot a tenth of confidence, as large as the exams in it; on the line what is said is what "
            "comes true.": reliability_plot(record["bins"]),
        },
    )


def _said(word: str | None) -> str:
    return word or "not compared"


def _plain(value: float | None, scale: float, digits: int) -> str:
    return _number(value, scale, digits, sign=False)


def selective_section(record: Record) -> Section:
    """What is gained where the least sure exams are left to others."""
    models = {name: found for name, found in record["figures"]["models"].items() if name != BEFORE}
    figures = [name for name in next(iter(models.values())) if name.startswith("accuracy_at_")]
    rows = [
        (name, interval_cell(found["aurc"], digits=1), *(interval_cell(found[figure]) for figure in figures))
        for name, found in models.items()
    ]
    heads = ["model", "AURC, %", *(f"surest {float(name.rpartition('_')[2]):.0%}" for name in figures)]
    return Section(
        title="Answering only where it is sure",
        note="Accuracy in % of the surest share of the exams; AURC is the mean error over all shares, lower is better.",
        grids=[Grid(heads, rows, ours=True)],
        pictures={"Error among the answered exams, ours, by the share that is answered.": risk_coverage_plot(record)},
    )


def subgroup_section(records: Sequence[Record], *, min_exams: int) -> Section:
    """Ours, group by group; groups of too few exams are named below, with their counts."""
    figures = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy"}
    rows: list[Sequence[Cell]] = []
    few: dict[str, list[str]] = {}
    judged = sum(record["verdicts"] is not None for record in records)
    for record in records:
        attribute = record["attribute"].replace("_", " ")
        if record["figures"] is None:
            few.setdefault(attribute, []).append(f"{record['value']} ({record['num_exams']})")
            continue
        gap: Cell = _NONE
        if record["verdicts"] is not None:
            differs = interval_cell(record["differences"]["accuracy"], sign=True)
            gap = (_WORD[record["verdicts"]["accuracy"]], differs[1])
        rows.append(
            (
                (record["value"], attribute),
                (str(record["num_exams"]), f"{record['num_patients']} patients"),
                *(interval_cell(record["figures"][figure]) for figure in figures),
                gap,
            )
        )
    names = [(f"{attribute}: {', '.join(values)}",) for attribute, values in few.items()]
    grids = [Grid(["group", "exams", *figures.values(), "beside the rest"], rows)] if rows else []
    if names:
        grids.append(Grid([f"too few: groups of fewer than {min_exams} exams, with their counts"], names))
    return Section(
        title="Subgroups",
        note="Ours, in %. The last column is the accuracy beside that of all other exams, in points. Groups that are "
        f"judged: {judged}; by chance alone one in twenty differs. Groups differ in their diagnoses too.",
        grids=grids,
    )


def robustness_section(record: Record) -> Section:
    """Ours, on exams that were altered."""
    figures = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1"}
    rows: list[Sequence[Cell]] = []
    for item in record["conditions"]:
        found = [interval_cell(item["figures"][figure]) for figure in figures]
        gap: Cell = _NONE
        if item["differences"] is not None:
            gap = (
                _WORD[item["verdicts"]["accuracy"]],
                interval_cell(item["differences"]["accuracy"], sign=True)[1],
            )
        answered = (percent(item["answered"]), percent(item["accuracy_answered"]))
        rows.append((item["title"], *found, gap, percent(item["confidence"]), answered))
    heads = [
        "exams",
        *figures.values(),
        "by accuracy",
        "confidence",
        "answered",
    ]
    return Section(
        title="Robustness",
        note="The same exams, altered; in %, differences in accuracy paired over patients. The confidence is the mean "
        "of the largest probabilities: far above the accuracy it is not to be believed. Answered is what is not too "
        "uncertain, with the accuracy there; it may still be refused for its photos.",
        grids=[Grid(heads, rows, ours=True)],
    )
