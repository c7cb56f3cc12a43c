"""Parts of an index encoded by a pool of Ray Data actors. The only module of this folder that imports Ray.

Parts are staged as files in the index folder, which every node must be able to read: what travels through Ray is a
file's name on the way there, and rows with vectors on the way back. The driver commits them as they come.
"""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from prima_ray.base import PrimaError, canonical_json, write_atomic
from prima_ray.knowledge.documents import Document
from prima_ray.knowledge.embedding import Embedder, EncoderIdentity
from prima_ray.knowledge.index import IndexConfig, refuse_another_encoder
from prima_ray.knowledge.indexing import EncodedPart, Part, PartEncoder

STAGED = "_staged"


@dataclass(frozen=True, slots=True)
class RayActors:
    """Encodes parts in actors of the cluster that this process is connected to; a `run` of `update_index`."""

    num_actors: int | None = None
    """None: one a GPU where the cluster has any, else one a CPU."""

    def __call__(self, encoder: PartEncoder, parts: Iterable[Part]) -> Iterator[EncodedPart]:
        """Stage all parts, then encode them; results as they come.

        Raises:
            PrimaError: what an actor found wrong with the model or the folder.
        """
        # A name of its own: a build that was killed may have left a folder, and its actors may still be reading.
        folder = Path(encoder.folder).resolve() / STAGED / uuid.uuid4().hex[:8]
        try:
            paths = [_stage(folder, part) for part in parts]
            if paths:
                yield from self._encode(encoder, paths)
        finally:
            shutil.rmtree(folder.parent, ignore_errors=True)

    def _encode(self, encoder: PartEncoder, paths: list[str]) -> Iterator[EncodedPart]:
        import ray

        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        size = max(1, min(len(paths), self.num_actors or gpus or int(resources.get("CPU", 1))))
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        # Warns that the bars are off which were turned off: ours is the one that is shown.
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
        with ray.data.DataContext.current(context):
            rows = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=len(paths)).map(
                _Worker,
                fn_constructor_args=(
                    str(Path(encoder.folder).resolve()),
                    encoder.config.model_dump(mode="json"),
                    encoder.embedder.identity.model_dump(mode="json"),
                    "cuda" if gpus else "cpu",
                    encoder.embedder.batch_size,
                ),
                compute=ray.data.ActorPoolStrategy(size=size),
                num_gpus=1 if gpus else None,
            )
            found = iter(rows.iter_rows())
            try:
                for row in found:
                    if row["mistake"]:
                        raise PrimaError(**json.loads(row["mistake"]))
                    with pa.ipc.open_stream(row["rows"]) as stream:
                        yield EncodedPart(row["number"], stream.read_all(), row["num_embedded"])
            finally:
                # Not left to garbage collection: an abandoned execution holds its actors.
                found.close()


def _stage(folder: Path, part: Part) -> str:
    path = folder / f"part-{part.number:06}.json"
    body = {
        "number": part.number,
        "documents": [document.model_dump(mode="json") for document in part.documents],
        "changed": list(part.changed),
    }
    write_atomic(path, canonical_json(body))
    return str(path)


def _read_staged(path: str) -> Part:
    body = json.loads(Path(path).read_text(encoding="utf-8"))
    documents = tuple(Document.model_validate(item) for item in body["documents"])
    return Part(body["number"], documents, tuple(body["changed"]))


class _Worker:
    """One actor: loads the model once.

    A mistake of the user's travels back as a value: of an exception in an actor, Ray Data keeps the text alone, and an
    actor that does not start it tries again.
    """

    def __init__(
        self, folder: str, config: dict[str, Any], identity: dict[str, Any], device: str, batch_size: int
    ) -> None:
        self._encoder: PartEncoder | PrimaError
        try:
            parsed = IndexConfig.model_validate(config)
            embedder = Embedder.load(parsed.encoder, device=device, batch_size=batch_size)
            # A folder of the same name may hold another model on another node.
            refuse_another_encoder(folder, built=EncoderIdentity.model_validate(identity), wanted=embedder.identity)
            self._encoder = PartEncoder(folder, parsed, embedder)
        except PrimaError as error:
            self._encoder = error

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            if isinstance(self._encoder, PrimaError):
                raise self._encoder
            encoded = self._encoder(_read_staged(row["path"]))
        except PrimaError as error:
            mistake = json.dumps({"what": error.what, "where": error.where, "mend": error.mend})
            return {"number": -1, "rows": b"", "num_embedded": 0, "mistake": mistake}
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, encoded.rows.schema) as stream:
            stream.write_table(encoded.rows)
        return {
            "number": encoded.number,
            "rows": sink.getvalue().to_pybytes(),
            "num_embedded": encoded.num_embedded,
            "mistake": "",
        }
