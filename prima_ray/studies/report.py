"""The page of a study: its table as papers print it, a verdict a claim, and what was chosen how."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prima_ray.data.description import DataSetConfig
from prima_ray.evaluation.metrics import HEADLINE
from prima_ray.evaluation.report import Cell, Grid, Report, Section, Table, percent
from prima_ray.evaluation.sections import difference_grid, interval_cell, operating_section
from prima_ray.evaluation.statistics import Interval
from prima_ray.studies.results import TITLES, WHOLE
from prima_ray.studies.schedule import duration

_WORDS = {
    "better": "better",
    "worse": "worse",
    "not distinguishable": "not distinguishable",
    "too few": "not judged: too few",
}
_PAYS = {
    "better": "pays",
    "worse": "costs",
    "not distinguishable": "makes no difference that can be told",
    "too few": "cannot be told: too few",
}
_JUDGED = ("macro_f1", "balanced_accuracy")
_BELIEF = {
    "nll": ("NLL", 1.0, 3),
    "ece": ("ECE, %", 100.0, 1),
    "brier": ("Brier", 1.0, 3),
    "aurc": ("AURC, %", 100.0, 1),
}


def build_report(metrics: Mapping[str, Any], data_set: DataSetConfig, command: str) -> Report:
    """The page of `metrics.json`."""
    names = {name: item["title"] for name, item in metrics["variants"].items()}
    sets = metrics["sets"]
    folds, seeds = metrics["folds"], metrics["seeds"]
    whole = _whole(sets)
    searched = metrics["scored_on"] == "validation"
    return Report(
        title=metrics["title"] or f"{data_set.title or data_set.name}: a study",
        subtitle=f"{whole['num_exams']} exams of {whole['num_patients']} patients of "
        f"{data_set.title or data_set.name}; {count_of(len(folds), 'test fold')} grouped by {metrics['split']}, "
        f"{count_of(len(seeds), 'seed')}. Everything that is chosen is chosen on validation folds; "
        + ("no test fold was looked at." if searched else "each test fold is touched once."),
        verdict=verdict_sentences(metrics),
        warnings=_warnings(metrics, names),
        tables=[
            Table(
                title=TITLES[name],
                note="Means over the test folds; intervals of 95 % over resampled patients.",
                unit="photos" if name == "photos" else "exams",
                num_exams=record["num_exams"],
                num_patients=record["num_patients"],
                rows={
                    names[model]: {figure: Interval(**item) for figure, item in found.items()}
                    for model, found in record["headline"]["models"].items()
                },
            )
            for name, record in sets.items()
        ],
        baselines={},
        per_class=[],
        phrases={},
        pictures={},
        sections=_sections(metrics, names),
        facts={
            "data": f"{data_set.title or data_set.name} ({data_set.license or 'licence not stated'})",
            **({"citation": data_set.citation} if data_set.citation else {}),
            "shards": metrics["shards_hash"][:12],
            "chosen by": f"{HEADLINE[metrics['choose_by']]} on the validation fold",
            "seeds": ", ".join(map(str, seeds)),
        },
        commands=[command],
    )


def verdict_sentences(metrics: Mapping[str, Any]) -> list[str]:
    """Ours beside the best rival of each set, and a sentence a claim."""
    names = {name: item["title"] for name, item in metrics["variants"].items()}
    ours = names[metrics["ours"]]
    found = []
    for name, record in metrics["sets"].items():
        best = metrics["best"][name]
        if best is None:
            continue
        told = record["headline"]
        parts = [
            f"{title} {_WORDS[told['verdicts'][best][figure]]} ({_points(told['differences'][best][figure])})"
            for figure, title in HEADLINE.items()
            if figure in _JUDGED
        ]
        found.append(f"{TITLES[name]}: {ours} beside the best of the others, {names[best]}: {'; '.join(parts)}.")
    for claim in metrics["claims"]:
        record = next((claim["sets"][name] for name in WHOLE if name in claim["sets"]), None)
        if record is None:
            found.append(f"{claim['what']}: not told, a variant is missing.")
            continue
        parts = [
            f"{_points(record['differences'][figure])} {HEADLINE[figure]}, it {_PAYS[record['verdicts'][figure]]}"
            for figure in _JUDGED
        ]
        found.append(f"{claim['what']}: {'; '.join(parts)}.")
    return found


def _whole(sets: Mapping[str, Any]) -> Mapping[str, Any]:
    """The set that a study is judged by."""
    found: Mapping[str, Any] = next(sets[name] for name in WHOLE if name in sets)
    return found


def _points(gap: Mapping[str, Any]) -> str:
    if not math.isfinite(gap["low"]):
        return f"{100 * gap['value']:+.1f} points"
    return f"{100 * gap['value']:+.1f} points, {100 * gap['low']:+.1f} to {100 * gap['high']:+.1f}"


def _warnings(metrics: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    found = []
    lacking: dict[str, list[str]] = {}
    for name, item in metrics["variants"].items():
        if item["missing"]:
            several = len(metrics["seeds"]) > 1
            where = ", ".join(f"fold {fold}" + f" seed {seed}" * several for fold, seed in item["missing"])
            lacking.setdefault(where, []).append(names[name])
    for lost, titles in lacking.items():
        if len(titles) == len(names):
            found.append(f"Part of the study: there is no answer in {lost} yet.")
        else:
            found.append(f"No answer in {lost}: {'; '.join(titles)}. All variants are compared on what they share.")
    if metrics.get("waiting"):
        found.append(f"Part of the study: {'; '.join(metrics['waiting'])} wait for another sitting.")
    if metrics["scored_on"] == "validation":
        found.append("Scored on validation folds, where runs were chosen too: figures are a little too good. A search.")
    if metrics.get("unvetted"):
        found.append("Unvetted: runs of this study used entries of a risk corpus that nobody has vetted.")
    if metrics["split"] == "lesion":
        found.append("Grouped by lesion: the models may have seen other exams of these patients in training.")
    return found


def _sections(metrics: Mapping[str, Any], names: Mapping[str, str]) -> list[Section]:
    sets = metrics["sets"]
    whole = _whole(sets)
    sections = [
        Section("Mean (SD) over the folds", "As papers print it, in %; SD with n - 1.", _fold_grids(sets, names)),
        Section(
            "Differences",
            "Ours minus the other, in points, paired over patients.",
            [
                difference_grid(_named(record["headline"], names), HEADLINE, caption=TITLES[key])
                for key, record in sets.items()
            ],
        ),
    ]
    if metrics["claims"]:
        sections.append(_claims_section(metrics["claims"]))
    sections.append(_class_section(whole, names))
    if metrics["positive"]:
        told = {
            TITLES[name]: {**record["operating"], **_named(record["operating"], names)} for name, record in sets.items()
        }
        sections.append(operating_section(metrics["positive"], told))
    sections.append(_belief_section(whole, names))
    sections.append(_choice_section(metrics, names))
    if metrics.get("runs"):
        rows = [
            (stage, str(item["runs"]), duration(item["seconds"]), duration(item["seconds"] / max(1, item["runs"])))
            for stage, item in metrics["runs"].items()
        ]
        sections.append(
            Section(
                "Where the time went",
                "Of all runs, whichever sitting they were made in; they ran beside each other.",
                [Grid(["recipe", "runs", "in all", "each"], rows)],
            )
        )
    return sections


def _named(record: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Variants by their titles."""
    parts = ("models", "differences", "verdicts")
    return {part: {names[name]: found for name, found in record[part].items()} for part in parts}


