"""A loaded run that answers batches of exams, in whatever process it is needed. No Ray."""

from __future__ import annotations

from collections.abc import Sequence

from prima_ray.base import PrimaError, read_json
from prima_ray.data.fetched import local_copy
from prima_ray.data.run_record import RECORD, check_model
from prima_ray.inference.diagnosis import Diagnoser
from prima_ray.inference.readiness import check_known_exam
from prima_ray.serving.engine import Answer, Question, Served
from prima_ray.serving.schemas import ModelCard


class Model:
    """See `engine.Answering`."""

    def __init__(self, run: str, *, device: str = "cpu") -> None:
        """Raises:
        PrimaError: no such run, a damaged one, or files that are not those that the run wrote.
        """
        # By every replica: on a cluster nobody else has looked, and it may start days after the others.
        check_model(run)
        self._diagnoser = Diagnoser.load(run, device=device)
        predictor = self._diagnoser.predictor
        self.served = Served(
            card=model_card(run, self._diagnoser),
            data_set=predictor.data_set,
            read_attributes=predictor.read_attributes,
            reference=predictor.bundle.reference,
        )

    def answer(self, questions: Sequence[Question]) -> list[Answer | PrimaError]:
        """See `engine.Answering.answer`."""
        explain = [question.explain for question in questions]
        found = self._diagnoser.diagnose([question.exam for question in questions], explain=explain)
        return [
            item
            if isinstance(item, PrimaError)
            else Answer(item.as_dict(), self.served.card, dict(item.timings), len(questions), item.drift)
            for item in found
        ]

    def check(self) -> None:
        """See `engine.Engine.check`. A model of before there were known exams passes."""
        check_known_exam(self._diagnoser.predictor)


def model_card(run: str, diagnoser: Diagnoser) -> ModelCard:
    """Name and versions of a run's model."""
    record_file = local_copy(run) / RECORD
    record = read_json(record_file) if record_file.exists() else {}
    shards = record.get("inputs", {}).get("shards", {}).get("hash")
    return ModelCard(
        name=diagnoser.name,
        version=diagnoser.version,
        data_version=str(shards)[:16] if shards else None,
        unvetted=bool(record.get("unvetted", False)),
    )
