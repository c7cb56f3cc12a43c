"""The loop on toy tasks, in this process, against loops written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prima_ray.base import PrimaError
from prima_ray.data.description import DataSetConfig
from prima_ray.data.plan import ExamIndex, plan_steps
from prima_ray.data.stream import local_batches
from prima_ray.training.checkpoint import load_best, load_last
from prima_ray.training.config import SelectionConfig
from prima_ray.training.contexts import LocalContext
from prima_ray.training.leaving import Notice
from prima_ray.training.loop import TrainingJob, train
from prima_ray.training.tracking import Tracker
from tests.unit.training.toys import Classify, Contrast, Net, curve, make_job, read_lines

CPU = LocalContext("cpu")
Make = Callable[..., TrainingJob]


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


@pytest.fixture
def make(tmp_path: Path, toy_shards: str) -> Make:
    def make(name: str = "run", task: Any = None, **keys: Any) -> TrainingJob:
        return make_job(tmp_path / name, toy_shards, task, **keys)

    return make


@pytest.fixture(scope="module")
def data_set(toy_shards: str) -> DataSetConfig:
    return ExamIndex.read(toy_shards).manifest.data_set


def run(job: TrainingJob) -> list[float]:
    train(job, CPU)
    return curve(job.run)


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Die after the update of ``step``, before anything is written of it."""
    original = Tracker.step

    def fatal(self: Tracker, record: Mapping[str, Any]) -> None:
        if record["step"] == step:
            raise Killed
        original(self, record)

    monkeypatch.setattr(Tracker, "step", fatal)


def assert_same_state(one: Path, other: Path, *, tolerance: float = 0.0) -> None:
    left, right = load_last(one / "checkpoints"), load_last(other / "checkpoints")
    assert left is not None
    assert right is not None
    assert left[1] == right[1]
    assert left[0].keys() == right[0].keys()
    for key, value in left[0].items():
        torch.testing.assert_close(value, right[0][key], rtol=0, atol=tolerance, msg=key)


# ------------------------------------------------------------------------------------------------ the arithmetic


@pytest.mark.parametrize("clip_norm", [0.1, None])
def test_the_loop_is_adamw_clipping_and_torchs_own_schedule(make: Make, clip_norm: float | None):
    """Against torch's optimizer and schedulers over the real exams of each batch, in one piece, padding cut off."""
    optimizer = {"lr": 0.05, "weight_decay": 0.1, "clip_norm": clip_norm, "final_lr_fraction": 0.2}
    job = make(optimizer={**optimizer, "warmup_fraction": 0.34}, epochs=3)
    losses = run(job)

    task = job.task
    assert isinstance(task, Classify)
    net = task.build()
    decayed = [parameter for name, parameter in net.named_parameters() if name in ("first.weight", "last.weight")]
    others = [parameter for name, parameter in net.named_parameters() if not name.endswith("weight")]
    assert len(decayed) + len(others) == len(list(net.parameters()))
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.05
    )
    schedulers = torch.optim.lr_scheduler
    schedule = schedulers.SequentialLR(
        adam,
        [
            schedulers.LinearLR(adam, start_factor=1 / 3, total_iters=2),
            schedulers.CosineAnnealingLR(adam, T_max=6, eta_min=0.01),
        ],
        milestones=[3],
    )
    rates, norms, expected = [], [], []
    steps = plan_steps(job.train_rows, global_batch=5, seed=0, total_steps=9)
    for padded in local_batches(job.shards, steps, task.stream(train=True).collate):
        batch = padded.split(int(padded.weights.sum()))[0]
        assert len(batch) == (5 if len(expected) % 3 < 2 else 3)
        weights = torch.tensor(task.class_weights)[batch.labels]
        each = nn.functional.cross_entropy(task.logits(net(batch)), batch.labels, reduction="none")
        loss = (each * weights).sum() / weights.sum()
        loss.backward()
        rates.append(adam.param_groups[0]["lr"])
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), clip_norm or math.inf)))
        expected.append(loss.item())
        adam.step()
        adam.zero_grad()
        schedule.step()
    assert losses == pytest.approx(expected, abs=1e-6)
    assert curve(job.run, "lr") == pytest.approx(rates, rel=1e-6)
    assert curve(job.run, "grad_norm") == pytest.approx(norms, rel=1e-5)
    assert curve(job.run, "double_loss") == pytest.approx([2 * value for value in expected], abs=1e-6)
    assert min(norms) > 0.1, "clipping was never active"
    loaded = load_last(job.run / "checkpoints")
    assert loaded is not None
    state, _ = loaded
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(state[f"param/{name}"], parameter.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [Classify, Contrast])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_the_size_of_the_micro_batch_changes_nothing(
    make: Make, data_set: DataSetConfig, kind: type[Classify | Contrast], micro_batch: int
):
    whole, parts = make("whole", kind(data_set)), make("parts", kind(data_set), micro_batch=micro_batch)
    assert run(parts) == pytest.approx(run(whole), abs=1e-5)
    assert curve(parts.run, "grad_norm") == pytest.approx(curve(whole.run, "grad_norm"), rel=1e-4)
    one, other = load_last(whole.run / "checkpoints"), load_last(parts.run / "checkpoints")
    assert one is not None
    assert other is not None
    assert one[1].metrics == pytest.approx(other[1].metrics, abs=1e-5)


