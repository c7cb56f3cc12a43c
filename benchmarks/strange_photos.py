"""What a run does with photos that it should not answer: altered ones of its own test fold, and foreign ones.

    python benchmarks/strange_photos.py [RUN] [--shards FOLDER] [--exams 60]

Takes a finished run of fuse or finetune, one photo of each of some exams of its test fold, and asks about the photo as
it is, about alterations of it, and about pictures of other things with the same exam's attributes. Prints, for every
kind, the share of exams that are not answered and why; beside it what the distance of the tower's features alone would
have noticed (Lee et al. 2018, the peer). Writes benchmarks/results/strange_photos.json.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from prima_ray.base import PrimaError, write_json
from prima_ray.config import read_yaml
from prima_ray.data.images import decode_image
from prima_ray.data.phantoms import PhantomConfig, generate
from prima_ray.data.plan import ExamIndex, split_roles
from prima_ray.data.reader import RowReader
from prima_ray.data.run_record import CONFIG, read_record
from prima_ray.inference.diagnosis import Diagnoser, Diagnosis
from prima_ray.inference.predictor import Exam
from prima_ray.stages.rundir import git_commit, versions

RESULT = Path(__file__).parent / "results" / "strange_photos.json"
SIDE = 256
Make = Callable[[Image.Image, np.random.Generator], Image.Image]


def _array(change: Callable[[np.ndarray], np.ndarray]) -> Make:
    return lambda photo, _: Image.fromarray(np.clip(change(np.asarray(photo, float)), 0, 255).astype(np.uint8))


def _random(cells: int) -> Make:
    def make(_: Image.Image, rng: np.random.Generator) -> Image.Image:
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        return coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)

    return make


def _page(_: Image.Image, rng: np.random.Generator) -> Image.Image:
    page = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(page)
    for line in range(4, SIDE, 14):
        pen.text((4, line), "".join(map(chr, rng.integers(97, 122, 45))), fill="black")
    return page


def _blur(photo: Image.Image, _: np.random.Generator) -> Image.Image:
    return photo.filter(ImageFilter.GaussianBlur(min(photo.size) / 10))


ALTERED: dict[str, Make] = {
    "as it is": lambda photo, _: photo,
    "upside down": lambda photo, _: photo.transpose(Image.Transpose.ROTATE_180),
    "black and white": lambda photo, _: photo.convert("L").convert("RGB"),
    "red and blue swapped": _array(lambda pixels: pixels[..., ::-1]),
    "negative": _array(lambda pixels: 255 - pixels),
    "a tenth of the light": _array(lambda pixels: 0.1 * pixels),
    "far out of focus": _blur,
    "a corner of a tenth": lambda photo, _: photo.crop((0, 0, max(1, photo.width // 10), max(1, photo.height // 10))),
}
FOREIGN: dict[str, Make] = {
    "noise": _random(SIDE),
    "random soft colours": _random(5),
    "one colour": _random(1),
    "a page of letters": _page,
}


def sets(photos: Sequence[Image.Image]) -> dict[str, list[Image.Image]]:
    """Kind -> a picture an exam."""
    found = {
        name: [make(photo, np.random.default_rng([place, number])) for number, photo in enumerate(photos)]
        for place, (name, make) in enumerate({**ALTERED, **FOREIGN}.items())
    }
    drawn = (data for record in generate(PhantomConfig(image_side=128)) for data in list(record.photos.values())[:1])
    found["drawings of lesions (phantoms)"] = [decode_image(data) for data in islice(drawn, len(photos))]
    return found


def png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def ask(diagnoser: Diagnoser, exams: Sequence[Exam]) -> dict[str, float]:
    """Shares of the exams."""
    answers: list[Diagnosis] = []
    for start in range(0, len(exams), 16):
        answers += [item for item in diagnoser.diagnose(exams[start : start + 16]) if isinstance(item, Diagnosis)]
    causes = [{reason.cause for reason in item.reasons} for item in answers]
    found: dict[str, Any] = {
        name: float(np.mean([name in item for item in causes]))
        for name in ("image_unusable", "out_of_distribution", "uncertain")
    }
    found["not_answered"] = float(np.mean([bool(item) for item in causes]))
    found["photos_noticed"] = float(np.mean([bool(item - {"uncertain"}) for item in causes]))
    found["features_alone"] = float(np.mean([item.novelty_by.get("features", 0.0) > 1 for item in answers]))
    found["mean_confidence"] = float(np.mean([item.confidence for item in answers]))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", nargs="?", default="runs/pad_ufes_20/fuse")
    parser.add_argument("--shards", help="where the run's shards are now")
    parser.add_argument("--exams", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)
    try:
        found = measure(arguments.run, arguments.shards, arguments.exams)
    except PrimaError as error:
        print(error, file=sys.stderr)
        return 2
    width = max(map(len, found["kinds"]))
    print(f"{'':{width}}  unusable  strange  uncertain  not answered  noticed by features alone")
    for name, row in found["kinds"].items():
        print(
            f"{name:{width}}  {row['image_unusable']:8.0%} {row['out_of_distribution']:8.0%} {row['uncertain']:10.0%} "
            f"{row['not_answered']:13.0%} {row['features_alone']:26.0%}"
        )
    write_json(arguments.out, found)
    return 0


def measure(run: str, shards: str | None, num_exams: int) -> dict[str, Any]:
    """The figures of a run."""
    record, config = read_record(run), read_yaml(Path(run) / CONFIG)
    index = ExamIndex.read(shards or record["inputs"]["shards"]["path"])
    roles = split_roles(index, fold=config["fold"], val_fold=config["val_fold"], split=config["split"])
    rows = roles.test[index.labels[roles.test] >= 0][:num_exams]
    table = (
        RowReader(index.shards, index.manifest, columns=("exam_id", "images", "attributes")).read(rows, 0).to_pylist()
    )
    photos = [decode_image(row["images"][0]["bytes"]) for row in table]
    diagnoser = Diagnoser.load(run)
    kinds = {
        name: ask(diagnoser, [Exam((png(one),), dict(row["attributes"])) for one, row in zip(made, table, strict=True)])
        for name, made in sets(photos).items()
    }
    return {
        "data_set": index.manifest.data_set.name,
        "stage": record["stage"],
        "num_exams": len(table),
        "commit": git_commit(),
        "versions": versions(),
        "kinds": kinds,
    }


if __name__ == "__main__":
    sys.exit(main())