def _fold_grids(sets: Mapping[str, Any], names: Mapping[str, str]) -> list[Grid]:
    grids = []
    for key, record in sets.items():
        over = record["headline"].get("over_folds")
        if over is None:
            continue
        rows: list[Sequence[Cell]] = [
            (names[name], *(_mean_sd(found[figure]) for figure in HEADLINE)) for name, found in over.items()
        ]
        grids.append(Grid(["", *HEADLINE.values()], rows, caption=TITLES[key], ours=True))
    return grids


def _mean_sd(item: Mapping[str, Any]) -> str:
    spread = item["sd"]
    return percent(item["mean"]) + (f" ({percent(spread)})" if math.isfinite(spread) else "")


def _claims_section(claims: Sequence[Mapping[str, Any]]) -> Section:
    grids = []
    for name, title in TITLES.items():
        rows: list[Sequence[Cell]] = []
        for claim in claims:
            record = claim["sets"].get(name)
            if record is None:
                continue
            cells = [
                (interval_cell(record["differences"][figure], sign=True), record["verdicts"][figure])
                for figure in HEADLINE
            ]
            rows.append((claim["what"], *((cell[0], f"{cell[1]}: {word}") for cell, word in cells)))
        if rows:
            grids.append(Grid(["component", *HEADLINE.values()], rows, caption=title))
    return Section("Does each component pay?", "With it minus without it, in points, paired over patients.", grids)


def _class_section(whole: Mapping[str, Any], names: Mapping[str, str]) -> Section:
    models = whole["classes"]["models"]
    rows: list[Sequence[Cell]] = [
        (name, *(interval_cell(found[f"{name}.f1"]) for found in models.values()), str(count))
        for name, count in whole["class_counts"].items()
    ]
    heads = ["class", *(names[name] for name in models), "exams"]
    return Section("Class by class", "F1 on all exams, in %, a mean over the folds.", [Grid(heads, rows)])


def _belief_section(whole: Mapping[str, Any], names: Mapping[str, str]) -> Section:
    rows: list[Sequence[Cell]] = [
        (
            names[name],
            *(interval_cell(found[key], scale=scale, digits=digits) for key, (_, scale, digits) in _BELIEF.items()),
        )
        for name, found in whole["belief"]["models"].items()
    ]
    return Section(
        "Can the probabilities be believed?",
        "On all exams; trained runs are calibrated on their validation fold. Lower is better.",
        [Grid(["variant", *(title for title, _, _ in _BELIEF.values())], rows, ours=True)],
    )


def _choice_section(metrics: Mapping[str, Any], names: Mapping[str, str]) -> Section:
    rows: list[Sequence[Cell]] = []
    for name, items in metrics["choices"].items():
        if not items:
            continue
        count = len(items[0]["scores"])
        chosen = ", ".join(str(item["chosen"] + 1) for item in items)
        best = [max(item["scores"]) for item in items]
        rows.append((names[name], str(count), chosen if count > 1 else "-", percent(sum(best) / len(best))))
    heads = ["variant", "candidates", "chosen, fold by fold", f"{HEADLINE[metrics['choose_by']]}, validation"]
    return Section(
        "What was chosen",
        "On the validation fold; the last column is the mean of the chosen ones' figure there, in %.",
        [Grid(heads, rows)],
    )


def count_of(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