def test_bf16_is_near_fp32(make: Make):
    exact, coarse = run(make("fp32")), run(make("bf16", precision="bf16"))
    assert coarse != exact
    assert coarse == pytest.approx(exact, rel=3e-2)


# ---------------------------------------------------------------------------------------------------- the order


def test_every_exam_once_an_epoch_and_the_ids_are_logged_where_asked(make: Make, toy_shards: str):
    job = make(log_exam_ids=True)
    run(job)
    lines = read_lines(job.run / "steps.jsonl")
    assert [line["epoch"] for line in lines] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    wanted = sorted(ExamIndex.read(toy_shards).exam_ids[job.train_rows])
    epochs = [[exam for line in lines if line["epoch"] == epoch for exam in line["exam_ids"]] for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [wanted] * 3
    assert epochs[0] != epochs[1]
    other = make("silent", max_steps=1)
    run(other)
    assert set(read_lines(other.run / "steps.jsonl")[0]) == {
        *("step", "epoch", "lr", "world_size", "seconds", "time", "loss", "double_loss", "grad_norm")
    }


def test_max_steps_ends_run_and_schedule(make: Make):
    job = make(max_steps=4)
    assert len(run(job)) == 4
    loaded = load_last(job.run / "checkpoints")
    assert loaded is not None
    assert (loaded[1].step, loaded[1].done) == (4, True)
    assert curve(job.run, "lr") == pytest.approx([0.05 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])


# ---------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("step", [1, 5, 9])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(make: Make, monkeypatch: pytest.MonkeyPatch, step: int):
    keys: dict[str, Any] = {"checkpoint_every_steps": 2, "micro_batch": 2, "log_exam_ids": True}
    whole, broken = make("whole", **keys), make("broken", **keys)
    expected = run(whole)
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            train(broken, CPU)
    assert len(curve(broken.run)) == step - 1
    assert run(broken) == expected
    assert [line["step"] for line in read_lines(broken.run / "steps.jsonl")] == list(range(1, 10))
    assert curve(broken.run, "exam_ids") == curve(whole.run, "exam_ids")
    assert_same_state(broken.run, whole.run)
    starts = read_lines(broken.run / "starts.jsonl")
    # Checkpoints lie at 2, 3 (an epoch's end), 4, 6, 8.
    last = {1: 0, 5: 4, 9: 8}[step]
    assert [(line["from_step"], line["replayed_steps"]) for line in starts] == [(0, 0), (last, step - 1 - last)]
    assert starts[0]["engine"] == {"kind": "torch", "world_size": 1}


def test_steps_after_the_last_checkpoint_are_taken_again_and_stand_once(make: Make, monkeypatch: pytest.MonkeyPatch):
    whole, broken = make("whole"), make("broken")
    expected = run(whole)
    kill_at(monkeypatch, 6)
    with pytest.raises(Killed):
        train(broken, CPU)
    # A kill in the middle of a write leaves half a line.
    with (broken.run / "steps.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    monkeypatch.undo()
    assert run(broken) == expected
    assert read_lines(broken.run / "starts.jsonl")[1]["replayed_steps"] == 3
    # What was lost with the worker is told of, as it was the first time.
    lost = read_lines(broken.run / "replayed.jsonl")
    assert [(line["step"], line["loss"]) for line in lost] == [(4, expected[3]), (5, expected[4])]


class Told(LocalContext):
    """A worker that hears notices at certain steps."""

    def __init__(self, notices: Mapping[int, Notice]) -> None:
        super().__init__("cpu")
        self._notices, self._step, self.num_heeded = notices, 0, 0

    def notice(self) -> Notice:
        self._step += 1
        return self._notices.get(self._step, Notice.NONE)

    def heeded(self) -> None:
        self.num_heeded += 1


def test_a_notice_is_a_checkpoint_and_a_call_to_leave_the_end_of_this_group(make: Make):
    whole, told = make("whole"), make("told")
    expected = run(whole)
    context = Told({4: Notice.SAVE, 5: Notice.LEAVE})
    assert train(told, context) is False
    assert context.num_heeded == 1
    assert curve(told.run) == expected[:5]
    assert "save" not in read_lines(told.run / "steps.jsonl")[0]
    kept = sorted(folder.name for folder in (told.run / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000004", "step-00000005"]
    assert train(told, CPU) is True
    assert curve(told.run) == expected
    starts = read_lines(told.run / "starts.jsonl")
    assert [(line["from_step"], line["replayed_steps"]) for line in starts] == [(0, 0), (5, 0)]
    assert_same_state(told.run, whole.run)


def test_a_torn_checkpoint_falls_back_to_the_one_before(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    keys: dict[str, Any] = {"checkpoint": {"keep_last": 2}, "checkpoint_every_steps": 2}
    whole, broken = make("whole", **keys), make("broken", **keys)
    expected = run(whole)
    kill_at(monkeypatch, 9)
    with pytest.raises(Killed):
        train(broken, CPU)
    monkeypatch.undo()
    newest = broken.run / "checkpoints" / "step-00000008" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert run(broken) == expected
    assert_same_state(broken.run, whole.run)
    assert "passing over a torn checkpoint" in caplog.text
    assert read_lines(broken.run / "starts.jsonl")[1]["from_step"] == 6


def test_a_finished_run_returns_at_once(make: Make):
    job = make()
    expected = run(job)
    assert run(job) == expected
    assert len(read_lines(job.run / "starts.jsonl")) == 1


def test_a_checkpoint_of_another_model_is_refused(make: Make, data_set: DataSetConfig, monkeypatch: pytest.MonkeyPatch):
    job = make()
    kill_at(monkeypatch, 5)
    with pytest.raises(Killed):
        train(job, CPU)
    with pytest.raises(PrimaError) as caught:
        train(replace(job, task=Classify(data_set, top=nn.Linear(3, 3))), CPU)
    assert str(caught.value) == (
        f"{job.run / 'checkpoints'}: the checkpoint does not fit the model: top.bias is only in the model\n"
        "  Resume with the config and version that wrote it, or choose another `out`."
    )


# ---------------------------------------------------------------------------------------------------- choosing


def progress_of(job: TrainingJob) -> tuple[int, int | None, float | None]:
    loaded = load_last(job.run / "checkpoints")
    assert loaded is not None
    assert loaded[1].done
    assert load_best(job.run / "checkpoints")[1].step == loaded[1].best_step
    return loaded[1].step, loaded[1].best_step, loaded[1].best_value


@pytest.mark.parametrize(
    ("script", "keys", "expected"),
    [
        ([3, 1, 2], {"mode": "min"}, (9, 6, 1)),
        ([3, 1, 2], {}, (9, 3, 3)),
        ([1, 1, 1], {}, (9, 3, 1)),
        # Two epochs without a better one.
        ([5, 4, 3, 9], {"patience_epochs": 2, "epochs": 4}, (9, 3, 5)),
        ([5, 4, 6, 5, 5], {"patience_epochs": 2, "epochs": 6}, (15, 9, 6)),
        # Patience counts from the first epoch that may be chosen.
        ([9, 8, 1, 1, 1], {"patience_epochs": 2, "min_epochs": 3, "epochs": 6}, (15, 9, 1)),
        ([5, 4], {"patience_epochs": 2, "epochs": 6, "validate_every_epochs": 2}, (12, 6, 5)),
        ([1, 2], {"validate_every_epochs": 2}, (9, 9, 2)),
        ([9, 2], {"min_epochs": 3, "max_steps": 4}, (4, 4, 2)),
        ([math.nan, 2, math.nan], {}, (9, 6, 2)),
        ([math.nan] * 3, {}, (9, 9, None)),
        ([1, 2], {"max_steps": 4}, (4, 4, 2)),
    ],
)
def test_validation_chooses_the_best_and_stops_early(
    make: Make,
    data_set: DataSetConfig,
    script: list[float],
    keys: dict[str, Any],
    expected: tuple[int, int, float | None],
):
    own = {name: value for name, value in keys.items() if name in SelectionConfig.model_fields}
    rest = {name: value for name, value in keys.items() if name not in own}
    selection = {"metric": "scripted", "mode": "max", **own}
    job = make(task=Classify(data_set, script=list(script)), selection=selection, **rest)
    run(job)
    assert progress_of(job) == expected


def test_patience_survives_a_resume(make: Make, data_set: DataSetConfig, monkeypatch: pytest.MonkeyPatch):
    selection = {"metric": "scripted", "mode": "max", "patience_epochs": 2}
    job = make(task=Classify(data_set, script=[5, 4, 3, 9]), selection=selection, epochs=4)
    kill_at(monkeypatch, 7)
    with pytest.raises(Killed):
        train(job, CPU)
    monkeypatch.undo()
    run(job)
    assert progress_of(job) == (9, 3, 5)


def test_without_a_validation_fold_the_last_state_is_the_best(make: Make):
    job = make(validate=False, checkpoint_every_steps=2)
    run(job)
    assert progress_of(job) == (9, 9, None)


# ---------------------------------------------------------------------------------------------------- refusing


@pytest.mark.parametrize("what", ["loss", "gradient's norm"])
def test_a_figure_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(
    make: Make, data_set: DataSetConfig, toy_shards: str, what: str
):
    clean = make("clean", log_exam_ids=True)
    run(clean)
    # An exam that comes late in the second epoch, so that there is a checkpoint before and none in between.
    ids = curve(clean.run, "exam_ids")
    victim = ids[5][0]  # type: ignore[index]
    poison = {"poison_loss": victim} if what == "loss" else {"poison_gradient": victim}
    job = make("poisoned", Classify(data_set))
    poisoned = replace(job, task=Classify(data_set, **poison))
    first = next(step for step, exams in enumerate(ids, start=1) if victim in exams)  # type: ignore[operator]
    with pytest.raises(PrimaError) as caught:
        train(poisoned, CPU)
    shown = ", ".join(ids[first - 1][:4])  # type: ignore[index]
    more = ", ..." if len(ids[first - 1]) > 4 else ""  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"{job.run}: the {what} is nan at step {first} (exams {shown}{more})\n"
        "  A lower optimizer.lr, or precision: fp32, usually helps."
    )
    assert load_last(job.run / "checkpoints") is None
    assert len(curve(job.run)) == first - 1


def test_the_last_good_state_is_named(make: Make, data_set: DataSetConfig, monkeypatch: pytest.MonkeyPatch):
    job = make()
    kill_at(monkeypatch, 4)
    with pytest.raises(Killed):
        train(job, CPU)
    monkeypatch.undo()
    monkeypatch.setattr(Net, "forward", lambda self, batch: {
        "features": self.last(torch.tanh(self.first(batch.images.flatten(2)))) * math.inf,
        "temperature": self.log_temperature.exp(),
    })  # fmt: skip
    with pytest.raises(PrimaError, match=r"The state after step 3 is kept\. A lower") as caught:
        train(job, CPU)
    assert caught.value.what.startswith("the loss is nan at step 4 (exams e")
    loaded = load_last(job.run / "checkpoints")
    assert loaded is not None
    assert loaded[1].step == 3


def test_an_unknown_metric_names_those_that_there_are(make: Make):
    with pytest.raises(PrimaError) as caught:
        run(make(selection={"metric": "acuracy", "mode": "max"}))
    assert str(caught.value) == (
        "selection.metric is 'acuracy', which classify does not report\n"
        "  It reports accuracy, balanced_accuracy, loss, macro_f1, weighted_loss."
    )


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (nn.Dropout2d(0.1), "the layer top drops at random (p 0.1), which would depend on the worker that draws"),
        (nn.BatchNorm1d(2), "the layer top is a batch norm, which mixes the exams of a worker's batch"),
    ],
)
def test_layers_that_depend_on_the_worker_are_refused(make: Make, data_set: DataSetConfig, layer: nn.Module, what: str):
    with pytest.raises(PrimaError) as caught:
        run(make(task=Classify(data_set, top=layer)))
    assert caught.value.what == what
