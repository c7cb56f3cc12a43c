"""Predict: the diagnosis of one exam, or of every exam of a shard folder."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from prima_ray.base import PrimaError, is_uri, write_atomic
from prima_ray.config import read_yaml
from prima_ray.data.attributes import normalise_attributes
from prima_ray.data.description import AttributeConfig, DataSetConfig
from prima_ray.data.fetched import local_copy
from prima_ray.data.metadata import text_attributes
from prima_ray.data.plan import ExamIndex
from prima_ray.data.run_record import CONFIG, check_model
from prima_ray.data.schema import split
from prima_ray.data.storage import Folder, reaching
from prima_ray.inference.bundle import BundleConfig
from prima_ray.inference.diagnosis import Diagnoser
from prima_ray.inference.predictor import Exam, check_diagnoses, check_photo

_log = logging.getLogger(__name__)


def run_predict(
    run_dir: str,
    *,
    shards: str | None = None,
    out: str | None = None,
    images: Sequence[str] = (),
    metadata: str | None = None,
    as_json: bool = False,
    explain: str | None = None,
) -> int:
    """What `prima predict` does; returns the exit code.

    Raises:
        PrimaError: a mistake in the arguments, the photos or the attributes.
    """
    _check_arguments(shards=shards, out=out, images=images, metadata=metadata, as_json=as_json, explain=explain)
    if shards is not None and out is not None:
        with contextlib.redirect_stdout(sys.stderr):  # Ray's driver prints to stdout unasked
            predict_folder(run_dir, shards, out)
        print(f"run: {out}")  # noqa: T201 - the command's answer
        return 0
    answer = predict_exam(run_dir, images, metadata, explain=explain)
    sys.stdout.write(json.dumps(answer, indent=2, ensure_ascii=False) + "\n" if as_json else _table(answer))
    return 0


def _check_arguments(
    *,
    shards: str | None,
    out: str | None,
    images: Sequence[str],
    metadata: str | None,
    as_json: bool,
    explain: str | None,
) -> None:
    see = "See `prima predict --help`."
    if (shards is None) == (not images):
        raise PrimaError("give --shards, or one --image or more", mend=see)
    if shards is None:
        if out is not None:
            raise PrimaError("--out goes with --shards; one exam is printed", mend=see)
        return
    if out is None:
        raise PrimaError("--shards needs --out, the Parquet file to write", mend=see)
    for name, given in (("--metadata", metadata is not None), ("--json", as_json), ("--explain", explain is not None)):
        if given:
            raise PrimaError(f"{name} goes with --image", mend=see)


def predict_exam(
    run_dir: str, images: Sequence[str], metadata: str | None, *, explain: str | None = None
) -> dict[str, Any]:
    """One exam from files.

    Args:
        explain: a folder; the answer then says what it rests on, and where words look is drawn into the folder, a file
        a photo.

    Returns:
        see `Diagnosis.as_dict`.

    Raises:
        PrimaError: see `run_predict`.
    """
    # All that can be wrong with the question is found before the weights are read.
    config = check_diagnoses(run_dir)
    attributes = normalise_attributes(config.data_set, read_metadata(metadata))
    photos = tuple(_read(path) for path in images)
    check_model(run_dir)
    exam = Exam(images=photos, attributes=attributes)
    found = Diagnoser.load(run_dir).diagnose_one(exam, explain=explain is not None)
    if found.explanation is not None and explain is not None:
        for item in found.explanation.maps:
            if item.png is not None:
                write_atomic(Path(explain) / f"attention-{item.photo}.png", item.png)
    return found.as_dict()


def read_metadata(metadata: str | None) -> dict[str, object]:
    """Attributes from JSON, or from a file that holds it; none where it is not given.

    Raises:
        PrimaError: it is neither, or no object of plain values.
    """
    if metadata is None:
        return {}
    text, where = metadata, "--metadata"
    if not metadata.lstrip().startswith(("{", "[")):
        where = metadata
        try:
            text = Path(metadata).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise PrimaError(
                f"--metadata is neither a JSON object nor a file that can be read ({reason})",
                where=metadata,
                mend="""Example: --metadata '{"age": 61, "itch": true}'""",
            ) from None
    try:
        found = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise PrimaError(f"not valid JSON ({error})", where=where) from None
    if not isinstance(found, dict):
        raise PrimaError(f"expected an object of attributes, got a {type(found).__name__}", where=where)
    for name, value in found.items():
        if isinstance(value, list | dict):
            kind = "list" if isinstance(value, list) else "object"
            raise PrimaError(f"{name}: expected a text, a number, true, false or null, got a {kind}", where=where)
    return found


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON; leave out what is missing, or write null")


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def _read(path: str) -> bytes:
    try:
        # A pipe or a device may have no end.
        if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
            raise PrimaError("is no file", where=path, mend="Name the file of a photo.")
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise PrimaError(f"cannot be read ({getattr(error, 'strerror', None) or error})", where=path) from None
    check_photo(data, where=path)
    return data


def _table(answer: dict[str, Any]) -> str:
    ranked = sorted(answer["probabilities"].items(), key=lambda item: -item[1])
    width = max(len(name) for name, _ in ranked)
    lines = [f"prediction: {answer['prediction']}", ""]
    lines += [f"  {name:<{width}}  {value:6.1%}  {'#' * round(40 * value)}".rstrip() for name, value in ranked]
    lines += ["", f"one of these, for {answer['coverage']:.0%} of exams: {', '.join(answer['prediction_set'])}"]
    lines += [f"no answer: {reason['text']}" for reason in answer["reasons"]]
    if answer["text"] is not None:
        lines.append(f"read: {answer['text']}")
    for key, title in (
        ("attributes_missing", "not given"),
        ("attributes_ignored", "given, but not read by this model"),
    ):
        if answer[key]:
            lines.append(f"{title}: {', '.join(answer[key])}")
    lines += [f"warning: {text}" for text in answer["warnings"]]
    if "explanation" in answer:
        lines += ["", *_explained(answer["prediction"], answer["explanation"])]
    return "\n".join(lines) + "\n"


def _explained(prediction: str, explanation: dict[str, Any]) -> Iterator[str]:
    contributions = explanation["contributions"]
    for item in contributions["attributes"] if contributions else ():
        yield f"{item['log_odds']:+.2f} log-odds of {prediction} by {item['attribute']} = {item['value']}"
    for item in explanation["evidence"]:
        doubt = "" if item["vetted"] else " (nobody has vetted this)"
        yield f"{item['factor']}, {item['diagnosis']}: {item['direction']}{doubt}"
        yield from (f"    “{part['quote']}” {part['title']}, {part['url']}" for part in item["sources"])
    yield from (f"note: {text}" for text in explanation["notes"])


def predict_folder(run_dir: str, shards: str, out: str | Path) -> None:
    """Every exam of a shard folder, by Ray Data, into `predictions.parquet`'s columns and those of an answer: its
    confidence, its prediction set, whether and why it abstains, how strange its photos are, and its warnings.

    Raises:
        PrimaError: the file exists or cannot be written, or the shards describe other classes or attributes than the
            model knows.
    """
    from tqdm import tqdm

    from prima_ray.inference.batch import ANSWER_SCHEMA, predict_shards
    from prima_ray.stages.training import write_predictions
    from prima_ray.training.cluster import connect
    from prima_ray.training.config import RayContextConfig

    config = check_diagnoses(run_dir)
    index = ExamIndex.read(shards)
    _check_same_language(config, index.manifest.data_set, where=shards)
    _check_out(str(out))
    check_model(run_dir)
    connect(RayContextConfig(), num_workers=0)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    places, answers = [np.zeros(0, dtype=np.int64)], [ANSWER_SCHEMA.empty_table()]
    with tqdm(total=len(index), desc="predict", unit="exam", file=sys.stderr, mininterval=1.0) as bar:
        run, folder = (item if is_uri(item) else str(Path(item).resolve()) for item in (run_dir, shards))
        for rows, found in predict_shards(run, folder, index.manifest, progress=bar.update):
            places.append(rows)
            answers.append(found)
    rows, found = np.concatenate(places), pa.concat_tables(answers)
    values = found["probabilities"].combine_chunks().flatten().to_numpy()
    probabilities = torch.from_numpy(values.reshape(len(rows), len(config.data_set.classes)).copy())
    write_predictions(
        out, index, rows, index.folds(_split(run_dir)), probabilities, further=found.drop_columns("probabilities")
    )
    _log.info("%d exams predicted", len(index))


def _check_out(address: str) -> None:
    """The file must be new and its folder writable, before minutes are spent."""
    if is_uri(address):
        folder, name = split(address)
        with reaching(address, "--out cannot be reached"):
            if Folder.at(folder).exists(name):
                raise PrimaError("--out exists", where=address, mend="Name a new file; nothing is overwritten.")
        return
    out = Path(address)
    if out.exists():
        what = "is a folder, not a file" if out.is_dir() else "exists"
        raise PrimaError(f"--out {what}", where=out, mend="Name a new file; nothing is overwritten.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except (FileExistsError, NotADirectoryError):
        raise PrimaError("--out cannot be written (its folder is a file)", where=out) from None
    except OSError as error:
        raise PrimaError(f"--out cannot be written ({error.strerror})", where=out) from None


def _check_same_language(config: BundleConfig, found: DataSetConfig, *, where: str) -> None:
    """Classes and attributes of the shards must mean what they meant in training."""
    known = config.data_set
    if known.class_names != found.class_names:
        raise PrimaError(
            f"the shards' classes are {', '.join(found.class_names)}, the model's {', '.join(known.class_names)}",
            where=where,
        )
    if config.text is None:
        return
    theirs = {item.name: item for item in found.attributes}
    for item in text_attributes(known, config.text):
        other = theirs.get(item.name)
        if other is None:
            _log.warning("%s: the shards have no attribute %r: it counts as missing", where, item.name)
        elif _meaning(other) != _meaning(item):
            raise PrimaError(
                f"the attribute {item.name!r} of the shards is not the model's: kind, unit or values differ",
                where=where,
            )


def _meaning(item: AttributeConfig) -> tuple[object, ...]:
    return (item.kind, getattr(item, "unit", None), tuple(getattr(item, "values", ())))


def _split(run_dir: str) -> Literal["patient", "lesion"]:
    """What the run's folds are grouped by."""
    path = local_copy(run_dir) / CONFIG
    return "lesion" if path.exists() and read_yaml(path).get("split") == "lesion" else "patient"
