"""The page of an evaluation, of its figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prima_ray.base import PrimaError, read_json
from prima_ray.evaluation.baselines import metadata_baselines
from prima_ray.evaluation.explanation_sections import explanation_section
from prima_ray.evaluation.metrics import HEADLINE
from prima_ray.evaluation.plots import confusion_plot, per_class_plot, training_plot
from prima_ray.evaluation.report import Report, Section
from prima_ray.evaluation.sections import (
    calibration_section,
    operating_section,
    robustness_section,
    selective_section,
    subgroup_section,
)
from prima_ray.stages.explanations import Example
from prima_ray.stages.report_parts import example_section, model_card
from prima_ray.stages.scoring import ScoredSet, verdict_sentences
from prima_ray.stages.tested_run import MEND, TestedRun

_FEW_EXAMS = 10


def read_baselines(run: TestedRun, whole: ScoredSet) -> dict[str, str]:
    """Title -> what it reads, of the baselines that were scored."""
    known = metadata_baselines(run.index.manifest.data_set)
    return {item.title: item.inputs for item in known if item.title in whole.table.rows}


def build_report(
    run: TestedRun,
    scored: Sequence[ScoredSet],
    metrics: Mapping[str, Any],
    notes: Sequence[str],
    examples: Sequence[Example] = (),
) -> Report:
    """The page.

    Args:
        scored: the sets of exams; all of them first.
        metrics: what goes into metrics.json.
        examples: exams that are shown whole.
    """
    data_set, whole = run.index.manifest.data_set, scored[0]
    external = metrics["external"]
    fold = f"test fold {run.config['fold']} of {run.index.manifest.num_folds}"
    pictures = {
        f"Confusion matrix of {'all exams' if external else 'the test fold'}: counts, shaded by the share of the true "
        "class.": confusion_plot(whole.confusion, data_set.class_names),
        "F1 by class, beside the baselines.": per_class_plot(whole.per_class),
    }
    steps = _steps(run.path)
    if steps:
        pictures["Training loss, step by step."] = training_plot(steps)
    subtitle = (
        f"External validation on {external['title']}: exams of another data set, read through a mapping."
        if external
        else f"{fold[0].upper()}{fold[1:]} (0 to {run.index.manifest.num_folds - 1}), grouped by "
        f"{run.config['split']}; one model, trained once."
    )
    options = "".join(f" --{part}" for part in ("robustness", "explanations") if metrics[part])
    shards = " --shards SHARDS --mapping MAPPING.yaml" if external else ""
    return Report(
        title=f"{data_set.title or data_set.name}: {run.model}",
        subtitle=subtitle,
        verdict=[*notes, *verdict_sentences(scored)],
        warnings=_warnings(run, scored, metrics),
        tables=[item.table for item in scored],
        baselines=metrics["baselines"],
        per_class=metrics["per_class"],
        phrases={item.name: item.phrase for item in data_set.classes},
        pictures=pictures,
        sections=[
            *_sections(scored, metrics),
            *(example_section(item, data_set) for item in examples),
            model_card(run, scored, metrics),
        ],
        facts=_facts(run, metrics),
        commands=[
            f"prima {run.record['stage']} {run.address}/config.yaml --set out=NEW_FOLDER",
            f"prima evaluate NEW_FOLDER{shards}{options}",
        ],
    )


def _sections(scored: Sequence[ScoredSet], metrics: Mapping[str, Any]) -> list[Section]:
    sections, whole = [], scored[0]
    if metrics["positive"]:
        sets = {item.table.title: item.operating for item in scored if item.operating and item.table.num_exams}
        sections.append(operating_section(metrics["positive"], sets))
    sections.append(calibration_section(metrics["calibration"], num_exams=whole.table.num_exams))
    sections.append(selective_section(metrics["calibration"]))
    if metrics["subgroups"]:
        least = metrics["config"]["subgroups"]["min_exams"]
        sections.append(subgroup_section(metrics["subgroups"], min_exams=least))
    if metrics["robustness"]:
        sections.append(robustness_section(metrics["robustness"]))
    if metrics["explanations"]:
        sections.append(explanation_section(metrics["explanations"]))
    return sections


def _warnings(run: TestedRun, scored: Sequence[ScoredSet], metrics: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing a figure."""
    found, external = [], metrics["external"]
    if run.unvetted:
        found.append(
            "Unvetted: this run, or one that it builds on, used entries of a risk corpus that nobody has vetted. Its "
            "figures are those of an experiment."
        )
    if run.shared_patients:
        found.append(
            f"Grouped by lesion: of {run.shared_patients} test patients the model has seen other exams in training. "
            "The figures do not say how it does on new patients."
        )
    where = "The other data set" if external else "The test fold"
    rows = scored[0].per_class[run.model]
    absent = [row["class"] for row in rows if not row["num_exams"]]
    few = [f"{row['class']} ({row['num_exams']})" for row in rows if 0 < row["num_exams"] < _FEW_EXAMS]
    if absent:
        found.append(f"{where} has no exam of {', '.join(absent)}: averages run over the other classes.")
    if few:
        found.append(f"{where} has very few exams of {', '.join(few)}: macro averages hang on each of them.")
    if any(item.table.num_patients == 1 for item in scored):
        found.append("All exams are of one patient: there is nothing to draw intervals from.")
    return [*found, *_external_warnings(external)] if external else found


