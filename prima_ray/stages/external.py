"""External validation: a run scored on another data set's shards, through a mapping of attributes and classes.

The mapping is a YAML:

    attributes:                          # of the run <- of the other data set
      age: age_years                     # the same values
      diameter_1: {source: size_cm, scale: 10}                     # value * scale + offset
      gender: {source: sex, values: {f: FEMALE, m: MALE}}          # value by value; others count as missing
    classes: {melanoma: MEL, nevus: NEV, mole: NEV}                # of the other data set -> of the run

Exams of a class that is not mapped are counted and left out; so are exams without a diagnosis. `external` in
`metrics.json`:

    data_set, shards_hash        what the run was scored on
    num_exams, num_unlabelled    labelled and mapped exams, and those without a diagnosis
    classes, unmapped_classes    class of the other data set -> class of the run; class -> exams left out
    absent_classes               classes of the run that no exam has
    attributes, not_mapped       attribute of the run -> of the other; what the model reads and nothing is mapped to
    unreadable                   attribute of the run -> values that it cannot have, treated as missing: how many
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from prima_ray.base import PrimaError, StrictConfig
from prima_ray.config import load_config, read_yaml
from prima_ray.data.attributes import AttributeRejected, normalise_value
from prima_ray.data.description import AttributeConfig, DataSetConfig, NumericAttribute
from prima_ray.data.metadata import expand_names
from prima_ray.data.plan import ExamIndex, Roles, split_roles
from prima_ray.data.reader import Rows
from prima_ray.data.run_record import CONFIG, check_outputs
from prima_ray.data.schema import SHARD_SCHEMA
from prima_ray.evaluation.baselines import metadata_baselines
from prima_ray.evaluation.comparison import check_unseen
from prima_ray.inference.bundle import read_bundle_config
from prima_ray.stages.row_sets import Load, RowSet, shard_tables
from prima_ray.stages.tested_run import TestedRun, model_name, read_diagnosing, read_trained_shards

_NO_ROWS = np.empty(0, dtype=np.int64)


class AttributeMapping(StrictConfig):
    """Where a value comes from."""

    source: str
    """An attribute of the other data set."""
    values: dict[str, str] = Field(default_factory=dict)
    """Its value -> ours; one that is not named counts as missing. Empty: values stay as they are."""
    scale: float = 1.0
    """Of a number: value * scale + offset is in our unit."""
    offset: float = 0.0


class MappingConfig(StrictConfig):
    """How another data set is read as if it were the run's own."""

    attributes: dict[str, str | AttributeMapping] = Field(default_factory=dict)
    classes: dict[str, str] = Field(min_length=1)

    def source(self, name: str) -> AttributeMapping:
        """Of an attribute of the run."""
        found = self.attributes[name]
        return AttributeMapping(source=found) if isinstance(found, str) else found


@dataclass(frozen=True)
class ExternalTest:
    """Another data set, read as if it were the run's own."""

    run: TestedRun
    """Its index is the other data set's, mapped; all exams that can be scored are `roles.test`."""
    own: ExamIndex | None
    """What the run was trained on, if it is still there."""
    learned: Rows
    """Rows of ``own`` that the run trained or chose on."""
    validated: Rows
    """Those that it chose on."""
    record: Mapping[str, Any]
    """`external` in metrics.json."""
    other: ExamIndex

    def tables(self, rows: Rows) -> Iterator[pa.Table]:
        """Rows of the shard schema, mapped."""
        start = 0
        for table in shard_tables(self.other, rows):
            part = rows[start : start + table.num_rows]
            start += table.num_rows
            kind = SHARD_SCHEMA.field("attributes").type
            attributes = self.run.index.attributes.take(pa.array(part)).combine_chunks().cast(kind)
            labels = pa.array(self.run.index.label_names(part), pa.string())
            yield _with_column(_with_column(table, "attributes", attributes), "label", labels)


def open_external(address: str, shards: str, mapping: str) -> ExternalTest:
    """Open a run to be scored on another data set.

    Raises:
        PrimaError: no run that diagnoses, no finished shards, the shards are those that the run was trained on or share
            patients or photos with them, or the mapping names what is not there.
    """
    record, path = read_diagnosing(address)
    check_outputs(path, record)
    wanted = load_config(MappingConfig, mapping)
    data_set, other = read_bundle_config(path / "model").data_set, ExamIndex.read(shards)
    theirs = other.manifest.data_set
    _check_mapping(wanted, data_set, theirs, where=mapping)
    if other.manifest.content_hash == record["inputs"].get("shards", {}).get("hash"):
        raise PrimaError(
            "these are the shards that the run was trained on",
            where=shards,
            mend="Without --mapping the run is scored on its own test fold; name another data set's shards for it.",
        )
    config = read_yaml(path / CONFIG)
    own, learned, validated = _own(record, path, config)
    labels, unmapped = _map_labels(other, wanted, data_set)
    rows, unreadable = _map_attributes(other, wanted, data_set, where=mapping)
    test = np.flatnonzero(labels >= 0)
    if not len(test):
        raise PrimaError(
            "no exam has a diagnosis that is mapped", where=mapping, mend=f"Classes there: {', '.join(unmapped)}."
        )
    if own is not None:
        _check_leak(own, learned, other, test, same_names=theirs.name == data_set.name, where=address)
    column = pa.chunked_array([pa.array([list(row.items()) for row in rows], SHARD_SCHEMA.field("attributes").type)])
    manifest = other.manifest.model_copy(update={"data_set": data_set})
    index = replace(other, manifest=manifest, labels=labels, attributes=column)
    roles = Roles(train=_NO_ROWS, val=_NO_ROWS, test=test)
    told = {
        "data_set": theirs.name,
        "title": theirs.title or theirs.name,
        "license": theirs.license,
        "shards_hash": other.manifest.content_hash,
        "num_exams": len(test),
        "num_unlabelled": int((other.labels < 0).sum()),
        "classes": wanted.classes,
        "unmapped_classes": unmapped,
        "absent_classes": [name for place, name in enumerate(data_set.class_names) if not (labels == place).any()],
        "attributes": {name: wanted.source(name).source for name in wanted.attributes},
        "not_mapped": [
            item.name for item in data_set.attributes if item.relevant and item.name not in wanted.attributes
        ],
        "unreadable": unreadable,
    }
    run = TestedRun(address, path, record, config, index, roles, model_name(record))
    return ExternalTest(run=run, own=own, learned=learned, validated=validated, record=told, other=other)


def external_set(test: ExternalTest, load: Load) -> RowSet:
    """All exams of the other data set that can be scored, ours beside baselines that learned where the run did."""
    run, data_set = test.run, test.run.index.manifest.data_set
    rows = run.roles.test
    found = {run.model: load().predict_tables(test.tables(rows))}
    if test.own is not None and len(test.learned):
        known, labels = test.own.attribute_rows(test.learned), test.own.labels[test.learned]
        asked = run.index.attribute_rows(rows)
        for item in metadata_baselines(data_set):
            found[item.title] = item.fit_predict(known, labels, asked, len(data_set.classes))
    return RowSet("all", f"All exams of {test.record['title']}", "None of them was seen in training.", rows, found)


def _with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), SHARD_SCHEMA.field(name), values)


def _own(record: Mapping[str, Any], path: Path, config: Mapping[str, Any]) -> tuple[ExamIndex | None, Rows, Rows]:
    """The run's own shards if they are there, the labelled rows that it trained or chose on, and the latter alone."""
    try:
        own = read_trained_shards(record, path)
    except PrimaError:
        return None, _NO_ROWS, _NO_ROWS
    fold = config["fold"] if config["fold"] != "none" else None
    roles = split_roles(own, fold=fold, val_fold=config["val_fold"], split=config["split"])
    learned = np.sort(np.concatenate([roles.train, roles.val]))
    return own, learned[own.labels[learned] >= 0], roles.val[own.labels[roles.val] >= 0]