def _external_warnings(external: Mapping[str, Any]) -> list[str]:
    found = []
    left_out = {name: count for name, count in external["unmapped_classes"].items() if count}
    if left_out:
        told = ", ".join(f"{name} ({count})" for name, count in left_out.items())
        found.append(f"Left out, {sum(left_out.values())} exams of classes that are not mapped: {told}.")
    if external["not_mapped"]:
        found.append(f"Nothing is mapped to these attributes: {', '.join(external['not_mapped'])}.")
    if external["unreadable"]:
        told = ", ".join(f"{name} ({count})" for name, count in external["unreadable"].items())
        found.append(f"Values that an attribute cannot have were treated as missing: {told}.")
    return found


def _facts(run: TestedRun, metrics: Mapping[str, Any]) -> dict[str, str]:
    data_set, record, manifest = run.index.manifest.data_set, run.record, run.index.manifest
    trained = read_json(run.path / "metrics.json")
    if not isinstance(trained, dict):
        raise PrimaError("damaged: holds no object", where=run.path / "metrics.json", mend=MEND)
    external, roles = metrics["external"], run.roles
    told = {
        "data": f"{data_set.title or data_set.name} ({data_set.license or 'licence not stated'})"
        + ("" if external else f", {manifest.num_exams} exams, {manifest.num_images} photos")
    }
    if external:
        mapped = ", ".join(f"{theirs} as {ours}" for theirs, ours in external["classes"].items())
        licence = external["license"] or "licence not stated"
        told["scored on"] = f"{external['title']} ({licence}), {external['num_exams']} exams; {mapped}"
        chosen = "by a validation fold, or the last"
    else:
        told["exams"] = f"{len(roles.train)} trained, {len(roles.val)} validated, {len(roles.test)} are tested"
        chosen = "by the validation fold" if len(roles.val) else "the last, there was no validation fold"
    return {
        **told,
        "classes": ", ".join(f"{item.name}: {item.phrase}" for item in data_set.classes),
        "attributes": ", ".join(data_set.attribute_names) or "none",
        "chosen checkpoint": f"step {trained.get('best_step')}, {chosen}",
        "temperature": f"{metrics['calibration']['temperature']:.3g}"
        + "".join(f"; {note}" for note in metrics["calibration"]["notes"]),
        "seed": str(record["seed"]),
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "commit": str(record["git_commit"] or "not a checkout"),
        "figures": ", ".join(HEADLINE.values()) + " (macro, one class against the rest); averages over the classes "
        "that occur",
        **({"citation": data_set.citation} if data_set.citation else {}),
    }


def _steps(run: Path) -> list[dict[str, Any]]:
    path = run / "steps.jsonl"
    if not path.exists():
        return []
    try:
        steps = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise PrimaError(f"not valid JSON ({error})", where=path) from None
    for number, step in enumerate(steps, start=1):
        if not isinstance(step, dict) or not all(isinstance(step.get(key), int | float) for key in ("step", "loss")):
            raise PrimaError(f"damaged: line {number} is not a step with its loss", where=path, mend=MEND)
    return steps