def _check_mapping(wanted: MappingConfig, ours: DataSetConfig, theirs: DataSetConfig, *, where: str) -> None:
    try:
        expand_names(tuple(wanted.attributes), ours, what="attributes")
        expand_names([wanted.source(name).source for name in wanted.attributes], theirs, what="attributes")
    except PrimaError as error:
        raise PrimaError(error.what, where=where, mend=error.mend) from None
    blocks = [name for name in wanted.attributes if name not in ours.attribute_names]
    if blocks:
        raise PrimaError(f"attributes: {blocks[0]!r} is a block", where=where, mend="Map its attributes one by one.")
    for names, known, whose in (
        (wanted.classes, theirs.class_names, theirs.name),
        (wanted.classes.values(), ours.class_names, ours.name),
    ):
        absent = [name for name in names if name not in known]
        if absent:
            raise PrimaError(
                f"classes: {whose} has no class {absent[0]!r}", where=where, mend=f"Known: {', '.join(known)}."
            )
    by_name = {item.name: item for item in ours.attributes}
    for name in wanted.attributes:
        _check_attribute(by_name[name], wanted.source(name), ours, where=where)


def _check_attribute(
    attribute: AttributeConfig, found: AttributeMapping, data_set: DataSetConfig, *, where: str
) -> None:
    key = f"attributes.{attribute.name}"
    if (found.scale, found.offset) != (1.0, 0.0) and not isinstance(attribute, NumericAttribute):
        raise PrimaError(f"{key}: scale and offset are for numbers", where=where, mend="Leave them out.")
    for value in found.values.values():
        try:
            normalise_value(attribute, value, missing=data_set.missing)
        except AttributeRejected as error:
            raise PrimaError(f"{key}.values: {error.detail}", where=where) from None


def _map_labels(other: ExamIndex, wanted: MappingConfig, ours: DataSetConfig) -> tuple[Rows, dict[str, int]]:
    """Our class indices, -1 of what is not mapped or not known; and exams a class that is not mapped."""
    names = other.manifest.data_set.class_names
    place = {name: index for index, name in enumerate(ours.class_names)}
    table = np.array([place[wanted.classes[name]] if name in wanted.classes else -1 for name in names])
    labels = np.where(other.labels >= 0, table[np.maximum(other.labels, 0)], -1)
    left_out = {
        name: int((other.labels == index).sum()) for index, name in enumerate(names) if name not in wanted.classes
    }
    return labels, left_out


def _map_attributes(
    other: ExamIndex, wanted: MappingConfig, ours: DataSetConfig, *, where: str
) -> tuple[list[dict[str, str]], dict[str, int]]:
    """Our canonical values by exam; and by attribute how many values it cannot have."""
    by_name = {item.name: item for item in ours.attributes}
    sources = {name: wanted.source(name) for name in wanted.attributes}
    given, unreadable = Counter[str](), Counter[str]()
    mapped = []
    for row in other.attribute_rows():
        found: dict[str, str] = {}
        for name, source in sources.items():
            if source.source not in row:
                continue
            given[name] += 1
            try:
                value = normalise_value(by_name[name], _translate(row[source.source], source), missing=ours.missing)
            except (AttributeRejected, ValueError):
                value = None
                unreadable[name] += 1
            if value is not None:
                found[name] = value
        mapped.append(found)
    hopeless = [name for name in sources if given[name] and unreadable[name] == given[name]]
    if hopeless:
        raise PrimaError(
            f"attributes.{hopeless[0]}: it can have none of the {given[hopeless[0]]} values of "
            f"{sources[hopeless[0]].source!r}",
            where=where,
            mend="Give `values`, or `scale` and `offset` of another unit.",
        )
    return mapped, dict(unreadable)


def _translate(value: str, source: AttributeMapping) -> str:
    if source.values:
        if value not in source.values:
            raise ValueError(value)
        return source.values[value]
    if (source.scale, source.offset) != (1.0, 0.0):
        return repr(round(float(value) * source.scale + source.offset, 9))
    return value


def _check_leak(own: ExamIndex, learned: Rows, other: ExamIndex, test: Rows, *, same_names: bool, where: str) -> None:
    if same_names:
        # Of another data set the same id is another person.
        check_unseen(own.patient_ids[learned], other.patient_ids[test], what="patient", where=where)
    seen, asked = (_photo_hashes(index, rows) for index, rows in ((own, learned), (other, test)))
    check_unseen(seen, asked, what="photo", where=where)


def _photo_hashes(index: ExamIndex, rows: Rows) -> set[str]:
    return {
        hashlib.sha256(photo["bytes"]).hexdigest()[:16]
        for table in shard_tables(index, rows)
        for photos in table["images"].to_pylist()
        for photo in photos
    }
